"""JSON over several lines, as one line per record: the elements of an array, or objects that follow one another.

A file is read as a stream. After an element that is not JSON, the next one begins after `},` and `{`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

from olmo_train.data.prepare.chunks import CHUNK_BYTES, BreaksOff, read_blocks

SEPARATORS = re.compile(r"[\s,\[\]\ufeff]*")
NEXT = re.compile(r"\}(?=[\s,]*\{)")
DECODER = json.JSONDecoder()


def json_elements(path: Path) -> Iterator[tuple[bytes, int]]:
    """(element, position in the file up to which it was read), in order. Raises BreaksOff after the elements before the break."""
    blocks, decoder = read_blocks(path), codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, at, end, complete, broken = "", 0, 0, False, None
    while True:
        at = SEPARATORS.match(text, at).end()
        if at < len(text):
            stop, is_json = _element_end(text, at, complete)
            if broken and not is_json and stop == len(text):
                raise broken
            if stop:
                element = text[at:stop].encode("utf-8", "surrogateescape")
                # A line break inside a string is not JSON; a control character keeps it so, where a blank would repair it.
                yield element.replace(b"\n", b" " if is_json else b"\1"), end
                at = stop
                continue
        if complete:
            break
        pieces, at, wanted = [text[at:]], 0, max(len(text) - at, CHUNK_BYTES)  # doubles, so that time stays linear
        try:
            while wanted > 0 and not complete:
                block, end = next(blocks, (b"", end))
                complete = not block
                pieces.append(decoder.decode(block, complete))
                wanted -= len(block)
        except BreaksOff as problem:
            complete, broken, end = True, problem, problem.end
        text = "".join(pieces)
    if broken:
        broken.records = 0
        raise broken


def _element_end(text: str, at: int, complete: bool) -> tuple[int | None, bool]:
    """(the end of the element that begins at `at`, whether it is JSON); None if that depends on text not yet read."""
    try:
        return DECODER.raw_decode(text, at)[1], True
    except (ValueError, RecursionError) as problem:
        flaw = getattr(problem, "pos", at)
        if not complete and (len(text) - flaw < 20 or "Unterminated" in str(problem)):
            return None, False
        gap = NEXT.search(text, flaw)
        return (gap.end() if gap else len(text) if complete else None), False
