import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from olmo_train.data.prepare import chunks as chunks_module
from olmo_train.data.prepare import elements, inputs, readers, tables
from olmo_train.data.prepare.chunks import Skipped
from olmo_train.data.prepare.inputs import find_units
from olmo_train.data.prepare.readers import Record, chunks, records
from olmo_train.errors import ConfigError

ROWS = [{"id": f"d{i}", "text": f"text {i} " + "x" * (i % 7), "other": i} for i in range(50)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 200 bytes, so that a tiny file has many."""
    for module in (chunks_module, elements, inputs, readers, tables):
        monkeypatch.setattr(module, "CHUNK_BYTES", 200)


def read(*inputs, text_field="text"):
    units = find_units([str(path) for path in inputs])
    return [record for unit in units for chunk in chunks(unit, text_field) for record in records(chunk, text_field)]


def skipped(found):
    return [(str(s.where).rpartition("/")[2], s.why) for s in found if isinstance(s, Skipped)]


def write(folder, format):
    file = folder / f"rows.{format}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = pa.Table.from_pylist(ROWS)
    if format == "jsonl":
        file.write_bytes(lines)
    elif format == "jsonl.gz":  # two members, as `cat a.gz b.gz` makes
        middle = lines.index(b"\n", len(lines) // 2) + 1
        file.write_bytes(gzip.compress(lines[:middle]) + gzip.compress(lines[middle:]))
    elif format == "jsonl.zst":
        with pa.CompressedOutputStream(str(file), "zstd") as stream:
            stream.write(lines)
    elif format == "parquet":
        pq.write_table(table, file, row_group_size=20)
    else:
        new = pa.ipc.new_file if format == "file.arrow" else pa.ipc.new_stream
        with pa.OSFile(str(file), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=13)
    return file


@pytest.mark.parametrize("format", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "stream.arrow", "file.arrow"])
def test_every_format_is_read_as_the_same_records(tmp_path, format):
    file = write(tmp_path, format)
    expected = [Record(row["id"], str(file), i + 1, ((row["text"], True),)) for i, row in enumerate(ROWS)]
    assert read(file) == expected
    (unit,) = find_units([str(file)])
    cut = list(chunks(unit, "text"))
    assert len(cut) > 5 or format == "jsonl.gz"
    if format not in ("stream.arrow", "file.arrow"):  # their rows are not known beforehand
        assert sum(chunk.input_bytes for chunk in cut) == unit.size


def test_a_corrupt_line_is_named_and_the_others_are_kept(tmp_path):
    lines = [json.dumps(row).encode() for row in ROWS]
    lines[3] = b'{"text": oops}'
    lines[10] = b'{"text": "\xff"}'
    lines[20] = b'{"txt": "x"}'
    lines[21] = b'{"text": 5}'
    lines[22] = b"[1]"
    lines[23] = b'{"text": "\\ud800"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n\n".join(lines))  # blank lines count as lines, and are no records
    found = read(tmp_path / "a.jsonl")
    assert len(found) == 50
    assert [where for where, _ in skipped(found)] == [f"a.jsonl:{2 * i + 1}" for i in (3, 10, 20, 21, 22, 23)]
    reasons = [
        "is not JSON",
        "is not UTF-8",
        "no text in a field 'text'; its fields: txt",
        "holds int where text",
        "is no record",
        "lone surrogate",
    ]
    assert all(reason in why for reason, (_, why) in zip(reasons, skipped(found), strict=True))


@pytest.mark.parametrize("format", ["jsonl.gz", "jsonl.zst", "parquet", "stream.arrow"])
def test_a_file_that_breaks_off_is_named_and_what_came_before_is_kept(tmp_path, format):
    file = write(tmp_path, format)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * 0.7)])
    found = read(file)
    assert "breaks off here" in skipped(found)[-1][1]
    assert len(found) > 10 or format in ("parquet", "jsonl.zst")  # Parquet has its index at its end


def test_a_line_longer_than_a_chunk_is_one_record(tmp_path):
    text = "y" * 5000
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": text}) + '\n{"text": "b"}')
    assert [record.segments[0][0] for record in read(tmp_path / "a.jsonl")] == ["a", text, "b"]


def test_a_folder_of_text_is_its_files_in_order_and_what_is_no_text_is_named(tmp_path):
    for name in ("b.txt", "a/z.py", "a.txt", "a/b/c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.bin").write_bytes(b"\0\1")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    found = read(tmp_path)
    assert [r.segments[0][0] for r in found if isinstance(r, Record)] == ["a/b/c.md", "a/z.py", "a.txt", "b.txt"]
    assert skipped(found) == [("c.bin", "is binary, not text"), ("d.txt", "is not UTF-8 (byte 3)")]
    assert found[0].record is None


def test_text_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\n".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("ö".encode()))
    assert [record.segments[0][0] for record in read(tmp_path)] == ["one\r\ntwo\n", "ö"]


def test_a_folder_is_records_or_text_by_what_most_of_its_files_are_and_the_others_are_named(tmp_path):
    notes = []
    write(tmp_path, "jsonl.gz")
    (tmp_path / "README.md").write_text("about")
    assert [unit.format for unit in find_units([str(tmp_path)], notes.append)] == ["jsonl"]
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "more.md").write_text("more")
    (unit,) = find_units([str(tmp_path)], notes.append)
    assert [file.name for file in unit.files] == ["README.md", "more.md", "settings.json"]
    assert [(note.reason, note.records, note.size) for note in notes] == [
        ("files of another kind than most in their folder", 1, len("about")),
        ("files of another kind than most in their folder", 1, (tmp_path / "rows.jsonl.gz").stat().st_size),
    ]
    assert "1 file of other kinds, such as" in notes[0].why and "only files of records are read, 1 here" in notes[0].why


def test_a_folder_of_json_files_is_read_as_records(tmp_path):
    write(tmp_path, "jsonl").rename(tmp_path / "rows.json")
    assert len(read(tmp_path)) == 50


def test_a_saved_data_set_is_read_and_one_of_several_splits_must_be_named(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write(tmp_path / split, "stream.arrow")
        (tmp_path / split / "state.json").write_text("{}")
        (tmp_path / split / "dataset_info.json").write_text("{}")
    assert len(read(tmp_path / "train")) == 50
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"several splits; name one: .*/test, .*/train"):
        find_units([str(tmp_path)])


def test_a_hub_folder_of_several_splits_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        write(tmp_path, "parquet").rename(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match="the splits test, train"):
        find_units([str(tmp_path)])


def test_instructions_are_scored_where_the_model_answers():
    def segments(values):
        return readers.to_record(values, "a.jsonl", 1, "text").segments

    assert segments({"prompt": "2+2=", "response": "4"}) == (("2+2=", False), ("4", True))
    assert segments({"prompt": "2+2=", "completion": "4"}) == (("2+2=", False), ("4", True))
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert "".join(text for text, _ in segments({"messages": chat})) == "<|user|>\nhi\n<|assistant|>\nhello"
    assert [text for text, scored in segments({"messages": chat}) if scored] == ["hello"]
    broken = readers.to_record({"messages": [{"role": "user"}]}, "a.jsonl", 1, "text")
    assert "NoneType where text" in broken.why


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
        {"messages": [{"role": "assistant", "content": [{"text": "a"}, {"image": "b"}]}]},
        {"conversations": [{"from": "gpt", "value": "\ud800"}]},
        {"prompt": "a", "response": b"\xff"},
        {"instruction": "a", "input": 5, "output": "b"},
    ],
)
def test_text_is_read_beside_messages_that_are_not_text(other):
    record = readers.to_record({"text": "hello"} | other, "a.jsonl", 1, "text")
    assert (record.segments, record.turns) == ((("hello", True),), ())
    assert isinstance(readers.to_record(other, "a.jsonl", 1, "text"), Skipped)


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    file = write(tmp_path, "parquet")
    (unit,) = find_units([str(file)])
    assert set(tables.rows(next(chunks(unit, "text")).payload)[0]) == {"id", "text"}


def test_a_missing_input_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        find_units([str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="holds no files"):
        find_units([str(tmp_path)])
