"""Write one source folder: shards, label masks, documents.parquet, documents.ids and, last, meta.json.

`save` flushes everything written so far and returns a small state; a writer created with that state truncates the files to it
and continues. So a kill costs only the work since the last `save`. A document is never split over two shards; a document longer
than the shard limit gets a shard to itself.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from olmo_train.data.documents import DOCUMENTS_FILE
from olmo_train.data.meta import (
    BEGINS,
    FORMAT_VERSION,
    MARKED_VERSION,
    TOKENIZER_FILE,
    Meta,
    ShardMeta,
    hash_blocks,
    hash_file,
    marks_documents,
    write_meta,
)
from olmo_train.data.prepare.documents import DocumentParts
from olmo_train.data.prepare.packing import Packer
from olmo_train.data.prepare.tokenized import Tokenized
from olmo_train.data.tokenizer import Tokenizer
from olmo_train.storage import flush


@dataclass
class WriterState:
    """What is on the disk, stored as JSON between two runs."""

    shards: list[dict] = field(default_factory=list)  # the finished ones
    shard_tokens: int = 0  # of the unfinished shard
    shard_labels: bool = False  # whether it has a label mask
    documents: int = 0
    bytes: int = 0
    parts: int = 0  # files of rows for documents.parquet
    padding: int = 0
    open_windows: dict = field(default_factory=dict)  # Packer.state


class SourceWriter:
    """Appends documents to a source folder, in windows of `pack` tokens if it is set. `work` is a folder for temporary files."""

    def __init__(
        self,
        folder: Path,
        work: Path,
        tokenizer: Tokenizer,
        max_shard_tokens: int,
        state: WriterState,
        pack: int | None = None,
        template: dict | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        self.folder, self.tokenizer, self.max_shard_tokens, self.state = folder, tokenizer, max_shard_tokens, state
        self.pack, self.template = pack, template
        self._packer = Packer(pack, tokenizer.eos_id, tokenizer.dtype, state.open_windows) if pack else None
        self._parts = DocumentParts(work, state.parts)
        names = self._names()
        self._tokens = _HashedFile(folder / names[0], state.shard_tokens * tokenizer.dtype.itemsize)
        self._labels = _HashedFile(folder / names[1], state.shard_tokens) if state.shard_labels else None

    def _names(self) -> tuple[str, str]:
        index = len(self.state.shards)
        return f"tokens-{index:05d}.bin", f"labels-{index:05d}.bin"

    def add(self, documents: Tokenized) -> None:
        """Append documents, or the windows that they fill."""
        for part in self._packer.add(documents) if self._packer else [documents]:
            self._add(part)

    def end(self) -> None:
        """Append the windows that are still open, and one EOS, which is the label of the last window's last token."""
        if not self._packer or self.n_tokens % self._packer.size == 1:  # the latter in a run killed after its end
            return
        for window in self._packer.finish():
            self._add(window)
        if self._labels:  # there are windows
            self._tokens.write(np.array([self.tokenizer.eos_id], self.tokenizer.dtype))
            self._labels.write(np.array([BEGINS], np.uint8))
            self.state.shard_tokens, self.state.padding = self.state.shard_tokens + 1, self.state.padding + 1

    def _add(self, documents: Tokenized) -> None:
        """Append documents, and close each shard that is full."""
        low = 0
        while low < len(documents):
            rest = documents.part(low, len(documents)) if low else documents
            room = self.max_shard_tokens - self.state.shard_tokens
            fit = int(np.searchsorted(rest.ends(), room, side="right"))
            if not fit and self.state.shard_tokens:
                self._close_shard()
                continue
            fit = max(fit, 1)
            self._append(rest.part(0, fit) if fit < len(rest) else rest)
            low += fit

    def _append(self, documents: Tokenized) -> None:
        state, begin = self.state, self.state.shard_tokens
        self._tokens.write(documents.tokens)
        mask = None if documents.mask is None or (documents.mask == 1).all() else documents.mask
        if mask is not None and self._labels is None:
            self._labels = _HashedFile(self.folder / self._names()[1], 0)
            self._labels.write(np.ones(begin, np.uint8))
            state.shard_labels = True
        if self._labels:
            self._labels.write(np.ones(len(documents.tokens), np.uint8) if mask is None else mask)
        ends = begin + documents.ends() - documents.padding - 1
        shard = len(state.shards)
        self._parts.add(shard, documents.ids, ends - documents.lengths, ends, documents.origins, documents.records)
        state.shard_tokens += len(documents.tokens)
        state.documents += len(documents)
        state.bytes += int(documents.bytes.sum())
        state.padding += int(documents.padding.sum())

    def _close_shard(self) -> None:
        tokens, labels, state = self._tokens, self._labels, self.state
        size = state.shard_tokens * self.tokenizer.dtype.itemsize
        sha256 = tokens.close()
        assert tokens.path.stat().st_size == size, (tokens.path, tokens.path.stat().st_size, size)
        mask = {"file": labels.path.name, "sha256": labels.close()} if labels else None
        shard = ShardMeta(tokens.path.name, state.shard_tokens, size, sha256, hash_blocks(tokens.path), mask)
        state.shards.append(asdict(shard))
        state.shard_tokens, state.shard_labels, self._labels = 0, False, None
        self._tokens = _HashedFile(self.folder / self._names()[0], 0)

    @property
    def n_tokens(self) -> int:
        """Tokens written so far, EOS included."""
        return self.state.shard_tokens + sum(shard["tokens"] for shard in self.state.shards)

    @property
    def unsaved_rows(self) -> int:
        """Documents whose rows are in memory."""
        return self._parts.rows

    def save(self) -> WriterState:
        """Flush everything to the disk; returns the state to continue from."""
        for file in (self._tokens, self._labels):
            if file:
                file.flush()
        flush(self.folder)
        self.state.parts = self._parts.save()
        self.state.open_windows = self._packer.state() if self._packer else {}
        return self.state

    def finish(self, skipped: dict, account: dict, recipe: dict) -> Meta:
        """Close the last shard, write the documents and meta.json. Call `end` and `save` first."""
        if self.state.shard_tokens:
            self._close_shard()
        self._tokens.close()
        self._tokens.path.unlink()  # an empty shard
        shards = tuple(ShardMeta(**shard) for shard in self.state.shards)
        rows, document_tokens = self._parts.merge(self.folder, [shard.tokens for shard in shards])
        state, tokenizer = self.state, self.tokenizer
        on_disk = sum((self.folder / shard.file).stat().st_size for shard in shards) // tokenizer.dtype.itemsize
        tokens = sum(shard.tokens for shard in shards)
        assert rows == state.documents and on_disk == tokens == document_tokens + rows + state.padding, (rows, on_disk, tokens)
        (self.folder / TOKENIZER_FILE).write_text(tokenizer.json, encoding="utf-8")
        meta = Meta(
            format_version=MARKED_VERSION if marks_documents(self.pack, self.template) else FORMAT_VERSION,
            dtype=tokenizer.dtype.name,
            tokenizer=tokenizer.name,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            eos_text=tokenizer.eos_text,
            tokens=tokens,
            documents=state.documents,
            bytes=state.bytes,
            shards=shards,
            documents_sha256=hash_file(self.folder / DOCUMENTS_FILE),
            skipped=skipped,
            account=account,
            recipe=recipe,
            pack=self.pack,
            padding=state.padding,
            template=self.template,
        )
        write_meta(self.folder, meta)
        return meta

    def close(self) -> None:
        """Close the open files without finishing the folder."""
        for file in (self._tokens, self._labels):
            if file:
                with suppress(OSError):  # the disk is full; what was not saved is written again in the next run
                    file.stream.close()


class _HashedFile:
    """A file to append to, with the sha256 of its contents. Opening it truncates it to `size` bytes."""

    def __init__(self, path: Path, size: int):
        self.path, self.digest = path, hashlib.sha256()
        self.stream = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        self.stream.truncate(size)
        hashlib.file_digest(self.stream, lambda: self.digest)

    def write(self, array: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(array)).cast("B") if len(array) else b""
        self.digest.update(data)
        self.stream.write(data)

    def flush(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def close(self) -> str:
        """Flush and close; returns the sha256."""
        self.flush()
        self.stream.close()
        return self.digest.hexdigest()
