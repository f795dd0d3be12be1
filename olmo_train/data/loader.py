"""Batches as tensors, prefetched by a thread. The loader has no state to save: it can start at any step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from olmo_train.data.mixture import Mixture
from olmo_train.data.shards import TokenSource

IGNORE = -100  # a label that is not scored
AHEAD = 4  # batches to prefetch
PATIENCE = 0.2  # seconds between checks whether to keep waiting


@dataclass(frozen=True)
class Batch:
    """The rows of one rank."""

    input_ids: Tensor  # (rows, T) int64
    labels: Tensor  # (rows, T) int64, IGNORE where nothing is scored
    sources: Tensor  # (rows,) int64, index into the mixture's names
    documents: Tensor | None = None  # (rows, T) int64, number of each token's document in its row; None: attend to all
    sample_hash: str = ""  # of the global batch
    step: int = 0

    def micro_batches(self, rows: int) -> Iterator[Batch]:
        """The batch in parts of `rows` rows."""
        for start in range(0, len(self.input_ids), rows):
            yield self._map(lambda tensor, start=start: tensor[start : start + rows])

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The batch in pinned memory, from which copies to a GPU are asynchronous."""
        return self._map(lambda tensor: tensor.contiguous().pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        documents = None if self.documents is None else function(self.documents)
        changed = {"input_ids": function(self.input_ids), "labels": function(self.labels), "sources": function(self.sources)}
        return replace(self, documents=documents, **changed)


def read_batch(mixture: Mixture, step: int, data_rank: int, data_size: int) -> Batch:
    """The rows of `data_rank` in step `step`: one of `data_size` equal, contiguous parts of the global batch."""
    global_batch = mixture.global_batch(step)
    rows = len(global_batch) // data_size
    mine = global_batch[data_rank * rows : (data_rank + 1) * rows]
    tokens = torch.from_numpy(mixture.read(mine))
    input_ids, labels = split_labels(tokens, mixture.read_label_mask(mine), mixture.shifted)
    documents = None
    if mixture.eos_id is not None:
        documents = document_numbers(input_ids, mixture.eos_id)
        for row, (source, instance) in enumerate(zip(mine.source.tolist(), mine.instance.tolist(), strict=True)):
            if mixture.sources[source].marks_documents:
                start = mixture.span(source, instance)[0]
                documents[row] = torch.from_numpy(mixture.sources[source].document_numbers(start, input_ids.shape[1]))
    return Batch(input_ids, labels, torch.from_numpy(mine.source), documents, mixture.sample_hash(global_batch), step)


def document_numbers(input_ids: Tensor, eos_id: int) -> Tensor:
    """The number of each token's document in its row, (rows, T) int64, from 0. An EOS belongs to the document that it ends."""
    ends = (input_ids == eos_id).long()
    return ends.cumsum(dim=1) - ends


def split_labels(tokens: Tensor, mask: np.ndarray | None, shifted: bool) -> tuple[Tensor, Tensor]:
    """(input_ids, labels), each (rows, T) int64, of instances (rows, T + 1), or (rows, T) with `shifted`.

    The label of a token is the next token; with `shifted`, the last one has none. `mask` is 0 for tokens that are no labels.
    """
    if mask is None and not shifted:
        return tokens[:, :-1], tokens[:, 1:]
    labels = tokens.clone() if mask is None else tokens.masked_fill(torch.from_numpy(mask) == 0, IGNORE)
    if shifted:
        return tokens, torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return tokens[:, :-1], labels[:, 1:]


class Loader:
    """Iterates over the batches of one rank from first_step on, without end; call `close` at the end."""

    def __init__(self, mixture: Mixture, data_rank: int, data_size: int, device: torch.device, first_step: int):
        self.mixture, self.data_rank, self.data_size, self.device = mixture, data_rank, data_size, device
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first_step,), name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self.get()) is not None:
            yield batch

    def get(self, give_up: Callable[[], int] = lambda: 0) -> Batch | None:
        """Wait for the next batch; None if `give_up()` becomes true while waiting."""
        while True:
            try:
                item = self._ready.get(timeout=PATIENCE)
            except queue.Empty:
                if give_up():
                    return None
                continue
            if isinstance(item, BaseException):
                raise item
            return item.to(self.device)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)  # make room for a thread that is blocked in put
            except queue.Empty:
                pass
        self._thread.join()

    def _run(self, step: int) -> None:
        try:
            while not self._closed.is_set():
                batch = read_batch(self.mixture, step, self.data_rank, self.data_size)
                self._ready.put(batch.pinned() if self.device.type == "cuda" else batch)
                step += 1
        except BaseException as problem:  # `get` raises it in the training loop
            self._ready.put(problem)


def validation_batches(
    source: TokenSource, seq_len: int, rows: int, data_rank: int, data_size: int, eos_id: int | None = None
) -> Iterator[Batch]:
    """A validation source in order, with every token but the first a label once. With `eos_id`, attention stays within documents.

    All ranks get the same number of batches of the same shape (rows, seq_len), as sharded models need. Rows beyond the end of
    the source are unscored, so sums over ranks are the same for every world size.
    """
    instances = -(-(source.n_tokens - 1) // seq_len)
    for first in range(0, instances, rows * data_size):
        tokens = np.zeros((rows, seq_len + 1), dtype=np.int64)
        scored = np.zeros((rows, seq_len + 1), dtype=np.uint8)
        marked = np.zeros((rows, seq_len), dtype=np.int64) if eos_id is not None and source.marks_documents else None
        for row in range(rows):
            start = (first + data_rank * rows + row) * seq_len
            length = min(seq_len + 1, source.n_tokens - start)
            if length > 1:
                source.read(start, tokens[row, :length])
                scored[row, :length] = 1
                if source.has_label_mask:
                    source.read_label_mask(start, scored[row, :length])
                if marked is not None:
                    marked[row, : min(length, seq_len)] = source.document_numbers(start, min(length, seq_len))
        input_ids, labels = split_labels(torch.from_numpy(tokens), scored, shifted=False)
        if marked is not None:
            documents = torch.from_numpy(marked)
        else:
            documents = None if eos_id is None else document_numbers(input_ids, eos_id)
        yield Batch(input_ids, labels, torch.zeros(rows, dtype=torch.int64), documents)
