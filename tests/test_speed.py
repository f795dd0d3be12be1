"""What would cost speed without anybody noticing: reading a tensor on the host within a step, where a GPU would be waited
for. The speed itself is measured by `olmo-train bench` and benchmarks/peers.py, not here."""

from dataclasses import replace

import pytest
import torch
from fake import Collectives, Operations, fake_world, zero_weights
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from olmo_train import train
from olmo_train.data.loader import Batch
from olmo_train.guards.spikes import SpikeDetector
from olmo_train.model.transformer import Transformer
from olmo_train.optim import build
from olmo_train.parallel import shard
from olmo_train.parallel.exchange import on_full_tensors
from olmo_train.parallel.world import join_world

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


ATEN = torch.ops.aten
# A read inside an operation on DTensors comes as `item` or `is_nonzero`, one elsewhere as what these call.
READS = {ATEN._local_scalar_dense.default, ATEN.item.default, ATEN.is_nonzero.default, ATEN.equal.default}


class HostReads(Operations):
    """Counts the tensors whose value is asked for on the host: item, tolist, bool, float."""

    def key(self, function, args):
        return "read" if function in READS else None

    @property
    def count(self) -> int:
        return self.counts["read"]


def a_step(config, world):
    """A function that does one whole update of a model that is made once."""
    with torch.device("meta"):
        model = Transformer(config.model)
    shard.shard(model, config.parallel, world)
    shard.init_weights(model, config.seed)
    optimizer = build.build_optimizer(
        dict(model.named_parameters()), config.optim, ranks=world.size, on_full_tensors=on_full_tensors
    )
    build.allocate_state(optimizer)
    tokens = torch.arange(config.global_batch_size * config.model.seq_len).view(config.global_batch_size, -1) % 512
    batch = Batch(tokens, tokens, torch.zeros(len(tokens), dtype=torch.int64)).to(world.device)
    spikes = SpikeDetector(world.device)
    return lambda step: train.train_step(model, optimizer, replace(batch, step=step), config, world, spikes)


def test_a_read_inside_an_operation_on_sharded_tensors_is_seen(monkeypatch):
    def multiply(operation, args, kwargs):  # as the code that DTensor runs for an operation could
        args[0].to_local().mul_(args[0].to_local().sum().item())
        return args[0]

    monkeypatch.setitem(DTensor._op_dispatcher._custom_op_handlers, ATEN.mul_.Tensor, multiply)
    with join_world() as world, HostReads() as reads:
        sharded = distribute_tensor(torch.ones(4), world.mesh, [Shard(0)])
        before = reads.count
        sharded.mul_(2)
        assert reads.count == before + 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_step_reads_no_tensor_on_the_host(tiny_args, precision, checkpointing, name):
    changes = {
        "optim.name": name,
        "parallel.precision": precision,
        "parallel.activation_checkpointing": checkpointing,
        "model.z_loss": 1e-4,
    }
    with join_world() as world, HostReads() as reads:
        step = a_step(tiny_args(**changes), world)
        step(1)
        before = reads.count
        step(2)
        assert reads.count == before


def test_a_logged_step_of_the_loop_reads_a_fixed_number_of_tensors(tiny_args):
    """On a CPU the verdicts of a step are read at once; a line of metrics reads the interval's sums and the norm."""
    counts = {}
    for interval in (1, 1000):
        with HostReads() as reads:
            run = train.train(
                tiny_args(f"every-{interval}", **{"log.interval_steps": interval, "checkpoint.interval_steps": 100})
            )
            for _ in range(3):  # the console reads the loss of the first two steps
                next(run)
            before = reads.count
            for _ in range(3):
                next(run)
            counts[interval] = (reads.count - before) / 3
            run.close()
    assert counts[1000] <= 1, "a step that is not logged"
    assert counts[1] <= 4, "a logged one"


L, M = 2, 2  # blocks and micro-batches of the tiny configuration
SUMS = {"all_reduce": 3}  # of scored tokens, of the losses, and of the norm of all gradients
# A step's collectives. Weights are gathered for each forward, and those of a block again for each backward; gradients are
# reduced with the last micro-batch.
STEPS = {
    "FSDP": ({}, 1, {"all_gather": M * (2 * L + 2), "reduce_scatter": L + 2}),
    "tied": ({"model.tie_embeddings": True}, 1, {"all_gather": M * (2 * L + 1), "reduce_scatter": L + 1}),
    "recomputed": (
        {"parallel.activation_checkpointing": "full"}, 1, {"all_gather": M * (2 * L + 2), "reduce_scatter": L + 2}
    ),
    "grad_op": ({"parallel.shard": "grad_op"}, 1, {"all_gather": L + 2, "reduce_scatter": L + 2}),
    "HSDP": ({}, 2, {"all_gather": M * (2 * L + 2), "reduce_scatter": L + 2, "all_reduce": 3 + L + 2}),
}  # fmt: skip


@pytest.mark.parametrize("way", STEPS)
def test_a_step_on_eight_ranks_sends_these_collectives_and_no_more(tiny_args, monkeypatch, way):
    monkeypatch.setattr(shard, "init_weights", zero_weights)
    changes, replicas, expected = STEPS[way]
    with fake_world(8, replicas) as world:
        step = a_step(tiny_args(**changes, **{"parallel.replicas": replicas}), world)
        step(1)
        with Collectives() as collectives:
            step(2)
    assert collectives.counts == SUMS | expected


def test_one_rank_gathers_and_reduces_nothing(tiny_args):
    with fake_world() as world, Collectives() as collectives:
        a_step(tiny_args(), world)(1)
    assert set(collectives.counts) <= {"all_reduce"}


@on_a_gpu
def test_on_a_gpu_the_compiled_loss_and_gradients_are_those_of_the_plain_step(tiny_args):
    norms = []
    for compiled in (False, True):
        with join_world() as world:
            stats = a_step(tiny_args(**{"parallel.precision": "bf16", "parallel.compile": compiled}), world)(1)
            norms.append((stats.loss.item(), stats.grad_norm.item()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
