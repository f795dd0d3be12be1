"""Muon: torch's arithmetic, in fp32, on whole matrices, for every number of processes; a skipped step leaves no trace."""

import pytest
import torch
from runs import LOSS, history, trained, trained_on
from torch import nn

from olmo_train.checkpoint.load import load_model
from olmo_train.optim import adamw, build, config
from olmo_train.optim import muon as optim_muon

SHAPES = {
    "embed.weight": (32, 16),
    "blocks.0.attn.wo.weight": (16, 16),
    "blocks.0.mlp.w_up.weight": (64, 16),
    "norm.weight": (16,),
}
MATRICES = [name for name in SHAPES if name.startswith("blocks.")]
CONFIG = config.OptimConfig(name="muon", peak_lr=1e-2)


def random_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def test_steps_equal_those_of_torch_up_to_its_bf16():
    ours, theirs = random_parameters(), random_parameters()
    optimizer = build.build_optimizer(ours, CONFIG)
    build.allocate_state(optimizer)
    muon = torch.optim.Muon([theirs[name] for name in MATRICES], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = adamw.adamw({name: theirs[name] for name in SHAPES if name not in MATRICES}, CONFIG)
    for step in range(1, 6):
        for one in (optimizer, muon, rest):
            build.set_lr(one, 1e-3 * step)
        for name in SHAPES:
            theirs[name].grad = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(step))
            ours[name].grad = theirs[name].grad.clone()
        optimizer.found_inf = torch.zeros(())
        for one in (optimizer, muon, rest):
            one.step()
        for name in SHAPES:
            size = (
                1e-3 * step * (0.2 * max(SHAPES[name]) ** 0.5 if name in MATRICES else 0)
            )  # an entry of an orthogonal matrix is below 1
            assert torch.allclose(ours[name], theirs[name], rtol=0, atol=0.02 * step * size), name


def test_orthogonalizing_keeps_singular_vectors_and_brings_values_near_one():
    matrix = torch.randn(48, 16, generator=torch.Generator().manual_seed(2))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    seen = u.T @ optim_muon.orthogonalize(matrix) @ v.T
    assert (seen - seen.diagonal().diag()).abs().max() < 1e-4
    assert seen.diagonal().min() > 0.6 and seen.diagonal().max() < 1.3


def test_the_updates_of_q_k_and_v_are_as_large_whatever_the_scales_of_their_gradients():
    generator = torch.Generator().manual_seed(0)
    parameters = {f"blocks.0.attn.w{name}.weight": nn.Parameter(torch.zeros(64, 64)) for name in "qkv"}
    parameters["norm.weight"] = nn.Parameter(torch.zeros(64))
    optimizer = build.build_optimizer(parameters, CONFIG)
    build.set_lr(optimizer, 1 / (0.2 * 8))  # times 0.2 * sqrt(64)
    for scale, parameter in zip((1.0, 0.1, 0.01, 0.0), parameters.values(), strict=True):
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    norms = [parameter.norm().item() for parameter in parameters.values()]
    assert norms[:3] == pytest.approx([7.0] * 3, abs=0.2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(poison):
    parameters = random_parameters()
    optimizer = build.build_optimizer(parameters, CONFIG)
    build.allocate_state(optimizer)
    build.set_lr(optimizer, 1e-3)
    for value, skipped in ((0.5, 0.0), (poison, 1.0)):
        before = [tensor.detach().clone() for tensor in everything(parameters, optimizer)]
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.found_inf = torch.tensor(skipped)
        optimizer.step()
        same = [torch.equal(*pair) for pair in zip(before, everything(parameters, optimizer), strict=True)]
        assert all(same) if skipped else not any(same)


def everything(parameters, optimizer) -> list[torch.Tensor]:
    return [*parameters.values(), *(value for state in optimizer.state.values() for value in state.values())]


def test_only_matrices_of_the_blocks_have_muons_state():
    parameters = random_parameters()
    optimizer = build.build_optimizer(parameters, CONFIG)
    build.allocate_state(optimizer)
    kept = {name: set(optimizer.state[parameter]) for name, parameter in parameters.items()}
    assert {name for name, keys in kept.items() if "momentum_buffer" in keys} == set(MATRICES)
    assert kept["norm.weight"] == {"step", "exp_avg", "exp_avg_sq"}


def test_a_resumed_run_continues_bit_for_bit(tmp_path, tiny_args):
    changes = {"optim.name": "muon", "checkpoint.interval_steps": 4}
    trained(tiny_args("whole", total_steps=8, **changes))
    for steps in (4, 8):
        trained(tiny_args("parts", total_steps=steps, **{**changes, "optim.schedule_steps": 8}))
    assert history(tmp_path / "whole") == history(tmp_path / "parts") and len(history(tmp_path / "parts")) == 8
    ours = dict(load_model(tmp_path / "parts").named_parameters())
    assert all(torch.equal(p, ours[name]) for name, p in load_model(tmp_path / "whole").named_parameters())


def test_two_processes_train_as_one(tmp_path, tiny_args):
    for size in (1, 2):
        trained_on(size, tiny_args(f"on-{size}", **{"optim.name": "muon"}))
    curves = [torch.tensor(history(tmp_path / f"on-{size}", LOSS)).flatten() for size in (1, 2)]
    assert len(curves[0]) == 12 and curves[0][-1] < curves[0][0] - 0.1
    assert (curves[0] - curves[1]).abs().max() < 1e-5
    one, two = (dict(load_model(tmp_path / f"on-{size}").named_parameters()) for size in (1, 2))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
