"""muP and completep: equal to the package mup, sizes of activations that do not depend on the width, and exports without
multipliers. The standard parametrization and a base of the model's own size have the same bits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from references.random_models import GEMMA, write_random_checkpoint
from runs import LOSS, cut, first_model, first_quick, history, load_script, trained, trained_on

from olmo_train.checkpoint.load import load_model
from olmo_train.convert.hf import export_hf
from olmo_train.errors import ConfigError
from olmo_train.model.config import ModelConfig
from olmo_train.model.init import init_std
from olmo_train.optim.build import build_optimizer, set_lr
from olmo_train.optim.config import OptimConfig
from olmo_train.optim.groups import Scaling, group_of
from olmo_train.run.build import scaling_of

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "references/mup_parity.json").read_text())
SMALL = {"d_model": 64, "n_layers": 2, "n_heads": 4, "mlp_hidden": 96, "vocab_size": 512, "seq_len": 32}
MUP = {"parametrization": "mup", "base_width": 16}
COMPLETEP = {"parametrization": "completep", "base_width": 16, "base_depth": 1}
AT_BASE = {"base_width": 64, "base_depth": 2, "base_head_dim": 16, "parametrization": "completep"}


@pytest.fixture(scope="module")
def coordinates():
    return load_script(HERE / "benchmarks/coordinates.py")


@pytest.fixture(scope="module")
def reference():
    """What was trained for REFERENCE."""
    return load_script(HERE / "references/mup_parity.py")


# ---- the rules


@pytest.mark.parametrize("init", ["mitchell", "normal"])
def test_a_model_of_the_size_of_its_base_is_the_standard_one(init):
    standard, based = (ModelConfig(**SMALL, init=init, **more) for more in ({}, AT_BASE))
    shapes = {name: tuple(p.shape) for name, p in first_model(standard).named_parameters()}
    for name, rows in shapes.items():
        assert init_std(name, standard) == init_std(name, based)
        assert group_of(name, rows, OptimConfig()) == group_of(name, rows, OptimConfig(), scaling_of(based))
    ids = torch.arange(32)[None]
    assert torch.equal(first_model(standard)(ids), first_model(based)(ids))


def test_mitchell_has_the_fan_in_of_each_matrix_and_the_base_for_embedding_and_head():
    config = ModelConfig(**SMALL, **MUP)
    assert init_std("blocks.1.attn.wq.weight", config) == 64**-0.5
    assert init_std("blocks.1.mlp.w_down.weight", config) == (2 * 96 * 2) ** -0.5
    assert init_std("embed.weight", config) == init_std("head.weight", config) == pytest.approx(16**-0.5)


def test_deviations_rates_and_the_multiplier_are_those_of_the_package_mup(reference):
    config = reference.our_shape()
    assert {name: init_std(name, config) for name in REFERENCE["deviations"]} == REFERENCE["deviations"]
    optim = OptimConfig(weight_decay=reference.DECAY, peak_lr=reference.LR, decay_embeddings=True)
    rules = {name: group_of(name, (1, 1), optim, scaling_of(config)) for name in REFERENCE["rates"]}
    assert {name: [reference.LR * g.lr_scale, reference.DECAY * g.decay] for name, g in rules.items()} == REFERENCE["rates"]
    assert 1 / config.width_ratio == REFERENCE["readout_multiplier"]


def test_20_losses_are_those_of_the_package_mup(reference):
    config = reference.our_shape()
    model = first_model(config, seed=1)
    optim = OptimConfig(weight_decay=reference.DECAY, peak_lr=reference.LR, eps=1e-8, decay_embeddings=True)
    optimizer = build_optimizer(dict(model.named_parameters()), optim, scaling=scaling_of(config))
    set_lr(optimizer, reference.LR)
    losses = []
    for tokens in reference.batches():
        loss = model(tokens[:, :-1], tokens[:, 1:]).sum() / tokens[:, 1:].numel()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(REFERENCE["losses"], rel=0, abs=1e-5)


def test_completep_divides_the_branches_and_epsilon():
    """Dey et al. 2025, table 1."""
    config = ModelConfig(**SMALL, **COMPLETEP)
    scaling, optim = scaling_of(config), OptimConfig()
    assert scaling == Scaling(1.0, width_ratio=4.0, depth_ratio=2.0, scales_eps=True)
    matrix = group_of("blocks.0.attn.wq.weight", (64, 64), optim, scaling)
    assert (matrix.lr_scale, matrix.decay, matrix.eps_scale) == (1 / 4, 4, 1 / 8)
    assert group_of("blocks.0.attn_norm.weight", (64,), optim, scaling).eps_scale == 1 / 8
    for name in ("embed.weight", "head.weight"):
        group = group_of(name, (512, 64), optim, scaling)
        assert (group.lr_scale, group.eps_scale) == (1, 1 / 4)
    model = first_model(config)
    x = torch.randn(1, 32, 64)
    x_out = model.blocks[0](x, *model._positions(torch.arange(32)[None], None, None), None)
    block = first_model(ModelConfig(**SMALL, **MUP)).blocks[0]
    block.load_state_dict(model.blocks[0].state_dict())
    halved = {name: value / 2 for name, value in block.state_dict().items() if name.endswith(("wo.weight", "w_down.weight"))}
    block.load_state_dict(halved, strict=False)
    torch.testing.assert_close(x_out, block(x, *model._positions(torch.arange(32)[None], None, None), None))


def test_attention_divides_its_scores_by_the_head_size_beyond_that_of_the_base():
    config = ModelConfig(**SMALL, **MUP, base_head_dim=4)
    attention, seen = first_model(config).blocks[0].attn, []
    attention.attend = lambda q, k, v, mask: seen.append(q) or F.scaled_dot_product_attention(q, k, v, is_causal=True)
    plain = first_model(ModelConfig(**SMALL, **MUP)).blocks[0].attn
    plain.attend = attention.attend
    x, rope = torch.randn(1, 32, 64), first_model(config)._positions(torch.arange(32)[None], None, None)
    attention(x, *rope, None), plain(x, *rope, None)
    torch.testing.assert_close(seen[0], seen[1] * (4 / 16) ** 0.5)


def test_muon_scales_its_rate_with_the_root_of_the_width():
    group = group_of("blocks.0.attn.wq.weight", (64, 64), OptimConfig(name="muon"), Scaling(width_ratio=4.0))
    assert (group.lr_scale, group.decay) == (1 / 2, 2)


@pytest.mark.parametrize(
    "values, key, words",
    [
        ({"parametrization": "mup"}, "model.base_width", "is not set; mup needs the d_model of the model"),
        ({"parametrization": "completep", "base_width": 16}, "model.base_depth", "is not set; completep needs the n_layers"),
        ({"base_width": 16}, "model.base_width", "is read with parametrization: mup or completep only, not standard"),
        ({**MUP, "base_depth": 2}, "model.base_depth", "is read with parametrization: completep only, not mup"),
        ({"base_head_dim": 16}, "model.base_head_dim", "is read with parametrization: mup or completep only"),
    ],
)
def test_a_base_that_is_missing_or_not_read_is_refused(values, key, words):
    with pytest.raises(ConfigError) as refused:
        ModelConfig(**SMALL, **values)
    assert str(refused.value).startswith(f"{key}: ") and words in str(refused.value)


# ---- what they are for


@pytest.mark.parametrize("parametrization, optimizer", first_quick([("mup", "adamw"), ("completep", "adamw"), ("mup", "muon")]))
def test_no_activation_depends_on_the_width(coordinates, parametrization, optimizer):
    slopes = coordinates.check(parametrization, optimizer)
    # Muon, at the rate of AdamW, moves embedding and head too little for logits to leave their first noise.
    judged = {key: slope for key, slope in slopes.items() if key[0] != "logits" or (key[1] == 10 and optimizer == "adamw")}
    assert all(abs(slope) <= 0.1 for slope in judged.values()), judged


@pytest.mark.slow
def test_activations_grow_with_the_width_under_the_standard_parametrization_and_with_a_rate_that_is_not_scaled(coordinates):
    assert max(coordinates.check("standard", seeds=1).values()) >= 1
    unscaled = coordinates.check("mup", seeds=1, fault=lambda scaling: replace(scaling, width_ratio=1.0))
    assert max(unscaled.values()) >= 1


# ---- runs


@pytest.mark.slow
def test_the_best_rate_is_that_of_the_narrow_model_under_mup_and_another_one_under_the_standard_parametrization(coordinates):
    rates = (2**-8, 2**-6, 2**-4)

    def best(width: int, parametrization: str, seed: int) -> float:
        config = coordinates.shape(width, parametrization, depth=2)
        losses = {lr: coordinates.loss_after(config, OptimConfig(peak_lr=lr, eps=1e-8, weight_decay=0.0), seed) for lr in rates}
        return min(losses, key=losses.get)

    found = {
        (width, parametrization): [best(width, parametrization, seed) for seed in range(3)]
        for width in (64, 256)
        for parametrization in ("mup", "standard")
    }
    assert found[64, "mup"] == found[256, "mup"] == found[64, "standard"] == [2**-6] * 3
    assert found[256, "standard"] == [2**-8] * 3


def test_runs_have_the_losses_of_one_process_on_two_and_go_on_bit_for_bit(tiny_args):
    values = {"model.parametrization": "completep", "model.base_width": 8, "model.base_depth": 1, "model.base_head_dim": 8}
    values |= {"total_steps": 6, "checkpoint.interval_steps": 3}
    trained(tiny_args("one", **values))
    trained_on(2, two := tiny_args("two", **values))
    cut(stopped := tiny_args("stopped", **values), 3)
    trained(stopped)
    one = history(Path(two.run_dir).parent / "one", "step", LOSS)
    assert history(Path(stopped.run_dir), "step", LOSS) == one
    losses = [loss for _, loss in history(Path(two.run_dir), "step", LOSS)]
    assert losses == pytest.approx([loss for _, loss in one], rel=1e-6)


# ---- exports, which have no multipliers

EXPORTS = {
    "olmo": {},
    "olmo2": {"norm": "rms_norm", "qk_norm": True, "block": "reordered_norm"},
    "llama": {"norm": "rms_norm", "n_kv_heads": 2},
    "llama, tied": {"norm": "rms_norm", "tie_embeddings": True},
    "gemma": GEMMA,
}


@torch.no_grad()
@pytest.mark.parametrize("family", EXPORTS)
def test_an_export_has_the_multipliers_in_its_weights(tmp_path, family):
    config = ModelConfig(**{**SMALL, **EXPORTS[family], **COMPLETEP, "base_head_dim": 4})
    write_random_checkpoint(tmp_path / "ours", config)
    export_hf(tmp_path / "ours", tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    ids = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(5))
    ours = load_model(tmp_path / "ours")(ids)
    assert theirs.config.model_type == family.partition(",")[0]
    assert (ours - theirs(ids).logits).abs().max() <= 2e-5 * max(1, ours.abs().max())


@pytest.mark.parametrize(
    "values, key",
    [
        ({"clip_qkv": 8.0}, "model.clip_qkv"),
        ({"qk_norm": True}, "model.qk_norm"),
        ({"block": "reordered_norm", "base_head_dim": None}, "model.block"),
    ],
)
def test_an_export_without_a_weight_for_a_multiplier_is_refused(tmp_path, values, key):
    write_random_checkpoint(tmp_path / "ours", ModelConfig(**SMALL, **{**COMPLETEP, "base_head_dim": 4, **values}))
    with pytest.raises(ConfigError, match=f"^{key}: "):
        export_hf(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
