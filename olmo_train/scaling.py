"""How FSDP and HSDP go on many GPUs: seconds of a step from its computation and its communication.

The one idea: a block's weights are gathered while the block before it computes, so a block takes the longer of both, and
what is seen of communication is the excess, the first gather and the last reduction. All of it is closed form; what it
assumes stands in Network and in docs/scaling.md, where it is held against published runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from olmo_train.model.config import ModelConfig
from olmo_train.model.cost import block_parameters, count_parameters, flops_per_token
from olmo_train.planner import BYTES, Layout, memory_estimate


@dataclass(frozen=True)
class Network:
    """Bandwidths are in one direction, as the makers tell them."""

    gpus_per_node: int = 8
    inside_bytes: float = 450e9  # a second and GPU within a node: NVLink 4 of the H100
    between_bytes: float = 50e9  # a second and GPU between nodes: one 400 Gb/s adapter for each GPU
    efficiency: float = 0.8  # of these that a large collective reaches: assumed
    hop_seconds: float = 10e-6  # a step of a ring from one node (or GPU of a node) to the next: assumed


def collective_seconds(size: float, ranks: int, network: Network) -> float:
    """Of an all-gather that gives, or a reduce-scatter that takes, `size` bytes on each of `ranks` neighbouring GPUs.

    A ring: each node takes in all but its own part once, over all its adapters together, and hands it round inside.
    """
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / network.gpus_per_node)
    if nodes == 1:
        hops, bandwidth = ranks - 1, network.inside_bytes
    else:
        hops, bandwidth = nodes - 1, min(network.inside_bytes, network.between_bytes * network.gpus_per_node)
    return size * (ranks - 1) / ranks / (bandwidth * network.efficiency) + hops * network.hop_seconds


def all_reduce_seconds(size: float, replicas: int, network: Network) -> float:
    """Of `size` bytes of each GPU over its `replicas` counterparts in other nodes: twice round the ring."""
    if replicas == 1:
        return 0.0
    moved = 2 * size * (replicas - 1) / replicas
    return moved / (network.between_bytes * network.efficiency) + 2 * (replicas - 1) * network.hop_seconds


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer update on each GPU."""

    seconds: float
    compute_seconds: float
    tokens_per_second: float  # of one GPU

    @property
    def seen_communication(self) -> float:
        """Share of the step in which a GPU only waits for others."""
        return 1 - self.compute_seconds / self.seconds


def step_time(model: ModelConfig, layout: Layout, flops_per_second: float, network: Network) -> StepTime:
    """The step of a layout whose GPUs reach `flops_per_second` (of flops_per_token) when they wait for nobody.

    Forward is a third of the FLOPs, backward two; full recomputation adds another third to each block's backward. The
    weights of a block are gathered in the precision of compute, its gradients reduced in reduce_dtype with the last
    micro-batch; with replicas each shard is then summed over them.
    """
    shards = layout.gpus // layout.replicas
    block, total = block_parameters(model), count_parameters(model).total
    root = total - model.n_layers * block
    tokens = layout.micro_batch_size * model.seq_len
    forward = tokens * flops_per_token(model) / 3 / flops_per_second
    head = forward * 6 * model.vocab_rows * model.d_model / flops_per_token(model)  # the root's own part
    each = (forward - head) / model.n_layers

    def gather(parameters: int) -> float:
        return collective_seconds(BYTES[layout.precision] * parameters, shards, network)

    def reduce(parameters: int) -> float:
        size = BYTES[layout.reduce_dtype] * parameters
        return collective_seconds(size, shards, network) + all_reduce_seconds(size / shards, layout.replicas, network)

    again = each if layout.activation_checkpointing == "full" else 0.0
    regathered = gather(block) if layout.shard == "full" else 0.0
    compute = model.n_layers * (3 * each + again) + 3 * head
    forward_seconds = gather(root) + gather(block) + (model.n_layers - 1) * max(each, gather(block)) + each + head
    backward_seconds = 2 * head + model.n_layers * max(2 * each + again, regathered)
    last = 2 * head + model.n_layers * max(2 * each + again, regathered + reduce(block)) + reduce(root)
    seconds = layout.micro_batches * forward_seconds + (layout.micro_batches - 1) * backward_seconds + last
    return StepTime(seconds, layout.micro_batches * compute, layout.micro_batches * tokens / seconds)


def scaling_table(model: ModelConfig, flops_per_second: float, network: Network, layout: Layout, gpus: list[int]) -> list[str]:
    """Lines of Markdown: for each number of GPUs plain FSDP, and HSDP with one copy of the state in each 8 nodes or so
    (64 GPUs), a GPU's speed as a share of its speed without communication, and its planned memory."""
    lines = ["| GPUs | FSDP, of ideal | memory GB | HSDP over 64 GPUs, of ideal | memory GB |", "|---|---|---|---|---|"]
    for n in gpus:
        cells = [f"{n:,}"]
        for replicas in (1, n // 64):
            if n % 64 and replicas != 1 or not replicas:
                cells += ["", ""]
                continue
            trial = replace(layout, gpus=n, replicas=replicas)
            time = step_time(model, trial, flops_per_second, network)
            cells += [f"{1 - time.seen_communication:.1%}", f"{memory_estimate(model, trial).peak / 1e9:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
