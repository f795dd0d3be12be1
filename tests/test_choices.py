"""What precision auto and compile null mean: arithmetic and one measurement, decided once for all ranks and kept on resume."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from runs import cut, events_of, history, trained

from olmo_train import config as configuration
from olmo_train.config import load
from olmo_train.errors import ConfigError
from olmo_train.guards.signals import StopSignals
from olmo_train.parallel import choices, kernels
from olmo_train.parallel.config import ParallelConfig
from olmo_train.run.open import open_run
from olmo_train.tools import doctor
from olmo_train.tools.replay import replay
from olmo_train.train_config import TrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(autouse=True)
def not_yet_measured():
    for measured in (choices.fast_precision, choices.missing_by_trial):
        measured.cache_clear()
    yield
    for measured in (choices.fast_precision, choices.missing_by_trial):
        measured.cache_clear()


@pytest.fixture
def chosen(monkeypatch):
    """chosen(precision, core_seconds): what this machine measures from now on, and what compiling saves for each token, layer and
    feature. Compiling itself is left out."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def choose(precision: str = "fp32", core_seconds: float = 0.0) -> None:
        monkeypatch.setattr(choices, "fast_precision", lambda on_gpu: (precision, "measured"))
        monkeypatch.setattr(choices, "FUSED_SECONDS", core_seconds)

    choose()
    return choose


def recorded(folder) -> tuple[str, str]:
    """(precision, compile) in the config.yaml of a folder."""
    parallel = configuration.decoded(configuration.read([Path(folder, "config.yaml")]))["parallel"]
    return parallel["precision"], parallel["compile"]


def none_missing() -> None:
    return None


# ---- the decisions


FIRST_RUN = [CONFIGS / "runs/first-run.yaml", CONFIGS / "data/first-run.yaml"]
BF16 = "parallel.precision=bf16"
SMALL = [
    "model.d_model=768", "model.n_layers=12", "model.n_heads=12", "model.mlp_hidden=2048", "model.seq_len=1024",
    "global_batch_size=8", "run_dir=any", "data.sources.a.path=any", "optim.warmup_steps=0",
]  # fmt: skip


@pytest.mark.parametrize(
    "files, words, cores, done, seconds, compiled",
    [
        (FIRST_RUN, ["parallel.precision=fp32"], 2, 0, 8.65, False),  # 550 x 2048 tokens x 4 x 192 x 20 ns / 2
        (FIRST_RUN, [BF16], 2, 0, 8.65, False),
        (FIRST_RUN, [BF16, "total_steps=3800"], 2, 0, 59.8, False),
        (FIRST_RUN, [BF16, "total_steps=3820"], 2, 0, 60.1, True),
        (FIRST_RUN, [BF16, "total_steps=3820"], 4, 0, 30.0, False),
        (FIRST_RUN, [BF16, "total_steps=3820"], 2, 20, 59.8, False),  # a branch that begins after step 20
        (FIRST_RUN, [BF16, "total_steps=3820"], 2, 4000, 0.0, False),
        ([], [*SMALL, "total_steps=78"], 2, 0, 58.9, False),
        ([], [*SMALL, "total_steps=80"], 2, 0, 60.4, True),
        ([], SMALL, 64, 0, 5760000, True),  # 2e12 tokens
    ],
)
def test_a_run_is_compiled_if_that_saves_twice_what_it_takes(files, words, cores, done, seconds, compiled):
    config = load(TrainConfig, files, words).in_steps()
    assert choices.seconds_saved(config, cores, done) == pytest.approx(seconds, rel=5e-3)
    found, (note,) = choices.choose_compile(config, cores, none_missing, done=done)
    assert found == compiled
    assert note.startswith("compiled: torch.compile saves about" if compiled else "not compiled: torch.compile would save about")
    assert note.endswith(" of this run, and takes about 30 s")


def test_what_is_missing_is_asked_only_if_compiling_pays_and_a_new_run_goes_without_silently():
    asked = []

    def missing() -> str:
        asked.append(1)
        return "a C++ compiler (g++ or $CXX)"

    short, long = (load(TrainConfig, [], [*SMALL, f"total_steps={steps}"]) for steps in (10, 1000))
    assert not choices.choose_compile(short, 2, missing)[0] and asked == []
    assert choices.choose_compile(long, 2, missing) == (False, []) and asked == [1]


@pytest.mark.parametrize(
    "saved, lacks, compiled, notes",
    [
        ({"compile": True}, None, True, []),
        ({"compile": False}, None, False, []),
        ({"compile": None}, None, False, []),  # by a version that did not compile on a CPU, or on a GPU
        ({}, None, False, []),
        ({"compile": True}, "g++", False, ["no longer compiled: torch.compile needs g++"]),
    ],
)
def test_a_resumed_run_keeps_what_was_chosen_however_long_it_is_now(saved, lacks, compiled, notes):
    for steps in (10, 10**6):
        config = load(TrainConfig, [], [*SMALL, f"total_steps={steps}"])
        assert choices.choose_compile(config, 2, lambda: lacks, saved) == (compiled, notes)


def test_precision_auto_is_measured_once_and_a_value_that_is_set_or_saved_is_kept(monkeypatch):
    monkeypatch.setattr(choices, "fast_precision", lambda on_gpu: ("bf16" if on_gpu else "fp32", "measured"))

    def choose(precision, on_gpu=False, saved=None):
        parallel, notes = choices.choose_precision(ParallelConfig(precision=precision), on_gpu, saved)
        return parallel.precision, notes

    assert choose("bf16") == ("bf16", []) and choose("fp32", saved={"precision": "bf16"}) == ("fp32", [])
    assert choose("auto") == ("fp32", ["parallel.precision auto is fp32: measured"])
    assert choose("auto", on_gpu=True)[0] == "bf16"
    assert choose("auto", saved={"precision": "bf16"}) == ("bf16", [])
    assert choose("auto", saved={})[0] == "fp32"  # of a checkpoint that was converted


@pytest.mark.parametrize("faster, precision", [(0.2, "fp32"), (1.0, "fp32"), (1.25, "fp32"), (1.4, "bf16"), (8.0, "bf16")])
def test_bf16_is_chosen_where_a_product_takes_less_time_by_the_clock(monkeypatch, faster, precision):
    clock = {"now": 0.0, "calls": 0}

    def linear(x, weight):
        clock["calls"] += 1
        slow = 3.0 if clock["calls"] <= 2 else 1.0  # the first calls of each, which do not count
        clock["now"] += slow * (1.0 / faster if x.dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(choices.time, "perf_counter", lambda: clock["now"])
    chosen, why = choices.fast_precision(on_gpu=False)
    assert chosen == precision and why == f"this CPU multiplies matrices in bf16 {faster:.2g} times as fast as in fp32"


@pytest.mark.parametrize("native, precision", [(True, "bf16"), (False, "fp32")])
def test_a_gpu_is_asked_for_bf16_that_is_not_emulated(monkeypatch, native, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert choices.fast_precision(on_gpu=True)[0] == precision


def test_this_machine_is_measured_without_an_error():
    assert choices.fast_precision(on_gpu=False)[0] in ("bf16", "fp32")


# ---- in a run


def test_both_are_recorded_and_kept_by_a_resume_that_would_choose_otherwise(tiny_args, chosen, capsys):
    open_config = tiny_args("auto", **{"parallel.precision": "auto"})
    explicit = trained(tiny_args("explicit", **{"parallel.precision": "bf16"}))
    chosen("bf16", core_seconds=1.0)
    cut(open_config, steps=7)
    out = capsys.readouterr().out
    assert "parallel.precision auto is bf16: measured" in out
    assert "compiled: torch.compile saves about 9.1 days of this run, and takes about 30 s" in out
    assert "bf16, C++ kernels, compiled" in out or "bf16, compiled" in out
    assert "compiling: the first step takes about half a minute longer" in out
    assert recorded(open_config.run_dir) == recorded(Path(open_config.run_dir, "checkpoints/step-0000005")) == ("bf16", True)
    chosen("fp32", core_seconds=0.0)
    trained(open_config)
    out = capsys.readouterr().out
    assert recorded(open_config.run_dir) == ("bf16", True) and "precision auto" not in out and "torch.compile saves" not in out
    assert history(open_config.run_dir) == history(explicit.run_dir)
    assert [event["config"]["parallel"]["compile"] for event in events_of(open_config.run_dir, "start", "resume")] == [True, True]


def test_a_branch_and_a_run_without_a_checkpoint_choose_again(tiny_args, chosen):
    words = {"parallel.precision": "auto", "checkpoint.interval_steps": 4}
    chosen("bf16", core_seconds=1.0)
    parent = cut(tiny_args("parent", **words), steps=4)
    chosen("fp32", core_seconds=1.0)
    branch = tiny_args("branch", total_steps=6, resume_from=parent.run_dir, **words)
    trained(branch)
    assert recorded(branch.run_dir) == ("fp32", True)
    chosen("fp32", core_seconds=30 / (512 * 2 * 64) / 2)  # 15 s a step: the two steps of the branch are not worth it
    branch = trained(replace(branch, run_dir=branch.run_dir + "-2"))
    assert recorded(branch.run_dir) == ("fp32", False)


def test_two_ranks_agree_on_what_rank_0_measures(tiny_args, monkeypatch):
    def opened(world) -> list:
        measured = ("bf16", "on rank 0") if world.is_main else ("fp32", "on rank 1")
        monkeypatch.setattr(choices, "fast_precision", lambda on_gpu: measured)
        monkeypatch.setattr(choices, "FUSED_SECONDS", 1.0 if world.is_main else 0.0)
        monkeypatch.setattr(choices, "missing_by_trial", none_missing if world.is_main else lambda: "a compiler")
        with open_run(tiny_args(**{"parallel.precision": "auto"}), world, StopSignals()) as run:
            return [run.config.parallel.precision, run.config.parallel.compile]

    assert on_ranks(2, opened) == [["bf16", True]] * 2


def test_determinism_leaves_the_run_uncompiled_and_any_explicit_value_stands(tiny_args, chosen):
    chosen("fp32", core_seconds=1.0)
    for name, words in (
        ("run", {"determinism": "run"}),
        ("world", {"determinism": "world"}),
        ("false", {"parallel.compile": False}),
    ):
        config = trained(tiny_args(name, total_steps=5, **words))
        assert recorded(config.run_dir) == ("fp32", False), name
    chosen("bf16")
    assert recorded(trained(tiny_args("true", total_steps=5, **{"parallel.compile": True})).run_dir) == ("fp32", True)


def test_without_a_compiler_null_trains_and_true_is_an_error(tiny_words, run_main, chosen, monkeypatch, tmp_path):
    chosen(core_seconds=1.0)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    done = run_main("train", *tiny_words("null", total_steps=5))
    assert done.returncode == 0 and "ompiled" not in done.stdout
    assert recorded(tmp_path / "null") == ("fp32", False)
    done = run_main("train", *tiny_words("true", total_steps=5, **{"parallel.compile": "true"}))
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
        "error: parallel.compile: needs a C++ compiler (g++ or $CXX), which is not found; install it, or set false"
    )


def test_a_compiler_that_fails_is_found_out_before_the_run(tiny_args, chosen, monkeypatch, caplog):
    def failing(function, **options):
        def fail(*inputs):
            raise RuntimeError("g++: no space left\nand more")

        return fail

    chosen(core_seconds=1.0)
    monkeypatch.setattr(torch, "compile", failing)
    with caplog.at_level(logging.WARNING):
        config = trained(tiny_args(total_steps=5))
    assert recorded(config.run_dir) == ("fp32", False)
    assert "torch.compile fails on this machine, so the run is not compiled: g++: no space left" in caplog.text


def test_a_batch_that_is_not_set_stays_that_of_the_checkpoint(tiny_args, chosen, monkeypatch):
    monkeypatch.setattr("olmo_train.train_config.batch_for", lambda model: 4)
    words = {"global_batch_size": None, "micro_batch_size": 2, "parallel.precision": "auto"}
    cut(tiny_args(**words), steps=5)
    monkeypatch.setattr("olmo_train.train_config.batch_for", lambda model: 8)
    config = trained(tiny_args(**words))
    assert configuration.decoded(configuration.read([Path(config.run_dir, "config.yaml")]))["global_batch_size"] == 4


def test_replay_uses_what_was_recorded_and_an_earlier_version_did_not_compile(tiny_args, chosen, monkeypatch):
    chosen("bf16", core_seconds=1.0)
    config = trained(tiny_args(total_steps=7, **{"parallel.precision": "auto"}))
    chosen("fp32")
    assert replay(Path(config.run_dir), 7).differing == []
    file = Path(config.run_dir, "events.jsonl")
    file.write_text(file.read_text().replace('"compile": true', '"compile": null'))
    chosen("fp32", core_seconds=1.0)
    seen, real = [], kernels.is_compiled
    monkeypatch.setattr("olmo_train.parallel.shard.kernels.is_compiled", lambda *about: seen.append(real(*about)) or seen[-1])
    assert replay(Path(config.run_dir), 7).differing == [] and set(seen) == {False}


# ---- the other verbs


def test_doctor_plan_and_bench_say_what_a_run_would_choose(tiny_args, tiny_words, run_main, chosen):
    words = tiny_words(**{"parallel.precision": "auto"})
    for precision, core_seconds, compiled in (("fp32", 0.0, False), ("bf16", 1.0, True)):
        chosen(precision, core_seconds)
        said = f"parallel.precision auto is {precision}: measured"
        about = f"{'compiled: torch.compile saves' if compiled else 'not compiled: torch.compile would save'} about"
        findings = {f.check: f for f in doctor.examine(tiny_args(**{"parallel.precision": "auto"}))}
        assert findings["parallel.precision"].finding == said
        assert findings["parallel.compile"].finding.startswith(about) and ("compile" in findings) == compiled
        assert not [finding for finding in findings.values() if finding.status == "problem"]
        plan = run_main("plan", *words)
        text = " ".join(plan.stdout.split())
        assert plan.returncode == 0 and f"P{said[1:]}." in text and about[1:] in text and f"{precision}, 2 x 4 sequences" in text
        bench = run_main("bench", *words, "--steps", 1, "--warmup", 1)
        assert f"precision         {precision}\n" in bench.stdout
        assert f"compiled          {'yes' if compiled else 'no'}\n" in bench.stdout


def test_a_plan_for_a_gpu_is_in_bf16_and_measures_nothing(tiny_words, run_main, monkeypatch):
    monkeypatch.setattr(choices, "fast_precision", lambda on_gpu: pytest.fail("measured"))
    done = run_main("plan", *tiny_words(**{"parallel.precision": "auto"}), "--gpu", "h100")
    assert done.returncode == 0 and "\nbf16, 2 x 4 sequences" in done.stdout


def test_doctor_knows_no_length_that_follows_from_missing_data(tiny_args, chosen, tmp_path):
    words = {"data.sources.a.path": tmp_path / "none.npy", "total_steps": None, "total_epochs": 1, "parallel.precision": "auto"}
    findings = doctor.examine(tiny_args(**words))
    assert [f.check for f in findings if f.status == "problem"] and "parallel.compile" not in {f.check for f in findings}


@pytest.mark.parametrize("value", ["true", "null", "1"])
def test_another_precision_is_refused(value):
    with pytest.raises(ConfigError, match="parallel.precision: .* is not a choice; known: auto, bf16, fp32"):
        load(TrainConfig, [], [*SMALL, f"parallel.precision={value}"])
