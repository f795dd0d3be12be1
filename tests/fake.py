"""Many ranks in one process: torch's fake process group makes it rank 0 of any world, with collectives that move nothing.

fake_world(size, replicas)   join it; yields the World
zero_weights(model)          the values of a sharded model, where init_weights would exchange them between ranks
Operations()                 counts the operations of torch that run in its context
Collectives()                counts the collectives of what runs in its context, by kind
"""

import contextlib
from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from olmo_train.parallel.world import World, make_mesh

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "scatter", "gather", "reduce", "send", "recv")


@contextlib.contextmanager
def fake_world(size: int = 1, replicas: int = 1):
    """Rank 0 of `size` ranks, as join_world would make it on a CPU, without the groups of the host."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        cpu = torch.device("cpu")
        yield World(0, size, 0, size, cpu, make_mesh(cpu, size, replicas), background_group=None, control_group=None)
    finally:
        dist.destroy_process_group()


def zero_weights(model: torch.nn.Module, *_) -> None:
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)


class Operations(TorchDispatchMode):
    """Counts operations in `counts`, those inside DTensor operations too, each by its `key`; None is not counted."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def key(self, function, args) -> str | None:
        return str(function).removeprefix("aten.")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor then calls the operations it consists of, which come here
        if (key := self.key(function, args)) is not None:
            self.counts[key] += 1
        return function(*args, **(kwargs or {}))


class Collectives(Operations):
    """Counts collectives by kind, those of FSDP too."""

    def key(self, function, args) -> str | None:
        if function.namespace not in ("c10d", "_c10d_functional"):
            return None
        name = function.name().split("::")[1].replace("alltoall", "all_to_all")
        name = name.replace("allgather", "all_gather").replace("allreduce", "all_reduce")
        other = name if function.namespace == "c10d" else None  # the functional ones also wait, which sends nothing
        return next((kind for kind in KINDS if kind in name), other)
