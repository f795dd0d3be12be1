"""meta.json: the description of a prepared source folder, with hashes to verify it.

The folder can be checked without the text it was made from: meta.json has the size and sha256 of every shard, the hash of the
tokenizer, the vocabulary size and the EOS id.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from olmo_train import storage
from olmo_train.errors import DataError, reason
from olmo_train.formats import counted

FORMAT_VERSION = 1
MARKED_VERSION = 2  # of a source whose label masks mark where documents begin
META_FILE = "meta.json"
# The fix for a damaged source; prepare-data does not write into a finished folder.
PREPARE_AGAIN = "copy it again, or prepare the text again into a new folder"
TOKENIZER_FILE = "tokenizer.json"
DTYPES = ("uint16", "uint32")
SCORED, BEGINS = 1, 2  # bits of a byte of a label mask: the token is scored as a label; a document, or padding, begins with it
BLOCK_BYTES = 4096
BLOCKS = 16  # blocks of a shard in blocks_sha256, evenly spread, including the first and the last


@dataclass(frozen=True)
class ShardMeta:
    """A shard, as meta.json lists it."""

    file: str  # name in the folder
    tokens: int
    size: int  # bytes
    sha256: str  # of the file
    blocks_sha256: str  # of BLOCKS blocks, compared when a large source is opened
    labels: dict | None = None  # {"file", "sha256"} of the label mask, a byte per token (SCORED, BEGINS); null: all scored


@dataclass(frozen=True)
class Meta:
    """The contents of meta.json."""

    format_version: int
    dtype: str  # uint16 or uint32, little-endian
    tokenizer: str  # its name or the file it was read from
    tokenizer_sha256: str  # of tokenizer.json in the folder
    vocab_size: int
    eos_id: int
    eos_text: str
    tokens: int  # of all shards: those of the documents, one EOS per document, and padding
    documents: int
    bytes: int  # UTF-8 bytes of the documents' text, EOS not included
    shards: tuple[ShardMeta, ...]
    documents_sha256: str  # of documents.parquet
    skipped: dict = field(default_factory=dict)  # {"records": n, "empty": n, "first": [...]}: input without a document
    account: dict = field(default_factory=dict)  # where every byte and record of the input went; docs/data.md
    recipe: dict = field(default_factory=dict)  # inputs and options of prepare-data
    pack: int | None = None  # tokens of a window, which no document crosses; null: documents follow one another
    padding: int = 0  # tokens that fill the windows
    template: dict | None = None  # ChatFormat.record: name, instruction, markers, turn end, what is scored

    @property
    def marks_documents(self) -> bool:
        """Whether label masks mark where documents begin."""
        return marks_documents(self.pack, self.template)

    @property
    def has_label_mask(self) -> bool:
        """Whether some tokens are not scored."""
        return any(shard.labels for shard in self.shards)


def marks_documents(pack: int | None, template: object) -> bool:
    """Whether label masks mark where documents begin: with a template, or packed, an EOS is not always a document's end."""
    return pack is not None or template is not None


def read_meta(folder: Path) -> Meta:
    """Read meta.json. Raises DataError when the folder has none, or one that this version cannot read."""
    file = folder / META_FILE
    if not file.exists():
        raise DataError(
            folder,
            f"has no {META_FILE}: prepare-data has not finished (run the same command again), or it is no prepared "
            "folder (name raw token files by a glob such as FOLDER/*.npy)",
        )
    try:
        values = json.loads(file.read_bytes())
        version = values.get("format_version")
        if version not in (FORMAT_VERSION, MARKED_VERSION):
            raise DataError(file, f"format_version is {version}, expected {FORMAT_VERSION}; {PREPARE_AGAIN}")
        values = {"account": {}, "pack": None, "padding": 0, "template": None} | values  # earlier versions had none
        values = {f.name: values[f.name] for f in fields(Meta)}
        shards = tuple(ShardMeta(**shard) for shard in values.pop("shards"))
        meta = Meta(shards=shards, **values)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
        raise DataError(file, f"cannot be read: {type(problem).__name__}: {reason(problem)}; {PREPARE_AGAIN}") from problem
    if meta.dtype not in DTYPES:
        raise DataError(file, f"dtype is {meta.dtype!r}, expected one of {', '.join(DTYPES)}")
    total = sum(shard.tokens for shard in meta.shards)
    if total != meta.tokens:
        raise DataError(file, f"lists {counted(meta.tokens, 'token')}, but its shards sum to {total}; {PREPARE_AGAIN}")
    for shard in meta.shards:  # a name must not lead out of the folder, which may come from anybody
        for name in (shard.file, shard.labels["file"] if shard.labels else shard.file):
            if Path(name).name != name:
                raise DataError(file, f"names the shard {name!r}, which is not in the folder")
    return meta


def write_meta(folder: Path, meta: Meta) -> None:
    """Write meta.json atomically: a folder that has it is complete."""
    write_json(folder / META_FILE, asdict(meta))


def write_json(file: Path, values: Any) -> None:
    """Write a file atomically. A file name that is not UTF-8 is written with escapes."""
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    storage.replace_file(file, text.encode("utf-8", "backslashreplace"))


def hash_file(file: Path) -> str:
    """sha256 of a file's contents, in hexadecimal. Raises DataError when it cannot be read."""
    try:
        return storage.hash_file(file)
    except OSError as problem:
        raise DataError(file, f"cannot be read: {problem.strerror}") from problem


def hash_blocks(file: Path, blocks: int = BLOCKS) -> str:
    """sha256 of `blocks` blocks of 4 KiB, evenly spread, the first and the last included; of all of a smaller file."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= blocks * BLOCK_BYTES:
            return hash_file(file)
        for i in range(blocks):
            digest.update(os.pread(stream.fileno(), BLOCK_BYTES, i * (size - BLOCK_BYTES) // (blocks - 1)))
    return digest.hexdigest()
