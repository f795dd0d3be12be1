"""A spike is recorded, skipped, stops the run, or makes it rewind; steps named in the configuration are passed over."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import exit_code, fork, on_ranks
from runs import cut, events_of, first_quick, history, trained
from test_guards import EVERY, states_of, unchanged

from olmo_train import train as module
from olmo_train.checkpoint.folders import committed, newest_folder, read_state
from olmo_train.commands import inspect_data, replay
from olmo_train.errors import ConfigError, NonFiniteError
from olmo_train.guards import anomalies, spikes
from olmo_train.guards.config import GuardConfig
from olmo_train.guards.rewind import plan_rewind
from olmo_train.log.recorder import Recorder
from olmo_train.tools.replay import COMPARED
from olmo_train.train import train

SPIKE = 8  # the step that stands out in these runs


@pytest.fixture
def spiking(tiny_args, monkeypatch):
    """spiking(name, policy, at=[8], **changes): the config of a run whose batches of steps `at` have a gradient far
    longer than the others, whenever they are computed. Few steps must have been seen before one is judged."""
    monkeypatch.setattr(spikes, "LEAST", 4)

    def config(name, policy, at=(SPIKE,), **changes):
        spoil(at, monkeypatch)
        changes = {"checkpoint.interval_steps": 3, "checkpoint.async_save": False, **changes}
        return tiny_args(name, **{"guards.spike": policy, **changes})

    return config


def spoil(at, monkeypatch):
    """The gradient of these steps is a thousand times too long."""
    real_step, real_clip, now = module.train_step, module.gradients.clip_gradients, []

    def step(model, optimizer, batch, *rest):
        now[:] = [batch.step]
        return real_step(model, optimizer, batch, *rest)

    def clip(model, max_norm, **options):
        for parameter in model.parameters() if now[0] in at else ():
            parameter.grad.mul_(1000)
        return real_clip(model, max_norm)

    monkeypatch.setattr(module, "train_step", step)
    monkeypatch.setattr(module.gradients, "clip_gradients", clip)


def test_a_spike_is_an_event_a_metric_of_its_step_and_one_line_on_the_console(spiking, read_metrics, capsys):
    config = spiking("run", "record")
    assert [s.step for s in train(config) if s.spike] == [SPIKE]
    assert [line["spike"] for line in read_metrics(config.run_dir)] == [0] * 7 + [1] + [0] * 4
    (event,) = events_of(config.run_dir, "spike", "skip")
    line = read_metrics(config.run_dir)[SPIKE - 1]
    assert (event["event"], event["step"]) == ("spike", SPIKE)
    assert event["loss"] == line["train/CrossEntropyLoss"] and event["grad_norm"] == line["optim/total_grad_norm"]
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith(f"step {SPIKE} ")]
    assert said == [
        f"step {SPIKE} is a spike: loss {event['loss']:.4g}, gradient norm {event['grad_norm']:.4g}; "
        f"see {config.run_dir}/forensics/step-0000008"
    ]


def test_a_spike_that_is_skipped_changes_nothing_and_counts_as_skipped(spiking, read_metrics, capsys):
    config = spiking("run", "skip", **EVERY | {"total_steps": 10})
    trained(config)
    assert f"step {SPIKE} is a spike and is skipped: loss " in capsys.readouterr().out
    assert unchanged(config.run_dir, 7, 8) and not unchanged(config.run_dir, 8, 9)
    assert states_of(config.run_dir, 10)["updates"] == 9
    assert [line["skipped"] for line in read_metrics(config.run_dir)] == [0] * 7 + [1] + [0] * 2


def test_what_was_seen_before_a_resume_judges_as_without_it(spiking):
    whole, config = spiking("whole", "skip"), spiking("cut", "skip")
    trained(whole)
    trained(cut(config, steps=7))
    assert history(config.run_dir, *COMPARED) == history(whole.run_dir, *COMPARED)
    last = [read_state(newest_folder(Path(c.run_dir))) for c in (config, whole)]
    assert last[0]["spikes"] == last[1]["spikes"] and last[0]["spikes"]["seen"] == 12


def test_a_spike_that_stops_the_run_is_not_committed(spiking):
    config = spiking("run", "stop", **{"checkpoint.interval_steps": 4})
    with pytest.raises(
        NonFiniteError, match=rf"guards.spike: step {SPIKE} is a spike.*step-0000004.*skip_steps=\[{SPIKE}\]"
    ) as caught:
        trained(config)
    assert caught.value.exit_code == 5 and list(committed(Path(config.run_dir))) == [4]


def test_a_rewound_run_equals_one_that_never_took_the_step(spiking, read_metrics, capsys):
    """Bit for bit, with each step once in the record."""
    config, named = spiking("run", "rewind"), spiking("named", "record", **{"guards.skip_steps": f"[{SPIKE}]"})
    assert [s.step for s in train(config)] == [*range(1, 8), *range(7, 13)]
    trained(named)
    assert history(config.run_dir, *COMPARED) == history(named.run_dir, *COMPARED)
    assert unchanged_between(config, named, 12)
    (event,) = events_of(config.run_dir, "rewind")
    assert (event["from"], event["to"], event["skipped"]) == (SPIKE, 6, [SPIKE])
    assert f"step {SPIKE} is a spike" in (said := capsys.readouterr().out) and f"rewinding from step {SPIKE} to step 6" in said
    lines = read_metrics(config.run_dir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[SPIKE - 1]["skipped"] == 1 and lines[SPIKE - 1]["train/CrossEntropyLoss"] is None
    assert lines[SPIKE - 1]["optim/learning_rate_group0"] > 0 and lines[SPIKE - 1]["sample_hash"]


def unchanged_between(one, other, step):
    a, b = states_of(one.run_dir, step), states_of(other.run_dir, step)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_spike_before_the_first_checkpoint_goes_back_to_the_first_weights(spiking):
    config = spiking("run", "rewind", **{"checkpoint.interval_steps": 100})
    assert [s.step for s in train(config)] == [*range(1, 8), *range(1, 13)]


def test_spikes_on_and_on_are_passed_over_in_doubling_stretches_and_end_the_run(spiking):
    config = spiking("run", "rewind", range(8, 100), total_steps=24, **{"checkpoint.interval_steps": 4, "guards.max_rewinds": 3})
    with pytest.raises(
        NonFiniteError, match="guards.max_rewinds: step 15 is a spike after 3 rewinds in a row, the first from step 8"
    ):
        trained(config)
    assert [event["skipped"] for event in events_of(config.run_dir, "rewind")] == [[8], [9, 10], [11, 12, 13, 14]]


def test_rewinds_at_other_steps_are_counted_from_zero():
    before = [{"to": 3, "from": 4, "skipped": [4]}, {"to": 3, "from": 6, "skipped": [6, 7]}]
    assert plan_rewind(8, 3, before, GuardConfig())["skipped"] == [8, 9, 10, 11]  # to the same checkpoint
    assert plan_rewind(9, 3, before, GuardConfig())["skipped"] == [9, 10, 11, 12]
    assert plan_rewind(8, 7, before, GuardConfig())["skipped"] == [8, 9, 10, 11]  # or right behind
    assert plan_rewind(9, 7, before, GuardConfig())["skipped"] == [9]
    with pytest.raises(NonFiniteError, match="after 2 rewinds in a row, the first from step 4"):
        plan_rewind(8, 7, before, GuardConfig(max_rewinds=2))


@pytest.mark.parametrize("moment", first_quick(["before", "after"]))
def test_a_run_killed_in_a_rewind_continues_as_if_not_killed(spiking, monkeypatch, moment):
    whole, config = spiking("whole", "rewind"), spiking("killed", "rewind")
    trained(whole)
    real = Recorder.event

    def dying(self, event, *rest, **about):
        if event == "rewind" and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, event, *rest, **about)
        if event == "rewind":
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Recorder, "event", dying)
    assert exit_code(fork(lambda: trained(config) and 0)) == -signal.SIGKILL
    monkeypatch.setattr(Recorder, "event", real)
    trained(config)
    assert history(config.run_dir, *COMPARED) == history(whole.run_dir, *COMPARED)
    assert unchanged_between(config, whole, 12)


def test_two_ranks_rewind_together(spiking, read_metrics):
    config = spiking("run", "rewind")

    def run(world):
        return [s.step for s in train(config, world)]

    assert on_ranks(2, run) == [[*range(1, 8), *range(7, 13)]] * 2
    assert [line["skipped"] for line in read_metrics(config.run_dir)] == [0] * 7 + [1] + [0] * 4


@pytest.mark.parametrize("policy", first_quick(["rewind", "skip", "stop"]))
def test_flags_that_are_read_late_lead_to_the_same_run(spiking, policy):
    """On a GPU steps are read some at a time, and before anything is saved."""
    soon, late = spiking("soon", policy), spiking("late", policy, **{"log.interval_steps": 5})
    outcomes = []
    for config, read in ((soon, True), (late, False)):
        real, anomalies.READ_AT_ONCE = anomalies.READ_AT_ONCE, {"cpu"} if read else set()
        try:
            trained(config)
        except NonFiniteError as problem:
            outcomes.append(str(problem).replace("/late/", "/soon/"))
        else:
            outcomes.append(states_of(config.run_dir, 12))
        finally:
            anomalies.READ_AT_ONCE = real
    events = [[(e["event"], e["step"], e.get("skipped")) for e in events_of(c.run_dir, "spike", "rewind")] for c in (soon, late)]
    assert events[0] == events[1]
    if policy == "stop":
        assert "is a spike" in outcomes[0]
        assert outcomes[0] == outcomes[1]
    else:
        assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])


# ---- named steps


def test_named_steps_are_passed_over_without_an_update(tiny_args, read_metrics):
    config = tiny_args("run", **EVERY, **{"guards.skip_steps": "[2,5]", "guards.max_skipped": 1})
    assert [s.skipped.item() for s in train(config)] == [0, 1, 0, 0, 1, 0]
    assert unchanged(config.run_dir, 1, 2) and unchanged(config.run_dir, 4, 5) and not unchanged(config.run_dir, 5, 6)
    assert states_of(config.run_dir, 6)["updates"] == 4
    plain = tiny_args("plain", **EVERY)
    trained(plain)
    for name in ("sample_hash", "optim/learning_rate_group0"):  # the others keep their batch and their learning rate
        assert [line[name] for line in read_metrics(config.run_dir)] == [line[name] for line in read_metrics(plain.run_dir)]


def test_steps_to_come_may_be_named_on_a_resume_those_done_may_not(tiny_args):
    trained(tiny_args("run", total_steps=4))
    with pytest.raises(ConfigError, match=r"guards.skip_steps: differ in step 3, which is before the checkpoint of step 4"):
        trained(tiny_args("run", total_steps=6, **{"guards.skip_steps": "[3,5]"}))
    config = tiny_args("run", total_steps=6, **{"guards.skip_steps": "[5]"})
    assert [s.skipped.item() for s in train(config)] == [1, 0]
    trained(tiny_args("run", total_steps=7, allow_changes="[guards.skip_steps]"))


def test_replay_and_inspect_data_know_what_was_passed_over(spiking, capsys):
    config = spiking("run", "rewind", **{"guards.skip_steps": "[2]"})
    trained(config)
    for step in (1, 2, 7, 8, 9, 12):
        assert replay.run(arguments(run_dir=config.run_dir, step=step, audit=None, seed=0)) == 0
        capsys.readouterr()
        words = dict(config=[config.run_dir], step=step, rank=None, world_size=None, brief=True)
        inspect_data.run(arguments(**words, json=True))
        assert json.loads(capsys.readouterr().out)["passed_over"] == (step in (2, 8))
        inspect_data.run(arguments(**words, json=False))
        assert ("this step is passed over" in capsys.readouterr().out) == (step in (2, 8))


def arguments(**values):
    return type("Arguments", (), values)


@pytest.mark.parametrize("word, key", [("guards.spike=ignore", "guards.spike"), ("guards.skip_steps=[0]", "guards.skip_steps"),
                                       ("guards.max_rewinds=0", "guards.max_rewinds")])  # fmt: skip
def test_what_means_nothing_is_refused(tiny_args, word, key):
    with pytest.raises(ConfigError, match=key):
        tiny_args("run", **dict([word.split("=")]))


def test_a_step_that_is_not_finite_is_an_event(tiny_args, monkeypatch):
    from test_guards import poison

    poison(4, math.nan, monkeypatch)
    config = tiny_args("run", total_steps=6)
    trained(config)
    assert [(event["step"], event["grad_norm"]) for event in events_of(config.run_dir, "skip", "spike")] == [(4, None)]
