"""Our training is OLMo's: 200 steps beside the curves of ai2-olmo's own trainer, and the numbers that they rest on.

golden_olmo.json was written by tests/references/olmo_parity.py, which runs ai2-olmo 0.6.0 in a separate environment.
"""

import json
import math

import pytest
import torch
from references import olmo_parity as parity
from runs import first_quick

from olmo_train.convert import olmo
from olmo_train.convert.families import pair
from olmo_train.data.mixture import Mixture
from olmo_train.model.init import init_std
from olmo_train.optim import config as optim_config
from olmo_train.optim import schedules

GOLDEN = json.loads(parity.GOLDEN.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    parity.prepare(folder)
    return folder


@pytest.mark.parametrize("name", first_quick(parity.VARIANTS))
def test_two_hundred_steps_are_those_of_olmos_trainer(folder, name):
    run = parity.our_config(name, folder)
    ours, theirs = parity.our_curves(run), GOLDEN["curves"][name]
    assert len(theirs["loss"]) == 200
    gap = parity.apart(ours, theirs)
    assert gap["loss"] < 1e-4 and gap["grad_norm"] < 1e-3 and gap["lr"] < 1e-15, gap
    limits = [schedules.max_grad_norm_at(step, run.optim) for step in range(1, 201)]
    clipped = sum(norm > limit for norm, limit in zip(theirs["grad_norm"], limits, strict=True))
    assert 50 < clipped < 150, "some steps are clipped and some are not"
    assert parity.STEPS > 1004 // 8, "the run goes over the end of an epoch"


def test_the_curve_tells_olmos_divisor_from_ours(folder):
    ours = parity.our_curves(parity.our_config("untied", folder, run_dir=folder / "scored", loss_divisor="scored_tokens"))
    theirs = GOLDEN["curves"]["untied"]
    assert ours["loss"][0] * 63 / 64 == pytest.approx(theirs["loss"][0], abs=1e-6)  # T - 1 of T positions are scored
    assert parity.apart({**ours, "loss": [loss * 63 / 64 for loss in ours["loss"]]}, theirs)["loss"] > 1e-4


@pytest.mark.parametrize("name", parity.VARIANTS)
def test_instances_come_in_olmos_order(folder, name):
    run = parity.our_config(name, folder)
    mixture = Mixture(run.data, run.seed, run.global_batch_size, run.model.seq_len, run.model.vocab_size)
    first = [instance for step in (1, 2) for instance in mixture.global_batch(step).instance.tolist()]
    assert first == GOLDEN["order"][name]


@pytest.mark.parametrize("case", range(len(parity.SCHEDULES)))
def test_learning_rates_are_those_of_olmos_scheduler(case):
    their = parity.SCHEDULES[case]
    settings = {**parity.RUN, "model": parity.MODEL, "data": {"drop_last": True}, "scheduler": their["scheduler"]}
    settings |= {"max_duration": their["max_steps"], "optimizer": {"name": "adamw", "learning_rate": their["peak"]}}
    ours = olmo.read_settings(settings)
    config = optim_config.OptimConfig(**{**ours["optim"], "betas": tuple(ours["optim"]["betas"])})
    rates = [schedules.lr_at(step, config, ours["total_steps"]) for step in their["steps"]]
    assert rates == pytest.approx(GOLDEN["learning_rates"][case], rel=1e-14)


@pytest.mark.parametrize("name", parity.VARIANTS)
def test_first_weights_have_the_deviations_of_olmos(folder, name):
    shape = parity.our_config(name, folder).model
    weights = parity.their_names(parity.first_weights(shape, seed=1))
    assert set(GOLDEN["deviations"][name]) == {key for key, value in weights.items() if value.ndim > 1}
    cut = 0.98658  # the deviation of a normal distribution that is cut at 3
    for ours, theirs in ((ours, mapping.theirs) for mapping in pair(olmo.NAMES, shape) for ours in mapping.ours):
        if weights[theirs].ndim > 1:
            of_the_sample = 4 / math.sqrt(2 * weights[theirs].numel())
            expected = cut * init_std(ours, shape)
            assert weights[theirs].std().item() == pytest.approx(expected, rel=of_the_sample)
            assert GOLDEN["deviations"][name][theirs] == pytest.approx(expected, rel=of_the_sample)


def test_z_loss_adds_its_gradient_and_leaves_the_loss(folder):
    from dataclasses import replace

    from olmo_train.model.transformer import Transformer

    shape = parity.our_config("untied", folder).model
    tokens = torch.tensor(parity.TOKENS)
    found = {}
    for coefficient in (0.0, 0.01):
        model = Transformer(replace(shape, z_loss=coefficient))
        model.load_state_dict(parity.first_weights(shape, seed=1))
        losses = model(tokens[:, :-1], tokens[:, 1:].masked_fill(tokens[:, 1:] < 100, -100))
        losses.sum().backward()
        found[coefficient] = losses.detach(), model.head.weight.grad
    logits = model(tokens[:, :-1]).double()
    squares = logits.logsumexp(-1).square() * (tokens[:, 1:] >= 100)
    added = torch.autograd.grad(0.01 * squares.sum(), model.head.weight)[0]
    assert torch.equal(found[0.0][0], found[0.01][0])
    assert torch.allclose(found[0.01][1] - found[0.0][1], added, atol=1e-4 * added.abs().max().item())
