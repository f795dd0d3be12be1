"""A spike is told from noise, from a falling loss and from a new level; what was seen survives a checkpoint."""

import json
import math

import torch

from olmo_train.guards.spikes import LEAST, WINDOW, SpikeDetector


def judge(detector, loss, norm=1.0):
    return bool(detector.judge(torch.tensor(loss), torch.tensor(norm)))


def calm(detector, steps=LEAST + 10, level=4.0):
    """Steps of a noisy, slowly falling loss. Gives how many of them were called spikes."""
    noise = torch.Generator().manual_seed(0)
    draws = torch.randn(steps, 2, generator=noise).tolist()
    return sum(judge(detector, level - 0.001 * i + 0.05 * a, math.exp(0.1 * b)) for i, (a, b) in enumerate(draws))


def test_noise_and_a_falling_loss_are_no_spikes():
    assert calm(SpikeDetector(torch.device("cpu")), steps=2000) <= 2


def test_a_jump_of_the_loss_or_of_the_norm_is_a_spike():
    for loss, norm in ((5.0, 1.0), (4.0, 5.0)):
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
