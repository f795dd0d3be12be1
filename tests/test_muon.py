"""Muon: torch's arithmetic, in fp32, on whole matrices, for every number of processes; a skipped step leaves no trace. Each
matrix is orthogonalized on one rank."""

import pytest
import torch
from fake import Collectives, fake_world
from ranks import on_ranks
from runs import LOSS, first_quick, history, trained
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.optim._muon import _zeropower_via_newtonschulz as newton_schulz_of_torch

from olmo_train.checkpoint.load import load_model
from olmo_train.optim import adamw, build, config
from olmo_train.optim import muon as optim_muon
from olmo_train.parallel.exchange import on_full_tensors

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
    seen = u.T @ optim_muon.newton_schulz(matrix) @ v.T
    assert (seen - seen.diagonal().diag()).abs().max() < 1e-4
    assert seen.diagonal().min() > 0.6 and seen.diagonal().max() < 1.3


def test_in_bf16_orthogonalizing_has_the_bits_of_torch_also_in_a_batch():
    for shape in ((48, 16), (16, 48), (32, 32)):
        matrices = list(torch.randn(3, *shape, generator=torch.Generator().manual_seed(3)).bfloat16())
        theirs = [newton_schulz_of_torch(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7) for matrix in matrices]
        assert all(map(torch.equal, map(optim_muon.newton_schulz, matrices), theirs)), shape
        batched = optim_muon.orthogonalize(matrices, in_batches=True)
        assert all((x - y).abs().max() < 0.02 for x, y in zip(batched, theirs, strict=True)), shape


def test_matrices_of_one_shape_in_a_batch_are_those_one_by_one():
    generator = torch.Generator().manual_seed(4)
    matrices = [torch.randn(shape, generator=generator) for shape in ((8, 4), (4, 8), (8, 4), (4, 4), (8, 4), (4, 8))]
    alone, batched = (optim_muon.orthogonalize(matrices, in_batches=batches) for batches in (False, True))
    assert all(torch.equal(x, optim_muon.newton_schulz(matrix)) for x, matrix in zip(alone, matrices, strict=True))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(alone, batched, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(alone, optim_muon.orthogonalize(matrices), strict=True)), "a CPU has no batches"


ROWS = (1, 7, 33, 8, 3)  # of tensors that do not divide over 4 ranks; some ranks have no row of some


def moved(mesh) -> list:
    """Full tensors doubled by their owners, and what each rank was given."""
    placements = [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
    tensors = [torch.arange(3.0 * rows).view(rows, 3) + rows for rows in ROWS]
    sharded = [distribute_tensor(tensor, mesh, placements, src_data_rank=None) for tensor in tensors]
    seen = []

    def doubled(full: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.extend(len(tensor) for tensor in full)
        return [2 * tensor for tensor in full]

    owners = [i % mesh.size() for i in range(len(ROWS))]
    results = on_full_tensors(doubled, sharded, owners)
    assert all(torch.equal(r.full_tensor(), 2 * t) for r, t in zip(results, tensors, strict=True))
    assert all(r.to_local().shape == s.to_local().shape for r, s in zip(results, sharded, strict=True))
    return seen


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2), (4, 1)])
def test_each_rank_works_on_the_full_tensors_that_it_owns_and_all_get_their_shards(shape):
    size = torch.Size(shape).numel()
    names = ("replicate", "shard")[-len(shape) :]
    seen = on_ranks(size, lambda world: moved(init_device_mesh("cpu", shape, mesh_dim_names=names)))
    assert seen == [[rows for i, rows in enumerate(ROWS) if i % size == rank] for rank in range(size)]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("elements, rounds", [(2**22, 1), (1, 2)])
def test_a_step_on_eight_ranks_is_two_collectives_a_round(replicas, elements, rounds, monkeypatch):
    monkeypatch.setattr(optim_muon, "ROUND_ELEMENTS", elements)
    with fake_world(8, replicas) as world:
        placements = [Shard(0)] if replicas == 1 else [Replicate(), Shard(0)]
        full = {f"blocks.{i}.attn.wq.weight": torch.ones(64, 32) for i in range(16)} | {"norm.weight": torch.ones(32)}
        sharded = {name: distribute_tensor(value, world.mesh, placements, src_data_rank=None) for name, value in full.items()}
        parameters = {name: nn.Parameter(value) for name, value in sharded.items()}
        optimizer = build.build_optimizer(parameters, CONFIG, ranks=8, on_full_tensors=on_full_tensors)
        build.allocate_state(optimizer)
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        with Collectives() as seen:
            optimizer.step()
        assert seen.counts == {"all_to_all": 2 * rounds}


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


@pytest.mark.parametrize("ranks, replicas", first_quick([(4, 2), (2, 1), (4, 1)]))
def test_processes_train_as_one_and_share_the_work(tmp_path, tiny_args, monkeypatch, ranks, replicas):
    """Also with replicas, which do not repeat each other's work."""
    calls, newton_schulz = [], optim_muon.newton_schulz
    monkeypatch.setattr(optim_muon, "newton_schulz", lambda x: calls.append(x.shape) or newton_schulz(x))
    curves, models = {}, {}
    for name, size, copies in (("alone", 1, 1), ("together", ranks, replicas)):
        run = tiny_args(name, **{"optim.name": "muon", "micro_batch_size": 2, "parallel.replicas": copies})
        counts = on_ranks(size, lambda world, run=run: trained(run, world) and len(calls), replicas=copies)
        assert sum(counts) == 13 * 14, "seven matrices of two blocks, in 12 steps and in the one that allocates the state"
        assert max(counts) <= 13 * -(-14 // size)
        curves[name] = torch.tensor(history(tmp_path / name, LOSS)).flatten()
        models[name] = dict(load_model(tmp_path / name).named_parameters())
    curve = curves["alone"]
    assert len(curve) == 12 and curve[-1] < curve[0] - 0.1
    assert (curve - curves["together"]).abs().max() < 1e-5
    assert all((value - models["together"][name]).abs().max() < 1e-5 for name, value in models["alone"].items())
