"""Formats of checkpoint folders: open a checkpoint of any format under the tensor names of the current one.

Format 1 stored some matrices of a block stacked by rows. They are split while reading: a rank reads only the rows that it
needs, and the optimizer's moments are split like the weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from olmo_train import config as configuration
from olmo_train.errors import CheckpointError
from olmo_train.model.config import ModelConfig
from olmo_train.model.transformer import Transformer

FORMAT = 2  # `format` in state.json
# Stacked in format 1 -> its parts, from the first row down. A model without a gate has no w_gate.
STACKED = {"attn.wqkv": ("attn.wq", "attn.wk", "attn.wv"), "mlp.w_in": ("mlp.w_up", "mlp.w_gate"), "mlp.w_out": ("mlp.w_down",)}
STACKED_NAME = re.compile(rf"((?:model|optim)\.blocks\.\d+)\.({'|'.join(map(re.escape, STACKED))})(\.weight.*)")


def open_reader(folder: Path) -> HuggingFaceStorageReader:
    """A reader of the folder's tensors. Raises CheckpointError on a format later than FORMAT."""
    version = json.loads((folder / "state.json").read_text(encoding="utf-8"))["format"]
    if version > FORMAT:
        raise CheckpointError(folder, f"has format {version}, but this version reads up to {FORMAT}; update olmo-train")
    return HuggingFaceStorageReader(str(folder)) if version == FORMAT else _Format1Reader(folder)


class _Format1Reader(HuggingFaceStorageReader):
    """Lists the rows of each part in the stored chunks as chunks of the part, and reads them from there."""

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        config = configuration.build(ModelConfig, configuration.read([folder / "config.yaml"])["model"], "model")
        with torch.device("meta"):
            block = Transformer(config).blocks[0]
        self._rows = {name.removesuffix(".weight"): weight.shape[0] for name, weight in block.named_parameters()}
        self._stored: dict[MetadataIndex, tuple[MetadataIndex, int]] = {}  # chunk of a part -> stored chunk, its first row there

    def read_metadata(self) -> Metadata:
        """The tensors of the folder, under today's names where the format is older."""
        metadata = super().read_metadata()
        for name in list(metadata.state_dict_metadata):
            if match := STACKED_NAME.fullmatch(name):
                block, stacked, rest = match.groups()
                whole, start = metadata.state_dict_metadata.pop(name), 0
                for part in filter(self._rows.get, STACKED[stacked]):
                    self._add_part(metadata, name, whole, f"{block}.{part}{rest}", start, start + self._rows[part])
                    start += self._rows[part]
        return metadata

    def _add_part(self, metadata: Metadata, name: str, whole: TensorStorageMetadata, part: str, start: int, end: int) -> None:
        """Enter rows `start` to `end` of the stored tensor `name` as the tensor `part`."""
        entry = TensorStorageMetadata(whole.properties, torch.Size((end - start, *whole.size[1:])), [])
        for chunk in whole.chunks:
            offset, *columns = chunk.offsets
            first, last = max(offset, start), min(offset + chunk.sizes[0], end)
            if first < last:
                offsets = torch.Size((first - start, *columns))
                entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size((last - first, *chunk.sizes[1:]))))
                stored, own = MetadataIndex(name, chunk.offsets), MetadataIndex(part, offsets)
                self._stored[own] = stored, first - offset
                metadata.storage_data[own] = metadata.storage_data[stored]
        metadata.state_dict_metadata[part] = entry

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        items = []
        for item in plan.items:
            index, row = self._stored.get(item.storage_index, (item.storage_index, 0))
            offsets = torch.Size((item.storage_offsets[0] + row, *item.storage_offsets[1:]))
            items.append(replace(item, storage_index=index, storage_offsets=offsets))
        return super().read_data(replace(plan, items=items), planner)
