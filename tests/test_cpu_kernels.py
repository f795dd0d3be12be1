"""The C++ of attention and loss computes what torch computes, at least as exactly, and hides nothing that is not finite."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ranks import exit_code, fork, on_ranks
from runs import LOSS, cut, events_of, history, trained

from olmo_train.checkpoint import folders
from olmo_train.commands.bench import table
from olmo_train.errors import ConfigError
from olmo_train.hardware import cpuinfo
from olmo_train.model.loss import IGNORE, differentiate_
from olmo_train.model.transformer import document_mask, document_starts
from olmo_train.parallel import cpu_kernels, kernels
from olmo_train.storage import cache_folder
from olmo_train.tools import bench, doctor
from olmo_train.tools.replay import replay

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

# sequences, query heads, key heads, tokens, head size: tokens around blocks of 32 and 64, groups of queries, one token, and more
# tokens than the 256 whose scores the forward keeps at once on tiles
SHAPES = [(2, 4, 4, 64, 32), (1, 4, 2, 77, 48), (2, 6, 1, 33, 64), (3, 2, 2, 31, 16), (1, 2, 2, 1, 128), (1, 1, 1, 300, 256)]
BF16_SHAPES = [(1, 2, 1, 600, 64), (2, 2, 2, 97, 80)]

# Every machine tests what is built on matrix tiles, with an emulation of the instructions; one that has them also tests them, and
# what it would compute without.
EMULATED_TILES = Path(__file__).with_name("emulated_tiles.h")
DIGEST = hashlib.sha256(EMULATED_TILES.read_bytes()).hexdigest()[:16]  # a changed emulation is another library
BUILDS = {"as built here": (), "emulated tiles": ("-include", str(EMULATED_TILES), f"-DEMULATION={DIGEST}")}
if any("amx_bf16" in line for line in cpuinfo()):
    BUILDS["without tiles"] = ("-DTILES=0",)
FP32, BF16 = (torch.float32, 2e-6), (torch.bfloat16, 1e-2)  # and the largest relative error
KINDS = [("as built here", *FP32), *((build, *BF16) for build in BUILDS)]
each_kind = pytest.mark.parametrize("build, dtype, floor", KINDS, ids=lambda value: str(value), indirect=["build"])


@pytest.fixture
def build(request, monkeypatch):
    """The library of this test, one of BUILDS."""
    monkeypatch.setattr(cpu_kernels, "FLAGS", (*cpu_kernels.FLAGS, *BUILDS[request.param]))
    cpu_kernels.library.cache_clear()
    products = cpu_kernels.library().bf16_products()
    assert products == {"emulated tiles": 2, "without tiles": 1}.get(request.param, products)
    yield request.param
    cpu_kernels.library.cache_clear()


def random_heads(shape, dtype, seed=0) -> list[torch.Tensor]:
    """q, k, v and a gradient, as the model makes them: q, k and v are parts of one tensor."""
    B, H, K, T, D = shape
    torch.manual_seed(seed)
    parts = torch.randn(B, T, (H + 2 * K) * D).to(dtype).split([H * D, K * D, K * D], dim=-1)
    heads = [part.view(B, T, -1, D).transpose(1, 2) for part in parts]
    return [*heads, torch.randn(B, T, H, D).to(dtype).transpose(1, 2)]


def random_starts(shape) -> torch.Tensor:
    """The starts of documents of some twenty tokens, and of one document in the last sequence."""
    documents = (torch.rand(shape[0], shape[3]) < 0.05).cumsum(dim=1)
    documents[-1] = 0
    return document_starts(documents)


def attend_and_back(attend, q, k, v, grad, starts=None) -> list[torch.Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, starts)
    out.backward(grad)
    return [out.detach(), q.grad, k.grad, v.grad]


def by_kernels(q, k, v, starts=None):
    return cpu_kernels.attend(q, k, v, starts)


def by_torch(q, k, v, starts=None):
    mask = None if starts is None else document_mask(starts)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


@pytest.mark.parametrize("in_documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES + BF16_SHAPES, ids=str)
@each_kind
def test_attention_and_its_gradients_are_those_of_fp64_as_exactly_as_torchs_own(build, dtype, floor, shape, in_documents):
    tensors = random_heads(shape, dtype)
    starts = random_starts(shape) if in_documents else None
    exact = attend_and_back(by_torch, *(x.double() for x in tensors), starts)
    for found, torchs, truth in zip(
        attend_and_back(by_kernels, *tensors, starts), attend_and_back(by_torch, *tensors, starts), exact, strict=True
    ):
        size, error, torchs_error = truth.norm(), (found - truth).norm(), (torchs - truth).norm()
        assert found.dtype == dtype and found.shape == truth.shape
        rounding = 1e-6 * tensors[3].norm()  # of sums that cancel: one token alone has no gradient by its query
        assert error <= floor * size + rounding
        assert error <= 1.5 * torchs_error + rounding


@each_kind
def test_large_scores_neither_overflow_nor_vanish(build, dtype, floor):
    """Each fifth of the keys has larger ones than all before: sums of other chunks of keys are scaled down to nothing."""
    q, k, v, grad = random_heads((1, 2, 2, 320, 32), dtype)
    tensors = [50 * q, k * (10 * (1 + torch.arange(320) // 64))[:, None].to(dtype), v, grad]
    exact = attend_and_back(by_torch, *(x.double() for x in tensors))
    for found, truth in zip(attend_and_back(by_kernels, *tensors), exact, strict=True):
        assert (found - truth).norm() <= 5 * floor * (truth.norm() + 50 * grad.norm())
    assert (attend_and_back(by_kernels, *tensors)[0] - exact[0]).norm() <= 5 * floor * exact[0].norm()


@each_kind
def test_a_token_does_not_see_those_behind_it_nor_other_documents(build, dtype, floor):
    q, k, v, _ = random_heads((1, 2, 2, 150, 32), dtype)
    starts = document_starts((torch.arange(150) >= 45).long()[None])
    whole, apart = by_kernels(q, k, v), by_kernels(q, k, v, starts)
    assert torch.equal(apart[:, :, :45], whole[:, :, :45]) and not torch.equal(apart[:, :, 45:], whole[:, :, 45:])
    second = [x[:, :, 45:].clone() for x in (q, k, v)]
    assert (apart[:, :, 45:] - by_kernels(*second)).abs().max() <= 4 * floor
    for x in (q, k, v):
        x[:, :, 45:] = 1e3
    for mask, before in ((None, whole), (starts, apart)):
        assert torch.equal(by_kernels(q, k, v, mask)[:, :, :45], before[:, :, :45])
    for x, y in zip((q, k, v), second, strict=True):
        x[:, :, :45], x[:, :, 45:] = 1e3, y
    assert torch.equal(by_kernels(q, k, v, starts)[:, :, 45:], apart[:, :, 45:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each_kind
def test_what_is_not_finite_stays_so(build, dtype, floor, bad):
    """The guard must see it: a vector's maximum, or an exponential, may pass a NaN over."""
    for place in range(3):
        for at in (5, 290):
            tensors = random_heads((1, 2, 2, 300, 32), dtype)
            tensors[place][0, 1, at, 7] = bad
            out, *gradients = attend_and_back(by_kernels, *tensors)
            assert not out[0, 1, at:].isfinite().all() and out[0, 0].isfinite().all()
            assert not all(gradient[0, 1].isfinite().all() for gradient in gradients)
    logits = torch.randn(3, 50).to(dtype)
    logits[1, 20] = bad
    losses = cpu_kernels.differentiate_(logits, torch.tensor([1, 2, 3]), 0.0)
    assert losses.isfinite().tolist() == [True, False, True]
    assert not logits[1].isfinite().all()


@each_kind
def test_the_number_of_threads_does_not_change_a_bit(build, dtype, floor):
    tensors, logits, labels = random_heads((3, 4, 2, 77, 32), dtype), torch.randn(13, 333), torch.arange(13)
    seen = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        gradients = logits.clone()
        seen.append([*attend_and_back(by_kernels, *tensors), cpu_kernels.differentiate_(gradients, labels, 0.1), gradients])
    for other in seen[1:]:
        assert all(map(torch.equal, seen[0], other))


def test_the_registered_operations_keep_torchs_rules():
    """Among them: shapes and strides are those that torch.compile was promised."""
    q, k, v, _ = random_heads((2, 4, 2, 40, 32), torch.float32)
    for starts in (None, random_starts((2, 4, 2, 40, 32))):
        torch.library.opcheck(cpu_kernels.attention, [*(x.clone().requires_grad_() for x in (q, k, v)), starts])


@pytest.mark.parametrize("vocab", [5, 64, 333])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_losses_and_gradients_are_those_of_torchs_operations(vocab, dtype, close, z_loss):
    torch.manual_seed(0)
    logits, labels = 5 * torch.randn(20, vocab).to(dtype), torch.randint(vocab, (20,))
    labels[3] = labels[11] = IGNORE
    gradients, expected, scored = logits.clone(), logits.clone(), labels != IGNORE
    losses = cpu_kernels.differentiate_(gradients, labels, z_loss)
    torch.testing.assert_close(losses, differentiate_(expected, labels, z_loss), rtol=1e-6, atol=1e-6)
    assert (gradients[scored] - expected[scored]).norm() <= close * expected[scored].norm()


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_outside_of_the_vocabulary_is_refused(label):
    with pytest.raises(IndexError, match="labels must be below 7, or -100"):
        cpu_kernels.differentiate_(torch.zeros(2, 7), torch.tensor([0, label]), 0.0)


def test_what_the_kernels_do_not_know_is_left_to_torch():
    q, k, v, _ = random_heads((1, 2, 2, 40, 32), torch.float32)
    starts = document_starts((torch.arange(40) >= 20).long()[None])
    expected = by_torch(q, k, v, starts)
    assert torch.equal(cpu_kernels.attend(q, k, v, document_mask(starts)), expected)
    assert not torch.equal(by_kernels(q, k, v, starts), expected)
    odd = [x[..., :24] for x in (q, k, v)]  # a head size that is no multiple of 16
    assert torch.equal(by_kernels(*odd), by_torch(*odd)) and torch.equal(by_kernels(*odd, starts), by_torch(*odd, starts))


# ---- building


@pytest.fixture
def nothing_built(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpu_kernels.library.cache_clear()
    yield
    cpu_kernels.library.cache_clear()


def test_a_built_library_is_found_again_and_a_damaged_one_is_reported(nothing_built, monkeypatch, run_main, tiny_words):
    def lanes():
        return cpu_kernels.library().lanes()

    found = exit_code(fork(lanes))  # in another process: this one would not load the file again
    [built] = [path for path in cache_folder().rglob("*") if path.is_file()]
    assert built.suffix == ".so" and built.parent.parent == cache_folder()
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: pytest.fail("built again"))
    assert exit_code(fork(lanes)) == found and found in (4, 8, 16)
    built.write_bytes(b"not a library")
    done = run_main("train", *tiny_words(**{"parallel.cpu_kernels": "true"}))
    assert done.returncode == 2 and f"cannot be built or loaded: {built}" in done.stderr


@pytest.mark.parametrize("compiler, said", [("no-such-compiler", "or set false"), ("c++ -no-such-option", "set CXX to another")])
def test_without_a_compiler_the_run_says_what_to_do_and_leaves_nothing(
    run_main, tiny_words, nothing_built, monkeypatch, compiler, said
):
    monkeypatch.setenv("CXX", compiler)
    done = run_main("train", *tiny_words(**{"parallel.cpu_kernels": "true"}))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: parallel.cpu_kernels: ")
    assert "no-such-" in done.stderr and said in done.stderr
    assert not list(cache_folder().rglob("*.so"))


def test_a_missing_compiler_is_reported(nothing_built, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="parallel.cpu_kernels: needs a C"):
        cpu_kernels.library()


# ---- in a run


def test_they_are_for_cpus_and_used_where_there_is_a_compiler(monkeypatch, request):
    def has(device, asked=None):
        return kernels.has_cpu_kernels(asked, torch.device(device))

    assert [has("cpu"), has("cpu", True), has("cpu", False), has("cuda")] == [True, True, False, False]
    with pytest.raises(ConfigError, match="parallel.cpu_kernels: is for CPUs, and the device is cuda"):
        has("cuda", True)
    request.getfixturevalue("nothing_built")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not has("cpu")
    with pytest.raises(ConfigError, match="no-such-compiler"):
        has("cpu", True)


def test_a_run_learns_the_same_and_resumes_with_the_same_bits(tiny_args):
    plain = trained(tiny_args("plain", **{"parallel.cpu_kernels": False}))
    kernels = trained(tiny_args("kernels", **{"parallel.cpu_kernels": True}))
    resumed = trained(cut(tiny_args("cut", **{"parallel.cpu_kernels": True}), steps=7))
    plain, kernels, resumed = ([loss for (loss,) in history(c.run_dir, LOSS)] for c in (plain, kernels, resumed))
    assert resumed == kernels != plain
    assert kernels == pytest.approx(plain, rel=1e-6)


def test_a_compiled_run_learns_the_same(run_cli, tiny_words, tiny_args, read_metrics, tmp_path):
    trained(tiny_args("plain", total_steps=4, **{"parallel.cpu_kernels": False}))
    done = run_cli("train", *tiny_words("compiled", total_steps=4, **{"parallel.compile": "true"}))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^the first step took \S+ (s|min), including torch.compile; loss \d", done.stdout, re.MULTILINE)
    losses = {name: [line["train/CrossEntropyLoss"] for line in read_metrics(tmp_path / name)] for name in ("plain", "compiled")}
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-5) and losses["compiled"] != losses["plain"]


# ---- the choice between this attention and torch's


@pytest.fixture
def times(tmp_path, monkeypatch):
    """(ours, torch's) seconds that the next measurement finds, and the shapes measured so far. Every shape is worth measuring."""
    found, built = SimpleNamespace(seconds=(1.0, 2.0), measured=[]), cpu_kernels.library()
    monkeypatch.setattr(cpu_kernels, "library", lambda: built)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def measure(shape):
        found.measured.append(shape)
        return found.seconds

    monkeypatch.setattr(cpu_kernels, "MEASURED_FLOPS", 0)
    monkeypatch.setattr(cpu_kernels, "time_attention", measure)
    return found


@pytest.mark.parametrize("seconds, chosen", [((1.0, 2.0), True), ((1.0, 0.99), True), ((1.0, 0.9), "loss")])
def test_torchs_attention_is_used_where_it_is_measured_to_be_clearly_faster(times, tiny_args, seconds, chosen):
    times.seconds = seconds
    assert kernels.choose_cpu_kernels(tiny_args()) == chosen
    assert kernels.choose_cpu_kernels(tiny_args(), recorded=True) is True
    times.seconds = seconds[::-1]
    assert kernels.choose_cpu_kernels(tiny_args()) == chosen and len(times.measured) == 1  # once per machine


def test_each_class_of_shapes_is_measured_once_and_a_damaged_measurement_again(times, tiny_args):
    documents = {"data.document_mask": True, "data.eos_id": 511}
    for changes in ({}, documents, {"parallel.precision": "bf16"}, {"micro_batch_size": 8}, {"model.seq_len": 60}):
        kernels.choose_cpu_kernels(tiny_args(**changes))
    assert [(shape.dtype, shape.tokens, shape.in_documents) for shape in times.measured] == [
        ("fp32", 64, False), ("fp32", 64, True), ("bf16", 64, False)
    ]  # fmt: skip
    for file in cache_folder().rglob("*.json"):
        file.write_text("[1.0]")
    assert kernels.choose_cpu_kernels(tiny_args()) is True and len(times.measured) == 4


def test_nothing_is_measured_for_small_shapes_nor_where_bits_must_never_change(times, tiny_args, monkeypatch):
    times.seconds = (2.0, 1.0)
    assert kernels.choose_cpu_kernels(tiny_args(determinism="run")) is True
    monkeypatch.setattr(cpu_kernels, "MEASURED_FLOPS", 2e8)
    assert kernels.choose_cpu_kernels(tiny_args()) is True
    monkeypatch.setattr(cpu_kernels, "MEASURED_FLOPS", 0)
    monkeypatch.setattr(cpu_kernels, "replace_file", lambda *words: (_ for _ in ()).throw(OSError))
    assert not times.measured and kernels.choose_cpu_kernels(tiny_args()) is True  # it could not be kept
    assert times.measured and not list(cache_folder().rglob("*.json"))


def test_the_choice_is_kept_on_resume_and_replayed_whatever_would_be_measured_now(times, tiny_args):
    def chosen(config):
        return [event["cpu_kernels"] for event in events_of(config.run_dir, "start", "resume")]

    def losses(config):
        return [loss for (loss,) in history(config.run_dir, LOSS)]

    ours = trained(tiny_args("ours"))
    times.seconds = (2.0, 1.0)
    for file in cache_folder().rglob("*.json"):
        file.unlink()
    config = trained(tiny_args("torchs"))
    started = cut(tiny_args("cut"), steps=7)
    times.seconds = (1.0, 2.0)
    for file in cache_folder().rglob("*.json"):
        file.unlink()
    resumed = trained(started)
    assert chosen(ours) == [True] and chosen(config) == ["loss"] and chosen(resumed) == ["loss", "loss"]
    assert losses(resumed) == losses(config) != losses(ours)
    assert folders.read_state(folders.newest_folder(Path(config.run_dir)))["cpu_kernels"] == "loss"
    assert replay(Path(config.run_dir), 3).differing == []


def test_the_choice_of_rank_0_is_that_of_all_ranks(times, tiny_args):
    """On forked ranks, each with its own times: by its own choice, rank 1 would wait in vain or learn something else."""

    def alone(world):
        times.seconds = (2.0, 1.0) if world.is_main else (1.0, 2.0)
        trained(tiny_args(), world)
        return len(times.measured)

    assert on_ranks(2, alone) == [1, 0]
    assert [event["cpu_kernels"] for event in events_of(tiny_args().run_dir, "start")] == ["loss"]


def test_doctor_and_bench_show_the_choice_with_both_times(times, tiny_args, tiny_words):
    times.seconds = (0.002, 0.001)
    (finding,) = [found.finding for found in doctor.examine(tiny_args()) if found.check == "kernels"]
    assert finding.startswith("the loss uses the C++ kernels") and "torch's kernel: 1.0 ms where the C++ kernel" in finding
    assert finding.endswith("takes 2.0 ms")
    figures = bench.measure([], tiny_words(), steps=1, warmup=1)
    assert figures["attention"] in finding and figures["attention"] in table(figures)


def test_a_measurement_is_short(monkeypatch):
    shape = cpu_kernels.AttentionShape("fp32", 64, 1, 8192, True, 1).fitted()
    assert shape.tokens == 1024 and shape.flops < cpu_kernels.MOST_FLOPS
    monkeypatch.setattr(cpu_kernels, "ENOUGH_SECONDS", 0)
    ours, torchs = cpu_kernels.time_attention(cpu_kernels.AttentionShape("bf16", 64, 2, 256, True, 1))
    assert min(ours, torchs) > 0
