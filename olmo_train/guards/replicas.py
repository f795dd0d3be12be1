"""Detect ranks whose bits differ from their replicas: copies of the sharded state (HSDP), and values equal on all ranks.

A flipped bit or a faulty device leaves finite weights and a plausible loss; only a comparison finds it. Each rank hashes
its shards on the device, and a few integers of each rank are compared on the host.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from olmo_train.parallel.world import World

CHUNK = 1 << 22  # elements hashed at once: 32 MB of temporary integers on the device
FACTOR = 6364136223846793005  # odd; the multiplier of Knuth's MMIX generator
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element: the type of its bits


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """A hash of the bits of this rank's part of a tensor: int64, no dimensions, on its device, without a host sync.

    The bits, as integers, are each multiplied by an odd number that depends on their place, and summed modulo 2^64. Odd numbers
    have an inverse, so a change of one element of up to 4 bytes always changes the sum; several changes cancel only by chance.
    """
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    bits = local.detach().contiguous().reshape(-1).view(INTEGERS[local.element_size()])
    places = torch.arange(1, 2 * min(CHUNK, bits.numel()) + 1, 2, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(CHUNK):
        total = total * FACTOR + (chunk * places[: chunk.numel()]).sum()
    return total


def find_outliers(hashes: Mapping[int, object]) -> list[int]:
    """The ranks whose hash is not the majority's; all ranks if there is no majority, none if all are equal."""
    counts = Counter(hashes.values())
    if len(counts) == 1:
        return []
    [(common, n)] = counts.most_common(1)
    return sorted(rank for rank, found in hashes.items() if 2 * n <= len(hashes) or found != common)


def divergence(sharded: Mapping[str, Tensor], alike: Mapping[str, Tensor], world: World, replicas: int) -> str | None:
    """Which ranks hold other bits than their peers, and the first such tensor; None if all are equal.

    `sharded` tensors are compared between ranks with the same shard in each of the `replicas`, `alike` tensors between all
    ranks. A collective call; every rank returns the same answer.
    """
    if world.size == 1:
        return None
    compared = {**alike, **(sharded if replicas > 1 else {})}
    hashes = torch.stack([fingerprint(tensor) for tensor in compared.values()]).tolist()
    ranks = world.gather((hashes, f"{socket.gethostname()}, {world.device}"))
    shards = world.size // replicas  # the mesh numbers ranks along "shard" first, so rank % shards is the shard
    suspects, first = set(), None
    for i, name in enumerate(compared):
        groups = [range(world.size)] if name in alike else [range(place, world.size, shards) for place in range(shards)]
        for group in groups:
            odd = find_outliers({rank: ranks[rank][0][i] for rank in group})
            suspects.update(odd)
            first = first or (name if odd else None)
    if first is None:
        return None
    named = " and ".join(f"rank {rank} ({ranks[rank][1]})" for rank in sorted(suspects))
    return f"{named} {'holds other bits than its peers' if len(suspects) == 1 else 'hold different bits'}, first in {first}"
