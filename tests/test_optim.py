"""Learning rates equal OLMo's to the last bit; AdamW with clipping equals torch's own; decay goes where OLMo puts it."""

import math
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from olmo_train.guards.nonfinite import skip_if_not_finite
from olmo_train.model.config import ModelConfig
from olmo_train.model.transformer import Transformer
from olmo_train.optim import groups as optim_groups
from olmo_train.optim import schedules
from olmo_train.optim.build import OPTIMIZERS, allocate_state, build_optimizer, set_lr
from olmo_train.optim.config import OptimConfig
from olmo_train.optim.schedules import lr_at
from olmo_train.parallel.gradients import clip_gradients

# Computed by allenai/OLMo's own scheduler. 7B: linear, 5000 steps of warmup, 2e12 tokens of 4,194,304 a step.
OLMO_7B_STEPS = math.ceil(2e12 / 4194304)
OLMO_7B = {0: 3.0e-5, 1: 3.0054e-5, 2500: 1.65e-4, 4999: 2.99946e-4, 5000: 3.0e-4, 5001: 2.999994277697006e-4,
           100000: 2.4563812155867053e-4, 238419: 1.6643057574845604e-4, 476837: 3.000057223029941e-5,
           476838: 3.0e-5, 500000: 3.0e-5}  # fmt: skip
# 1B as released: cosine, 2000 steps of warmup, 739,328 steps.
OLMO_1B = {0: 4e-5, 2000: 4e-4, 2001: 3.999999999983661e-4, 100000: 3.845348655775134e-4, 739328: 4e-5}


def test_the_optimizers_and_schedules_are_the_choices_of_the_configuration():
    hints = get_type_hints(OptimConfig)
    assert (tuple(OPTIMIZERS), tuple(schedules.SCHEDULES)) == (get_args(hints["name"]), get_args(hints["schedule"]))
    assert tuple(schedules.DECAY_SHAPES) == get_args(hints["decay_shape"])


@pytest.mark.parametrize("step, lr", OLMO_7B.items())
def test_the_learning_rate_of_olmo_7b(step, lr):
    assert lr_at(step, OptimConfig(), OLMO_7B_STEPS) == pytest.approx(lr, rel=1e-15, abs=0)


@pytest.mark.parametrize("step, lr", OLMO_1B.items())
def test_the_learning_rate_of_olmo_1b(step, lr):
    config = OptimConfig(peak_lr=4e-4, warmup_steps=2000, schedule="cosine")
    assert lr_at(step, config, 739328) == pytest.approx(lr, rel=1e-15, abs=0)


def test_the_warmup_starts_at_warmup_start_ratio():
    assert lr_at(0, OptimConfig(warmup_start_ratio=0.0), 10**6) == 0.0
    assert lr_at(0, OptimConfig(warmup_start_ratio=0.1), 10**6) == pytest.approx(3e-5)
    assert lr_at(1, OptimConfig(warmup_steps=0, schedule="constant"), 10) == 3e-4


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_every_schedule_peaks_at_the_warmups_end_and_never_rises_after(schedule):
    config = OptimConfig(peak_lr=1.0, warmup_steps=10, schedule=schedule, final_lr_ratio=0.1)
    lrs = [lr_at(step, config, 100) for step in range(10, 131)]
    assert lrs[0] == 1.0
    assert all(later <= earlier for earlier, later in zip(lrs, lrs[1:], strict=False))
    last = {"constant": 1.0, "inverse_sqrt": math.sqrt(10 / 100)}.get(schedule, 0.1)
    assert lrs[90] == pytest.approx(last) and lrs[-1] >= 0.1 - 1e-12


def test_wsd_holds_the_peak_and_falls_over_its_last_steps():
    config = OptimConfig(peak_lr=1.0, warmup_steps=10, schedule="wsd", decay_steps=20, final_lr_ratio=0.5)
    assert [lr_at(step, config, 100) for step in (10, 50, 80, 90, 100)] == [1.0, 1.0, 1.0, 0.75, 0.5]
    tenth = OptimConfig(peak_lr=1.0, warmup_steps=10, schedule="wsd", final_lr_ratio=0.0)
    assert [lr_at(step, tenth, 100) for step in (90, 95, 100)] == [1.0, 0.5, 0.0]


def test_the_shapes_of_wsds_decay_are_those_of_the_paper():
    """Hägele et al. 2024: f(n) = 1 - (n - N + D) / D, and f(n) = 1 - sqrt((n - N + D) / D), times the peak."""
    for shape, f in {"linear": lambda done: 1 - done, "1-sqrt": lambda done: 1 - math.sqrt(done)}.items():
        config = OptimConfig(peak_lr=2.0, warmup_steps=10, schedule="wsd", decay_steps=40, final_lr_ratio=0.0, decay_shape=shape)
        assert [lr_at(step, config, 100) for step in (10, 59, 60)] == [2.0, 2.0, 2.0]
        for step in range(60, 101):
            assert lr_at(step, config, 100) == pytest.approx(2.0 * f((step - 60) / 40), abs=1e-15)
        tenth = replace(config, final_lr_ratio=0.1)
        assert [lr_at(step, tenth, 100) for step in (60, 100, 120)] == [2.0, 0.2, 0.2]


def test_inverse_sqrt_halves_at_four_times_the_warmup():
    config = OptimConfig(peak_lr=1.0, warmup_steps=10, schedule="inverse_sqrt", final_lr_ratio=0.1)
    assert lr_at(40, config, 100) == pytest.approx(0.5)
    assert lr_at(10**6, config, 100) == pytest.approx(0.1)


def model_and_twin():
    """Two equal small nets whose gradients have spread-out sizes; parameters are named as a Transformer's."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(11, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 11, bias=False)})
    twin = nn.ModuleDict({"embed": nn.Embedding(11, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 11, bias=False)})
    twin.load_state_dict(model.state_dict())
    return model, twin


def backward(net, step):
    ids = torch.arange(step, step + 6) % 11
    logits = net["head"](net["norm"](net["embed"](ids)))
    scale = 10.0 if step % 3 else 0.01  # some steps are clipped, others not
    (scale * nn.functional.cross_entropy(logits, ids.flip(0))).backward()


def test_adamw_with_clipping_equals_torch_step_by_step():
    model, twin = model_and_twin()
    config = OptimConfig(peak_lr=1e-2, warmup_steps=3)
    ours = build_optimizer(dict(model.named_parameters()), config)
    allocate_state(ours)
    groups = [
        {"params": [twin["head"].weight], "weight_decay": 0.1},
        {"params": [twin["embed"].weight, twin["norm"].weight, twin["norm"].bias], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-5, foreach=False, fused=False)
    clipped = 0
    for step in range(1, 13):
        backward(model, step)
        backward(twin, step)
        norm, _ = clip_gradients(model, config.max_grad_norm)
        their_norm = nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        assert norm.item() == pytest.approx(their_norm.item(), rel=1e-6)
        clipped += int(norm > 1.0)
        skip_if_not_finite(ours, torch.tensor(1.0), norm)
        for optimizer in (ours, theirs):
            set_lr(optimizer, lr_at(step, config, 12))
            optimizer.step()
            optimizer.zero_grad()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert 0 < clipped < 12


def test_one_step_equals_the_formula_of_olmo():
    """Decay first, then the update; eps is added outside of the root, after the bias correction."""
    w, g, lr = torch.tensor([2.0, -3.0]), torch.tensor([0.3, 1e-6]), 0.1
    parameter = nn.Parameter(w.clone())
    optimizer = build_optimizer({"head.weight": parameter}, OptimConfig(peak_lr=lr))
    allocate_state(optimizer)
    set_lr(optimizer, lr)
    skip_if_not_finite(optimizer, torch.tensor(1.0), torch.tensor(1.0))
    for n in (1, 2):
        parameter.grad = g.clone()
        optimizer.step()
        w = w * (1 - lr * 0.1)
        m, v = g * (1 - 0.9**n), g * g * (1 - 0.95**n)  # moments under a constant gradient
        w = w - lr / (1 - 0.9**n) * m / (v.sqrt() / math.sqrt(1 - 0.95**n) + 1e-5)
        torch.testing.assert_close(parameter.detach(), w, rtol=1e-6, atol=1e-7)


def test_the_clip_coefficient_is_that_of_olmo():
    net = nn.Linear(2, 1, bias=False)
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(net, 1.0)[0].item() == pytest.approx(5.0)
    torch.testing.assert_close(net.weight.grad, torch.tensor([[3.0, 4.0]]) * (1.0 / (5.0 + 1e-6)))
    net.weight.grad = torch.tensor([[0.3, 0.4]])
    clip_gradients(net, 1.0)
    torch.testing.assert_close(net.weight.grad, torch.tensor([[0.3, 0.4]]), rtol=0, atol=0)


def decayed(model_config: ModelConfig, **options) -> set[str]:
    with torch.device("meta"):
        parameters = dict(Transformer(model_config).named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = build_optimizer(parameters, OptimConfig(**options)).param_groups
    assert sorted(names.values()) == sorted(names[id(p)] for group in groups for p in group["params"]), "each exactly once"
    return {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"] == 0.1}


SMALL = dict(d_model=16, n_layers=1, n_heads=2, mlp_hidden=24, vocab_size=30, seq_len=8)
MATRICES = {f"blocks.0.attn.{name}.weight" for name in ("wq", "wk", "wv", "wo")}
MATRICES |= {f"blocks.0.mlp.{name}.weight" for name in ("w_gate", "w_up", "w_down")}


def test_weight_decay_is_on_linear_weights_only():
    assert decayed(ModelConfig(**SMALL)) == MATRICES | {"head.weight"}
    affine = ModelConfig(**SMALL, norm="layer_norm", bias="norm", qk_norm=True)
    assert decayed(affine) == MATRICES | {"head.weight"}
    assert decayed(ModelConfig(**SMALL, norm="rms_norm", block="parallel")) == MATRICES | {"head.weight"}


def test_a_tied_head_is_not_decayed_unless_embeddings_are():
    tied = ModelConfig(**SMALL, tie_embeddings=True)
    assert decayed(tied) == MATRICES
    assert decayed(tied, decay_embeddings=True) == MATRICES | {"embed.weight"}


def test_norms_are_decayed_when_asked():
    config = ModelConfig(**SMALL, norm="rms_norm", qk_norm=True)
    norms = {"norm.weight", *(f"blocks.0.{n}.weight" for n in ("attn_norm", "mlp_norm", "attn.q_norm", "attn.k_norm"))}
    assert decayed(config, decay_norms=True) == MATRICES | {"head.weight"} | norms


def test_a_group_scales_the_learning_rate_and_a_frozen_parameter_has_none(monkeypatch):
    rule = optim_groups.group_of
    scaled = lambda name, shape, *others: replace(rule(name, shape, *others), lr_scale=0.25 if shape == (11, 8) else 1.0)  # noqa: E731
    monkeypatch.setattr(optim_groups, "group_of", scaled)
    model, _ = model_and_twin()
    model["embed"].weight.requires_grad_(False)
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig(weight_decay=0.0))
    allocate_state(optimizer)
    assert model["embed"].weight not in optimizer.state and len(optimizer.state) == 3
    set_lr(optimizer, 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.ones_like(parameter)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    moved = {name: (before[name] - p).abs().max().item() for name, p in model.named_parameters()}
    assert moved == pytest.approx({"embed.weight": 0, "norm.weight": 1e-2, "norm.bias": 1e-2, "head.weight": 2.5e-3}, rel=1e-3)


def test_allocating_the_state_changes_no_weight_and_counts_no_step():
    model, twin = model_and_twin()
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig())
    allocate_state(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    for state in optimizer.state.values():
        assert state["step"].item() == 0
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()
