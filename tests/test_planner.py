"""The planned bytes equal those of a real step's live tensors; time, energy and carbon equal the paper's arithmetic."""

import weakref
from dataclasses import replace

import pytest
import torch
from fake import fake_world
from runs import first_quick
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olmo_train.checkpoint.config import CheckpointConfig
from olmo_train.errors import ConfigError
from olmo_train.hardware import lookup
from olmo_train.model.adapter import adapt
from olmo_train.model.config import AdapterConfig, ModelConfig
from olmo_train.model.cost import adapter_parameters, count_parameters
from olmo_train.model.transformer import Transformer
from olmo_train.optim import build
from olmo_train.optim import config as optim_config
from olmo_train.parallel import config as parallel_config
from olmo_train.parallel import gradients, shard
from olmo_train.parallel.exchange import on_full_tensors
from olmo_train.plan import memory, time
from olmo_train.plan.memory import Layout, memory_estimate
from olmo_train.plan.time import Assumptions, run_cost

OLMO_1B = ModelConfig(d_model=2048, n_layers=16, n_heads=16, mlp_hidden=8192, tie_embeddings=True)
OLMO_7B = ModelConfig()
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = {
    "olmo": {},
    "small vocabulary": {"vocab_size": 128, "padded_vocab_size": 128},  # the logits are no longer the highest moment
    "olmo 2": {"norm": "rms_norm", "qk_norm": True, "block": "reordered_norm"},
    "clipped": {"clip_qkv": 8.0, "norm": "layer_norm", "qk_norm": True},
    "gemma": {"n_kv_heads": 1, "activation": "geglu", "norm": "rms_norm_offset", "tie_embeddings": True},
    "falcon": {"activation": "gelu", "block": "parallel", "norm": "layer_norm", "bias": "norm"},
}


def small(**changes) -> ModelConfig:
    shape = dict(n_layers=3, d_model=128, n_heads=4, mlp_hidden=384, vocab_size=2000, padded_vocab_size=2048, seq_len=128)
    return ModelConfig(**shape | changes)


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation touches; `peak` is the most bytes that were alive after one."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def follow(self, tensor: torch.Tensor) -> None:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if storage._cdata not in self.alive:
            gone = lambda _, key=storage._cdata: self.alive.pop(key, None)  # noqa: E731
            self.alive[storage._cdata] = weakref.ref(storage, gone)

    @property
    def total(self) -> int:
        """FSDP frees gathered weights by resizing their storage to nothing, so sizes are read again."""
        return sum(storage.nbytes() for ref in list(self.alive.values()) if (storage := ref()) is not None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor):
                self.follow(leaf)
        self.peak = max(self.peak, self.total)
        return result


def measure_step(model_config: ModelConfig, layout: Layout) -> tuple[int, int]:
    """(bytes of weights and moments, highest bytes of a step) of rank 0, with collectives that move nothing."""
    with fake_world(layout.gpus, layout.replicas) as world:
        choices = parallel_config.ParallelConfig(
            cpu_kernels=False,  # which would keep less than torch on a GPU does, of which the plan is
            shard=layout.shard,
            replicas=layout.replicas,
            precision=layout.precision,
            activation_checkpointing=layout.activation_checkpointing,
        )
        with torch.device("meta"):
            model = Transformer(model_config)
            if layout.adapter.is_on:
                adapt(model, layout.adapter)
        shard.shard(model, choices, world)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        recipe = optim_config.OptimConfig(name=layout.optimizer)
        optimizer = build.build_optimizer(
            dict(model.named_parameters()), recipe, ranks=layout.gpus, on_full_tensors=on_full_tensors
        )
        ids = torch.zeros(layout.micro_batch_size, model_config.seq_len, dtype=torch.int64)
        run_step(model, optimizer, ids, layout.micro_batches)  # the first step makes the moments
        live = LiveBytes()
        for tensor in tree_leaves((list(model.parameters()), [list(s.values()) for s in optimizer.state.values()])):
            live.follow(tensor)
        state = live.total
        with live:
            run_step(model, optimizer, ids, layout.micro_batches)
        return state, live.peak


def run_step(model, optimizer, ids, micro_batches) -> None:
    for i in range(micro_batches):
        gradients.last_micro_batch(model, i == micro_batches - 1)
        model(ids, ids).sum().backward()
    gradients.clip_gradients(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()


LAYOUTS = {
    "one": Layout(micro_batch_size=4),
    "one, full, accumulated": Layout(micro_batch_size=4, micro_batches=2, activation_checkpointing="full"),
    "eight, full": Layout(gpus=8, micro_batch_size=4, activation_checkpointing="full"),
    "one, selective": Layout(micro_batch_size=4, activation_checkpointing="selective"),
    "eight, selective, accumulated": Layout(gpus=8, micro_batch_size=4, micro_batches=2, activation_checkpointing="selective"),
    "eight, grad_op, accumulated": Layout(gpus=8, micro_batch_size=4, micro_batches=2, shard="grad_op"),
    "eight, two replicas": Layout(gpus=8, replicas=2, micro_batch_size=4),
    "one, muon": Layout(micro_batch_size=4, optimizer="muon"),
    "eight, muon": Layout(gpus=8, micro_batch_size=1, optimizer="muon"),
}
CASES = [  # every layout, where the loss is the highest moment and where it is not; every other shape once
    *(("olmo", name, "bf16") for name in LAYOUTS),
    *(("small vocabulary", name, "fp32") for name in LAYOUTS),
    *((name, "one", "bf16") for name in list(SHAPES)[1:]),
    ("olmo 2", "eight, full", "fp32"),
    *((name, "one, selective", "bf16") for name in list(SHAPES)[1:]),
]


@pytest.mark.parametrize("shape, layout, precision", CASES)
def test_planned_peak_lies_within_a_tenth_of_the_live_tensors_of_a_real_step(shape, layout, precision):
    model, layout = small(**SHAPES[shape]), replace(LAYOUTS[layout], precision=precision)
    state, peak = measure_step(model, layout)
    planned = memory_estimate(model, layout)
    kept = memory.checkpoint_bytes(model, layout.optimizer)
    assert kept == 12 * count_parameters(model).total or layout.optimizer == "muon"
    assert state == pytest.approx(kept / (layout.gpus // layout.replicas), rel=1e-3)
    assert planned.peak == pytest.approx(peak, rel=0.1)


ADAPTED = [
    *(("lora", name, "olmo") for name in LAYOUTS if "muon" not in name),
    *(("dora", name, "small vocabulary") for name in ("one", "eight, full", "one, selective")),
    ("lora", "one", "olmo 2"),
    ("lora", "eight, full", "gemma"),
]


@pytest.mark.parametrize("kind, layout, shape", ADAPTED)
def test_planned_bytes_beside_adapters_are_those_of_a_real_step(kind, layout, shape):
    """Frozen weights are in the precision of compute, and have no gradients and no moments."""
    model, layout = small(**SHAPES[shape]), replace(LAYOUTS[layout], adapter=AdapterConfig(kind))
    state, peak = measure_step(model, layout)
    planned = memory_estimate(model, layout)
    trained, shards = adapter_parameters(model, layout.adapter), layout.gpus // layout.replicas
    assert memory.checkpoint_bytes(model, "adamw", layout.adapter) == 12 * trained
    assert state == pytest.approx((12 * trained + 2 * count_parameters(model).total) / shards, rel=1e-3)
    assert state == pytest.approx(planned.moments["update"]["weights"] + planned.moments["update"]["optimizer"], rel=1e-3)
    assert planned.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("gpus, replicas", first_quick([(8, 1), (64, 8), (64, 1), (256, 1)], 2))
def test_the_state_of_olmo_7b_takes_exactly_the_planned_bytes(gpus, replicas):
    """50,304 rows do not divide by 256: rank 0 has 197 of embedding and head, the last rank 69."""
    with fake_world(gpus, replicas) as world, FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("meta"):
            model = Transformer(OLMO_7B)
        shard.shard(model, parallel_config.ParallelConfig(replicas=replicas, cpu_kernels=False), world)
        optimizer = build.build_optimizer(dict(model.named_parameters()), optim_config.OptimConfig())
        build.allocate_state(optimizer)
        moments = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
        size = {"weights": list(model.parameters()), "optimizer": moments}
        size = {part: sum(tensor.to_local().nbytes for tensor in tensors) for part, tensors in size.items()}
    planned = memory_estimate(OLMO_7B, Layout(gpus=gpus, replicas=replicas)).moments["update"]
    assert size == {part: planned[part] for part in size}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_planned_activations_are_what_autograd_saves(shape, precision):
    config = small(**SHAPES[shape])
    model = Transformer(config).to(DTYPES[precision])
    ids, saved = torch.zeros(2, config.seq_len, dtype=torch.int64), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(ids, ids).sum()
    assert loss.requires_grad
    tokens, layout = ids.numel(), Layout(precision=precision)
    planned = config.n_layers * memory.kept_activation_bytes(config, layout) + memory.final_activation_bytes(config, layout)
    logits = memory.BYTES[precision] * tokens * config.vocab_rows  # which are their own gradients by then
    assert sum(saved.values()) == pytest.approx(tokens * planned + logits, rel=0.02)


def test_state_is_exactly_sixteen_bytes_a_parameter_over_all_gpus():
    for gpus in (1, 8):
        update = memory_estimate(OLMO_1B, Layout(gpus=gpus)).moments["update"]
        assert gpus * (update["weights"] + update["optimizer"] + update["gradients"]) == 16 * 1_176_764_416


def test_gradients_are_whole_on_each_gpu_while_they_add_up_over_micro_batches():
    once = memory_estimate(OLMO_7B, Layout(gpus=64, micro_batches=1)).moments["loss"]
    twice = memory_estimate(OLMO_7B, Layout(gpus=64, micro_batches=2)).moments["loss"]
    assert once["gradients"] == 0
    assert twice["gradients"] == 4 * 6_888_095_744


def test_largest_micro_batch_fits_and_the_next_divisor_does_not():
    layout = Layout(gpus=8, micro_batch_size=8, micro_batches=32)
    size = memory.largest_micro_batch(OLMO_1B, layout, 80e9)
    fits = lambda n: memory_estimate(OLMO_1B, Layout(gpus=8, micro_batch_size=n, micro_batches=256 // n)).fits(80e9)  # noqa: E731
    assert fits(size) and not fits(2 * size)
    assert memory.largest_micro_batch(OLMO_7B, Layout(), 80e9) is None


def test_a_layout_that_no_run_can_have_is_refused():
    with pytest.raises(ConfigError, match=r"parallel.replicas: 3 does not divide the 8 GPUs"):
        Layout(gpus=8, replicas=3)


def test_the_papers_energy_makes_the_papers_carbon():
    assert time.co2_kg(104_000) == pytest.approx(70_000, rel=0.005)  # OLMo-7B on A100: 104 MWh, 70 t
    assert time.co2_kg(135_000, carbon=0) == 0  # on LUMI, which hydropower feeds


def test_time_and_money_follow_from_the_tokens_per_second_of_the_assumed_mfu():
    cost = run_cost(OLMO_1B, tokens=50.3e3 * 3600, gpus=1, hardware=lookup("h100"), assumed=Assumptions(mfu=0.4, price=2.0))
    assert cost.tokens_per_second == pytest.approx(50.3e3, rel=1e-3)  # the convention's table
    assert cost.seconds == pytest.approx(3600, rel=1e-3)
    assert cost.money == pytest.approx(2.0, rel=1e-3)
    assert cost.gpu_kwh == pytest.approx(0.7, rel=1e-3)
    assert cost.kwh == pytest.approx(0.77, rel=1e-3)
    assert cost.co2_kg == pytest.approx(0.77 * 0.61, rel=1e-3)


def test_more_gpus_take_less_time_for_the_same_money():
    one, eight = (run_cost(OLMO_7B, 1e12, gpus, lookup("h100"), Assumptions(0.4, price=2.0)) for gpus in (1, 8))
    assert one.seconds == pytest.approx(8 * eight.seconds)
    assert one.money == pytest.approx(eight.money)
    assert run_cost(OLMO_7B, 1e12, 1, lookup("h100"), Assumptions(0.4)).money is None


def test_checkpoints_that_stay_are_the_permanent_ones_and_the_last_of_the_others():
    config = CheckpointConfig(interval_steps=10, keep_last=2, permanent_interval_steps=40, save_steps=(2,))
    assert time.checkpoint_counts(85, config) == (10, 5)  # 2, 10, 20, ..., 80, 85, of which 2, 40, 70, 80, 85 stay
    assert time.checkpoint_counts(10**18, CheckpointConfig()) == (10**15, 3)


@pytest.mark.parametrize("every, forever, named, keep", [(10, 40, (2, 20, 80), 2), (6, 4, (5, 12), 1), (7, None, (14, 99), 3)])
def test_checkpoints_are_counted_as_a_run_would_save_them(every, forever, named, keep):
    config = CheckpointConfig(interval_steps=every, keep_last=keep, permanent_interval_steps=forever, save_steps=named)
    for total in range(1, 100):
        saved = [step for step in range(1, total + 1) if config.is_due(step) or step == total]
        passing = [step for step in saved if not config.is_permanent(step)]
        kept = len(saved) - len(passing) + len(passing[-keep:])
        assert time.checkpoint_counts(total, config) == (len(saved), kept)


def test_milestones_hold_the_first_step_the_end_of_the_warmup_and_the_last():
    assert time.milestones(100, 25) == [1, 10, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100]
    assert time.milestones(3, 5000) == [1, 2, 3]
