"""Many ranks in one process: torch's fake process group makes it rank 0 of any world, with collectives that move nothing.

fake_world(size, replicas)   join it; yields the World
zero_weights(model)          the values of a sharded model, where init_weights would exchange them between ranks
Collectives()                counts the collectives of what runs in its context, by kind
"""

import contextlib
from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from olmo_train.parallel.world import World

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "scatter", "gather", "reduce", "send", "recv")


@contextlib.contextmanager
def fake_world(size: int = 1, replicas: int = 1):
    """Rank 0 of `size` ranks, as join_world would make it on a CPU, without the groups of the host."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        shape, names = ((replicas, size // replicas), ("replicate", "shard")) if replicas > 1 else ((size,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        yield World(0, size, 0, size, torch.device("cpu"), mesh, background_group=None, control_group=None)
    finally:
        dist.destroy_process_group()


def zero_weights(model: torch.nn.Module, *_) -> None:
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)


class Collectives(TorchDispatchMode):
    """Counts collectives in `counts`, {kind: number}, those of FSDP and those inside DTensor operations."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor then calls the operations it consists of, which come here
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function.name().split("::")[1].replace("allgather", "all_gather").replace("allreduce", "all_reduce")
            if kind := next((kind for kind in KINDS if kind in name), None):
                self.counts[kind] += 1
        return function(*args, **(kwargs or {}))
