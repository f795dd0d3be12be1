"""The detector tells a spike from noise, from a falling loss and from a new level; its state survives a checkpoint."""

import json
import math
from pathlib import Path

import pytest
import torch

from olmo_train.guards.spikes import LEAST, WINDOW, SpikeDetector, nanmedian


def judge(detector, loss, norm=1.0):
    return bool(detector.judge(torch.tensor(loss), torch.tensor(norm)))


def calm(detector, steps=LEAST + 10, level=4.0):
    """Steps of a noisy, slowly falling loss. Gives how many of them were called spikes."""
    noise = torch.Generator().manual_seed(0)
    draws = torch.randn(steps, 2, generator=noise).tolist()
    return sum(judge(detector, level - 0.001 * i + 0.05 * a, math.exp(0.1 * b)) for i, (a, b) in enumerate(draws))


def test_noise_and_a_falling_loss_are_no_spikes():
    assert calm(SpikeDetector(torch.device("cpu")), steps=2000) <= 2


@pytest.fixture(scope="module")
def trained():
    """Loss and gradient norm of 500 steps on real text, and of bad batches at the weights of some of these steps."""
    return json.loads((Path(__file__).parent / "references" / "spikes.json").read_text())


def test_a_healthy_run_on_real_text_has_no_spike(trained):
    detector = SpikeDetector(torch.device("cpu"))
    steps = list(zip(trained["loss"], trained["grad_norm"], strict=True))
    assert len(steps) == 500 and not [step for step, values in enumerate(steps, 1) if judge(detector, *values)]


def test_bad_batches_and_a_long_gradient_are_spikes_of_a_real_run(trained):
    detector, found = SpikeDetector(torch.device("cpu")), []
    planted = {step: [] for step in range(1, 501)}
    for plant in trained["planted"]:
        planted[plant["step"]].append((plant["loss"], plant["grad_norm"]))
    for step, (loss, norm) in enumerate(zip(trained["loss"], trained["grad_norm"], strict=True), 1):
        for values in [*planted[step], *([(loss, 10 * norm)] if planted[step] else [])]:
            found.append(judge(SpikeDetector(torch.device("cpu"), detector.state()), *values))
        judge(detector, loss, norm)
    assert found == [True] * 15


def test_a_jump_of_the_loss_or_of_the_norm_is_a_spike():
    for loss, norm in ((5.0, 1.0), (4.0, 10.0)):
        detector = SpikeDetector(torch.device("cpu"))
        calm(detector)
        assert judge(detector, loss, norm)
        assert not judge(detector, 4.0, 1.0)  # one spike does not move the yardstick


def test_nothing_is_judged_before_enough_was_seen():
    detector = SpikeDetector(torch.device("cpu"))
    calm(detector, steps=LEAST - 1)
    assert not judge(detector, 50.0)


def test_a_new_level_becomes_the_yardstick():
    detector = SpikeDetector(torch.device("cpu"))
    calm(detector)
    verdicts = [judge(detector, 6.0 + 0.01 * (i % 5)) for i in range(2 * WINDOW)]
    assert verdicts[0] and not verdicts[-1]


def test_non_finite_steps_are_neither_judged_nor_remembered():
    detector = SpikeDetector(torch.device("cpu"))
    calm(detector)
    before = detector.state()
    assert not judge(detector, math.nan) and not judge(detector, 4.0, math.inf)
    assert detector.state() == before


def test_a_state_that_went_through_json_judges_on_as_before():
    one = SpikeDetector(torch.device("cpu"))
    calm(one)
    other = SpikeDetector(torch.device("cpu"), json.loads(json.dumps(one.state())))
    for loss in (3.9, 4.3, 4.1, 9.0, 3.8):
        assert judge(one, loss) == judge(other, loss)
    assert one.state() == other.state()


def test_the_median_is_that_of_torch_without_its_index():
    rows = torch.randn(6, 9, dtype=torch.float64).round(decimals=1)
    for row in range(6):
        rows[row, torch.randperm(9)[: 9 * row // 5]] = torch.nan
    assert torch.equal(nanmedian(rows)[:5], rows.nanmedian(dim=1).values[:5])
    assert nanmedian(rows)[5].isnan()
