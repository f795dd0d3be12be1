"""Where a step's figures go. metrics.jsonl is the record of truth; W&B and TensorBoard mirror it and may fail.

One JSON object a line, each step once, floats written so that they read back bit for bit. Names are those of the public
OLMo runs, so that curves overlay.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo_train.errors import ConfigError, DataError, check_choice
from olmo_train.storage import replace_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WandbConfig:
    mode: str = "auto"  # auto: online with a key, else offline; or online, offline, disabled
    project: str = "olmo-train"
    entity: str | None = None
    group: str | None = None
    name: str | None = None  # null: the run_dir's last part
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("log.wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))


@dataclass(frozen=True)
class LogConfig:
    interval_steps: int = 10  # a line in metrics.jsonl every so many steps
    tensorboard: bool = False  # mirror the metrics to run_dir/tensorboard
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        if self.interval_steps < 1:
            raise ConfigError("log.interval_steps", f"must be at least 1, got {self.interval_steps}")


class Recorder:
    """Writes metrics.jsonl and events.jsonl of a run_dir and mirrors the metrics. Made on rank 0 only."""

    def __init__(self, run_dir: Path, config: LogConfig, resolved: dict[str, Any], last_step: int):
        """`last_step`: the step that the run resumes from; what an earlier attempt logged beyond it is done again, so its
        lines are dropped."""
        self.path = run_dir / "metrics.jsonl"
        self._drop_after(last_step)
        self._metrics = open(self.path, "a")  # noqa: SIM115, closed by close()
        self._events = open(run_dir / "events.jsonl", "a")  # noqa: SIM115
        self._mirrors = list(_mirrors(run_dir, config, resolved))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One line of metrics. A non-finite value is written as null."""
        line = {"step": step, "time": time.time(), **metrics}
        self._metrics.write(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n")
        self._metrics.flush()
        for mirror in list(self._mirrors):
            try:
                mirror.log(step, {key: value for key, value in metrics.items() if isinstance(value, (int, float))})
            except Exception as problem:
                log.warning("%s failed and is left out from step %d on: %s", mirror.name, step, problem)
                self._mirrors.remove(mirror)

    def event(self, event: str, step: int, **details: Any) -> None:
        self._events.write(json.dumps({"event": event, "step": step, "time": time.time(), **details}) + "\n")
        self._events.flush()

    def sync(self) -> None:
        """Make all lines survive a power cut: called before a checkpoint is committed."""
        os.fsync(self._metrics.fileno())
        os.fsync(self._events.fileno())

    def close(self) -> None:
        for mirror in self._mirrors:
            try:
                mirror.close()
            except Exception as problem:
                log.warning("%s could not be finished: %s", mirror.name, problem)
        self._metrics.close()
        self._events.close()

    def _drop_after(self, last_step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError) as problem:
                if number < len(lines):  # only the last line can be half-written
                    raise DataError(self.path, f"line {number} is not a line of metrics: {problem!r}") from problem
        if len(kept) < len(lines):
            replace_file(self.path, b"".join(kept))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mirrors(run_dir: Path, config: LogConfig, resolved: dict[str, Any]) -> Iterator[WandbMirror | TensorboardMirror]:
    if config.tensorboard:
        yield TensorboardMirror(run_dir)
    mode = wandb_mode(config.wandb)
    if mode != "disabled":
        with contextlib.suppress(_MirrorFailed):
            yield WandbMirror(run_dir, config.wandb, mode, resolved)


class _MirrorFailed(Exception):
    pass


def wandb_mode(config: WandbConfig) -> str:
    """online, offline or disabled. `auto` follows WANDB_MODE, else goes online when a key is at hand, and never asks."""
    if config.mode != "auto":
        return config.mode
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    import netrc
    from urllib.parse import urlsplit

    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        return "online" if netrc.netrc().authenticators(host or "") else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


class WandbMirror:
    """The run on Weights & Biases, under one id over all restarts."""

    name = "W&B"

    def __init__(self, run_dir: Path, config: WandbConfig, mode: str, resolved: dict[str, Any]):
        import wandb

        folder = run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        id_file = folder / "run-id"
        if not id_file.exists():
            replace_file(id_file, uuid.uuid4().hex[:8].encode())
        settings = wandb.Settings(init_timeout=30, silent=True)
        options = {
            "project": config.project,
            "entity": config.entity,
            "group": config.group,
            "name": config.name or run_dir.resolve().name,
            "tags": list(config.tags),
            "dir": str(run_dir),
            "id": id_file.read_text(),
            "resume": "allow",
            "config": {**resolved, "code_version": code_version()},
            "settings": settings,
        }
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as problem:
            if mode == "offline":
                log.warning("W&B is left out: %s", problem)
                raise _MirrorFailed from problem
            log.warning(
                "W&B cannot be reached, this part of the run is recorded offline (wandb sync sends it later): %s",
                problem,
            )
            self._run = wandb.init(mode="offline", **options)
        self._run.define_metric("throughput/total_tokens")
        self._run.define_metric("train/CrossEntropyLoss", summary="last")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorboardMirror:
    """The metrics as TensorBoard event files under run_dir/tensorboard."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as problem:
            raise ConfigError(
                "log.tensorboard", "needs the package tensorboard; pip install 'olmo-train[tensorboard]'"
            ) from problem
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def code_version() -> str | None:
    """The commit of the code that trains, with `+changes` when files differ from it; None outside a checkout."""
    try:
        changes = "+changes" if _git("status", "--porcelain", "-uno", ".") else ""
        return _git("rev-parse", "HEAD") + changes
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    where = Path(__file__).parent
    done = subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


class Clock:
    """Seconds of training in an interval: the wall clock less what was spent on evaluating and saving."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._started, self._paused = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - before


class Interval:
    """Sums over the steps since the last line of metrics, on the device until they are read: one host sync a line.

    A skipped step gives no loss. The sums are part of a checkpoint, so that a resumed run logs the same line.
    """

    # rows of the tensor of scalars
    STEPS, SKIPPED, CLIPPED, IN_A_ROW = range(4)

    def __init__(self, sources: int, device: torch.device, state: dict[str, Any] | None = None):
        state = state or {"sums": [[0.0] * sources] * 2, "counts": [0.0] * 4}
        self.sums = torch.tensor(state["sums"], dtype=torch.float64, device=device)  # (2, sources): loss, scored tokens
        self.counts = torch.tensor(state["counts"], dtype=torch.float64, device=device)
        self.data_wait = 0.0  # seconds

    def add(self, sums: Tensor, skipped: Tensor, clipped: Tensor, data_wait: float) -> None:
        """sums (2, sources) of one step; skipped and clipped are 0.0 or 1.0."""
        self.sums += torch.where(skipped > 0, torch.zeros_like(sums), sums)
        self.counts[: self.IN_A_ROW] += torch.stack((torch.ones_like(skipped), skipped, clipped))
        self.counts[self.IN_A_ROW] = (self.counts[self.IN_A_ROW] + 1) * skipped
        self.data_wait += data_wait

    @property
    def steps(self) -> int:
        return int(self.counts[self.STEPS].item())

    def metrics(self, names: list[str], bytes_per_token: list[float | None]) -> dict[str, float]:
        """Mean losses over the interval, whole and by source, and the shares of clipped and skipped steps."""
        (losses, tokens), (steps, skipped, clipped, _) = self.sums.tolist(), self.counts.tolist()
        read = list(zip(names, losses, tokens, bytes_per_token, strict=True))
        known = all(ratio is not None for _, _, scored, ratio in read if scored)
        n_bytes = sum(scored * ratio for _, _, scored, ratio in read if scored) if known else None
        metrics = loss_metrics("train", sum(losses), sum(tokens), n_bytes)
        metrics |= {f"train/source/{name}/CrossEntropyLoss": loss / scored for name, loss, scored, _ in read if scored}
        return metrics | {"optim/clipping_rate": clipped / steps, "skipped": int(skipped)}

    def skipped_in_a_row(self) -> int:
        return int(self.counts[self.IN_A_ROW].item())

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums.tolist(), "counts": self.counts.tolist()}

    def restart(self) -> None:
        self.sums.zero_()
        self.counts[: self.IN_A_ROW] = 0
        self.data_wait = 0.0


def loss_metrics(prefix: str, loss: float, tokens: float, n_bytes: float | None) -> dict[str, float]:
    """Mean loss in nats a token, its perplexity, and bits per byte where the bytes of the tokens are known."""
    mean = loss / tokens if tokens else math.nan
    metrics = {f"{prefix}/CrossEntropyLoss": mean, f"{prefix}/Perplexity": math.exp(min(mean, 700.0))}
    if n_bytes:
        metrics[f"{prefix}/BitsPerByte"] = loss / math.log(2) / n_bytes
    return metrics


def throughput_metrics(
    step: int,
    steps: int,
    seconds: float,
    data_wait: float,
    tokens_per_step: int,
    flops_per_token: int,
    world_size: int,
    peak_flops: float | None,
) -> dict[str, float]:
    """Speed over an interval of `steps` that ends with `step` and took `seconds`, of which `data_wait` for data.

    MFU is left out where the device's peak is not known: a missing figure is better than a wrong one.
    """
    rate = steps * tokens_per_step / seconds
    metrics = {
        "throughput/total_tokens": step * tokens_per_step,
        "throughput/total_flops": step * tokens_per_step * flops_per_token,
        "throughput/tokens_per_second": rate,
        "throughput/device/tokens_per_second": rate / world_size,
        "throughput/step_seconds": seconds / steps,
        "throughput/data_wait_seconds": data_wait / steps,
    }
    if peak_flops is not None:
        metrics["throughput/mfu"] = rate / world_size * flops_per_token / peak_flops
    return metrics
