"""`determinism: world` computes the same bits on any number of processes and for any micro-batch; `run` each time."""

import hashlib
import itertools
import os

import pytest
import torch
from crash import run
from fake import Operations
from runs import first_quick, lines_of
from test_guards import states_of

from olmo_train.errors import ConfigError
from olmo_train.parallel.determinism import DETERMINISM, QUANTUM, RANGE, loss_terms
from olmo_train.train import train

SAME = ("train/CrossEntropyLoss", "optim/total_grad_norm", "optim/clipping_rate", "eval/held/CrossEntropyLoss", "sample_hash")
# 33 and 7 cannot be halved, so shards differ in size, and in what a vectorized loop leaves over.
ODD = {"model.d_model": 36, "model.n_heads": 2, "model.mlp_hidden": 33, "model.n_layers": 2, "model.norm": "rms_norm"}
# Operations that torch 2.11 to 2.13 refuse on CUDA tensors under torch.use_deterministic_algorithms(True): the second list of its
# docstring, by the beginnings of their names. cumsum only of floating-point numbers.
REFUSED = (
    "median.dim", "nanmedian.dim", "kthvalue", "cumsum", "cumprod", "put_", "histc", "bincount", "scatter_reduce", "nll_loss2d",
    "_ctc_loss", "_embedding_bag", "grid_sampler", "max_unpool", "max_pool3d", "avg_pool3d_backward", "fractional_max",
    "adaptive_max_pool2d_backward", "_adaptive_avg_pool", "upsample", "reflection_pad", "replication_pad",
)  # fmt: skip


@pytest.fixture
def bits(tiny_words, held_out, tmp_path):
    """bits(name, world, steps, **changes): the hash of all weights and moments after the run, and its lines of metrics."""

    def of(name: str, world: int, steps: int = 6, **changes):
        values = {"total_steps": steps, "data.validation.held.path": held_out, "eval.interval_steps": 3, **changes}
        codes, _ = run(tiny_words(name, **{"determinism": "world", **values}), tmp_path / name, world)
        assert codes == [0] * world
        digest = hashlib.sha256()
        for key, tensor in sorted(states_of(tmp_path / name, steps).items()):
            digest.update(key.encode() + tensor.numpy().tobytes())
        return digest.hexdigest(), [[line.get(key) for key in SAME] for line in lines_of(tmp_path / name)]

    return of


def test_two_processes_and_another_micro_batch_have_the_bits_of_one(bits):
    one = bits("one", 1, **ODD)
    assert len(one[1]) == 6 and one[1][2][3] is not None
    assert bits("two", 2, micro_batch_size=2, **ODD) == one


def test_without_it_they_have_others_but_the_same_command_again_has_the_same(bits):
    """Or the test above would show nothing."""
    one, again = (bits(name, 1, determinism="none", **ODD) for name in ("one", "again"))
    assert one == again
    assert bits("two", 2, determinism="none", micro_batch_size=2, **ODD)[0] != one[0]


@pytest.mark.parametrize(
    "changes",
    first_quick(
        [
            {"optim.name": "muon", "micro_batch_size": 2},
            {
                "model.tie_embeddings": True,
                "model.z_loss": 1e-4,
                "model.n_kv_heads": 1,
                "parallel.activation_checkpointing": "full",
            },
            {
                "parallel.precision": "bf16",
                "data.document_mask": True,
                "data.eos_id": 7,
                "parallel.shard": "grad_op",
                "optim.max_grad_norm": 0.01,
            },
        ]
    ),
)
def test_so_does_every_kind_of_model_and_optimizer(bits, changes):
    changes = ODD | changes
    assert bits("two", 2, **changes) == bits("one", 1, **changes)


def test_copies_of_the_state_have_the_bits_of_one_process(bits):
    changes = ODD | {"micro_batch_size": 2}
    assert bits("two", 2, **changes, **{"parallel.replicas": 2}) == bits("one", 1, **changes)


def test_a_run_continues_bit_for_bit_on_another_number_of_processes(bits, tiny_words, tmp_path):
    changes = ODD | {"optim.schedule_steps": 8, "data.validation.held.path": None}
    bits("cut", 2, steps=4, **changes)
    assert bits("cut", 1, steps=8, **changes) == bits("whole", 1, steps=8, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision, cases", [("fp32", list(itertools.product((1, 2, 4), (1, 2, 4)))), ("bf16", [(1, 4), (2, 2), (4, 1)])]
)
def test_worlds_of_1_2_and_4_and_micro_batches_of_1_2_and_4_have_equal_bits_after_20_steps(bits, precision, cases):
    changes = ODD | {"parallel.precision": precision, "global_batch_size": 16}
    expected = bits("first", 1, steps=20, micro_batch_size=1, **changes)
    for world, rows in cases:
        assert bits(f"{world}-{rows}", world, steps=20, micro_batch_size=rows, **changes) == expected, (world, rows)


def test_the_same_command_again_has_the_same_bits(bits):
    assert bits("run-1", 1, determinism="run", **ODD) == bits("run-2", 1, determinism="run", **ODD)


def test_gradients_too_large_to_be_added_exactly_skip_the_step(tiny_args, monkeypatch):
    from olmo_train.parallel import determinism

    monkeypatch.setattr(determinism, "RANGE", 1e-9)
    stats = [stats.skipped.item() for stats in train(tiny_args("run", determinism="world", total_steps=2))]
    assert stats == [1, 1]


def test_the_norm_is_the_norm():
    from torch.distributed.tensor import distribute_tensor

    from olmo_train.parallel.determinism import exact_norm
    from olmo_train.parallel.world import join_world

    torch.manual_seed(0)
    with join_world() as world:
        values = [torch.randn(40, 3), 1e-6 * torch.randn(7), torch.zeros(5), 1e4 * torch.randn(2, 2)]
        sharded = [distribute_tensor(value, world.mesh) for value in values]
        exactly = exact_norm(sharded)[0].item()
        assert exactly == pytest.approx(torch.cat([v.flatten() for v in values]).norm().item(), rel=1e-6)
        small = [distribute_tensor(1e-6 * torch.randn(1000), world.mesh), sharded[0]]
        assert exact_norm(small)[0].item() == pytest.approx(values[0].norm().item(), rel=1e-6)
        for bad in (float("nan"), float("inf"), -float("inf")):
            sharded[1].to_local()[3] = bad
            assert exact_norm(sharded)[0].item() == float("inf")


def test_losses_add_up_exactly_in_any_order():
    torch.manual_seed(0)
    terms = loss_terms(torch.cat((torch.rand(500) * 20000, torch.rand(500))))
    sums = {terms[torch.randperm(1000)].cumsum(0)[-1].item() for _ in range(20)}
    assert len(sums) == 1
    assert loss_terms(torch.tensor([1.0000001, 4317.125])).tolist() == torch.tensor([1.0000001, 4317.125]).double().tolist()
    assert QUANTUM * 2**53 == RANGE == 2048


def test_world_with_what_it_does_not_cover_is_refused(tiny_args):
    for key, value in (("parallel.compile", True), ("parallel.float8", True), ("parallel.reduce_dtype", "bf16")):
        with pytest.raises(ConfigError, match="determinism"):
            tiny_args("run", determinism="world", **{key: value})
    with pytest.raises(ConfigError, match="did you mean 'world'"):
        tiny_args("run", determinism="words")


def test_the_configuration_accepts_the_rows_of_the_table(tiny_args):
    assert [tiny_args(determinism=name).determinism for name in DETERMINISM] == ["none", "run", "world"]
    with pytest.raises(ConfigError, match="determinism"):
        tiny_args(determinism="always")


@pytest.mark.parametrize("name", ["run", "world"])
def test_torch_is_strict_inside_and_as_before_outside(name):
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8"), "read by cuBLAS before any run"
    modes = lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())  # noqa: E731
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with DETERMINISM[name].prepare():
            assert modes() == (True, False)
        assert modes() == (True, True)
    finally:
        torch.use_deterministic_algorithms(False)
    with DETERMINISM[name].prepare():
        assert modes() == (True, False)
    assert modes() == (False, False)


class Called(Operations):
    """All but cumsum of integers."""

    def key(self, function, args):
        name = super().key(function, args)
        return None if name.startswith("cumsum") and not args[0].is_floating_point() else name


@pytest.mark.parametrize(
    "changes",
    [
        {"determinism": "run"},
        {"determinism": "world", "model.norm": "rms_norm", "model.qk_norm": True, "optim.name": "muon"},
        {"data.document_mask": True, "data.eos_id": 7, "model.tie_embeddings": True, "model.z_loss": 1e-4, "model.n_kv_heads": 1},
        {"parallel.activation_checkpointing": "selective", "parallel.precision": "bf16", "model.clip_qkv": 1.0},
    ],
)
def test_no_operation_of_a_run_is_one_that_torch_refuses_on_a_gpu(tiny_args, held_out, changes):
    values = {"determinism": "run", "total_steps": 2, "parallel.cpu_kernels": False, "data.validation.held.path": held_out}
    config = tiny_args(**{**values, **changes})
    with Called() as called:
        for stats in train(config):
            stats.loss.item()
    assert {"mm.default", "sort.default", "embedding_dense_backward.default"} <= called.counts.keys(), "what was watched"
    assert not [name for name in called.counts if name.startswith(REFUSED)]
