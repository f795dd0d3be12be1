"""metrics.jsonl is the record of truth: each step once, read back bit for bit, complete whatever happens to the mirrors."""

import json
import math
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from runs import events_of, trained
from runs import lines_of as lines

from olmo_train.errors import DataError
from olmo_train.history import History
from olmo_train.log import version as log_version
from olmo_train.log import wandb as log_wandb
from olmo_train.log.config import LogConfig, WandbConfig
from olmo_train.log.console import Console
from olmo_train.log.interval import RESERVED, Interval, MeanLoss, OwnMetrics, throughput_metrics
from olmo_train.log.recorder import JsonLines, Recorder
from olmo_train.log.tensorboard import TensorboardMirror
from olmo_train.log.wandb import wandb_mode
from olmo_train.train import train

CPU = torch.device("cpu")
DISABLED = LogConfig(wandb=WandbConfig(mode="disabled"))


def recorder(run_dir, last_step=0, config=DISABLED):
    return Recorder(run_dir, config, {}, last_step)


# ---- the file


def test_floats_read_back_bit_for_bit_and_non_finite_ones_are_null(tmp_path):
    values = [0.1 + 0.2, 1e-323, math.pi * 1e300, -0.0, float(torch.tensor(0.1))]
    log = recorder(tmp_path)
    log.log(1, {f"v{i}": v for i, v in enumerate(values)} | {"nan": math.nan, "inf": -math.inf, "text": "NaN", "n": 3})
    log.close()
    line = lines(tmp_path)[0]
    assert [line[f"v{i}"].hex() for i in range(5)] == [v.hex() for v in values]
    assert (line["nan"], line["inf"], line["text"], line["n"], line["step"]) == (None, None, "NaN", 3, 1)


def test_lines_beyond_the_step_that_is_resumed_are_dropped(tmp_path):
    log = recorder(tmp_path)
    for step in range(1, 8):
        log.log(step, {"x": step})
    log.close()
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    again = recorder(tmp_path, last_step=4)
    again.log(5, {"x": 50})
    again.close()
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(b"".join(before[:4]))
    assert [(line["step"], line["x"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]


@pytest.mark.parametrize("half", [b'{"step": 3, "x', b'{"step": 3}', b"\x00\x00\x00", b"{"])
def test_half_a_line_of_a_killed_run_is_cut(tmp_path, half):
    whole = b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + half)
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "start", "step": 0}\n' + half)
    assert [History(tmp_path).line(step) for step in (2, 3)] == [{"step": 2}, None]
    log = recorder(tmp_path, last_step=2)
    log.log(3, {})
    log.event("resume", 2)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert [event["event"] for event in events_of(tmp_path)] == ["start", "resume"]
    assert len(History(tmp_path).starts) == 2


def test_a_broken_line_in_the_middle_is_refused_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"stp": 2}\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl: line 2 is not a line of metrics"):
        recorder(tmp_path, last_step=3)
    assert lines(tmp_path)[1] == {"stp": 2}, "and left as it was"


class Disk:
    """A file on a disk that is full until there is room for `room` bytes more."""

    def __init__(self, file):
        self.file, self.room = file, 10**9

    def write(self, content):
        if not self.room:
            raise OSError(28, "No space left on device")
        part = content[: self.room]
        self.room -= len(part)
        return self.file.write(part)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("then", ["append", "sync", "close"])
@pytest.mark.parametrize("room", [0, 7])
def test_lines_that_found_no_room_are_written_as_soon_as_there_is_some(tmp_path, room, then, caplog):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log._file = disk = Disk(log._file)
    log.append({"step": 1})
    disk.room = room
    log.append({"step": 2})
    log.append({"step": 3})
    assert caplog.text.count("cannot be written for now") == 1
    disk.room = 10**9
    if then == "append":
        log.append({"step": 4})
    elif then == "sync":
        log.sync()
    expected = [1, 2, 3, 4] if then == "append" else [1, 2, 3]
    if then != "close":
        assert [line["step"] for line in lines(tmp_path)] == expected
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == expected


# ---- the figures of an interval


def add(interval, loss, tokens, skipped=0.0, clipped=0.0):
    sums = torch.tensor([loss, tokens], dtype=torch.float64)
    interval.add(sums, torch.tensor(skipped), torch.tensor(clipped), torch.tensor(0.0), data_wait=0.5)


def test_the_loss_is_the_mean_over_the_intervals_tokens_and_not_over_its_steps():
    interval = Interval(2, CPU)
    add(interval, [10.0, 30.0], [10, 10])
    add(interval, [2.0, 0.0], [80, 0], clipped=1.0)
    found = interval.metrics(["a", "b"], [None, None])
    assert found["train/CrossEntropyLoss"] == 42 / 100
    assert found["train/Perplexity"] == pytest.approx(math.exp(0.42))
    assert found["train/source/a/CrossEntropyLoss"] == 12 / 90
    assert found["train/source/b/CrossEntropyLoss"] == 3.0
    assert (found["optim/clipping_rate"], found["skipped"], interval.timed_steps, interval.data_wait) == (0.5, 0, 2, 1.0)
    assert "train/BitsPerByte" not in found


def test_bits_per_byte_are_logged_if_the_bytes_of_all_sources_read_are_known():
    interval = Interval(2, CPU)
    add(interval, [8 * math.log(2), 0.0], [4, 0])
    assert interval.metrics(["a", "b"], [2.0, None])["train/BitsPerByte"] == pytest.approx(1.0)
    add(interval, [0.0, 1.0], [0, 1])
    assert "train/BitsPerByte" not in interval.metrics(["a", "b"], [2.0, None])


def test_a_skipped_step_adds_no_loss_and_is_counted():
    interval = Interval(1, CPU)
    add(interval, [10.0], [10])
    add(interval, [math.nan], [10], skipped=1.0)
    add(interval, [math.inf], [10], skipped=1.0)
    found = interval.metrics(["a"], [None])
    assert (found["train/CrossEntropyLoss"], found["skipped"]) == (1.0, 2)


def test_an_interval_continues_from_its_state():
    whole, first = Interval(2, CPU), Interval(2, CPU)
    for part in (whole, first):
        add(part, [0.1, 0.7], [3, 5], skipped=0.0, clipped=1.0)
        add(part, [math.nan, 0.0], [3, 5], skipped=1.0)
    second = Interval(2, CPU, json.loads(json.dumps(first.state())))
    for part in (whole, second):
        add(part, [0.2, 0.3], [1, 1])
    assert second.metrics(["a", "b"], [None] * 2) == whole.metrics(["a", "b"], [None] * 2)
    assert second.timed_steps == 1
    assert Interval(3, CPU, first.state()).sums.tolist() == [[0.0] * 3] * 2  # other sources: starts at 0


def test_without_tokens_the_loss_is_nan_and_nothing_crashes():
    found = MeanLoss(0.0, 0.0, None).metrics("eval/x")
    assert math.isnan(found["eval/x/CrossEntropyLoss"])
    assert MeanLoss(1e6, 1.0, None).metrics("eval/x")["eval/x/Perplexity"] > 1e300


def test_throughput_is_arithmetic_and_an_unknown_device_has_no_mfu():
    known = dict(steps=10, seconds=5.0, data_wait=1.0, tokens=20_000, interval_tokens=10_000, flops_per_token=7, world_size=4)
    found = throughput_metrics(**known, peak_flops=None)
    assert found == {
        "throughput/total_tokens": 20_000,
        "throughput/total_flops": 140_000,
        "throughput/tokens_per_second": 2000.0,
        "throughput/device/tokens_per_second": 500.0,
        "throughput/step_seconds": 0.5,
        "throughput/data_wait_seconds": 0.1,
    }
    assert throughput_metrics(**known, peak_flops=7000.0)["throughput/mfu"] == 0.5


# ---- a run's lines


def test_every_line_has_the_contracts_names(tiny_args, held_out, read_metrics, tmp_path):
    config = trained(tiny_args("run", total_steps=4, **{"log.interval_steps": 3, "data.validation.v.path": held_out}))
    first, last = read_metrics(config.run_dir)
    assert (first["step"], last["step"]) == (3, 4)
    for line in (first, last):
        assert line.keys() >= {
            "step", "train/CrossEntropyLoss", "train/Perplexity", "optim/total_grad_norm", "optim/clipping_rate",
            "optim/learning_rate_group0", "throughput/total_tokens", "throughput/device/tokens_per_second",
            "throughput/tokens_per_second", "throughput/step_seconds", "throughput/data_wait_seconds",
            "throughput/total_flops", "train/source/a/CrossEntropyLoss", "sample_hash", "skipped", "attempt", "world_size",
        }  # fmt: skip
        assert "throughput/mfu" not in line
    assert last.keys() >= {"eval/v/CrossEntropyLoss", "eval/v/Perplexity"}
    assert last["throughput/total_tokens"] == 4 * 8 * 64
    assert [event["event"] for event in events_of(tmp_path / "run")] == ["start", "evaluation", "save", "finish"]


def test_the_logged_loss_is_the_mean_of_the_intervals_losses(tiny_args, read_metrics):
    losses = [stats.loss.item() for stats in train(tiny_args("each", total_steps=6))]
    trained(tiny_args("six", total_steps=6, **{"log.interval_steps": 6}))
    (line,) = read_metrics(tiny_args("six").run_dir)
    assert line["train/CrossEntropyLoss"] == pytest.approx(sum(losses) / 6, rel=1e-9)


# ---- mirrors


def test_auto_goes_online_with_a_key_and_offline_without_asking(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode(WandbConfig()) == "offline"
    (tmp_path / ".netrc").touch(mode=0o600)
    (tmp_path / ".netrc").write_text("machine other.example login user password x\n")
    assert wandb_mode(WandbConfig()) == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert wandb_mode(WandbConfig()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert wandb_mode(WandbConfig()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode(WandbConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(WandbConfig()) == "disabled"
    assert wandb_mode(WandbConfig(mode="online")) == "online"


@pytest.mark.parametrize(
    "name, value, mode",
    [("MODE", "dryrun", "offline"), ("MODE", "OFFLINE", "offline"), ("MODE", "Disabled", "disabled"), ("MODE", "run", "online"),
     ("MODE", "offlien", "offline"), ("DISABLED", "true", "disabled"), ("DISABLED", "1", "disabled"),
     ("DISABLED", "false", "online"), ("MODE", "", "online")],
)  # fmt: skip
def test_with_a_key_wandb_goes_online_only_where_the_environment_allows_it(monkeypatch, name, value, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setenv(f"WANDB_{name}", value)
    assert wandb_mode(WandbConfig()) == mode
    assert wandb_mode(WandbConfig(mode="offline")) == "offline"


def test_what_the_configuration_sets_wins_over_the_environment(tmp_path, wandb, monkeypatch):
    for name in ("PROJECT", "NAME", "TAGS"):
        monkeypatch.setenv(f"WANDB_{name}", "theirs")
    recorder(tmp_path, config=LogConfig(wandb=WandbConfig("online", "p", name="n", tags=("t",)))).close()
    recorder(tmp_path, config=LogConfig(wandb=WandbConfig("online"))).close()
    found = [(call["project"], call["name"], call["tags"]) for call in wandb.calls]
    assert found == [("p", "n", ["t"]), ("theirs", "theirs", None)]  # None: the client reads WANDB_TAGS


def copy_of_run(tmp_path, host=None):
    """A run_dir with a W&B id, and a copy of it; with `host` the original is on that one."""
    recorder(tmp_path / "run", config=ONLINE).close()
    if host:
        place = tmp_path / "run/wandb/place"
        place.write_text(json.dumps(json.loads(place.read_text()) | {"host": host}))
    return shutil.copytree(tmp_path / "run", tmp_path / "copy")


def test_a_copied_run_dir_is_a_new_run_on_wandb_and_the_original_keeps_its_id(tmp_path, wandb, caplog):
    (tmp_path / "run").mkdir()
    copy_of_run(tmp_path)
    (tmp_path / "copy/wandb/offline-run-1").mkdir()
    for folder in ("copy", "run", "copy"):
        recorder(tmp_path / folder, config=ONLINE).close()
    ids = [call["id"] for call in wandb.calls]
    assert ids[0] == ids[2] and ids[1] == ids[3] != ids[0]
    assert caplog.text.count("is a copy of the one on") == 1
    assert (tmp_path / "copy/wandb/copied-offline-run-1").is_dir()


def test_a_moved_run_dir_and_one_on_another_node_continue_their_run_on_wandb(tmp_path, wandb):
    (tmp_path / "run").mkdir()
    copy_of_run(tmp_path, host="another")
    recorder(tmp_path / "run", config=ONLINE).close()  # the same path, as a cluster's nodes see it
    (tmp_path / "run").rename(tmp_path / "moved")
    recorder(tmp_path / "moved", config=ONLINE).close()
    assert len({call["id"] for call in wandb.calls}) == 1
    recorder(tmp_path / "copy", config=ONLINE).close()  # of a folder on another machine, which cannot be looked at
    assert len({call["id"] for call in wandb.calls}) == 2


def test_a_run_of_an_older_version_keeps_its_id_under_the_new_name(tmp_path, wandb):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/run-id").write_text("abcd1234")
    recorder(tmp_path, config=ONLINE).close()
    assert wandb.calls[0]["id"] == "abcd1234" == (tmp_path / "wandb/id").read_text()
    assert not list((tmp_path / "wandb").glob("run-*"))


def test_tensorboard_has_the_attempt_as_text_and_not_as_a_chart(tmp_path, monkeypatch):
    wrote = []

    class Writer:
        def __init__(self, *args, **kwargs): ...
        def __getattr__(self, name):
            return lambda *args, **kwargs: wrote.append((name, *args))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    mirror = TensorboardMirror(tmp_path, 0)
    for step in (1, 2):
        mirror.log(step, {"time": 1.0, "loss": 3.0, "attempt": 1, "world_size": 4})
    charts = [call for call in wrote if call[0] == "add_scalar"]
    assert charts == [("add_scalar", "loss", 3.0)] * 2
    assert [call for call in wrote if call[0] == "add_text"] == [("add_text", "run", "attempt: 1  \nworld_size: 4")]


class FakeRun:
    def __init__(self, log, mode, steps, id):
        self.id = id
        self._log, self._steps = log, steps
        self.offline, self.dir, self.starting_step = mode == "offline", "wandb/offline-run/files", len(steps) + 1

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, metrics, step, commit):
        self._log()
        self._steps.append(step)

    def finish(self):
        self._log()


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for W&B whose log may fail; `calls` holds what init was given."""
    fake = types.ModuleType("wandb")
    fake.calls, fake.breaks, fake.teardown, steps = [], False, lambda: None, []
    fake.Settings = lambda **settings: settings

    def log():
        if fake.breaks:
            raise ConnectionError("the network is gone")

    def init(**options):
        fake.calls.append(options)
        return FakeRun(log, options["mode"], steps, options["id"])

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(log_wandb, "check_answers", lambda url: None)
    return fake


ONLINE = LogConfig(wandb=WandbConfig(mode="online", name="a run", tags=("x",)))


def test_a_mirror_that_fails_in_the_middle_is_left_out_with_one_warning(tmp_path, wandb, caplog):
    log = recorder(tmp_path, config=ONLINE)
    log.log(1, {"loss": 1.0})
    wandb.breaks = True
    for step in (2, 3):
        log.log(step, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert len(caplog.records) == 1 and "W&B failed and is disabled from step 2 on" in caplog.text


def test_the_commit_of_the_code_is_known_in_a_checkout():
    version = log_version.code_version()
    assert version is None or len(version.removesuffix("+changes")) == 40


def test_an_infinite_number_of_the_configuration_is_json_in_the_events_and_reads_back(tiny_args):
    from olmo_train import config as configuration
    from olmo_train.train import train
    from olmo_train.train_config import TrainConfig

    config = tiny_args("run", total_steps=1, **{"optim.max_grad_norm": ".inf", "parallel.compile": False})
    list(train(config))

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    lines = (Path(config.run_dir) / "events.jsonl").read_text().splitlines()
    events = [json.loads(line, parse_constant=refuse) for line in lines]
    assert events[0]["config"]["optim"]["max_grad_norm"] == ".inf"
    assert configuration.build(TrainConfig, events[0]["config"]) == config


def test_the_console_names_a_validation_source_with_its_whole_name(capsys):
    Console("run", 0, 10).log(5, {"eval/web/en/CrossEntropyLoss": 1.5, "eval/web/de/CrossEntropyLoss": 2.5})
    assert "web/en 1.5000  web/de 2.5000" in capsys.readouterr().out


# ---- metrics of the user's own


def test_own_metrics_are_in_the_line_of_their_step(tiny_args, read_metrics):
    """Also of the last one, of a step that is evaluated, and of one that is not logged otherwise; a resumed run logs the same."""
    config = tiny_args("run", **{"log.interval_steps": 5, "checkpoint.interval_steps": 5})

    def training(last):
        for stats in train(config):
            if stats.step % 5 == 0 or stats.step in (7, 12):
                stats.log("mine/squared", torch.tensor(stats.step**2))
                stats.log("mine/none", float("nan"))
            if stats.step == last:
                break

    training(8)  # the checkpoint is of step 5: 6 and 7 are trained and logged again
    training(12)
    logged = lines(config.run_dir)
    assert [(line["step"], line["mine/squared"]) for line in logged] == [(5, 25), (7, 49), (10, 100), (12, 144)]
    assert all(line["mine/none"] is None and line.keys() >= {"sample_hash", "skipped"} for line in logged)
    assert [line["step"] for line in read_metrics(config.run_dir)] == [5, 10, 12]  # the interval continues


def test_a_line_with_own_metrics_and_an_evaluation_has_both(tiny_args, held_out):
    changes = {"data.validation.v.path": held_out, "eval.interval_steps": 2, "log.interval_steps": 4}
    config = tiny_args("run", total_steps=3, **changes)
    for stats in train(config):
        stats.log("mine/x", stats.step)
    assert [line["mine/x"] for line in lines(config.run_dir)] == [1, 2, 3]
    assert ["eval/v/CrossEntropyLoss" in line for line in lines(config.run_dir)] == [False, True, True]


@pytest.mark.parametrize("name", ["loss", "step", "train/loss", "eval/x/CrossEntropyLoss", "System/x", "/x", "mine/"])
def test_names_that_a_run_uses_itself_are_refused(name):
    with pytest.raises(ValueError, match=f"^stats.log: {name}: own metrics are called FOLDER/NAME.*mine/"):
        OwnMetrics().add(1, name, 0.0)


def test_a_metric_that_would_be_lost_is_refused(tiny_args):
    run = train(tiny_args("run", total_steps=3))
    first = next(run)
    first.log("mine/x", 1)
    with pytest.raises(ValueError, match="step 1 has this metric already"):
        first.log("mine/x", 2)
    next(run)
    with pytest.raises(ValueError, match="the line of step 1 is written"):
        first.log("mine/y", 2)
    run.close()


def test_every_metric_of_a_run_has_a_name_that_own_metrics_cannot_have(tiny_args, held_out):
    config = trained(tiny_args("run", total_steps=2, **{"data.validation.v.path": held_out, "eval.interval_steps": 1}))
    names = {name for line in lines(config.run_dir) for name in line}
    assert {name.split("/")[0] for name in names if "/" in name} <= set(RESERVED)
