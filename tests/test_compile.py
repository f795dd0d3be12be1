"""What is compiled: one graph for all blocks, once, whatever else is configured.

A backend that counts stands for Inductor, and torch's fake process group for the other ranks, so that a CPU can tell what a
GPU would compile.
"""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake import fake_world, zero_weights
from functorch.compile import make_boxed_func
from functorch.compile import min_cut_rematerialization_partition as partition
from runs import first_quick
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex

from olmo_train.errors import ConfigError
from olmo_train.model.adapter import adapt
from olmo_train.model.config import AdapterConfig, ModelConfig
from olmo_train.model.transformer import Transformer, document_blocks, document_mask, document_starts
from olmo_train.parallel import gradients, kernels, shard
from olmo_train.parallel.config import ParallelConfig

SHAPE = ModelConfig(d_model=32, n_layers=3, n_heads=2, mlp_hidden=48, vocab_size=64, padded_vocab_size=64, seq_len=160)
ROWS, STEPS = 2, 2


@pytest.fixture
def compiled(monkeypatch):
    """Counts the graphs that torch.compile makes, their calls, and the matrix products in them."""
    counted, real = SimpleNamespace(graphs=0, calls=0, products={}), torch.compile

    def counting(kind):
        def compiler(graph, inputs):
            counted.products[kind] = sum(str(node.target) == "aten.mm.default" for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        return compiler

    def backend(graph, inputs):
        counted.graphs += 1
        run = aot_autograd(fw_compiler=counting("forward"), bw_compiler=counting("backward"), partition_fn=partition)(
            graph, inputs
        )

        def call(*values):
            counted.calls += 1
            return run(*values)

        return call

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    yield counted
    torch._dynamo.reset()


def sharded(world, shape=SHAPE, adapter=None, **choices) -> Transformer:
    with torch.device("meta"):
        model = Transformer(shape)
        if adapter:
            adapt(model, adapter)
    shard.shard(model, ParallelConfig(cpu_kernels=False, compile=True, **choices), world)
    zero_weights(model)
    return model


def documents_of(step: int) -> torch.Tensor:
    """Document numbers (ROWS, T) that differ from step to step."""
    ends = torch.rand(ROWS, SHAPE.seq_len, generator=torch.Generator().manual_seed(step)) < 0.03
    return ends.long().cumsum(dim=1)


def train_steps(model, masked: bool) -> None:
    ids = torch.arange(ROWS * SHAPE.seq_len).view(ROWS, -1) % 64
    for step in range(STEPS):
        gradients.last_micro_batch(model, True)
        model(ids, ids, documents_of(step) if masked else None).sum().backward()
        gradients.clip_gradients(model, 1.0)
        model.zero_grad()


QUICK = [(1, "none", None, True), (8, "none", "blocks", False), (8, "selective", "blocks", True), (8, "full", "dense", False)]
WAYS = itertools.product((1, 8), ("none", "selective", "full"), (None, "dense", "blocks"), (False, True))


@pytest.mark.parametrize("ranks, checkpointing, mask, float8", first_quick(dict.fromkeys([*QUICK, *WAYS]), len(QUICK)))
def test_all_blocks_share_one_graph_that_is_compiled_once(compiled, monkeypatch, ranks, checkpointing, mask, float8):
    if mask == "blocks":  # as on a GPU; eager flex attention has a backward on a CPU too
        monkeypatch.setattr(Transformer, "document_mask", staticmethod(document_blocks))
        monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    with fake_world(ranks) as world:
        train_steps(sharded(world, activation_checkpointing=checkpointing, float8=float8), mask is not None)
    assert (compiled.graphs, compiled.calls) == (1, SHAPE.n_layers * STEPS)
    assert not counters["graph_break"]
    # Of a block's seven products the last need not be computed again: nothing is saved behind it.
    assert compiled.products == {"forward": 7, "backward": 14 + (6 if checkpointing == "full" else 0)}


@pytest.mark.parametrize(
    "ranks, kind, checkpointing", first_quick([(1, "lora", "none"), (8, "dora", "none"), (8, "dora", "selective")])
)
def test_blocks_with_adapters_share_one_graph_and_the_first_has_another(compiled, ranks, kind, checkpointing):
    """No gradient goes to the frozen embedding, so none of the first block's input is computed."""
    with fake_world(ranks) as world:
        model = sharded(world, adapter=AdapterConfig(kind, rank=4), activation_checkpointing=checkpointing)
        train_steps(model, masked=True)
    assert (compiled.graphs, compiled.calls) == (2, SHAPE.n_layers * STEPS)
    assert not counters["graph_break"]


def test_evaluation_compiles_nothing_and_leaves_the_graph_of_training(compiled):
    shape = replace(SHAPE, n_layers=2, seq_len=16)
    with fake_world() as world:
        model = sharded(world, shape)
        for rows, length in ((1, 16), (2, 16), (3, 7), (5, 1), (4, 16)):
            with torch.no_grad():
                model(torch.zeros(rows, length, dtype=torch.int64))
            ids = torch.zeros(2, 16, dtype=torch.int64)
            model(ids, ids).sum().backward()
    assert (compiled.graphs, compiled.calls) == (1, 5 * shape.n_layers)


@pytest.mark.parametrize("length", [1, 100, 128, 129, 300, 512])
def test_blocks_of_a_document_mask_are_those_that_torch_finds_pair_by_pair(length):
    documents = torch.stack([
        (torch.rand(length, generator=torch.Generator().manual_seed(row)) < rate).long().cumsum(0)
        for row, rate in enumerate((0.0, 0.003, 0.01, 0.1, 1.0))
    ])  # fmt: skip
    pairs = lambda b, h, q, k: (q >= k) & (documents[b, q] == documents[b, k])  # noqa: E731
    starts = document_starts(documents)
    found, expected = document_blocks(starts), flex.create_block_mask(pairs, 5, None, length, length, device="cpu")
    assert found.shape == expected.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, places = (getattr(expected, f"{kind}_{name}") for name in ("num_blocks", "indices"))
        assert torch.equal(getattr(found, f"{kind}_num_blocks"), counts)
        seen = torch.arange(places.shape[-1]) < counts[..., None]  # the other indices are never read
        assert torch.equal(getattr(found, f"{kind}_indices")[seen], places[seen])
    b, q, k = torch.meshgrid(torch.arange(5), torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(found.mask_mod(b, 0, q, k), pairs(b, 0, q, k))
    assert torch.equal(document_mask(starts)[:, 0], pairs(b, 0, q, k))


def test_what_a_gpu_needs_to_compile_is_looked_for(monkeypatch, tmp_path):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: name)
    monkeypatch.setattr(kernels.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    default = ParallelConfig()
    assert kernels.is_compiled(default, gpu) and not kernels.is_compiled(default, cpu)
    assert not kernels.is_compiled(ParallelConfig(compile=False), gpu) and kernels.is_compiled(ParallelConfig(compile=True), cpu)
    (tmp_path / "Python.h").unlink()
    assert not kernels.is_compiled(default, gpu)
    with pytest.raises(ConfigError, match=r"parallel.compile: needs Python.h \(the package python3-dev\), which is not found"):
        kernels.is_compiled(ParallelConfig(compile=True), gpu)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert kernels.missing_for_compile() == "a C compiler (gcc, clang or $CC)"
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert kernels.missing_for_compile() == "Triton"


def test_on_a_gpu_attention_is_left_to_torch_also_beside_flash_attention_3(monkeypatch):
    """torch asks cuDNN first there: an implementation that is only registered would never be called."""
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    registered = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", registered.append, raising=False)
    with torch.device("meta"):
        model = Transformer(SHAPE)
    kernels.select_kernels(model, ParallelConfig(compile=False), torch.device("cuda"), compiled=False)
    assert registered == [] and not kernels.uses_cpu_kernels(model)
