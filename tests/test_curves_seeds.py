"""Curves: runs that differ only in their seed are drawn as their mean, with a band from the lowest to the highest."""

from __future__ import annotations

import json

import numpy as np
import pytest
from curves_runs import make_run
from runs import lines_of

from olmo_train.curves import exports, page, panels, terminal

LOSS = "train/CrossEntropyLoss"


@pytest.fixture
def sweep(tmp_path):
    """Two learning rates with three seeds each."""
    return [
        make_run(tmp_path / f"lr{peak_lr:g}-seed{seed}", steps=100, seed=seed, peak_lr=peak_lr)
        for peak_lr in (3e-4, 1e-3)
        for seed in (1, 2, 3)
    ]


def test_runs_that_differ_only_in_their_seed_are_one_run_with_their_mean_and_range(sweep):
    low_lr, high_lr = exports.read_runs(sweep)
    assert [low_lr.name, high_lr.name] == ["lr0.0003 (3 seeds)", "lr0.001 (3 seeds)"]
    logged = np.array([[line[LOSS] for line in lines_of(run_dir)] for run_dir in sweep[:3]])
    np.testing.assert_allclose(low_lr.series[LOSS].values, logged.mean(0), rtol=1e-12)
    np.testing.assert_array_equal(low_lr.spread[LOSS], [logged.min(0), logged.max(0)])
    assert [run.name for run in exports.read_runs(sweep, each_seed=True)] == [run_dir.name for run_dir in sweep]
    assert [run.name for run in exports.read_runs(sweep, ["a", "b"])] == ["a", "b"]


def test_the_same_seed_twice_and_a_run_of_another_configuration_stay_apart(sweep, tmp_path):
    again = make_run(tmp_path / "again", steps=100, seed=1)
    assert len(exports.read_runs([*sweep[:3], again])) == 4
    assert len(exports.read_runs([sweep[0], sweep[3]])) == 2


def test_a_step_that_not_every_seed_has_logged_is_the_mean_of_those_that_have(sweep):
    whole = lines_of(sweep[0])
    (sweep[0] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole[:5]))
    (run,) = exports.read_runs(sweep[:3])
    last = [lines_of(run_dir)[-1][LOSS] for run_dir in sweep[1:3]]
    assert run.series[LOSS].values[-1] == pytest.approx(np.mean(last)) and run.last_step == 100
    assert not run.ended and run.state == "1 stopped, 2 finished"


def test_the_page_and_the_terminal_name_the_range_of_the_last_losses(sweep):
    runs = exports.read_runs(sweep)
    last = [lines_of(run_dir)[-1][LOSS] for run_dir in sweep[:3]]
    data = page.page_data(runs, panels.choose(runs), panels.View(panels.axis_of(runs, "step")))
    assert data["runs"][0]["summary"]["ranges"]["training"] == [min(last), max(last)]
    assert [row[0] for row in data["differences"]["rows"]] == ["optim.peak_lr"]
    curve = data["panels"][0]["curves"][0]
    assert curve["low"][-1] == min(last) and curve["high"][-1] == max(last)
    assert f"training {np.mean(last):.4f} ({min(last):.4f} to {max(last):.4f})" in terminal.headline(runs[0])


def test_a_figure_fills_the_band(sweep, tmp_path):
    from olmo_train.curves.write import write_curves

    for each_seed, bands in ((False, 2), (True, 0)):
        runs = exports.read_runs(sweep, each_seed=each_seed)
        write_curves(runs, panels.choose(runs, [LOSS]), tmp_path / "a.svg", panels.View(panels.axis_of(runs, "step")))
        assert (tmp_path / "a.svg").read_text().count('id="FillBetweenPolyCollection') == bands
