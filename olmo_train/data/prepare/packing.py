"""Fill windows of a fixed length with whole documents, so that no document crosses a window (`prepare-data --pack N`).

Each document goes into the open window with the least room that still holds it (best-fit). The tokens of the open windows are
bounded; beyond the bound the fullest window is closed. So the result depends on the order of the documents alone.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from bisect import bisect_left, insort
from typing import Any

import numpy as np

from olmo_train.data.prepare.tokenized import Tokenized, joined

POOL_TOKENS = 2**20  # most tokens of all open windows


class Packer:
    """The open windows of a source: `windows` are (room, number, documents), the fullest first."""

    def __init__(self, size: int, eos_id: int, dtype: np.dtype, state: dict[str, Any]):
        """`state`: what `state()` returned before an interruption; else empty."""
        self.size, self.eos_id = size, eos_id
        self.opened = state.get("opened", 0)  # windows so far; an older window is preferred
        self.windows: list[tuple[int, int, list[Tokenized]]] = []
        for room, number, documents in state.get("windows", []):
            self.windows.append((room, number, [_from_json(values, dtype) for values in documents]))

    def add(self, documents: Tokenized) -> list[Tokenized]:
        """Place these documents, each of at most `size` tokens with its EOS. Returns the windows that are closed."""
        closed = []
        for document in documents.each():
            length = len(document.tokens)
            assert length <= self.size, (length, self.size)
            at = bisect_left(self.windows, (length, -1))
            if at < len(self.windows):
                room, number, held = self.windows.pop(at)
            else:
                room, number, held = self.size, self.opened, []
                self.opened += 1
            held.append(document)
            if room == length:
                closed.append(joined(held))
            else:
                insort(self.windows, (room - length, number, held), key=lambda window: window[:2])
            if len(self.windows) * self.size > POOL_TOKENS:
                closed.append(self._close_fullest())
        return closed

    def finish(self) -> list[Tokenized]:
        """All windows that are open."""
        return [self._close_fullest() for _ in range(len(self.windows))]

    def _close_fullest(self) -> Tokenized:
        room, _, held = self.windows.pop(0)
        return joined(held).padded(room, self.eos_id)

    def state(self) -> dict[str, Any]:
        """The open windows, to store as JSON."""
        windows = [(room, number, [_to_json(document) for document in held]) for room, number, held in self.windows]
        return {"opened": self.opened, "windows": windows}


def _to_json(document: Tokenized) -> dict[str, Any]:
    arrays = {"tokens": document.tokens, "mask": document.mask}
    about = {"id": document.ids[0], "origin": document.origins[0], "record": document.records[0], "bytes": int(document.bytes[0])}
    return about | {name: b64encode(np.ascontiguousarray(array).tobytes()).decode() for name, array in arrays.items()}


def _from_json(values: dict[str, Any], dtype: np.dtype) -> Tokenized:
    tokens = np.frombuffer(b64decode(values["tokens"]), dtype)
    return Tokenized(
        tokens=tokens,
        lengths=np.array([len(tokens) - 1], np.int64),
        mask=np.frombuffer(b64decode(values["mask"]), np.uint8),
        ids=[values["id"]],
        origins=[values["origin"]],
        records=[values["record"]],
        bytes=np.array([values["bytes"]], np.int64),
        padding=np.zeros(1, np.int64),
    )
