"""Save checkpoints in the background and commit them atomically.

A checkpoint is a folder checkpoints/step-0001000/ of safetensors shards (torch.distributed.checkpoint writes and reshards
them), state.json, config.yaml and MANIFEST.json. No file is ever unpickled. Tensors are named `model.NAME` for weights and
`optim.NAME.KEY` for the optimizer's state of that weight.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from olmo_train.checkpoint.config import CheckpointConfig
from olmo_train.checkpoint.folders import _aside, folder_of, newest_folder, superfluous, write_best
from olmo_train.checkpoint.format import FORMAT
from olmo_train.checkpoint.load import state_tensors
from olmo_train.deal import deal
from olmo_train.errors import NonFiniteError, SaveError, reason
from olmo_train.formats import byte_size
from olmo_train.model.transformer import Transformer
from olmo_train.parallel.exchange import place_in
from olmo_train.parallel.world import World
from olmo_train.storage import commit_folder, remove_folder, temporary_folder, write_file

log = logging.getLogger(__name__)
ALIGNMENT = 64  # bytes at whose multiples a buffer begins: a cache line


class Checkpointer:
    """Writes a run's checkpoints, one at a time, and deletes old ones as the configuration says."""

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, world: World, files: dict[str, bytes], resumed_step: int | None = None
    ):
        """`files` are copied into every checkpoint: the configuration, the tokenizer. `resumed_step`: the step of the run's own
        checkpoint that training resumes from."""
        self.run_dir, self.config, self.world, self.files = run_dir, config, world, files
        # A snapshot in host memory is a DTensor on a CPU mesh.
        on_host = world.device.type == "cpu"
        self._mesh = world.mesh if on_host else DeviceMesh("cpu", world.mesh.mesh, mesh_dim_names=world.mesh.mesh_dim_names)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._host: dict[str, Tensor] = {}  # buffers of the snapshot, by name: parts of one allocation
        self._checkpoint_bytes = 0  # of all tensors of a checkpoint
        self._figures: dict[str, float] = {}
        self._failure: SaveError | None = None  # of the last save
        self.last_step = resumed_step  # of the last save that was started and has not failed: no need to save this step again
        self.committed_step = -1 if resumed_step is None else resumed_step  # of the last save known to be committed

    def save(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Save the state after update `step`.

        With async_save the files are written in the background; the next save, `wait` or `failed` reports a failure.
        """
        started = time.perf_counter()
        self.wait()
        optimizer_steps = int(next(iter(optimizer.state.values()))["step"].item())
        state = {"format": FORMAT, **state, "step": step, "optimizer_steps": optimizer_steps}
        snapshot = self._snapshot(state_tensors(model, optimizer))
        self._pending, self.last_step = self._thread.submit(self._write, step, snapshot, state), step
        if not self.config.async_save:
            self.wait()
        self._figures["throughput/checkpoint_stall_seconds"] = time.perf_counter() - started

    def failed(self) -> bool:
        """Whether the last save is known to have failed; never waits."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self, leaving: bool = False) -> None:
        """Wait until the last save is committed. Raises SaveError if it failed. If saves are not required it only warns, unless
        the run is `leaving`: a run must not report that it saved when it did not."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                seconds, size = pending.result()
            except SaveError as problem:
                self.last_step, self._failure = None, problem
                if not self.config.required and not leaving:
                    log.warning("%s; training continues without it", problem)
            else:
                self.committed_step, self._failure = self.last_step, None
                self._figures["throughput/checkpoint_write_seconds"] = seconds
                self._figures["throughput/checkpoint_bytes_per_second"] = size / seconds
        if self._failure is not None and (self.config.required or leaving):
            raise self._failure

    def take_figures(self) -> dict[str, float]:
        """Metrics of the saves since the last call: stall, write time in the background, bandwidth of all ranks together."""
        if self._pending is not None and self._pending.done() and not self.failed():
            self.wait()
        figures, self._figures = self._figures, {}
        return figures

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        if self._host and self.world.device.type == "cuda":
            slab = next(iter(self._host.values())).untyped_storage()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(slab.data_ptr()))
        self._host = {}

    def _snapshot(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors that this rank writes to host memory. The buffers are reused by the next snapshot: copying to new
        memory takes several times as long."""
        self._checkpoint_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        mine = {name: tensors[name] for name in names_to_write(tensors, self.world.mesh)}
        local = _local(mine)
        on_gpu = self.world.device.type == "cuda"
        if not self._host:
            self._host = _host_buffers(local, pinned=on_gpu)
        snapshot: dict[str, Tensor] = {}
        for name, tensor in mine.items():
            snapshot[name] = self._host[name].copy_(local[name], non_blocking=True)
            if isinstance(tensor, DTensor):
                snapshot[name] = DTensor.from_local(
                    snapshot[name], self._mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
                )
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return snapshot

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> tuple[float, int]:
        """In the thread, on every rank: write, agree that all ranks have written, let rank 0 commit and prune.

        Returns seconds and bytes. All ranks raise SaveError when one of them cannot write, and NonFiniteError when one
        holds a non-finite value: such a state is never committed.
        """
        started = time.perf_counter()
        final = folder_of(self.run_dir, step)
        if poisoned := sorted(set(sum(self._together(final, lambda: non_finite(tensors)), []))):
            raise NonFiniteError(
                final,
                f"was not committed: {poisoned[0]} and {len(poisoned) - 1} other tensors hold non-finite values; "
                f"the last good checkpoint is {newest_folder(self.run_dir)}; lower optim.peak_lr",
            )
        temporary = self._together(final, lambda: temporary_folder(final) if self.world.is_main else None)[0]
        writer = _Writer(temporary)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self.world.background_group)
        except CheckpointException as problem:  # raised on every rank when one could not write
            causes = {rank: failure[0] for rank, failure in problem.failures.items()}
            raise SaveError(final, f"could not be written: {causes}; {self._need()}") from problem
        parts = self._together(final, lambda: writer.entries)
        entries = {name: entry for part in parts for name, entry in part.items()}
        self._together(final, lambda: self._commit(temporary, final, state, entries) if self.world.is_main else None)
        return time.perf_counter() - started, sum(entry["size"] for entry in entries.values())

    def _together(self, final: Path, function: Callable[[], Any]) -> list[Any]:
        """Call a function on every rank and return all results; an OSError of one rank becomes a SaveError on all."""
        try:
            mine = (function(), None)
        except OSError as problem:
            mine = (None, f"could not be written: {reason(problem)}")
        outcomes: list[Any] = [None] * self.world.size
        dist.all_gather_object(outcomes, mine, group=self.world.background_group)
        for _, problem in outcomes:
            if problem is not None:
                raise SaveError(final, problem)
        return [result for result, _ in outcomes]

    def _need(self) -> str:
        """The space that checkpoints need, for the error about a full disk."""
        free = shutil.disk_usage(self.run_dir).free
        return f"a checkpoint needs {byte_size(self._checkpoint_bytes)}, {byte_size(free)} are free"

    def _commit(self, temporary: Path, final: Path, state: dict, entries: dict[str, dict]) -> None:
        for name, content in {"state.json": json.dumps(state, indent=1).encode(), **self.files}.items():
            entries[name] = write_file(temporary / name, content)
        if os.path.lexists(final):  # a damaged one that loading skipped; its step was computed again
            os.rename(final, _aside(final))  # not removed: until the new one has this name, `put_back` can undo it
        commit_folder(temporary, final, entries)
        write_best(self.run_dir, state.get("best"))  # before the former best may be deleted
        for folder in superfluous(self.run_dir, self.config, int(state["step"])):
            remove_folder(folder)
        for leftover in final.parent.glob(".step-*"):  # left by saves and deletions that were killed
            remove_folder(leftover)


def names_to_write(tensors: dict[str, Tensor], mesh: DeviceMesh) -> list[str]:
    """The names of the tensors whose shards this rank writes: all of them, or with replicas, which hold the same shards, its
    replica's share of the bytes."""
    rank, ranks, shards = place_in(mesh)
    owners = deal([tensor.numel() for tensor in tensors.values()], ranks // shards)
    return [name for name, owner in zip(tensors, owners, strict=True) if owner == rank // shards]


def _host_buffers(tensors: dict[str, Tensor], pinned: bool) -> dict[str, Tensor]:
    """A buffer in host memory for each tensor, {name: buffer}, all in one allocation.

    torch rounds each pinned allocation up to a power of two, also a large one, so ordinary memory is allocated and then pinned.
    """
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values()]
    slab = torch.empty(sum(sizes), dtype=torch.uint8)
    if pinned and slab.nbytes:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, 0))
    parts = zip(tensors.items(), slab.split(sizes), strict=True)
    return {name: part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for (name, tensor), part in parts}


def _local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of each tensor."""
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def non_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of tensors with a non-finite value in this rank's part."""
    local = _local(tensors)
    # aminmax finds any NaN or infinity and takes a twentieth of the time of isfinite.
    return [name for name, t in local.items() if t.numel() and not torch.stack(torch.aminmax(t)).isfinite().all()]


class _Writer(HuggingFaceStorageWriter):
    """Writes torch's layout of sharded safetensors, one file per rank, directly from the tensors' memory: torch's own writer
    builds the file in memory first. Records size and hash of the bytes it writes."""

    def __init__(self, path: Path):
        super().__init__(str(path), save_distributed=True)
        self.entries: dict[str, dict[str, Any]] = {}  # {file name: manifest entry} of this rank's files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write this rank's tensors as one safetensors file, and note its manifest entry."""
        tensors = {item.index.fqn: planner.resolve_data(item).contiguous() for item in plan.items}
        if tensors:
            name = f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
            offsets = {item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for item in plan.items}
            views = [memoryview(tensor.view(-1).view(torch.uint8).numpy()) for tensor in tensors.values()]
            self.entries[name] = write_file(Path(self.path) / name, safetensors_header(tensors, offsets), *views)
        written: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        written.set_result([WriteResult(item.index, sizes[item.index.fqn], None) for item in plan.items])
        return written


def safetensors_header(tensors: dict[str, Tensor], offsets: dict[str, Any]) -> bytes:
    """The header before the tensors' bytes: its length in 8 bytes, then JSON padded to a multiple of 8
    (github.com/huggingface/safetensors, "Format"). Offsets of shards are stored as torch's reader expects."""
    header: dict[str, Any] = {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32, (name, tensor.dtype)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, start + tensor.nbytes]}
        start += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
