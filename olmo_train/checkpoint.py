"""Checkpoints: save beside training, commit whole, load on any number of processes.

A checkpoint is a folder checkpoints/step-0001000/ of safetensors shards (torch.distributed.checkpoint writes and reshards
them), state.json, config.yaml and MANIFEST.json. No file is ever unpickled. Names of tensors: `model.NAME` for weights and
`optim.NAME.KEY` for the optimizer's state of that weight.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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

from olmo_train import config as configuration
from olmo_train.checkpoint_format import open_reader
from olmo_train.distributed import World
from olmo_train.errors import CheckpointError, ConfigError, NonFiniteError, SaveError
from olmo_train.model.config import ModelConfig
from olmo_train.model.transformer import Transformer
from olmo_train.storage import commit_folder, problems_of, remove_folder, write_file

log = logging.getLogger(__name__)
# Reading on one process without a process group is meant: load_model, WeightReader.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
FOLDER = re.compile(r"step-(\d{7,})")


@dataclass(frozen=True)
class CheckpointConfig:
    interval_steps: int = 1000  # save after every so many steps, and at the end
    keep_last: int = 3  # committed checkpoints that stay, besides the permanent ones
    permanent_interval_steps: int | None = None  # checkpoints at multiples of this are never deleted
    save_steps: tuple[int, ...] = ()  # further steps to save at, never deleted
    async_save: bool = True  # write beside training, from a copy in host memory
    required: bool = True  # a save that fails ends the run; false: it is a warning, and training goes on

    def __post_init__(self) -> None:
        for key in ("interval_steps", "keep_last", "permanent_interval_steps"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"checkpoint.{key}", f"must be at least 1, got {value}")

    def is_due(self, step: int) -> bool:
        return step % self.interval_steps == 0 or self.is_permanent(step)

    def is_permanent(self, step: int) -> bool:
        every = self.permanent_interval_steps
        return step in self.save_steps or (every is not None and step % every == 0)


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:07d}"


def committed(run_dir: Path) -> dict[int, Path]:
    """{step: folder} of the committed checkpoints of a run, oldest first."""
    root = run_dir / "checkpoints"
    found = {int(m[1]): path for path in root.glob("step-*") if (m := FOLDER.fullmatch(path.name)) and path.is_dir()}
    return dict(sorted(found.items()))


def _aside(folder: Path) -> Path:
    """The name of a checkpoint while another one of the same step takes its place."""
    return folder.with_name(f".{folder.name}.old")


def put_back(run_dir: Path) -> None:
    """Undo a replacement that a kill cut in half, or remove what one that was done has left.

    Only under the run's lock: beside a live run it would disturb the replacement that is under way.
    """
    for aside in (run_dir / "checkpoints").glob(".step-*.old"):
        final = aside.with_name(aside.name[1:].removesuffix(".old"))
        if os.path.lexists(final):
            remove_folder(aside)
        else:
            os.rename(aside, final)


def newest(run_dir: Path, strict: bool = False) -> Path | None:
    """The newest checkpoint that verifies; None when the run has none at all.

    Damaged ones are named in a warning and left alone. Raises CheckpointError when there are some and none verifies;
    with `strict`, when the newest one does not.
    """
    folders = committed(run_dir)
    for folder in reversed(folders.values()):
        problems = problems_of(folder)
        if not problems:
            return folder
        if strict:
            raise CheckpointError(folder, f"is damaged: {'; '.join(problems)}; resume: auto would take the one before it")
        log.warning("%s is damaged and passed over: %s", folder, "; ".join(problems))
    if folders:
        raise CheckpointError(
            run_dir / "checkpoints",
            f"none of the {len(folders)} checkpoints verifies; restore one or choose another run_dir",
        )
    return None


def newest_folder(run_dir: Path) -> Path | None:
    """The newest committed checkpoint, unverified."""
    return next(reversed(committed(run_dir).values()), None)


def resolve(path: Path) -> Path:
    """The checkpoint folder that a user means: itself, or the newest of a run_dir. Raises CheckpointError."""
    if (path / "MANIFEST.json").is_file():
        problems = problems_of(path)
        if problems:
            raise CheckpointError(path, f"is damaged: {'; '.join(problems)}")
        return path
    folder = newest(path) if path.is_dir() else None
    if folder is None:
        raise CheckpointError(path, "is neither a checkpoint folder nor a run_dir with a checkpoint")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises CheckpointError when it cannot be read."""
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointError(folder, f"state.json cannot be read: {problem}; all processes must see the same files") from problem


def load_model(folder: str | Path) -> Transformer:
    """The Transformer of a checkpoint folder, or of a run_dir's newest: fp32, on the CPU, in eval mode.

    Raises CheckpointError when the folder is damaged or does not hold this model's weights.
    """
    folder = resolve(Path(folder))
    shape = configuration.build(ModelConfig, configuration.read([folder / "config.yaml"])["model"], "model")
    with torch.device("meta"):
        model = Transformer(shape)
    model.to_empty(device="cpu")
    wanted = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    _read_tensors(folder, wanted, prefix="model.", group=None)
    return model.eval()


def load(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """Fill the model and the optimizer, sharded in any way, from a checkpoint; gives its state.json.

    A converted checkpoint may have weights alone (optimizer_steps null): then the optimizer stays as it is.
    """
    state = read_state(folder)
    if state["optimizer_steps"] is None:
        load_weights(folder, model, world)
        return state
    _read_tensors(folder, state_tensors(model, optimizer), prefix="", group=world.control_group)
    for values in optimizer.state.values():
        values["step"].fill_(state["optimizer_steps"])
    return state


def load_weights(folder: Path, model: Transformer, world: World) -> None:
    """Fill the model, sharded in any way, with a checkpoint's weights alone."""
    wanted = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    _read_tensors(folder, wanted, prefix="model.", group=world.control_group)


class WeightReader:
    """Reads the weights of a checkpoint folder one at a time, whole, on the CPU: for what must not hold a model at once."""

    def __init__(self, folder: Path):
        self._storage = open_reader(folder)
        metadata = self._storage.read_metadata()
        self._storage.read_metadata = lambda: metadata  # the files' headers, read once
        self._entries = metadata.state_dict_metadata

    def __call__(self, name: str) -> Tensor:
        """The parameter called `name`."""
        entry = self._entries[f"model.{name}"]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        dcp.load({f"model.{name}": tensor}, storage_reader=self._storage, no_dist=True)
        return tensor


def state_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{name: tensor} of all that a checkpoint keeps as tensors. The optimizer's count of its updates is the same for
    every weight and goes to state.json."""
    tensors = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is gathered, and would be saved whole and without its moments"
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():  # a frozen one has no state
            if key != "step":
                tensors[f"optim.{name}.{key}"] = value
    return tensors


def _read_tensors(folder: Path, wanted: dict[str, Tensor], prefix: str, group: Any) -> None:
    """Read tensors in place. Names and shapes must match both ways among those that start with `prefix`."""
    reader = open_reader(folder)
    stored = {
        name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items() if name.startswith(prefix)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    for name in sorted(stored.keys() | shapes.keys()):
        if stored.get(name) != shapes.get(name):
            raise CheckpointError(
                folder,
                f"{name} is {stored.get(name, 'absent')} in the checkpoint and {shapes.get(name, 'absent')} in this run",
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what no_dist asks for
        dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)


class Checkpointer:
    """Writes a run's checkpoints, one at a time, and deletes those that the configuration no longer keeps."""

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, world: World, files: dict[str, bytes], resumed_step: int | None = None
    ):
        """`files` go into every checkpoint as they are: the configuration, the tokenizer. `resumed_step`: the step of the
        run's own checkpoint that training goes on from."""
        self.run_dir, self.config, self.world, self.files = run_dir, config, world, files
        # A snapshot in host memory is a DTensor of a mesh of hosts.
        on_host = world.device.type == "cpu"
        self._mesh = world.mesh if on_host else DeviceMesh("cpu", world.mesh.mesh, mesh_dim_names=world.mesh.mesh_dim_names)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._host: dict[str, Tensor] = {}  # of the snapshot, by name
        self._figures: dict[str, float] = {}
        self._failure: SaveError | None = None  # of the last save
        self.last_step = resumed_step  # of the last save that was begun and has not failed: this step need not be saved again
        self.committed_step = -1 if resumed_step is None else resumed_step  # of the last save that is known to be committed

    def save(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Save the state after update `step`.

        With async_save the files are written beside training; the next save, `wait` or `failed` tells what went wrong.
        """
        started = time.perf_counter()
        self.wait()
        state = {**state, "step": step, "optimizer_steps": self._optimizer_steps(optimizer)}
        snapshot = self._snapshot(state_tensors(model, optimizer))
        self._pending, self.last_step = self._thread.submit(self._write, step, snapshot, state), step
        if not self.config.async_save:
            self.wait()
        self._figures["throughput/checkpoint_stall_seconds"] = time.perf_counter() - started

    def failed(self) -> bool:
        """Whether the last save is known to have failed; never waits."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self, leaving: bool = False) -> None:
        """Until the last save is committed. Raises SaveError when it failed; where a save is not required, only warns,
        unless the run is `leaving`: it must not end as saved when it was not."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                seconds, size = pending.result()
            except SaveError as problem:
                self.last_step, self._failure = None, problem
                if not self.config.required and not leaving:
                    log.warning("%s; training goes on without it", problem)
            else:
                self.committed_step, self._failure = self.last_step, None
                self._figures["throughput/checkpoint_write_seconds"] = seconds
                self._figures["throughput/checkpoint_bytes_per_second"] = size / seconds
        if self._failure is not None and (self.config.required or leaving):
            raise self._failure

    def take_figures(self) -> dict[str, float]:
        """Metrics of the saves since the last call: stall, time beside training, bandwidth of all ranks together."""
        if self._pending is not None and self._pending.done() and not self.failed():
            self.wait()
        figures, self._figures = self._figures, {}
        return figures

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _optimizer_steps(self, optimizer: torch.optim.Optimizer) -> int:
        return int(next(iter(optimizer.state.values()))["step"].item())

    def _snapshot(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A copy in host memory, which is kept for the next one: fresh memory takes several times as long."""
        snapshot = {}
        on_gpu = self.world.device.type == "cuda"
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if name not in self._host:
                self._host[name] = torch.empty_like(local, device="cpu", pin_memory=on_gpu)
            snapshot[name] = self._host[name].copy_(local, non_blocking=True)
            if isinstance(tensor, DTensor):
                snapshot[name] = DTensor.from_local(
                    snapshot[name], self._mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
                )
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return snapshot

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> tuple[float, int]:
        """In the thread, on every rank: write, agree that all is written, let rank 0 commit and prune.

        Gives seconds and bytes. All ranks raise SaveError when one of them cannot write, and NonFiniteError when one
        holds a non-finite value: such a state is never committed.
        """
        started = time.perf_counter()
        final = folder_of(self.run_dir, step)
        if poisoned := sorted(set(sum(self._together(final, lambda: _non_finite(tensors)), []))):
            raise NonFiniteError(
                final,
                f"was not committed: {poisoned[0]} and {len(poisoned) - 1} other tensors hold non-finite values; "
                f"the last good checkpoint is {newest_folder(self.run_dir)}; lower optim.peak_lr",
            )
        temporary = final.with_name(f".{final.name}.tmp")
        self._together(final, lambda: self._clear(temporary) if self.world.is_main else None)
        writer = _Writer(temporary)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self.world.background_group)
        except CheckpointException as problem:  # raised on every rank when the writing of one has failed
            causes = {rank: failure[0] for rank, failure in problem.failures.items()}
            raise SaveError(final, f"could not be written: {causes}; {self._need(tensors)}") from problem
        parts = self._together(final, lambda: writer.entries)
        entries = {name: entry for part in parts for name, entry in part.items()}
        self._together(final, lambda: self._commit(temporary, final, state, entries) if self.world.is_main else None)
        return time.perf_counter() - started, sum(entry["size"] for entry in entries.values())

    def _together(self, final: Path, function: Callable[[], Any]) -> list[Any]:
        """Call a function on every rank and give all results; an OSError of one becomes a SaveError of all."""
        try:
            mine = (function(), None)
        except OSError as problem:
            mine = (None, f"could not be written: {problem}")
        outcomes: list[Any] = [None] * self.world.size
        dist.all_gather_object(outcomes, mine, group=self.world.background_group)
        for _, problem in outcomes:
            if problem is not None:
                raise SaveError(final, problem)
        return [result for result, _ in outcomes]

    def _need(self, tensors: dict[str, Tensor]) -> str:
        """What the disk must hold, for the error that tells of a full one."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return f"a checkpoint needs {size / 1e9:.3g} GB, {shutil.disk_usage(self.run_dir).free / 1e9:.3g} GB are free"

    def _clear(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that died
        temporary.mkdir(parents=True)

    def _commit(self, temporary: Path, final: Path, state: dict, entries: dict[str, dict]) -> None:
        for name, content in {"state.json": json.dumps(state, indent=1).encode(), **self.files}.items():
            entries[name] = write_file(temporary / name, content)
        if os.path.lexists(final):  # a damaged one that loading passed over, now computed again
            os.rename(final, _aside(final))  # and not removed: until the new one has its name, `put_back` can undo this
        commit_folder(temporary, final, entries)
        for folder in superfluous(self.run_dir, self.config, int(state["step"])):
            remove_folder(folder)
        for leftover in final.parent.glob(".step-*"):  # of saves and deletions that died
            remove_folder(leftover)


def _non_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of those whose part on this rank is not finite throughout."""
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    # Smallest and largest value tell as much as isfinite and take a twentieth of its time.
    return [name for name, t in local.items() if t.numel() and not torch.stack(torch.aminmax(t)).isfinite().all()]


def superfluous(run_dir: Path, config: CheckpointConfig, last_step: int | None = None) -> list[Path]:
    """The checkpoints that retention would delete now: neither permanent nor among the newest keep_last whole ones.

    Those after `last_step`, the one just committed, do not count: they are damaged ones that loading passed over. One with
    a missing or cut file neither counts nor is deleted.
    """
    folders = committed(run_dir)
    passing = [step for step in folders if not config.is_permanent(step) and (last_step is None or step <= last_step)]
    whole = [folders[step] for step in passing if not problems_of(folders[step], contents=False)]
    return whole[: -config.keep_last]


class _Writer(HuggingFaceStorageWriter):
    """torch's layout of sharded safetensors, one file a rank, written from where the tensors lie: torch's own writer
    builds the whole file in memory first. Notes size and hash of the bytes it writes."""

    def __init__(self, path: Path):
        super().__init__(str(path), save_distributed=True)
        self.entries: dict[str, dict[str, Any]] = {}  # {file name: manifest entry} of what this rank has written

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        tensors = {item.index.fqn: planner.resolve_data(item).contiguous() for item in plan.items}
        if tensors:
            name = f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
            offsets = {item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for item in plan.items}
            views = [memoryview(tensor.view(-1).view(torch.uint8).numpy()) for tensor in tensors.values()]
            self.entries[name] = write_file(Path(self.path) / name, _safetensors_header(tensors, offsets), *views)
        written: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        written.set_result([WriteResult(item.index, sizes[item.index.fqn], None) for item in plan.items])
        return written


def _safetensors_header(tensors: dict[str, Tensor], offsets: dict[str, Any]) -> bytes:
    """What stands before the tensors' bytes: its length, 8 bytes, then JSON padded to a multiple of 8
    (github.com/huggingface/safetensors, "Format"). Where a part lies in its tensor is told as torch's reader wants it."""
    header: dict[str, Any] = {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32, (name, tensor.dtype)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, start + tensor.nbytes]}
        start += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
