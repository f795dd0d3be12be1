"""The time of a step on many GPUs: compute, communication, and the communication that compute does not hide.

FSDP communicates block by block, and gathers the next block's weights while it computes the current one. So the time of a
step is a sum of max(compute, communication) over blocks. memory.py computes the memory. docs/scaling.md lists the assumptions
and compares them with published runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from olmo_train.hardware import GPUS, Hardware
from olmo_train.model.config import ModelConfig
from olmo_train.model.cost import (
    adapter_parameters,
    attention_parameters,
    flops_per_token,
    mlp_parameters,
    trained_parameters,
)
from olmo_train.plan.memory import BYTES, Layout, Unit, memory_estimate, units
from olmo_train.plan.time import update_flops

MOST_GPUS = 4096  # of the table of a plan


@dataclass(frozen=True)
class Links:
    """What connects the GPUs. Bandwidths are those of one GPU in one direction, in bytes/s; hops in seconds."""

    node_bandwidth: float  # among the GPUs of one node
    network_bandwidth: float  # to other nodes; all GPUs of a node send at once
    reached: float = 0.8  # share of both that large collectives reach; assumed
    # Latencies of one hop of a ring with protocol Simple, from NCCL's own model (hwLat in src/graph/tuning.cc).
    node_hop: float = 3.4e-6
    network_hop: float = 14e-6
    gpus_per_node: int = 8


_DGX_H100 = Links(450e9, 50e9)  # NVIDIA DGX H100 data sheet: NVLink 900 GB/s both ways, a 400 Gb/s adapter for each GPU
_DGX_A100 = Links(300e9, 25e9)  # NVIDIA DGX A100 data sheet: NVLink 600 GB/s both ways, a 200 Gb/s adapter for each GPU
LINKS = {GPUS[gpu].name: _DGX_H100 for gpu in ("h100", "h200")} | {
    GPUS[gpu].name: _DGX_A100 for gpu in ("a100-40gb", "a100-80gb")
}


@dataclass(frozen=True)
class StepEstimate:
    """Seconds and bytes of one step on one GPU."""

    compute_seconds: float  # as if alone
    communication_seconds: float  # as if nothing were hidden
    seconds: float
    gathered_bytes: float  # received in all-gathers of weights
    reduced_bytes: float  # sent in reduce-scatters of gradients
    all_reduced_bytes: float  # sent between replicas
    tokens_per_second: float  # all GPUs
    mfu: float

    @property
    def exposed_seconds(self) -> float:
        """Communication that no compute hides."""
        return self.seconds - self.compute_seconds


def ring_seconds(sent: float, gpus: int, links: Links) -> float:
    """Of an all-gather or a reduce-scatter of `sent` bytes in all over `gpus` neighbours: each GPU sends (n - 1) / n of them,
    through the slower of NVLink and its node's adapters, and a piece makes n - 1 hops."""
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / links.gpus_per_node)
    bandwidth = links.node_bandwidth
    if nodes > 1:  # the ring enters and leaves each node once, through all of its adapters side by side
        bandwidth = min(bandwidth, links.gpus_per_node * links.network_bandwidth)
    latency = (nodes - 1) * links.network_hop + (gpus - nodes) * links.node_hop
    return sent * (gpus - 1) / gpus / (links.reached * bandwidth) + latency


def all_reduce_seconds(sent: float, replicas: int, inside: bool, links: Links) -> float:
    """Of an all-reduce of `sent` bytes over `replicas` GPUs, `inside` one node or each in another: twice (r - 1) / r of the
    bytes, and a tree's latency."""
    if replicas == 1:
        return 0.0
    bandwidth, hop = (links.node_bandwidth, links.node_hop) if inside else (links.network_bandwidth, links.network_hop)
    return 2 * sent * (replicas - 1) / replicas / (links.reached * bandwidth) + 2 * math.ceil(math.log2(replicas)) * hop


def exchange_seconds(model: ModelConfig, layout: Layout, links: Links) -> float:
    """Of Muon's all-to-alls, which bring each matrix in bf16 to the GPU that orthogonalizes it, and the result to the shards of
    all replicas; nothing hides them. 0 with AdamW."""
    if layout.optimizer != "muon" or layout.gpus == 1:
        return 0.0
    elements = model.n_layers * (attention_parameters(model) + mlp_parameters(model)) / layout.gpus  # that a GPU owns
    shards, inside = layout.gpus // layout.replicas, layout.gpus <= links.gpus_per_node
    sent = 2 * elements * ((shards - 1) / shards + layout.replicas * (layout.gpus - 1) / layout.gpus)
    return sent / (links.reached * (links.node_bandwidth if inside else links.network_bandwidth))


def unit_seconds(unit: Unit, layout: Layout, links: Links) -> tuple[float, float, float]:
    """Of gathering a unit's weights, of reducing its gradients to shards, and of adding those up between replicas."""
    shards, gradients = layout.gpus // layout.replicas, BYTES[layout.reduce_dtype] * unit.trained
    gather = ring_seconds(unit.gathered, shards, links) if unit.gathered else 0.0
    if not unit.trained:
        return gather, 0.0, 0.0
    scatter = ring_seconds(gradients, shards, links)
    between = all_reduce_seconds(gradients / shards, layout.replicas, layout.gpus <= links.gpus_per_node, links)
    # Where shards cross the network too, one comes after the other.
    return (gather, scatter + between, 0.0) if shards > links.gpus_per_node else (gather, scatter, between)


def step_estimate(model: ModelConfig, layout: Layout, hardware: Hardware, links: Links, efficiency: float) -> StepEstimate:
    """Time and traffic of a step. `efficiency` is the share of the peak that a GPU reaches when it does not wait for others;
    FLOPs are counted as in flops_per_token. With full activation checkpointing a block's forward is computed once more."""
    shards, layers, tokens = layout.gpus // layout.replicas, model.n_layers, layout.micro_batch_size * model.seq_len
    first, block, last = units(model, layout)
    reduced = BYTES[layout.reduce_dtype] * trained_parameters(model, layout.adapter)

    speed = hardware.peak_flops * efficiency
    products = attention_parameters(model) + mlp_parameters(model)
    frozen, adapters = layout.adapter.is_on, adapter_parameters(model, layout.adapter) / layers
    forward = tokens * (2 * (products + adapters) + 4 * model.n_heads * model.head_size * model.seq_len) / speed  # of a block
    backward = forward * (3 if layout.activation_checkpointing == "full" else 2)
    backward -= frozen * tokens * 2 * products / speed  # a frozen matrix has no gradient of its weights
    head = tokens * 2 * model.vocab_rows * model.d_model / speed
    head_backward = head * (1 if frozen else 2)

    gather, scatter, between = unit_seconds(block, layout, links)
    gather_first, scatter_first, between_first = unit_seconds(first, layout, links)
    gather_last, scatter_last, between_last = unit_seconds(last, layout, links)

    seconds = 0.0
    for micro_batch in range(layout.micro_batches):
        reduces = micro_batch == layout.micro_batches - 1
        gathers = layout.shard == "full" or micro_batch == 0  # grad_op keeps the whole weights until the step's end
        again = layout.shard == "full"
        seconds += gathers * (gather_first + gather)  # nothing is computed yet
        seconds += (layers - 1) * max(forward, gathers * gather) + max(forward, gathers * gather_last)
        seconds += head + max(head_backward, again * gather)
        # During the backward of a block, the gradients of what came after it are reduced, and the block before it is gathered.
        seconds += max(backward, again * (layers > 1) * gather + reduces * scatter_last, reduces * between_last)
        if layers > 1:
            seconds += (layers - 2) * max(backward, again * gather + reduces * scatter, reduces * between)
            seconds += max(backward, reduces * scatter, reduces * between)
        seconds += reduces * (scatter + scatter_first + max(between, between_first))  # no compute remains
    update, exchange = update_flops(model, layout) / speed, exchange_seconds(model, layout, links)
    seconds += update + exchange
    compute = layout.micro_batches * (layers * (forward + backward) + head + head_backward) + update

    # Blocks are gathered for forward and backward. The embedding has no use in the backward, and the head stays gathered for it.
    of_block, of_ends = (2 * layout.micro_batches, layout.micro_batches) if layout.shard == "full" else (1, 1)
    gathers = of_block * layers * gather + of_ends * (gather_first + gather_last)
    reductions = layers * (scatter + between) + scatter_first + between_first + scatter_last + between_last
    share = (shards - 1) / shards
    all_tokens = layout.gpus * layout.micro_batches * tokens
    return StepEstimate(
        compute_seconds=compute,
        communication_seconds=gathers + reductions + exchange,
        seconds=seconds,
        gathered_bytes=share * (of_block * layers * block.gathered + of_ends * (first.gathered + last.gathered)),
        reduced_bytes=share * reduced,
        all_reduced_bytes=2 * (layout.replicas - 1) / layout.replicas * reduced / shards,
        tokens_per_second=all_tokens / seconds,
        mfu=all_tokens * flops_per_token(model, adapter=layout.adapter) / (seconds * layout.gpus * hardware.peak_flops),
    )


def scaling_rows(model: ModelConfig, layout: Layout, hardware: Hardware, efficiency: float) -> list[dict[str, Any]]:
    """The step on the planned number of GPUs and on 4, 16, ... times as many up to MOST_GPUS, with the same global batch: with
    the planned replicas, and as `best` with the fastest number of replicas that fits the GPU's memory, if any does."""

    def row(trial: Layout) -> dict[str, Any]:
        step = step_estimate(model, trial, hardware, LINKS[hardware.name], efficiency)
        return {"replicas": trial.replicas, "seconds": step.seconds, "mfu": step.mfu, "exposed_seconds": step.exposed_seconds}

    rows = []
    while True:
        ways = [replace(layout, replicas=2**i) for i in range(layout.gpus.bit_length()) if layout.gpus % 2**i == 0]
        fitting = [row(way) for way in ways if memory_estimate(model, way).fits(hardware.memory_bytes)]
        best = min(fitting, key=lambda fit: fit["seconds"], default=None)
        rows.append({"gpus": layout.gpus, **row(layout), "best": best})
        if layout.micro_batches % 4 or 4 * layout.gpus > MOST_GPUS:
            return rows
        layout = replace(layout, gpus=4 * layout.gpus, micro_batches=layout.micro_batches // 4)
