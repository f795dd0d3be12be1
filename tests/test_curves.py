"""Curves: what is read, what is kept of long runs, and that what is drawn is what was logged."""

from __future__ import annotations

import argparse
import json
import os
import socket

import numpy as np
import pytest
from curves_runs import PAUSE_SECONDS, STEP_SECONDS, make_run
from runs import lines_of

from olmo_train.commands import curves as command
from olmo_train.curves import exports, panels, terminal, thin
from olmo_train.curves.runs import Run, Series, read_run
from olmo_train.errors import ConfigError, DataError


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "tiny", steps=400, spikes=(205,), resume_at=120)


def draw(*words) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(word) for word in words]))


# ---------------------------------------------------------------- reading


def test_every_number_that_was_logged_is_read_bit_for_bit(run_dir):
    run = read_run(run_dir)
    for line in lines_of(run_dir):
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                at = np.searchsorted(run.series[name].steps, line["step"])
                assert run.series[name].values[at] == value


def test_a_half_written_last_line_is_passed_over_and_a_broken_one_is_told(run_dir):
    whole = read_run(run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 410, "train/CrossEntr')
    assert read_run(run_dir).last_step == 400 and read_run(run_dir).notes == []
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 420, "train/CrossEntropyLoss": 1.0}\n')
    run = read_run(run_dir)
    assert len(run.series["train/CrossEntropyLoss"]) == len(whole.series["train/CrossEntropyLoss"]) + 1
    assert "1 broken line" in run.notes[0]


def test_evaluations_may_have_a_line_of_their_own_and_the_later_of_two_values_counts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "train/CrossEntropyLoss": 9.0}\n{"step": 2, "train/CrossEntropyLoss": 8.0}\n'
        '{"step": 2, "eval/web/CrossEntropyLoss": 8.5}\n{"step": 2, "train/CrossEntropyLoss": 7.0}\n'
        '{"step": 3, "train/CrossEntropyLoss": null}\n{"step": 4, "train/CrossEntropyLoss": NaN}\n'
    )
    run = read_run(tmp_path)
    assert run.series["train/CrossEntropyLoss"].steps.tolist() == [1, 2, 3, 4]
    np.testing.assert_equal(run.series["train/CrossEntropyLoss"].values, [9.0, 7.0, np.nan, np.nan])
    assert run.series["eval/web/CrossEntropyLoss"].values.tolist() == [8.5]


def test_time_does_not_count_the_pause_before_a_resume(run_dir):
    elapsed = read_run(run_dir).elapsed
    assert elapsed.values[-1] == pytest.approx(400 * STEP_SECONDS, rel=1e-6)
    assert elapsed.values[-1] < PAUSE_SECONDS


@pytest.mark.parametrize("event", ["start", "resume", "branch"])
def test_the_time_of_an_attempt_begins_at_its_start(tmp_path, event):
    rows = [{"step": 10 * i, "time": 90.0 + 10 * i, "attempt": 1, "x": 1.0} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": event, "step": 5, "time": 90.0}) + "\n")
    assert read_run(tmp_path).elapsed.values.tolist() == [10.0, 20.0]


def test_a_run_given_in_tokens_ends_at_the_step_that_its_start_logged(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "train/CrossEntropyLoss": 7.0}\n')
    (tmp_path / "config.yaml").write_text("total_steps: null\ntotal_tokens: 2048\n")
    event = {"event": "start", "step": 0, "time": 1.0, "total_steps": 8}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    run = read_run(tmp_path)
    assert not run.ended and "step 4 of 8," in terminal.headline(run)
    (tmp_path / "metrics.jsonl").write_text('{"step": 8, "train/CrossEntropyLoss": 7.0}\n')
    assert read_run(tmp_path).ended
    (tmp_path / "events.jsonl").write_text('{"event": "finish", "step": 8, "time": 1.0}\n')  # of an older version
    assert read_run(tmp_path).ended


def test_numbers_and_words_that_nothing_can_hold_end_no_curve(tmp_path):
    rows = [{"step": 1, "train/CrossEntropyLoss": 7.0, "throughput/total_flops": 10**400, "attempt": "first", "time": 10**400},
            {"step": 1e30, "train/CrossEntropyLoss": 6.0}, {"step": 10**400, "train/CrossEntropyLoss": 6.0},
            {"step": 2, "train/CrossEntropyLoss": 5.0, "time": 3.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(tmp_path)
    assert run.series["train/CrossEntropyLoss"].values.tolist() == [7.0, 5.0] and run.last_step == 2
    assert run.series["throughput/total_flops"].values.tolist() == [np.inf]


def test_a_figure_shows_names_as_they_are(tmp_path):
    rows = [{"step": s, "train/source/_b/CrossEntropyLoss": 7.0 - s, "train/source/$x_{$/CrossEntropyLoss": 6.0, "$x_{$": 1.0}
            for s in (1, 2)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(tmp_path, "--output", tmp_path / "f.svg", "--metric", "*x*", "--metric", "*_b*", "--label", "$x_{$")
    text = (tmp_path / "f.svg").read_text()
    assert "<!--  _b -->" in text and "<!-- $x_{$ -->" in text


def test_evaluations_between_logged_steps_find_their_tokens(run_dir):
    run = read_run(run_dir)
    tokens = panels.axes([run])["tokens"].at(run, np.array([0, 15, 400]))
    assert tokens.tolist() == [0, 15 * 32 * 512, 400 * 32 * 512]


def test_a_wandb_history_reads_as_the_run_it_came_from(run_dir, tmp_path):
    rows = [{("_step" if k == "step" else k): v for k, v in line.items()} for line in lines_of(run_dir)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = sorted({key for row in rows for key in row})
    table = [",".join(columns)] + [",".join(str(row.get(key, "")) for key in columns) for row in rows]
    (tmp_path / "history.csv").write_text("\n".join(table) + "\n")
    runs = exports.read_runs([run_dir, tmp_path / "history.jsonl", tmp_path / "history.csv"])
    for run in runs[1:]:
        for name in ("train/CrossEntropyLoss", "eval/web/CrossEntropyLoss", "throughput/total_tokens"):
            np.testing.assert_array_equal(run.series[name].steps, runs[0].series[name].steps)
            np.testing.assert_array_equal(run.series[name].values, runs[0].series[name].values)


def test_a_wandb_chart_is_split_into_its_runs(tmp_path):
    chart = tmp_path / "chart.csv"
    chart.write_text(
        '"Step","a - train/CrossEntropyLoss","a - train/CrossEntropyLoss__MIN","b - train/CrossEntropyLoss"\n'
        '"10","3.5","3.5",""\n"20","3.25","3.25","3.75"\n'
    )
    a, b = exports.read_runs([chart])
    assert (a.name, b.name) == ("a", "b") and list(a.series) == ["train/CrossEntropyLoss"]
    assert a.series["train/CrossEntropyLoss"].values.tolist() == [3.5, 3.25]
    assert b.series["train/CrossEntropyLoss"].steps.tolist() == [20]


def test_flops_of_the_public_olmo_runs_are_in_units_of_1e9(tmp_path):
    (tmp_path / "olmo.jsonl").write_text('{"_step": 1, "throughput/total_training_Gflops": 2.5}\n')
    assert exports.read_runs([tmp_path / "olmo.jsonl"])[0].series["throughput/total_flops"].values.tolist() == [2.5e9]


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    paths = [make_run(tmp_path / parent / "tiny", steps=40) for parent in ("a", "b")]
    assert [run.name for run in exports.read_runs(paths)] == ["a/tiny", "b/tiny"]
    assert [run.name for run in exports.read_runs(paths, ["left", "right"])] == ["left", "right"]


# ---------------------------------------------------------------- long runs


def long_series(n: int = 1_000_000) -> Series:
    values = np.random.default_rng(0).normal(3, 0.01, n)
    values[333_333], values[777_777], values[500_000] = 11.0, -2.0, np.nan
    return Series(np.arange(1, n + 1), values)


def test_a_thinned_series_keeps_its_spikes_its_ends_and_what_is_not_finite():
    series = long_series()
    kept = thin.thin(series, 4000)
    assert len(kept) <= 4000
    np.testing.assert_array_equal(kept.values, series.values[kept.steps - 1])  # untouched values at their own steps
    for index in (0, 333_333, 500_000, 777_777, 999_999):
        assert index + 1 in kept.steps


def test_a_thinned_series_shows_the_first_steps_on_a_log_axis():
    kept = thin.thin(long_series(), 4000)
    assert all(((kept.steps >= 10**k) & (kept.steps < 10 ** (k + 1))).sum() >= 9 for k in range(6))


def test_a_short_series_is_kept_whole():
    series = Series(np.arange(4000), np.random.default_rng(0).normal(size=4000))
    assert thin.thin(series, 4000) is series


def test_bucket_means_are_means_and_not_means_of_extremes():
    values = np.zeros(100_000)
    values[::100] = 1.0  # the extremes of a bucket average to about 0.5, its values to 0.01
    means = thin.means(Series(np.arange(100_000), values), 1000)
    assert len(means) <= 1000
    late = means.values[means.steps > 50_000]
    assert late.mean() == pytest.approx(0.01, rel=0.1) and late.max() < 0.1


def test_smoothing_counts_in_steps_and_leaves_a_constant_alone():
    constant = Series(np.array([1, 2, 50, 400]), np.full(4, 2.5))
    np.testing.assert_allclose(thin.smooth(constant, 30).values, 2.5, rtol=1e-15)
    fine = Series(np.arange(0, 3001), np.append(np.zeros(2001), np.ones(1000)))
    coarse = Series(fine.steps[::10], fine.values[::10])
    for series, every in ((fine, 1), (coarse, 10)):
        smoothed = thin.smooth(series, 100).values[:: 10 // every]  # of the steps 0, 10, 20, ...
        assert smoothed[200] == pytest.approx(0.5, abs=0.06)  # to both sides alike: no lag
        assert smoothed[205] == pytest.approx(1 - 0.5**2 / 2, abs=0.06)  # half of the triangle's way
        assert smoothed[189] == 0 and smoothed[211] == pytest.approx(1)


def test_smoothing_neither_lags_behind_a_falling_line_nor_moves_its_start():
    line = Series(np.arange(0, 1001, 10), 11.0 - np.arange(0, 1001, 10) / 100)
    smoothed = thin.smooth(line, 80).values
    np.testing.assert_allclose(smoothed[:-9], line.values[:-9], rtol=1e-12)


# ---------------------------------------------------------------- what is drawn


def test_each_metric_stands_in_one_panel_and_what_fits_none_has_its_own(run_dir):
    run = read_run(run_dir)
    run.series["my/metric"] = run.series["train/CrossEntropyLoss"]
    chosen = panels.choose([run])
    drawn = [metric for curves in chosen for metric in curves.metrics]
    assert len(drawn) == len(set(drawn))
    by_title = {curves.panel.title: curves.metrics for curves in chosen}
    assert by_title["Loss"] == {
        "train/CrossEntropyLoss": "training",
        "eval/web/CrossEntropyLoss": "validation web",
        "eval/code/CrossEntropyLoss": "validation code",
    }
    assert list(by_title)[-1] == "my/metric" and "time" not in drawn and "train/Perplexity" not in drawn


def test_a_metric_is_chosen_by_name_or_pattern_and_an_unknown_one_names_the_nearest(run_dir):
    run = read_run(run_dir)
    assert [list(c.metrics) for c in panels.choose([run], ["train/Perplexity"])] == [["train/Perplexity"]]
    assert len(panels.choose([run], ["train/source/*/CrossEntropyLoss"])[0].metrics) == 3
    with pytest.raises(ConfigError, match="did you mean 'train/Perplexity'"):
        panels.choose([run], ["train/perplexity"])
    other_names = {"lr": "optim/learning_rate_group0", "loss": "train/CrossEntropyLoss", "train/loss": "train/CrossEntropyLoss",
                   "grad_norm": "optim/total_grad_norm", "val_loss": "eval/web/CrossEntropyLoss",
                   "tokens/s": "throughput/tokens_per_second", "lerning_rate": "optim/learning_rate_group0"}  # fmt: skip
    for word, meant in other_names.items():
        with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
            panels.choose([run], [word])


@pytest.mark.parametrize("ending, magic", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_written_in_the_format_of_its_ending(run_dir, tmp_path, ending, magic):
    draw(run_dir, "--output", tmp_path / "new" / f"loss.{ending}", "--smooth", 50, "--x", "tokens")
    assert (tmp_path / "new" / f"loss.{ending}").read_bytes().startswith(magic)


def test_a_figure_marks_events_above_the_plot_and_a_legend_names_each_kind_once(run_dir, tmp_path):
    import matplotlib

    with open(run_dir / "events.jsonl", "a") as events:
        for name, step in (("resume", 100), ("spike", 200), ("spike", 202), ("rewind", 204)):
            events.write(json.dumps({"event": name, "step": step, "time": 0}) + "\n")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(run_dir, "--output", tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert [text.count(f">{word}<") for word in ("spike", "skip", "rewind", "resume", "save", "signal")] == [1, 1, 1, 1, 1, 0]


def test_a_figure_of_several_runs_names_them_and_its_axes(run_dir, tmp_path):
    other = make_run(tmp_path / "other", steps=300, seed=1, peak_lr=6e-4)
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        draw(run_dir, other, "--output", tmp_path / "a.svg", "--x", "time")
        draw(run_dir, other, "--output", tmp_path / "b.svg", "--x", "time")
    text = (tmp_path / "a.svg").read_text()
    for word in ("tiny", "other", "minutes of training", "nats per token", "validation web", "clip 1"):
        assert word in text
    assert text == (tmp_path / "b.svg").read_text()


def test_the_terminal_plot_fits_its_width_and_a_pipe_gets_no_colours(run_dir, capsys, monkeypatch):
    for columns in (60, 132):
        monkeypatch.setenv("COLUMNS", str(columns))
        draw(run_dir, "--x", "tokens", "--log-x")
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines()[1:])) <= columns and "\x1b" not in text
        assert "step 400 of 400" in text and "validation web" in text and "tokens" in text


def test_a_terminal_of_few_rows_gets_a_picture_that_fits(run_dir, tmp_path):
    runs = [read_run(run_dir)]
    for rows in (24, 40):
        for drawn in (runs, runs * 12):
            look = terminal.Look(panels.axis_of(drawn, "step"), width=80, height=rows - 1, color=False)
            chosen = [curves for curves in panels.choose(drawn) if curves.panel.title in terminal.FIRST]
            lines = terminal.draw_terminal(drawn, chosen, look).splitlines()
            assert 16 <= len(lines) <= rows - 1 and max(map(len, lines)) <= 80
            assert any(line.startswith("Loss (nats per token)") for line in lines)


def test_the_terminal_marks_events_in_the_columns_of_their_steps(run_dir):
    runs = [read_run(run_dir)]
    look = terminal.Look(panels.axis_of(runs, "step"), color=False)
    lines = terminal.draw_terminal(runs, panels.choose(runs)[:1], look).splitlines()
    row = next(line for line in lines if "▼" in line and not line.startswith("tiny"))
    ticks = next(i for i, line in enumerate(lines) if line.lstrip().startswith("└"))
    columns = [i for i, sign in enumerate(lines[ticks]) if sign in "┬┐"]
    at = dict(zip(map(int, lines[ticks + 1].split()), columns, strict=True))
    assert abs(row.index("▼") - at[200]) <= 1
    assert abs(row.index("▶") - (0.8 * at[100] + 0.2 * at[200])) <= 1  # step 120


@pytest.mark.parametrize("width, rows", [(80, 24), (140, 27), (140, 30), (140, 40)])
def test_the_numbers_of_the_y_axis_never_share_a_row(tmp_path, monkeypatch, width, rows):
    runs = [read_run(make_run(tmp_path / str(rate), steps=400, peak_lr=rate)) for rate in (3e-4, 1e-3)]
    texts, tick_text = [], panels.tick_text
    monkeypatch.setattr(panels, "tick_text", lambda *words: texts.append(tick_text(*words)) or texts[-1])
    look = terminal.Look(panels.axis_of(runs, "step"), width=width, height=rows - 1, color=False)
    chosen = [curves for curves in panels.choose(runs) if curves.panel.title in terminal.FIRST]
    lines = terminal.draw_terminal(runs, chosen, look).splitlines()
    shown, on_y = [], []
    for line, below in zip(lines, lines[1:], strict=False):
        if "┤" in line:
            on_y.insert(0, line.split("┤")[0].strip())
        elif line.lstrip().startswith("└"):
            shown, on_y = shown + below.split() + on_y, []
    assert shown == texts


def test_rows_to_spare_are_shared_by_the_plots_and_hues_and_symbols_are_named_once(run_dir, tmp_path):
    runs = [read_run(run_dir), read_run(make_run(tmp_path / "other", steps=400))]
    look = terminal.Look(panels.axis_of(runs, "step"), width=200, height=49)
    chosen = [curves for curves in panels.choose(runs) if curves.panel.title in terminal.FIRST]
    lines = terminal.draw_terminal(runs, chosen, look).splitlines()
    titles = [i for i, line in enumerate(lines) if line.startswith(("Loss", "Gradient norm", "Learning rate"))]
    assert np.diff([*titles, len(lines)])[1:].tolist() == [terminal.LOW + 1] * 2 and len(lines) == 49
    assert [lines[titles[0]].count(name) for name in ("tiny", "other", "training", "validation web")] == [1, 1, 1, 1]


def test_a_folder_stands_for_all_runs_below_it(tmp_path):
    for name in ("a", "deep/b"):
        make_run(tmp_path / "runs" / name, steps=40)
    (tmp_path / "runs/new").mkdir()
    (tmp_path / "runs/new/metrics.jsonl").touch()  # just started
    assert [run.name for run in exports.read_runs([tmp_path / "runs"])] == ["a", "deep/b"]


@pytest.fixture
def family(tmp_path):
    """A run of 400 steps, and a branch from its step 200."""
    trunk, branch = (make_run(tmp_path / name, steps=400, seed=i) for i, name in enumerate(("trunk", "branch")))
    lines = [line for line in lines_of(branch) if line["step"] > 200]
    (branch / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = trunk / "checkpoints/step-0000200"
    event = {"event": "branch", "step": 200, "time": 1.7e9 + 200 * STEP_SECONDS, "checkpoint": str(checkpoint)}
    (branch / "events.jsonl").write_text(json.dumps(event) + "\n")
    return trunk, branch


def test_a_branch_begins_at_the_last_point_of_its_parent_or_has_the_parent_before_it(family):
    trunk, branch = exports.read_runs(family)
    for name in ("train/CrossEntropyLoss", "throughput/total_tokens"):
        assert branch.series[name].steps[:2].tolist() == [200, 210]
        assert branch.series[name].values[0] == trunk.series[name].values[trunk.series[name].steps == 200]
    assert branch.elapsed.values[-1] == pytest.approx(400 * STEP_SECONDS)
    (alone,) = exports.read_runs(family[1:])
    assert alone.series["train/CrossEntropyLoss"].steps.tolist() == list(range(10, 401, 10))


def test_more_than_eight_runs_share_the_hue_of_their_group(tmp_path):
    runs = [read_run(make_run(tmp_path / f"r{i}", steps=20, seed=i, peak_lr=[1e-4, 3e-4][i % 2])) for i in range(9)]
    assert panels.hues(runs[:8])[1] == list(range(8))
    assert panels.hues(runs) == (["peak_lr 0.0001", "peak_lr 0.0003"], [0, 1] * 4 + [0])


def test_a_metric_that_repeats_another_is_drawn_once(run_dir):
    run = read_run(run_dir)
    assert "throughput/device/tokens_per_second" in [metric for curves in panels.choose([run]) for metric in curves.metrics]
    run.series["throughput/device/tokens_per_second"] = run.series["throughput/tokens_per_second"]
    assert "Throughput per device" not in [curves.panel.title for curves in panels.choose([run])]
    assert panels.choose([run], ["throughput/device/*"])[0].panel.title == "Throughput per device"


def test_ticks_of_a_log_axis_are_few_and_never_touch():
    for low in (0.3, 0.75, 1.0, 17.0):
        for ratio in (1.1, 2, 2.9, 4, 7, 30, 90, 500, 1e5):
            ticks = panels.log_ticks(low, low * ratio)
            gaps = np.diff(np.log10(ticks)) / np.log10(ratio)
            assert 2 <= len(ticks) <= 9 and gaps.min() > 0.05, (low, ratio, ticks)


def test_a_run_is_running_while_the_process_in_its_lock_lives(run_dir):
    assert read_run(run_dir).state == "finished"
    whole = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(whole[:-1]))
    assert read_run(run_dir).state == "stopped"
    for pid, state in ((os.getpid(), "running"), (2**30, "stopped")):
        (run_dir / ".lock").write_text(f"process {pid} on {socket.gethostname()} since 2024-01-01 00:00:00\n")
        assert read_run(run_dir).state == state


def test_following_waits_for_the_first_metrics_and_stops_at_the_last_step(run_dir, capsys, monkeypatch):
    whole = (run_dir / "metrics.jsonl").read_bytes()
    (run_dir / "metrics.jsonl").write_bytes(b"")
    monkeypatch.setattr(command.time, "sleep", lambda _: (run_dir / "metrics.jsonl").write_bytes(whole))
    draw(run_dir, "--follow")
    out = capsys.readouterr().out
    assert "waiting" in out and "holds no metrics yet" in out and "step 400 of 400" in out


@pytest.mark.parametrize(
    "words, error, code, told",
    [
        (["{tmp}/nowhere"], DataError, 3, "does not exist"),
        (["{tmp}/none"], DataError, 3, "holds no metrics.jsonl"),
        (["{tmp}/empty"], DataError, 3, "no metrics yet"),
        (["{tmp}/notes.txt"], DataError, 3, ".csv or .jsonl"),
        (["{run}", "--metric", "train/loss"], ConfigError, 2, "no run has the metric"),
        (["{run}", "--output", "{tmp}/a.gif"], ConfigError, 2, ".html, .png, .svg or .pdf"),
        (["{run}", "--output", "{tmp}/a.png", "--follow"], ConfigError, 2, "leave out --output"),
        (["{run}", "--label", "a", "--label", "b"], ConfigError, 2, "2 labels for 1 run"),
        (["{tmp}/plain.jsonl", "--x", "tokens"], ConfigError, 2, "known here: step"),
    ],
)
def test_wrong_input_is_told_with_the_way_out(run_dir, tmp_path, words, error, code, told):
    (tmp_path / "none").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "plain.jsonl").write_text('{"_step": 1, "train/CrossEntropyLoss": 2.0}\n')
    with pytest.raises(error, match=told) as caught:
        draw(*[word.format(tmp=tmp_path, run=run_dir) for word in words])
    assert caught.value.exit_code == code


def test_a_run_with_a_single_line_is_drawn_everywhere(tmp_path, capsys):
    run_dir = make_run(tmp_path / "one", steps=10)
    draw(run_dir)
    for ending in ("html", "png"):
        draw(run_dir, "--output", tmp_path / f"one.{ending}")
    assert isinstance(read_run(run_dir), Run)
