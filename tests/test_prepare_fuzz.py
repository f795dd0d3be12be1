"""Any folder of files, however odd or damaged: prepare-data ends in a true account or in one line of error."""

import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sources import write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import first_quick

from olmo_train.data.prepare import chunks, elements, inputs, readers, tables
from olmo_train.data.prepare.prepare import PrepareOptions, prepare
from olmo_train.errors import UserError

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(["sun moon", "a\0b", "<|endoftext|>", "é" * 90])
GOOD_ROWS = st.builds(lambda text: {"text": text + "."}, TEXTS)
ODD_ROWS = st.sampled_from(
    [
        b"{broken",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"id": "\\ud800", "text": "a"}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": ""}',
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}',
        b'{"conversations": [{"from": "human", "value": "a"}, 5]}',
        b'{"instruction": "a", "input": 3, "output": "b"}',
        b'{"a": ' * 3000,
        b"[[1, 2], {}]",
        b"NaN",
        b"",
        b"\0\0",
        b'{"text": "cut',
        b'{"text": "a"}, {"text": "b"}',
        b'{\n "text": "over\n lines"\n}',
        b'"},{"',
    ]
)
NAMES = st.sampled_from(
    ["a.jsonl", "b.json", "c.txt", "part-00000", "d.jsonlines", "e.JSON", "f.csv", "README.md", ".hidden", "g.parquet"]
    + ["h.arrow", "train.jsonl", "test.jsonl", "x y [z]\n.txt", os.fsdecode(b"caf\xe9.jsonl"), "dataset_info.json", "meta.json"]
)
FOLDERS = st.sampled_from(["", "", "", "sub", "sub/deep", ".git", "train", "val", "validation-data", "linked"])
DAMAGE = st.sampled_from(["none"] * 5 + ["cut", "flip", "pad", "insert"])
PACKING = st.sampled_from(["", "", ".gz", ".zst", ".GZ"])


def encoded(name, rows, good, as_array):
    """The contents of a file of rows: a table, an array, text, or lines."""
    if name.endswith((".parquet", ".arrow")):
        column = pa.array([row["text"].encode() for row in good] + [b"\xff"] * len(rows), pa.binary())
        ids = pa.array([row.get("id") for row in good] + [None] * len(rows), pa.string())
        times = pa.array([0] * len(good) + [2**62] * len(rows), pa.timestamp("us"))
        texts = pa.StringArray.from_buffers(len(column), *column.buffers()[1:3]) if as_array else column
        table = pa.table({"text": texts, "id": ids, "messages": times})
        sink = pa.BufferOutputStream()
        if name.endswith(".parquet"):
            pq.write_table(table, sink, row_group_size=3)
        else:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=3)
        return sink.getvalue().to_pybytes()
    lines = [json.dumps(row).encode() for row in good]
    return b"[" + b",\n".join([*lines, *rows]) + b"]" if as_array else b"\n".join([*lines, *rows])


def damaged(data, damage, where):
    at = int(where * len(data))
    if damage == "cut":
        return data[:at]
    if damage == "flip" and data:
        return data[: min(at, len(data) - 1)] + bytes([data[min(at, len(data) - 1)] ^ 0x15]) + data[at + 1 :]
    return data[:at] + b"\xff{\n" + data[at:] if damage == "insert" else data + b"\0" * 7 * (damage == "pad")


FILES = st.tuples(
    FOLDERS,
    NAMES,
    PACKING,
    st.lists(GOOD_ROWS, max_size=8),
    st.lists(ODD_ROWS, max_size=3),
    DAMAGE,
    st.floats(0, 1),
    st.booleans(),
)


def write_files(root, files):
    """The ids that must be documents."""
    sure = set()
    for i, (folder, name, packing, good, rows, damage, where, as_array) in enumerate(files):
        good = [{**row, "id": f"sure-{i}-{j}"} for j, row in enumerate(good)]
        data = encoded(name, rows, good, as_array)
        if packing.lower() == ".gz":
            data = gzip.compress(data)
        elif packing:
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(data)
            data = sink.getvalue().to_pybytes()
        file = root / folder / (name + packing)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_bytes(damaged(data, damage, where))
            lines = (
                name.endswith(".jsonl")
                and not as_array
                or name.endswith((".parquet", ".arrow"))
                and not packing + (damage != "none") * "x"
            )
            if damage in ("none", "pad") and lines and not folder.startswith(".") and not (damage == "pad" and not packing):
                sure |= {row["id"] for row in good}
    return sure


def check(files, special, on_error):
    with tempfile.TemporaryDirectory() as folder:
        root, output = Path(folder, "in"), Path(folder, "in", "out")
        root.mkdir()
        Path(folder, "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
        sure = write_files(root, files)
        if special == "loop":
            (root / "again").symlink_to(root)
        elif special == "pipe":
            os.mkfifo(root / "pipe.jsonl")
        elif special == "broken link":
            (root / "gone.jsonl").symlink_to("nowhere")
        sizes = [file.lstat().st_size for file in root.rglob("*") if file.is_file() and not file.is_symlink()]
        options = PrepareOptions(
            (str(root),), output, str(Path(folder, "tokenizer.json")), max_shard_tokens=300, on_error=on_error
        )
        notes = []
        try:
            result = prepare(options, on_note=notes.append)
        except UserError as problem:
            assert "\n" not in problem.what
            assert not output.exists()
            return
        account = result.meta.account
        left_out = account["left_out"].values()
        assert account["in"]["bytes"] == sum(sizes)
        assert account["in"]["bytes"] == account["out"]["bytes"] + sum(n["bytes"] for n in left_out)
        assert account["in"]["records"] == account["out"]["documents"] + sum(n["records"] for n in left_out)
        assert account["out"]["documents"] == result.meta.documents and account["out"]["tokens"] == result.meta.tokens
        assert min(account["out"]["bytes"], *(n["bytes"] for n in left_out), 0) == 0
        if "files of another kind than most in their folder" not in account["left_out"]:
            assert sure <= set(pq.read_table(output / "documents.parquet")["id"].to_pylist())
        assert prepare(options).already_finished


TOKENIZER = Path(tempfile.mkdtemp(), "tokenizer.json")


@pytest.fixture(autouse=True, scope="module")
def tokenizer():
    write_tokenizer(TOKENIZER)
    yield
    shutil.rmtree(TOKENIZER.parent)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        for module in (chunks, elements, inputs, readers, tables):
            patch.setattr(module, "CHUNK_BYTES", 200)
        patch.setattr(chunks, "INPUT_BYTES", 64)
        patch.setattr(os, "fsync", lambda file: None)  # most of the time
        yield


@pytest.mark.parametrize("examples", first_quick([100, 2000]))
def test_every_byte_is_accounted_for_or_the_error_is_one_line(examples):
    special = st.sampled_from([None, None, None, "loop", "pipe", "broken link"])
    on_error = st.sampled_from(["skip", "skip", "stop"])
    options = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=examples, **options)(given(st.lists(FILES, max_size=5), special, on_error)(check))()
