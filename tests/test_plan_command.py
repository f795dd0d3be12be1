"""`plan` as a user meets it: readable at 80 columns, honest about what it does not know, the same numbers as JSON."""

import json
import math
import os
from pathlib import Path

import pytest

from olmo_train.__main__ import main
from olmo_train.optim.config import OptimConfig
from olmo_train.optim.schedules import lr_at

OLMO_1B = str(Path(__file__).parent.parent / "configs" / "models" / "olmo-1b.yaml")
H100S = ("--gpus", "8", "--gpu", "h100")


@pytest.fixture
def plan(capsys, monkeypatch):
    """plan(*words): (exit code, stdout, stderr) of a run in a pipe of 80 columns, on a machine that takes 2 s for a step."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("olmo_train.commands.plan.cpu_seconds", lambda config: (2.0, 1.0))

    def run(*words):
        code = main(["plan", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_a_model_file_alone_makes_a_plan_that_fits_80_columns(plan):
    code, text, _ = plan(OLMO_1B, *H100S)
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    for figure in ("1,176,764,416", "7.866 GFLOPs", "18.83 GB", "assumed MFU 40%", "739,328", "Epochs are unknown"):
        assert figure in text


def test_json_holds_the_learning_rates_and_epochs_of_the_run(plan, tiny_words, tiny_tokens):
    code, text, _ = plan(*tiny_words(), f"data.validation.a.path={tiny_tokens}", "--json")
    printed = json.loads(text)
    assert code == 0
    config = OptimConfig(peak_lr=3e-3, warmup_steps=4)
    assert {m["step"]: m["lr"] for m in printed["milestones"]} == {
        step: lr_at(step, config, 12) for step in (1, 2, 4, 5, 6, 7, 8, 10, 11, 12)
    }
    assert printed["sources"]["a"]["epochs"] == 12 * 8 / ((40_000 - 1) // 64)
    assert printed["checkpoints_saved"] == 3 and printed["evaluations"] == 1


LENGTHS = [{"total_steps": "1e9"}, {"total_steps": "1e18"}, {"total_steps": None, "total_tokens": "1e30"}]


@pytest.mark.parametrize("words", LENGTHS)
def test_a_plan_of_any_length_is_arithmetic(plan, tiny_words, words):
    code, text, _ = plan(*tiny_words(**words, **{"eval.downstream": "[piqa]"}), "--json")
    printed = json.loads(text)
    steps = printed["total_steps"]
    assert code == 0 and steps == (math.ceil(1e30 / 512) if "total_tokens" in words else int(float(words["total_steps"])))
    assert printed["checkpoints_saved"] == -(-steps // 5) and printed["evaluations"] == -(-steps // 1000)
    assert printed["milestones"][-1]["step"] == steps
    assert printed["sources"]["a"]["epochs"] == pytest.approx(steps * 8 / ((40_000 - 1) // 64))


def test_a_warmup_that_fills_the_run_is_a_warning(plan, tiny_words):
    assert "optim.warmup_steps 4 fills the whole run of 3 steps" in " ".join(plan(*tiny_words(total_steps=3))[1].split())
    assert "fills the whole run" not in plan(*tiny_words(total_steps=5))[1]


def test_missing_data_leave_epochs_unknown_and_name_the_reason(plan, tiny_words):
    code, text, _ = plan(*tiny_words(**{"data.sources.a.path": "nowhere/tokens.npy"}), *H100S, "micro_batch_size=1")
    assert code == 0
    assert "Epochs are unknown" in text and "nowhere/tokens.npy" in text


def test_without_a_gpu_nothing_is_guessed(plan, tiny_words, monkeypatch):
    monkeypatch.setattr("olmo_train.plan.plan.detect", lambda: None)
    printed = json.loads(plan(*tiny_words(), "--json")[1])
    assert printed["cost"] is printed["fits"] is printed["gpu"] is None
    assert "unknown without a GPU" in plan(*tiny_words())[1]


def test_an_unknown_gpu_is_asked_for_its_figures(plan, tiny_words):
    code, _, error = plan(*tiny_words(), "--gpu", "h1000")
    assert code == 2
    for option in ("h1000", "--gpu-memory", "--gpu-peak", "--gpu-power", "did you mean 'h100'?"):
        assert option in error
    code, text, _ = plan(*tiny_words(), "--gpu", "h1000", "--gpu-memory", 96, "--gpu-peak", 2000, "--gpu-power", 900, "--json")
    gpu = json.loads(text)["gpu"]
    assert code == 0
    assert (gpu["memory_gb"], gpu["peak_flops"], gpu["power_watts"]) == (96, 2000e12, 900)


def test_a_figure_that_is_given_goes_before_the_table(plan):
    gpu = json.loads(plan(OLMO_1B, *H100S, "--gpu-power", 500, "--json")[1])["gpu"]
    assert (gpu["power_watts"], gpu["peak_flops"]) == (500, 989.4e12)


def test_assumptions_enter_the_result_and_stand_beside_it(plan):
    words = (OLMO_1B, *H100S, "--price", 2, "--mfu", 0.5, "--pue", 1.2, "--carbon", 0.1)
    cost = json.loads(plan(*words, "--json")[1])["cost"]
    assert cost["money"] == pytest.approx(2 * cost["gpu_hours"])
    assert cost["tokens_per_second"] / 8 == pytest.approx(62.9e3, rel=1e-3)
    assert cost["co2_kg"] == pytest.approx(cost["gpu_hours"] * 0.7 * 1.2 * 0.1)
    text = plan(*words)[1]
    for assumption in ("MFU 50%", "2 a GPU-hour", "PUE 1.2", "0.1 kg a kWh"):
        assert assumption in text


@pytest.mark.parametrize(
    "words, says",
    [
        (("--gpus", "3"), "global_batch_size: 8 is not a multiple"),
        (("--gpus", "0"), "--gpus: must be above 0"),
        (("--mfu", "40"), "--mfu: is a share"),
        (("--output", "plan.docx"), "'.docx' is not a format"),
        (("optim.peak=1",), "did you mean 'optim.peak_lr'?"),
    ],
)
def test_wrong_input_exits_2_with_one_line(plan, tiny_words, words, says):
    code, _, error = plan(*tiny_words(), *words)
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert says in error


@pytest.mark.parametrize("name", ["schedule.png", "new/schedule.svg", "schedule.html"])
def test_the_schedule_is_drawn_without_a_network(plan, tiny_words, tmp_path, name):
    code, text, _ = plan(*tiny_words(), "--output", tmp_path / name)
    assert code == 0 and text.rstrip().endswith(name)
    content = (tmp_path / name).read_bytes()
    assert len(content) > 5000
    assert b'src="http' not in content


def test_a_steps_time_tells_what_the_network_costs(plan):
    few, many = (
        json.loads(plan(OLMO_1B, "--gpus", gpus, "--gpu", "h100", "micro_batch_size=1", "--json")[1]) for gpus in (1, 1024)
    )
    assert few["step"]["exposed_seconds"] == pytest.approx(0, abs=1e-9) and few["step"]["mfu"] == pytest.approx(0.4)
    assert many["step"]["seconds"] > 1.2 * few["step"]["seconds"] / 1024
    text = plan(OLMO_1B, "--gpus", 1024, "--gpu", "h100", "micro_batch_size=1")[1]
    assert f"MFU {many['step']['mfu']:.1%}" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    assert json.loads(plan(OLMO_1B, "--gpus", 8, "--gpu", "l40s", "--json")[1])["step"] is None  # its links are not known here


def test_more_gpus_are_compared_in_a_table(plan):
    words = (OLMO_1B, "--gpus", 64, "--gpu", "h100", "micro_batch_size=1")
    printed = json.loads(plan(*words, "--json")[1])
    assert [row["gpus"] for row in printed["scaling"]] == [64, 256, 1024]  # 512 sequences a step: 2048 GPUs would have none
    assert printed["scaling"][0]["seconds"] == printed["step"]["seconds"]
    for row in printed["scaling"]:
        assert row["replicas"] == 1 and row["best"]["seconds"] <= row["seconds"]
    assert printed["scaling"][-1]["best"]["mfu"] > 1.2 * printed["scaling"][-1]["mfu"]
    text = plan(*words)[1]
    assert f"{printed['scaling'][-1]['best']['mfu']:.1%}" in text and max(map(len, text.splitlines())) <= 80


def test_without_a_gpu_the_plan_is_for_this_machines_cpu(plan, tiny_words, monkeypatch):
    code, text, _ = plan(*tiny_words(total_steps=3600))
    first = text.split("\n\n")[0]  # the run_dir of a test fills a line
    assert code == 0 and "1 process on this machine's CPU" in " ".join(first.split()) and "\nFits: " in first
    assert "about 2.0 h, 2 s per step" in text and max(map(len, text.splitlines())) <= 80
    printed = json.loads(plan(*tiny_words(total_steps=3600), "--json")[1])
    assert printed["machine"]["seconds"] == 7200 and printed["milestones"][-1]["seconds"] == 7200 and printed["machine"]["fits"]
    assert "busy" not in text
    monkeypatch.setattr("olmo_train.commands.plan.cpu_seconds", lambda config: (2.0, 2.5))
    text = " ".join(plan(*tiny_words(total_steps=3600))[1].split())
    assert "about 2.0 h, 2 s per step" in text and "busy: beside its other programs the run takes about 5.0 h" in text


@pytest.mark.parametrize("words", [(), ("--gpu", "a10g")])
def test_what_does_not_fit_is_said_first_and_last_and_exits_with_2(plan, tiny_words, monkeypatch, words):
    monkeypatch.setattr("olmo_train.plan.preflight.available_memory", lambda: 20 * 10**9)
    wide = {"model.d_model": 4096, "model.n_layers": 20, "model.mlp_hidden": 11008}
    code, text, error = plan(*tiny_words(**wide), *words)
    assert code == 2 and "\nDoes not fit: " in text.split("\n\n")[0]
    assert error.startswith("error: model: the run does not fit: ") and error.count("\n") == 1
    assert plan(*tiny_words(**wide), *words, "--json")[0] == 2


def test_the_time_of_a_cpu_is_measured_once_and_grows_with_layers_and_tokens(tiny_args, monkeypatch, tmp_path):
    from olmo_train.tools import cpu_time

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_time.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    first, slowdown = cpu_time.step_seconds(tiny_args())
    assert 0 < first < 60 and slowdown == 1
    monkeypatch.setattr(cpu_time, "_measure", lambda config: pytest.fail("measured twice"))
    assert cpu_time.step_seconds(tiny_args()) == (first, 1)
    timed = {"one": 1.0, "two": 1.5, "update": 0.0, "tokens": 256, "slowdown": 1.0}
    monkeypatch.setattr(cpu_time, "_cached", lambda config: timed)
    assert cpu_time.step_seconds(tiny_args(**{"model.n_layers": 5})) == (2 * (1.0 + 4 * 0.5), 1)  # 512 tokens


def test_beside_other_programs_cpu_time_counts_and_is_not_cached(tiny_args, monkeypatch, tmp_path):
    from olmo_train.tools import cpu_time

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load, seconds = [9.0 * os.cpu_count()], [0.0, 0.0]
    monkeypatch.setattr(cpu_time.os, "getloadavg", lambda: (load[0], 0.0, 0.0))
    monkeypatch.setattr(cpu_time.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(cpu_time.time, "thread_time", lambda: seconds[1])

    def call():
        """A second of CPU time that takes four."""
        seconds[:] = seconds[0] + 4, seconds[1] + 1

    monkeypatch.setattr(cpu_time, "_times", lambda *functions, times=cpu_time._times: times(*[call] * len(functions)))
    tokens = cpu_time._measure(config := tiny_args())["tokens"]
    expected = config.tokens_per_step / tokens + 1  # its two blocks once for these tokens, and one update
    assert cpu_time.step_seconds(config) == (pytest.approx(expected), 4) and not (tmp_path / "cache").exists()
    load[0] = 0.0  # the same waiting without other programs is that for the other threads
    assert cpu_time.step_seconds(config) == (pytest.approx(4 * expected), 1) and any((tmp_path / "cache").rglob("*.json"))
