"""The figures of the steps since the last line of metrics, and the line that they make."""

from __future__ import annotations

import logging
import socket
import statistics
import time
from typing import Any

import torch

from olmo_train import hardware
from olmo_train.data.loader import Batch
from olmo_train.data.mixture import Mixture
from olmo_train.log.energy import open_energy_meter
from olmo_train.log.interval import Clock, Interval, StepStats, slow_ranks, throughput_metrics
from olmo_train.log.run_logger import RunLogger
from olmo_train.model.cost import flops_per_token
from olmo_train.optim import schedules
from olmo_train.parallel.kernels import is_compiled
from olmo_train.parallel.world import World
from olmo_train.train_config import TrainConfig

log = logging.getLogger(__name__)


class Journal:
    """Collects each step's figures on the device and makes one line of metrics of them. Used alike on every rank."""

    def __init__(
        self, config: TrainConfig, world: World, mixture: Mixture, logger: RunLogger, attempt: int, state: dict[str, Any]
    ):
        """`state`: state.json of the checkpoint that the run continues, whose interval is continued too."""
        self.config, self.world, self.mixture, self.logger, self.attempt = config, world, mixture, logger, attempt
        self.interval = Interval(len(mixture.names), world.device, state.get("interval"))
        self.clock = Clock()
        self._meter, self._energy_before = open_energy_meter(), state.get("energy_kwh") or 0.0
        self._bytes_per_token = [s.n_bytes / s.n_tokens if s.n_bytes else None for s in mixture.sources]
        self._own_seconds = 0.0  # of this rank since the last line: waiting for data, and CPU time of this thread
        self._quiet_until = 0  # report a slow rank again after this step
        self._first_step = state["step"] + 1

    def begin_step(self, waited: float) -> None:
        """The batch is there, after `waited` seconds."""
        self._own_seconds += waited
        self._computing_since, self._waited, self._began = time.thread_time(), waited, time.perf_counter() - waited

    def add(self, stats: StepStats) -> None:
        """Count a step. Reads nothing from the device, but at the first two steps the loss, which waits for it."""
        self._own_seconds += time.thread_time() - self._computing_since
        self.logger.count(stats.step)
        if stats.step <= self._first_step + 1:
            loss = stats.loss.item()
            compiled = is_compiled(self.config.parallel, self.world.device)
            self.logger.early(time.perf_counter() - self._began, loss, compiled)
        clipped = (stats.grad_norm > schedules.max_grad_norm_at(stats.step, self.config.optim)).float()  # 0 if passed over
        self.interval.add(stats.sums, stats.skipped, clipped, stats.spike, self._waited)

    def line(self, stats: StepStats, batch: Batch) -> dict[str, Any]:
        """The metrics of the interval that ends with this step; starts the next interval."""
        config, world, device = self.config, self.world, hardware.detect()
        metrics = self.interval.metrics(self.mixture.names, self._bytes_per_token)
        metrics |= stats.metrics() | throughput_metrics(
            steps=self.interval.timed_steps,
            seconds=self.clock.seconds,
            data_wait=self.interval.data_wait,
            tokens=self.tokens(stats.step),
            interval_tokens=self.tokens(stats.step) - self.tokens(stats.step - self.interval.timed_steps),
            flops_per_token=flops_per_token(config.model, adapter=config.adapter),
            world_size=world.size,
            peak_flops=device.peak_flops if device else None,
        )
        metrics |= {f"train/source/{name}/epoch": epoch for name, epoch in self.mixture.epochs(stats.step).items()}
        self._report_slow_ranks(stats.step)
        if world.device.type == "cuda":
            metrics["System/Peak GPU Memory (MB)"] = torch.cuda.max_memory_allocated() / 2**20
        if (energy := self.energy_kwh()) is not None:
            metrics["throughput/energy_kwh"] = energy
        self.interval.restart()
        self.clock.restart()
        return metrics | self._origin(batch)

    def brief_line(self, stats: StepStats, batch: Batch) -> dict[str, Any]:
        """The line of a step that is evaluated but not logged otherwise; the interval continues."""
        return self._origin(batch) | {"skipped": int(stats.skipped.item())}

    def _origin(self, batch: Batch) -> dict[str, Any]:
        return {"sample_hash": batch.sample_hash, "attempt": self.attempt, "world_size": self.world.size}

    def tokens(self, step: int) -> int:
        """Tokens read by the end of this step."""
        return self.mixture.batches.places_before(step + 1) * self.config.model.seq_len

    def energy_kwh(self) -> float | None:
        """What all GPUs have used for the steps so far, those before a resume too; None where one cannot measure it."""
        used = self.world.gather(None if self._meter is None else self._meter())
        return None if None in used else self._energy_before + sum(used)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint of this step keeps, so that a resumed run logs the same line."""
        return {"total_tokens": self.tokens(step), "interval": self.interval.state(), "energy_kwh": self.energy_kwh()}

    def _report_slow_ranks(self, step: int) -> None:
        """Compare the time each rank spends on its own work, without waiting for others, which makes all steps equally long."""
        if self.world.size == 1:
            return
        ranks = self.world.gather((self._own_seconds / max(self.interval.timed_steps, 1), socket.gethostname()))
        self._own_seconds = 0.0
        slow = slow_ranks([own for own, _ in ranks])
        if slow and step > self._quiet_until:
            self._quiet_until = step + 10 * self.config.log.interval_steps
            median = statistics.median_low(own for own, _ in ranks)
            for rank in slow:
                own, host = ranks[rank]
                self.logger.event("slow", step, rank=rank, host=host, own_seconds=own, median_seconds=median)
                if self.world.is_main:
                    log.warning(
                        "rank %d on %s is slow: %.3g s a step for its data and work, the median is %.3g s; "
                        "all ranks wait for it", rank, host, own, median,
                    )  # fmt: skip
