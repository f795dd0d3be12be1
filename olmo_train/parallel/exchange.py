"""Move sharded tensors to the ranks that work on them whole, and the results back to their shards.

Each tensor has one owner. A rank sends its shards of all tensors in one all-to-all, so it sends and receives 1/ranks of what
gathering every tensor on every rank would take. With replicas, an owner collects the shards of its own replica and sends the
results to all replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def on_full_tensors(
    function: Callable[[list[Tensor]], list[Tensor]], tensors: Sequence[Tensor], owners: Sequence[int]
) -> list[Tensor]:
    """function([full tensors that this rank owns]), with the results of all owners sharded like `tensors`.

    `owners`: the rank that owns each tensor. Every rank must call this, also one that owns none.
    """
    return to_shards(function(to_owners(tensors, owners)), tensors, owners)


def to_owners(tensors: Sequence[Any], owners: Sequence[int]) -> list[Tensor]:
    """The full tensors that this rank owns, in order; tensors that are not sharded as they are."""
    if not isinstance(tensors[0], DTensor):
        return list(tensors)
    rank, size, shards = place_in(tensors[0].device_mesh)
    first = rank - rank % shards
    replica = range(first, first + shards)  # the ranks whose shards make up this replica
    local = [(tensor.to_local(), owner) for tensor, owner in zip(tensors, owners, strict=True)]
    mine = [tensor for tensor, owner in zip(tensors, owners, strict=True) if owner == rank]
    sent = [[part for part, owner in local if owner == peer] if peer in replica else [] for peer in range(size)]
    expected = [[_shard_shape(tensor, peer - first) for tensor in mine] if peer in replica else [] for peer in range(size)]
    received = _exchange(sent, expected, tensors[0])
    return [torch.cat(parts) if shards > 1 else parts[0] for parts in zip(*(received[peer] for peer in replica), strict=True)]


def to_shards(full: Sequence[Tensor], like: Sequence[Any], owners: Sequence[int]) -> list[Tensor]:
    """Tensors sharded like `like`, from the full ones that each rank owns, in order; tensors that are not sharded as they are."""
    if not isinstance(like[0], DTensor):
        return list(full)
    rank, size, shards = place_in(like[0].device_mesh)
    cut = [tensor.split([_rows(tensor.shape[0], shards, shard) for shard in range(shards)]) for tensor in full]
    owned = [[i for i, owner in enumerate(owners) if owner == peer] for peer in range(size)]
    sent = [[parts[peer % shards] for parts in cut] for peer in range(size)]
    received = _exchange(sent, [[_shard_shape(like[i], rank % shards) for i in pieces] for pieces in owned], like[0])
    local = {i: part for pieces, parts in zip(owned, received, strict=True) for i, part in zip(pieces, parts, strict=True)}
    return [
        DTensor.from_local(
            local[i], tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
        for i, tensor in enumerate(like)
    ]


def place_in(mesh: DeviceMesh) -> tuple[int, int, int]:
    """(this rank in the mesh, ranks, shards of a full tensor). Ranks count through the shards of the first replica, then of the
    next."""
    shards, rank = mesh.size(mesh.ndim - 1), 0
    for place, count in zip(mesh.get_coordinate(), mesh.shape, strict=True):
        rank = rank * count + place
    return rank, mesh.size(), shards


def _rows(rows: int, shards: int, shard: int) -> int:
    """Rows of one shard, as torch.chunk cuts them: all the same but the last ones, which may be smaller or empty."""
    most = -(-rows // shards)
    return max(0, min(rows - shard * most, most))


def _shard_shape(tensor: DTensor, shard: int) -> list[int]:
    return [_rows(tensor.shape[0], tensor.device_mesh.size(tensor.device_mesh.ndim - 1), shard), *tensor.shape[1:]]


def _exchange(sent: list[list[Tensor]], expected: list[list[list[int]]], like: DTensor) -> list[list[Tensor]]:
    """Send a list of tensors to each rank of the mesh of `like`, and receive tensors of the `expected` shapes from each, in one
    collective."""
    if len(sent) == 1:
        return sent
    mesh, local = like.device_mesh, like.to_local()
    assert like.placements[-1].is_shard(0) and not any(p.is_shard() for p in like.placements[:-1]), like.placements
    assert mesh.ndim == 1 or mesh.size() == dist.get_world_size(), (mesh, "a mesh with replicas has all ranks of the run")
    group = mesh.get_group() if mesh.ndim == 1 else None
    parts = [part.reshape(-1) for to_peer in sent for part in to_peer]
    outgoing = torch.cat(parts) if parts else local.new_empty(0)
    assert outgoing.dtype == local.dtype, (outgoing.dtype, local.dtype)
    sizes = [[torch.Size(shape).numel() for shape in shapes] for shapes in expected]
    incoming = outgoing.new_empty(sum(map(sum, sizes)))
    received_sizes, sent_sizes = [sum(of_peer) for of_peer in sizes], [_total(to_peer) for to_peer in sent]
    dist.all_to_all_single(incoming, outgoing, received_sizes, sent_sizes, group=group)
    received = iter(incoming.split([size for of_peer in sizes for size in of_peer]))
    return [[next(received).view(shape) for shape in shapes] for shapes in expected]


def _total(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
