"""batch_schedule: the batch grows at a step. Every figure, order and resume is exact on both sides of that edge."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import EOS_ID
from runs import LOSS, cut, events_of, first_quick, history, lines_of, trained, trained_on

from olmo_train import config as configuration
from olmo_train.curves import write
from olmo_train.errors import ConfigError
from olmo_train.history import History
from olmo_train.optim.schedules import lr_at
from olmo_train.tools.replay import replay
from olmo_train.train_config import TrainConfig

GROWING = {"batch_schedule": "[{from_step: 1, size: 4}, {from_step: 6, size: 8}]", "global_batch_size": None}
SIZES = [4] * 5 + [8] * 7  # of 12 steps
READ = np.cumsum([0, *SIZES]).tolist()  # instances after each step


def refusal(words) -> str:
    with pytest.raises(ConfigError) as caught:
        configuration.load(TrainConfig, [], words)
    return str(caught.value)


def test_a_schedule_of_one_row_has_the_bits_of_a_constant_batch(tiny_args, tmp_path):
    trained(tiny_args("constant", total_steps=6))
    one = {"batch_schedule": "[{from_step: 1, size: 8}]", "global_batch_size": None, "optim.lr_batch_scaling": "sqrt"}
    trained(tiny_args("one", total_steps=6, **one))
    assert history(tmp_path / "one") == history(tmp_path / "constant")
    weights = [tmp_path / name / "checkpoints/step-0000006/shard-00001.safetensors" for name in ("one", "constant")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("order", ["permute", "olmo"])
def test_figures_and_data_are_exact_on_both_sides_of_the_edge(tiny_args, order):
    """Logged at steps 3, 6, 9 and 12: the edge is inside an interval."""
    run = trained(tiny_args("run", **GROWING, **{"log.interval_steps": 3, "data.order": order}))
    lines, (start,) = lines_of(run.run_dir), events_of(run.run_dir, "start")
    assert start["batches"] == [[1, 4], [6, 8]] and [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [line["throughput/total_tokens"] for line in lines] == [READ[step] * 64 for step in (3, 6, 9, 12)]
    a_token = lines[0]["throughput/total_flops"] / lines[0]["throughput/total_tokens"]
    assert all(line["throughput/total_flops"] == a_token * line["throughput/total_tokens"] for line in lines)
    epochs = [line["train/source/a/epoch"] for line in lines]
    assert epochs == pytest.approx([READ[step] / (40_000 // 64) for step in (3, 6, 9, 12)], abs=2e-3)
    for line in lines:
        mixture = History(Path(run.run_dir)).attempt_of(line["step"]).mixture()
        batch = mixture.global_batch(line["step"])
        assert len(batch) == SIZES[line["step"] - 1] and mixture.sample_hash(batch) == line["sample_hash"]


def test_every_instance_is_read_once_an_epoch_over_the_edges(tiny_args, tiny_tokens):
    """48 instances of 64 tokens; the first edge is inside the first epoch, the second at its end."""
    tiny_tokens.write_bytes(tiny_tokens.read_bytes()[: 2 * (48 * 64 + 1)])
    rows = "[{from_step: 1, size: 4}, {from_step: 6, size: 7}, {from_step: 10, size: 12}]"
    mixture = tiny_args(batch_schedule=rows, global_batch_size=None, total_steps=17).mixture()
    read = [(int(e), int(i)) for step in range(1, 18) for e, i in zip(*epochs_and_instances(mixture, step), strict=True)]
    assert len(read) == 3 * 48 and Counter(read) == Counter((e, i) for e in range(3) for i in range(48))


def epochs_and_instances(mixture, step):
    batch = mixture.global_batch(step)
    return batch.epoch, batch.instance


def test_resumed_on_either_side_of_the_edge_a_run_has_the_same_bits(tiny_args, tmp_path):
    changes = {**GROWING, "optim.lr_batch_scaling": "sqrt", "checkpoint.interval_steps": 1, "checkpoint.keep_last": 99}
    whole = trained(tiny_args("whole", **changes))
    config = tiny_args("cut", **changes)
    for steps in (3, 8):  # resumed before the edge, which is passed then, and after it; the branch starts at the edge
        cut(config, steps)
    trained(config)
    assert history(config.run_dir) == history(whole.run_dir)
    trained(tiny_args("branch", **changes, resume_from=tmp_path / "whole/checkpoints/step-0000005"))
    assert history(tmp_path / "branch") == history(whole.run_dir)[5:]
    states = [json.loads((tmp_path / name / "checkpoints/step-0000012/state.json").read_bytes()) for name in ("whole", "cut")]
    assert states[0]["batches"] == states[1]["batches"] == [[1, 4], [6, 8]]


@pytest.mark.parametrize("done", first_quick([5, 8]))
def test_resumed_on_another_number_of_processes_the_losses_agree(tiny_args, read_metrics, done):
    whole = trained(tiny_args("whole", **GROWING, total_steps=9))
    changes = {**GROWING, "total_steps": 9, "checkpoint.interval_steps": 1}
    cut(tiny_args("cut", **changes), done)
    two = trained_on(2, tiny_args("cut", **changes))
    one, two = read_metrics(whole.run_dir), read_metrics(two.run_dir)
    assert [line["world_size"] for line in two] == [1] * done + [2] * (9 - done)
    assert [line["sample_hash"] for line in one] == [line["sample_hash"] for line in two]
    assert [line[LOSS] for line in two] == pytest.approx([line[LOSS] for line in one], rel=1e-6)


def test_a_run_past_an_edge_resumes_on_processes_that_divide_only_the_later_batches(tiny_args, tmp_path):
    changes = {"batch_schedule": "[{from_step: 1, size: 4}, {from_step: 3, size: 6}]", "global_batch_size": None}
    config = cut(tiny_args("run", total_steps=5, **changes, **{"checkpoint.interval_steps": 1}), steps=2)
    with pytest.raises(ConfigError, match=r"batch_schedule.0.size: 4 is not a multiple of the 3 processes; use 3 or 6"):
        tiny_args("run", total_steps=5, **changes).check_world(3)
    trained_on(3, config)
    assert [line["world_size"] for line in lines_of(tmp_path / "run")] == [1, 1, 3, 3, 3]
    with pytest.raises(AssertionError, match=r"batch_schedule.0.size: 4 is not a multiple of the 3 processes"):
        trained_on(3, tiny_args("new", total_steps=5, **changes))
    assert not (tmp_path / "new").exists()


def test_the_learning_rate_is_scaled_by_the_square_root_of_the_batch(tiny_args):
    plain, scaled = (tiny_args(**GROWING, **{"optim.lr_batch_scaling": scaling}).optim for scaling in ("none", "sqrt"))
    ratios = [lr_at(step, scaled, 12) / lr_at(step, plain, 12) for step in range(1, 13)]
    assert ratios[:5] == [1.0] * 5 and ratios[5:] == pytest.approx([math.sqrt(2)] * 7, rel=1e-15)
    halved = {"batch_schedule": "[{from_step: 1, size: 8}, {from_step: 3, size: 2}]", "global_batch_size": None}
    smaller = tiny_args(**halved, **{"optim.lr_batch_scaling": "sqrt"}).optim  # step 3 is in the warmup
    assert lr_at(3, smaller, 12) == lr_at(3, plain, 12) / 2


def test_lengths_in_tokens_count_the_batch_of_each_step(tiny_args):
    def lengths(tokens, **optim):
        words = {f"optim.{key}": value for key, value in ({"schedule": "wsd", "warmup_steps": 1} | optim).items()}
        config = tiny_args(**GROWING, total_steps=None, total_tokens=tokens * 64, **words).in_steps()
        return config.steps, config.optim.warmup_steps, config.optim.schedule_steps, config.optim.decay_steps

    assert [lengths(READ[step])[0] for step in range(2, 13)] == list(range(2, 13))
    assert lengths(READ[12] - 7)[0] == 12 and lengths(READ[12] - 8)[0] == 11
    # The last 8 steps read 7 * 8 + 4 instances: the edge is inside the decay.
    assert [lengths(READ[12], decay_tokens=n * 64)[3] for n in (8, 9, 56, 57, 60, 61)] == [1, 2, 7, 8, 8, 9]
    assert [lengths(READ[12], warmup_steps=None, warmup_tokens=n * 64)[1] for n in (4, 20, 21, 28, 29)] == [1, 5, 6, 6, 7]
    assert lengths(READ[12], schedule_tokens=36 * 64, decay_tokens=20 * 64)[2:] == (7, 3)


def test_a_run_of_tokens_or_epochs_ends_where_they_have_been_read(tiny_args, tiny_tokens, read_metrics):
    tiny_tokens.write_bytes(tiny_tokens.read_bytes()[: 2 * (36 * 64 + 1)])
    for name, length in {"tokens": {"total_tokens": 36 * 64}, "epochs": {"total_epochs": 1}}.items():
        lines = read_metrics(trained(tiny_args(name, **GROWING, total_steps=None, **length)).run_dir)
        assert [line["step"] for line in lines] == list(range(1, 8))
        assert lines[-1]["throughput/total_tokens"] == 36 * 64 and lines[-1]["train/source/a/epoch"] == 1.0


def test_inspect_data_and_replay_know_the_batch_of_each_step(tiny_args, run_main, tmp_path):
    run = trained_on(2, tiny_args("run", total_steps=8, determinism="world", **GROWING))
    for step in (5, 6):  # of which one is computed from the initial weights, the other from the checkpoint of step 5
        shown = json.loads(run_main("inspect-data", run.run_dir, "--step", step, "--json").stdout)
        half = SIZES[step - 1] // 2
        assert [row["rank"] for row in shown["instances"]] == [0] * half + [1] * half and shown["as_logged"] is True
        assert replay(Path(run.run_dir), step).differing == []
    planned = json.loads(run_main("inspect-data", tmp_path / "run/config.yaml", "--step", 6, "--json").stdout)
    assert planned["instances"] == shown["instances"]


def test_the_rank_of_a_visit_is_that_of_its_step(tiny_args, tiny_words, run_main):
    batch = tiny_args(**GROWING).mixture().global_batch(5)
    words = ["inspect-data", *tiny_words(**GROWING, **{"data.eos_id": EOS_ID}), "--world-size", 2, "--json"]
    shown = json.loads(run_main(*words, "--document", f"a:@{int(batch.instance[2]) * 64 + 9}").stdout)
    assert (5, 2, 1) in {(visit["step"], visit["row"], visit["rank"]) for visit in shown["visits"]}  # 2 rows on each rank
    assert all(visit["rank"] == visit["row"] // (SIZES[visit["step"] - 1] // 2) for visit in shown["visits"])


def test_a_plan_and_its_curves_count_the_batch_of_each_step(tiny_words, run_main, monkeypatch):
    drawn = []
    monkeypatch.setattr(write, "write_curves", lambda runs, *rest, **more: drawn.extend(runs))
    words = ["plan", *tiny_words(**GROWING), "--gpu", "h100"]
    plan = json.loads(run_main(*words, "--json", "--output", "x.html").stdout)
    assert (plan["total_tokens"], plan["batches"]) == (READ[12] * 64, [[1, 4], [6, 8]])
    assert plan["cost"]["flops"] == plan["flops_per_token"] * READ[12] * 64
    assert {m["step"]: m["tokens"] for m in plan["milestones"]}.items() >= {5: READ[5] * 64, 6: READ[6] * 64}.items()
    assert plan["sources"]["a"]["instances"] == READ[12]
    tokens = drawn[0].series["throughput/total_tokens"]
    assert dict(zip(tokens.steps.tolist(), tokens.values.tolist(), strict=True)) == {s: READ[s] * 64.0 for s in range(1, 13)}
    epochs = drawn[0].series["train/source/a/epoch"].values
    assert (epochs * 624).tolist() == pytest.approx(READ[1:])
    assert "256 to 512, 4 to 8 sequences" in run_main(*words).stdout


def test_a_schedule_that_cannot_be_is_refused(tiny_words, tiny_args):
    both = "and global_batch_size 8 are both set; leave one out, as global_batch_size=null"
    message = refusal(tiny_words(**GROWING | {"global_batch_size": 8}))
    assert message == f"batch_schedule: {both} (global_batch_size is set by command line)"
    late, twice = "[{from_step: 2, size: 4}]", "[{from_step: 1, size: 4}, {from_step: 1, size: 8}]"
    for rows, starts in {late: [2], twice: [1, 1]}.items():
        message = refusal(tiny_words(global_batch_size=None, batch_schedule=rows))
        assert message == f"batch_schedule: must start at step 1 and rise, got from_step {starts}"
    assert refusal(tiny_words(batch_schedule="[{from_step: 1, size: 0}]")).startswith("batch_schedule.0.size: must be at least 1")
    alone = "is read with batch_schedule only; leave it out"
    assert refusal(tiny_words(**{"optim.lr_batch_scaling": "sqrt"})) == f"optim.lr_batch_scaling: sqrt {alone}"
    config = tiny_args(**GROWING, micro_batch_size=16)
    assert (config.micro_batch_on(1), config.micro_batch_on(2), config.micro_batch_on(8)) == (4, 2, 1)
    assert config.batch_notes(1) == ["micro_batch_size 16 is lowered to 4, which divides the 4 and 8 instances of a process"]


def test_a_resumed_run_keeps_its_schedule_and_changes_it_where_that_is_allowed(tiny_args, tmp_path):
    trained(tiny_args("run", total_steps=2, **GROWING))
    with pytest.raises(ConfigError, match="batch_schedule: is .*'size': 2.* now and was .*'size': 8"):
        tighter = {"batch_schedule": "[{from_step: 1, size: 4}, {from_step: 3, size: 2}]", "global_batch_size": None}
        trained(tiny_args("run", total_steps=4, **tighter))
    trained(tiny_args("run", total_steps=3, global_batch_size=None))  # not set: that of the checkpoint
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["batch_schedule"] == [{"from_step": 1, "size": 4}, {"from_step": 6, "size": 8}]
    trained(tiny_args("run", total_steps=5, **tighter, allow_changes="[batch_schedule]"))
    assert [line["throughput/total_tokens"] // 64 for line in lines_of(tmp_path / "run")] == [4, 8, 12, 14, 16]
