"""The processes of a run: join and leave torch.distributed, ranks and groups. No other file starts or ends it.

There is one code path for any number of processes: without torchrun's environment the world has one rank, and its group needs
no port. A World is passed explicitly; there are no globals.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from olmo_train.errors import ConfigError, PeerError, UserError
from olmo_train.formats import counted
from olmo_train.parallel.processes import Processes, announced

T = TypeVar("T")
LEAVE_SECONDS = 2.0  # to wait for the other ranks before leaving the world early, or after an error
# gloo reports a closed connection or a timeout as a plain RuntimeError
GLOO_ERRORS = (
    "gloo/transport",
    "gloo/rendezvous",
    "Gloo connectFullMesh failed",
    "Connection closed by peer",
    "Application timeout caused pair closure",
)


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int  # which of the processes this is
    size: int
    data_rank: int  # which equal part of each batch it reads; processes that share a copy of the model read the same part
    data_size: int  # how many parts there are
    device: torch.device
    mesh: DeviceMesh  # ("shard",), or ("replicate", "shard") when there are replicas
    background_group: Any = field(repr=False)  # gloo group for threads, which must not share one with the training loop
    control_group: Any = field(repr=False)  # gloo group for small values on the host, also in GPU runs
    data_group: Any = field(repr=False, default=None)  # processes that read different parts, one for each; None: all

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device_memory(self) -> int | None:
        """Bytes of memory of this process's GPU; None on a CPU."""
        return torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else None

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the parts of the batch, in place and on its device; returns it."""
        dist.all_reduce(values, group=self.data_group)
        return values

    def any(self, flag: int | bool) -> int:
        """The largest flag of all ranks, on the host: every rank gets the same answer."""
        shared = torch.tensor(int(flag))
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.control_group)
        return int(shared)

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 and return its result, a small picklable object, on every rank.

        A UserError or OSError that it raises is raised on every rank, so that no rank waits for one that has failed.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (UserError, OSError) as problem:
                outcome[1] = problem
        outcome = self.broadcast(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def on_main_only(self, function: Callable[[], T]) -> T | None:
        """Call a function on rank 0; None elsewhere. Errors are raised on every rank, as with on_main."""
        kept: list[T] = []
        self.on_main(lambda: kept.append(function()))
        return kept[0] if kept else None

    def together(self, function: Callable[[], T]) -> T:
        """Call a function on every rank; each returns its own result. A UserError of any rank, such as a file that only one
        machine lacks, is raised on all of them."""
        result, problem = None, None
        try:
            result = function()
        except UserError as own:
            problem = own
        rank, problem = next(((rank, p) for rank, p in enumerate(self.gather(problem)) if p is not None), (0, None))
        if problem is not None:
            raise problem if rank == 0 else type(problem)(problem.where, f"on rank {rank}: {problem.what}")
        return result

    def gather(self, value: Any) -> list[Any]:
        """A small Python object from every rank, in rank order."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, a small picklable object, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control_group)
        return values[0]

    def barrier(self) -> None:
        dist.barrier(group=self.control_group)


@contextlib.contextmanager
def explain_lost_peers() -> Iterator[None]:
    """Turn the errors that torch raises when another process is gone or silent into a PeerError."""
    try:
        yield
    except RuntimeError as problem:
        if not isinstance(problem, dist.DistError) and not any(words in str(problem) for words in GLOO_ERRORS):
            raise
        reason = _reason(str(problem))
        raise PeerError("peers", f"another process of the run is gone: {reason}; run the same command again") from problem


def _reason(text: str) -> str:
    """The first sentence of an error from torch, gloo or NCCL, without source file names."""
    line = next(iter(text.strip().splitlines()), "").replace("error in: ", "error: ")
    return re.sub(r"\[?\S*/\S+\.\w+:\d+[\],]*\s*", "", line).split(". ")[0].rstrip(". ")


@contextlib.contextmanager
def join_world(replicas: int = 1, timeout_seconds: float = 600) -> Iterator[World]:
    """Join the processes that torchrun started, or be a world of one; leaves the group at the end, except after an error that
    the other ranks do not have: they would be waited for.

    `replicas`: how many groups of ranks each hold a full copy of the sharded state (HSDP); 1 is plain FSDP.
    A collective fails when a rank does not join it within `timeout_seconds`.
    Raises ConfigError when `replicas` does not divide the number of processes.
    """
    processes = announced()
    size = processes.size
    if size % replicas:
        raise ConfigError("parallel.replicas", f"{replicas} does not divide the {counted(size, 'process')} of this run")
    if torch.cuda.is_available():
        if processes.local_rank >= (gpus := torch.cuda.device_count()):
            error = ConfigError(
                "LOCAL_RANK", f"{processes.local_rank} has no GPU: this machine shows {gpus}; start {gpus} processes"
            )
            error.speaks = processes.local_rank == gpus  # rank 0 has a GPU, and waits for this one
            raise error
        device, backend = torch.device("cuda", processes.local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    # NCCL's monitor aborts a process whose launches block, by default after 480 s: the watchdog's report comes first.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(timeout_seconds + 120)))
    if processes.launched:
        store = _store_of_this_start(processes, timeout)
        dist.init_process_group(backend, store=store, rank=processes.rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # no port needed
    control_group = dist.new_group(backend="gloo", timeout=timeout)
    try:
        mesh = make_mesh(device, size, replicas)
        for group in mesh.get_all_groups():  # torch creates them with its default timeout, 600 s on a GPU
            dist.distributed_c10d._set_pg_timeout(timeout, group)
        yield World(
            rank=dist.get_rank(),
            size=size,
            data_rank=dist.get_rank(),
            data_size=size,
            device=device,
            mesh=mesh,
            background_group=dist.new_group(backend="gloo", timeout=timeout),
            control_group=control_group,
        )
    except BaseException:
        if size == 1 or _all_leave(control_group):
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _store_of_this_start(processes: Processes, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR, with a prefix that the processes of one start share. torchrun keeps its store when it restarts
    them, so that they would read the addresses of processes that are gone, and wait for them."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    me, hello = uuid.uuid4().hex, [f"hello/{other}" for other in range(size)]
    store.set(hello[rank], me)
    if rank == 0:  # names the start, and answers those that say hello, until all of them have heard it
        store.wait(hello, timeout)
        deadline = time.monotonic() + timeout.total_seconds()
        while not store.check([f"heard/{me}/{other}" for other in range(1, size)]):
            for other in set(store.multi_get(hello)):  # also those of the start before, whom nobody is waiting for
                store.set(f"start/{other.decode()}", me)
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"not all of {size} processes have joined after {timeout.total_seconds():.0f} s")
            time.sleep(0.01)
        return dist.PrefixStore(me, store)
    store.wait([f"start/{me}"], timeout)
    start = store.get(f"start/{me}").decode()
    store.set(f"heard/{start}/{rank}", "")
    return dist.PrefixStore(start, store)


def make_mesh(device: torch.device, size: int, replicas: int) -> DeviceMesh:
    """The mesh of all ranks: ("shard",), or with replicas ("replicate", "shard")."""
    shape, names = ((replicas, size // replicas), ("replicate", "shard")) if replicas > 1 else ((size,), ("shard",))
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def is_joined() -> bool:
    """Whether this process is in a group, which after an error it may never leave."""
    return dist.is_initialized()


def _all_leave(control_group: Any) -> bool:
    """Whether every rank leaves the world within LEAVE_SECONDS. After an error of one rank the others do not, and NCCL's
    `destroy_process_group` waits until all have called it."""
    deadline = time.monotonic() + LEAVE_SECONDS
    try:
        arrival = dist.barrier(group=control_group, async_op=True)
        while not arrival.is_completed():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        arrival.wait()
    except RuntimeError:  # a rank is gone
        return False
    return True
