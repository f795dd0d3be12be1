"""The fit L(N, D) = E + A / N^a + B / D^b, its intervals, and the table that `ladder --fit` reads."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from olmo_train.errors import ConfigError, DataError
from olmo_train.predict.fit import LEVEL, Fit, Points, fit, read_points

AI2 = Path(__file__).parent / "references/olmo_ladder.csv"  # 16 runs of AI2, with their source
COLUMNS = ["c4_loss_nats", "hellaswag_bpb", "arc_easy_bpb", "arc_challenge_bpb", "piqa_bpb", "csqa_bpb", "socialiqa_bpb",
           "openbookqa_bpb"]  # fmt: skip


def law(n, d):
    """Hoffmann et al. 2022, approach 3."""
    return 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28


def synthetic(sizes: int = 6, multiples=(0.5, 1, 2, 4, 10), noise: float = 0.005, seed: int = 0) -> Points:
    n = np.repeat(np.geomspace(5e7, 5e9, sizes), len(multiples))
    d = 20 * n * np.tile(multiples, sizes)
    return Points(n, d, law(n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n))))


def first(points: Points, runs: int) -> Points:
    return Points(*(values[:runs] for values in vars(points).values()))


def test_the_law_behind_synthetic_runs_is_found():
    exact = fit(synthetic(noise=0)).law
    assert [exact[name] for name in "EAB"] == pytest.approx([1.69, 406.4, 410.7], rel=1e-3)
    for seed in range(3):
        found = fit(synthetic(seed=seed)).law
        assert abs(found["a"] - 0.34) < 0.03 and abs(found["b"] - 0.28) < 0.03, found


def test_one_run_far_off_hardly_moves_the_forecast():
    points = synthetic()
    losses = points.losses.copy()
    losses[17] *= 1.3
    assert fit(Points(points.parameters, points.tokens, losses)).loss(5e10, 1e13) == pytest.approx(law(5e10, 1e13), rel=0.01)


def test_the_largest_run_of_ai2_is_forecast_from_the_three_smaller_sizes():
    """The last of the table, 1B at ten times 20 tokens per parameter; the table has four runs of each size."""
    covered = []
    for column in COLUMNS:
        points = read_points(AI2, column)
        forecast = fit(first(points, 12)).forecast(points.parameters[15], points.tokens[15])
        measured = points.losses[15]
        covered.append(forecast.low <= measured <= forecast.high)
        assert forecast.loss == pytest.approx(measured, rel=0.01 if column == "c4_loss_nats" else 0.05)
        assert forecast.high / forecast.low < 1.15, "an interval that covers everything says nothing"
    assert sum(covered) >= 6


def test_an_interval_holds_the_noise_of_one_run_and_widens_with_few_runs_and_far_away():
    """Of many runs of the same size, 90% lie within 1.645 standard deviations; an interval of the mean alone is narrower."""

    def width(points: Points, n: float, d: float) -> float:
        forecast = fit(points).forecast(n, d)
        assert forecast.low < forecast.loss < forecast.high
        return math.log(forecast.high / forecast.low)

    many = synthetic(8, (0.5, 1, 2, 4, 8, 16))
    assert width(many, 5e8, 4e10) == pytest.approx(2 * 1.645 * 0.005, rel=0.2)
    assert width(many, 5e11, 4e13) > 1.2 * width(many, 5e8, 4e10)
    few = np.mean([width(synthetic(3, (1, 2), seed=seed), 5e8, 2e10) for seed in range(4)])
    assert few > 3 * width(many, 5e8, 4e10)


@pytest.mark.slow
def test_the_intervals_cover_nine_of_ten_new_runs():
    """4 sizes x 3 multiples, and a run of 25 times the compute of the largest one."""
    inside = covered(200, lambda seed: fit(synthetic(4, (1, 2, 4), seed=seed)), noise=0.005)
    assert LEVEL - 0.07 <= inside / 200 <= LEVEL + 0.06, inside


def branches(seed: int, of_size: float = 0.003, of_run: float = 0.001) -> Points:
    """As synthetic(4, (1, 2, 4)), but most of the noise is that of a size, which its runs share."""
    points, random = synthetic(4, (1, 2, 4), noise=0), np.random.default_rng(seed)
    logs = np.repeat(of_size * random.standard_normal(4), 3) + of_run * random.standard_normal(12)
    return Points(points.parameters, points.tokens, points.losses * np.exp(logs))


def of_branches(seed: int, sizes_share: bool = True) -> Fit:
    return fit(branches(seed), sizes_share)


def covered(times: int, fitted: Callable[[int], Fit], noise: float = 0.0032) -> int:
    """How many of as many new runs with this noise lie in the intervals of the fits to seeds 0, 1, ..."""
    n, d, inside = 5e10, 20 * 5e10, 0
    for seed in range(times):
        forecast = fitted(seed).forecast(n, d)
        measured = law(n, d) * math.exp(noise * np.random.default_rng(10_000 + seed).standard_normal())
        inside += forecast.low <= measured <= forecast.high
    return inside


def test_an_interval_knows_that_the_branches_of_a_size_share_their_noise():
    assert covered(20, of_branches) >= 15 > covered(20, lambda seed: of_branches(seed, sizes_share=False))
    three = synthetic(3, (1, 2, 4))  # no size can be left out
    assert fit(three, sizes_share=True).forecast(5e10, 1e12) == fit(three).forecast(5e10, 1e12)


@pytest.mark.slow
def test_the_intervals_cover_nine_of_ten_runs_beside_a_ladder_of_branches():
    assert 0.83 <= covered(200, of_branches) / 200 <= 0.97


def test_the_verb_prints_the_forecast_as_json_and_as_tables(run_main):
    words = ["ladder", "--fit", AI2, "--column", "c4_loss_nats", "--forecast", "6.9e9,4e12"]
    done = run_main(*words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    forecast = fit(read_points(AI2, "c4_loss_nats")).forecast(6.9e9, 4e12)
    assert found["forecast"] == vars(forecast) and found["fit"]["runs"] == 16
    shown = run_main(*words).stdout
    assert f"tokens: {forecast.loss:.4f} ({forecast.low:.4f} to {forecast.high:.4f}, 90%)" in shown and "cannot tell" not in shown
    assert "cannot tell whether it is below the loss of the best run, 2.8321" in run_main(*words[:-1], "1.2e9,2.5e11").stdout
    assert json.loads(run_main(*words[:5], "--json").stdout)["forecast"] is None


def test_tables_that_cannot_be_fitted_are_refused(tmp_path, run_main):
    file = tmp_path / "runs.csv"
    good = [(n, 20 * n * m, law(n, 20 * n * m)) for n in (1e8, 3e8, 1e9) for m in (1, 4)]

    def refused(rows, *words, header="parameters,tokens,loss", column="loss") -> str:
        file.write_text("\n".join(["# ours", header, *(",".join(map(str, row)) for row in rows)]) + "\n")
        done = run_main("ladder", "--fit", file, "--column", column, *words)
        return f"{done.returncode} {done.stderr.splitlines()[-1] if done.stderr else ''}"

    assert refused(good) == "0 "
    assert "2 error: --fit: 4 runs of 2 sizes and 2 multiples (tokens per parameter) cannot be fitted" in refused(good[:4])
    assert "3 sizes and 1 multiple" in refused([(n, 20 * n, law(n, 20 * n)) for n in np.geomspace(1e8, 1e9, 3) for _ in "ab"])
    assert "5 runs of 3 sizes" in refused(good[:5])
    assert refused(good, column="los").startswith("2 error: --column: los: name a column")
    assert "3 error:" in refused(good, header="size,tokens,loss") and "has no column 'parameters'" in refused(
        good, header="a,tokens,loss"
    )
    assert "row 7 has 'nan' as loss" in refused([*good, (1e9, 1e9, "nan")]) and "has no runs" in refused([], header="")
    for target in ("7e9", "7e9,big", "7e9,-1", "1,2,3"):
        assert refused(good, "--forecast", target).startswith(f"2 error: --forecast: '{target}' is not N,D")
    with pytest.raises(DataError, match="cannot be read: No such file or directory; name a CSV file"):
        read_points(tmp_path / "none.csv", "loss")
    with pytest.raises(ConfigError, match="at least 3 sizes, 2 multiples"):  # tokens do not differ: B / D^b is a constant
        Points(np.geomspace(1e8, 1e9, 6), np.full(6, 1e10), np.linspace(3, 2, 6)).check("--fit", "add runs")
