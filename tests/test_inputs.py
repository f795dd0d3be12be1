import codecs
import gzip
import io
import json
import os
import socket
import struct
import threading
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_sources import prepare_source, write_tokenizer

from olmo_train.data.prepare import chunks as chunks_module
from olmo_train.data.prepare import elements, inputs, readers, tables
from olmo_train.data.prepare.chunks import BREAKS_OFF, TRAILING, Skipped
from olmo_train.data.prepare.inputs import find_units
from olmo_train.data.prepare.readers import Record, chunks, records
from olmo_train.errors import ConfigError, DataError

ROWS = [{"id": f"d{i}", "text": f"text {i}"} for i in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write(folder, **files):
    """Files by their relative path; text is written as UTF-8."""
    for name, contents in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return folder


def read(*paths, on_left_out=lambda skipped: None):
    units = find_units([str(path) for path in paths], on_left_out)
    return [record for unit in units for chunk in chunks(unit, "text") for record in records(chunk, "text")]


def texts(*paths):
    return ["".join(text for text, _ in r.segments) for r in read(*paths) if isinstance(r, Record)]


def skipped(*paths):
    return [(s.reason, s.records) for s in read(*paths) if isinstance(s, Skipped)]


ALL = [row["text"] for row in ROWS]


# What is walked


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    write(tmp_path, **{"in/a/b.jsonl": '{"text": "one"}', "other/c.jsonl": '{"text": "two"}'})
    (tmp_path / "in/linked").symlink_to(tmp_path / "other")
    (tmp_path / "in/a/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/z").symlink_to(tmp_path / "in/a")
    notes = []
    assert [r.segments[0][0] for r in read(tmp_path / "in", on_left_out=notes.append)] == ["one", "two"]
    assert sorted(note.where for note in notes) == [f"{tmp_path}/in/a/loop", f"{tmp_path}/in/z"]
    assert {note.reason for note in notes} == {"is a link to a folder that is read"}


def test_a_broken_link_is_refused(tmp_path):
    (write(tmp_path, **{"a.jsonl": LINES}) / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone.jsonl: is a broken link to nowhere; repair or remove it"):
        read(tmp_path)
    with pytest.raises(DataError, match="is a broken link"):
        read(tmp_path / "gone.jsonl")


@pytest.mark.parametrize("name", ["sub", "sub/b.jsonl"])
@pytest.mark.parametrize("how", ["mode", "scandir"])
def test_what_may_not_be_read_is_an_error_with_its_name(tmp_path, monkeypatch, name, how):
    write(tmp_path, **{"a.jsonl": LINES, "sub/b.jsonl": LINES})
    if how == "mode":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        (tmp_path / name).chmod(0)
    else:

        def refuse(path, *rest, real, **options):
            if str(path) == str(tmp_path / name):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *rest, **options)

        for module, function in ((os, "scandir"), (inputs, "open")):
            real = getattr(module, function, open)
            monkeypatch.setattr(module, function, lambda *a, real=real, **o: refuse(*a, real=real, **o), raising=False)
    with pytest.raises(DataError, match=rf"{name}: cannot be read: Permission denied; make it readable") as problem:
        read(tmp_path)
    assert problem.value.exit_code == 3
    (tmp_path / name).chmod(0o700)


def test_special_files_in_a_folder_are_named(tmp_path):
    os.mkfifo(write(tmp_path, **{"a.jsonl": LINES}) / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        notes = []
        assert len(read(tmp_path, on_left_out=notes.append)) == 20
    assert [note.why.partition(";")[0] for note in notes] == ["is no file but a pipe", "is no file but a socket"]
    with pytest.raises(ConfigError, match="/dev/null: is a device"):
        read("/dev/null")


def test_a_pipe_is_copied_and_read_as_what_it_holds(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(LINES))
    writer.start()
    assert texts(tmp_path / "pipe") == ALL
    writer.join()


def test_an_output_inside_the_input_is_no_input(tmp_path):
    folder = write(tmp_path / "in", **{"a.txt": "sun", "b.txt": "moon"})
    _, result = prepare_source(tmp_path, folder, name="in/out")
    assert result.meta.documents == 2
    assert prepare_source(tmp_path, folder, name="in/out")[1].already_finished
    _, second = prepare_source(tmp_path, folder, name="in/second")
    assert second.meta.account["in"] == result.meta.account["in"]
    (folder / "half/.unfinished").mkdir(parents=True)
    (folder / "half/tokens-00000.bin").write_bytes(b"an unfinished output")
    assert texts(folder) == ["sun", "moon"]
    with pytest.raises(ConfigError, match="is a folder that prepare-data wrote"):
        read(folder / "out")


def test_files_that_are_not_read_are_in_the_account(tmp_path):
    files = {"a.jsonl": LINES, "b.jsonl": LINES, "README.md": "about", ".cache/x": "hidden", ".y": "too", "state.json": "{}"}
    folder = write(tmp_path / "in", **files)
    _, result = prepare_source(tmp_path, folder)
    account = result.meta.account
    assert account["in"] == {"files": 6, "bytes": sum(len(contents) for contents in files.values()), "records": 44}
    assert account["left_out"] == {
        "a name that begins with a dot": {"records": 2, "bytes": 9},
        "a description of a data set": {"records": 1, "bytes": 2},
        "files of another kind than most in their folder": {"records": 1, "bytes": 5},
    }


def test_a_file_name_that_is_no_utf8_is_an_origin(tmp_path):
    (write(tmp_path, **{"in/a.txt": "sun"}) / "in" / os.fsdecode(b"caf\xe9.txt")).write_text("moon")
    folder, result = prepare_source(tmp_path, tmp_path / "in")
    assert pq.read_table(folder / "documents.parquet")["origin"].to_pylist()[1].endswith("/caf\\xe9.txt")
    file = tmp_path / "in" / os.fsdecode(b"caf\xe9.txt")
    prepare_source(tmp_path, file, name="direct")
    assert prepare_source(tmp_path, file, name="direct")[1].already_finished  # also its name in the recipe reads back


def test_names_are_the_same_in_a_locale_that_is_not_utf8(tmp_path, run_cli):
    write(tmp_path, **{"in/é.jsonl": '{"text": "über"}', "in/b.jsonl": "{broken"})
    (tmp_path / "in" / os.fsdecode(b"caf\xe9.jsonl")).write_text('{"text": "sun"}')
    write_tokenizer(tmp_path / "tokenizer.json")
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = run_cli("prepare-data", "in", "--output", "out", "--tokenizer", "tokenizer.json", "--workers=1", **ascii_locale)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "out/documents.parquet")["origin"].to_pylist() == ["in/caf\\xe9.jsonl", "in/é.jsonl"]
    assert json.loads((tmp_path / "out/meta.json").read_bytes())["account"]["left_out"] == {
        "is not JSON": {"records": 1, "bytes": 7}
    }


# Splits


@pytest.mark.parametrize(
    "names, example",
    [
        (["c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"], "c4-train*"),
        (["default/train/0000.parquet", "default/test/0000.parquet"], "default/train"),
        (["train/00.jsonl", "train/01.jsonl", "val.jsonl", "test.jsonl"], "train"),
        (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], "train*"),
        (["en_training.jsonl", "en_dev.jsonl"], "en_training*"),
        (["wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"], "wiki.train*"),
        (["train.txt", "val.txt"], "train*"),
        (["README", "train/pos/1.txt", "train/neg/2.txt", "test/pos/1.txt"], "train"),
        (["data.Train.jsonl", "data.EVAL.jsonl"], "data.Train*"),
    ],
)
def test_a_folder_of_training_and_held_out_parts_is_refused(tmp_path, names, example):
    write(tmp_path, **dict.fromkeys(names, ""))
    with pytest.raises(ConfigError, match="holds the splits") as problem:
        find_units([str(tmp_path)])
    assert str(problem.value).endswith(f"such as {tmp_path}/{example}")


@pytest.mark.parametrize(
    "names",
    [
        ["test.txt", "a.txt"],
        ["train-travel.md", "by-train.md"],
        ["train-travel.md", "test.txt"],  # topics: they differ by more than the word
        ["train.py", "test.py", "model.py", "data.py", "README.md"],  # programs: most files name no part
        ["contest.jsonl", "trainer.jsonl", "latest.jsonl", "evaluate.jsonl"],  # words that hold one
        ["train/00.jsonl", "train/test-questions.jsonl"],  # both of one part
        ["val.jsonl", "test.jsonl"],  # no training part beside them
        ["wiki-00000-of-00002.parquet", "wiki-00001-of-00002.parquet"],
    ],
)
def test_other_names_are_no_splits(tmp_path, names):
    write(tmp_path, **dict.fromkeys(names, "text"))
    assert sum(len(unit.files) for unit in find_units([str(tmp_path)])) == len(names)
    find_units([str(tmp_path / name) for name in names])  # who names the files has said what to read


def test_parts_that_are_named_are_read(tmp_path):
    write(tmp_path, **{"train.jsonl": LINES, "test.jsonl": LINES})
    assert len(read(tmp_path / "train.jsonl", tmp_path / "test.jsonl")) == 40


# Formats


@pytest.mark.parametrize(
    "name", ["part-00000", "a.jsonlines", "a.jl", "a.ndjson", "a.JSONL", "a.txt", "a.json", "spark/part-00000"]
)
@pytest.mark.parametrize("packing", ["", ".GZ"])
def test_json_lines_are_records_under_any_name(tmp_path, name, packing):
    write(tmp_path / "in", **{name + packing: gzip.compress(LINES) if packing else LINES})
    (tmp_path / "in" / "_SUCCESS").touch()
    assert texts(tmp_path / "in") == ALL
    assert texts(tmp_path / "in" / (name + packing)) == ALL


def test_the_first_lines_tell_json_lines_from_text(tmp_path):
    write(
        tmp_path, a=b'{broken\n{"text": "b"}\n\n{"text": "c"}\n', b="{% raw %}\ntext\n", c='{\n "a": 1\n}\n', d="[a](b)\n", e="{"
    )
    write(tmp_path, f=b'{"text": "' + b"x" * 2**17 + b'"}')
    formats = [find_units([str(tmp_path / name)])[0].format for name in "abcdef"]
    assert formats == ["jsonl", "text", "text", "text", "text", "jsonl"]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv.gz"])
def test_tables_of_separated_values_are_refused(tmp_path, name):
    write(tmp_path / "in", **{name: gzip.compress(b"text\tid\na\t1\n") if name.endswith("gz") else b"text,id\na,1\n"})
    for path in (tmp_path / "in", tmp_path / "in" / name):
        with pytest.raises(ConfigError, match="a table of separated values, .*convert it to Parquet or JSON lines"):
            read(path)
    notes = []
    write(tmp_path / "in", **{"a.txt": "sun"})
    assert len(read(tmp_path / "in", on_left_out=notes.append)) == 1
    assert [note.records for note in notes] == [1]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_utf16_is_refused_with_the_way_out(tmp_path, encoding):
    write(tmp_path, **{"a.jsonl": LINES.decode().encode(encoding), "b.txt": codecs.BOM_UTF16_LE + "sun".encode("utf-16-le")})
    with pytest.raises(DataError, match="UTF-8; convert it: iconv -f UTF-"):
        read(tmp_path / "a.jsonl")
    (found,) = read(tmp_path / "b.txt")
    assert "is not UTF-8 but UTF-16; convert it" in found.why


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("array", [True, False])
def test_json_arrays_and_objects_over_many_lines_are_records(tmp_path, monkeypatch, indent, array):
    for module in (chunks_module, readers, elements, tables):
        monkeypatch.setattr(module, "CHUNK_BYTES", 50)
    rows = [*ROWS, {"text": "a },\n { b [é] \\"}]
    dumped = json.dumps(rows, indent=indent) if array else "\n".join(json.dumps(row, indent=indent) for row in rows)
    write(tmp_path, **{"a.json": "\ufeff" + dumped, "b.json.gz": gzip.compress(dumped.encode())})
    for name in ("a.json", "b.json.gz"):
        found = read(tmp_path / name)
        assert [r.segments[0][0] for r in found] == [row["text"] for row in rows]
        assert [r.record for r in found] == list(range(1, 22)) and found[0].id == "d0"


def test_a_bad_element_of_an_array_is_left_out_alone(tmp_path):
    bad = ['{"text": oops}', '{"text": "a\n b"}', '{"text": "\xff"}', "5", '{"text": "\\ud800"}']
    parts = [
        piece for row, element in zip(ROWS, [*bad, *[None] * 15], strict=True) for piece in (json.dumps(row), element) if piece
    ]
    write(tmp_path, **{"a.json": ("[" + ",\n".join(parts) + "]").encode("latin-1")})
    assert texts(tmp_path) == ALL
    assert [reason for reason, _ in skipped(tmp_path)] == [
        "is not JSON",
        "is not JSON",
        "is not UTF-8",
        "is no record with fields",
        "holds a lone surrogate, which no UTF-8 text has",
    ]


def test_an_array_that_breaks_off_keeps_what_came_before(tmp_path):
    array = json.dumps(ROWS, indent=1).encode()
    write(tmp_path, **{"a.json.gz": gzip.compress(array)[:-30], "b.json": array[:-40]})
    assert ALL[:10] == texts(tmp_path / "a.json.gz")[:10] and skipped(tmp_path / "a.json.gz") == [(BREAKS_OFF, 1)]
    assert texts(tmp_path / "b.json") == ALL[:19] and skipped(tmp_path / "b.json") == [("is not JSON", 1)]


# Compressed files that break off


def zst(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("chunk_bytes", [200, 2**20])
@pytest.mark.parametrize("suffix, compress", [("gz", gzip.compress), ("zst", zst)])
@pytest.mark.parametrize("tail", [b"\0" * 512, b"\0", b"hello"])
def test_what_lies_behind_a_whole_compressed_file_is_the_end_with_a_warning(
    tmp_path, monkeypatch, suffix, compress, tail, chunk_bytes
):
    for module in (chunks_module, readers):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    write(tmp_path, **{f"a.jsonl.{suffix}": compress(LINES) + compress(LINES) + tail})
    _, result = prepare_source(tmp_path, tmp_path / f"a.jsonl.{suffix}", on_error="stop")
    assert result.meta.documents == 40
    assert result.meta.account["left_out"] == {TRAILING: {"records": 0, "bytes": len(tail)}}
    assert TRAILING in result.meta.skipped["first"][0]["why"]
    write(tmp_path, **{f"b.txt.{suffix}": compress(b"sun") + tail})
    assert texts(tmp_path / f"b.txt.{suffix}") == ["sun"]
    assert skipped(tmp_path / f"b.txt.{suffix}") == [(TRAILING, 0)]


def many_lines(n=4000):
    return b"".join(json.dumps({"text": f"sun moon {i * 7919 % 100_003}"}).encode() + b"\n" for i in range(n))


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_every_record_before_a_break_in_gzip_is_kept(tmp_path, damage):
    data = gzip.compress(many_lines(), mtime=0)
    at = len(data) * 3 // 4
    data = data[:at] if damage == "cut" else data[:at] + bytes(4) + data[at + 4 :]
    write(tmp_path, **{"a.jsonl.gz": data})
    _, result = prepare_source(tmp_path, tmp_path / "a.jsonl.gz")
    decompressor, whole = zlib.decompressobj(31), bytearray()
    try:
        for i in range(len(data)):
            whole += decompressor.decompress(data[i : i + 1])
    except zlib.error:
        pass
    expected = [line for line in bytes(whole).split(b"\n")[:-1] if readers._is_json(line) and "text" in json.loads(line)]
    assert result.meta.documents == len(expected) > 2000
    assert result.meta.account["left_out"][BREAKS_OFF]["records"] == 1
    with pytest.raises(DataError, match=BREAKS_OFF if damage == "cut" else "is not JSON"):  # what the flaw made of the data
        prepare_source(tmp_path, tmp_path / "a.jsonl.gz", name="strict", on_error="stop")


def test_every_record_before_a_break_in_zstandard_is_kept(tmp_path):
    data = zst(many_lines(20_000))[:-100]
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data))
    whole = reader.read(2**30)
    write(tmp_path, **{"a.jsonl.zst": data})
    assert len(texts(tmp_path / "a.jsonl.zst")) == whole.count(b"\n") > 1000
    assert skipped(tmp_path / "a.jsonl.zst") == [(BREAKS_OFF, 1)]


def test_a_window_too_long_for_zstandard_names_the_way_out(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    data = compressor.compressobj()
    write(tmp_path, **{"a.jsonl.zst": data.compress(many_lines(3000)) + data.flush(), "b.jsonl": LINES})
    (found,) = [record for record in read(tmp_path) if isinstance(record, Skipped)]
    assert "compress it again without --long" in found.why and len(texts(tmp_path)) == 20


def test_a_text_that_breaks_off_keeps_what_came_before(tmp_path):
    data = gzip.compress("é".encode() * 100_000 + os.urandom(100).hex().encode() * 100, mtime=0)
    write(tmp_path, **{"a.txt.gz": data[:-60], "b.txt.gz": data[:8]})
    first, loss, nothing = read(tmp_path / "a.txt.gz", tmp_path / "b.txt.gz")
    assert first.segments[0][0].startswith("é" * 90_000) and (loss.reason, loss.records) == (BREAKS_OFF, 0)
    assert (nothing.reason, nothing.records, nothing.size) == (BREAKS_OFF, 1, 8)


# One bad row


def test_a_bad_row_of_a_table_is_left_out_alone(tmp_path):
    texts_ = pa.array([b"a", b"\xff", b"c", b"d", b"e"])
    column = pa.StringArray.from_buffers(5, *texts_.buffers()[1:3])
    times = pa.array([0, 0, 2**62, 0, 0], pa.timestamp("us"))
    pq.write_table(pa.table({"text": column, "id": times}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": texts_, "id": [1, 2, 3, 4, 5]}), tmp_path / "b.parquet")
    assert texts(tmp_path / "a.parquet") == ["a", "d", "e"]
    assert [(s.where.rpartition("/")[2], s.reason) for s in read(tmp_path / "a.parquet") if isinstance(s, Skipped)] == [
        ("a.parquet:2", "cannot be read"),
        ("a.parquet:3", "cannot be read"),
    ]
    assert texts(tmp_path / "b.parquet") == ["a", "c", "d", "e"]  # bytes are read as UTF-8
    assert skipped(tmp_path / "b.parquet") == [("is not UTF-8", 1)]
    with pytest.raises(DataError, match=r"a.parquet:2: cannot be read"):
        prepare_source(tmp_path, tmp_path / "a.parquet", on_error="stop")


def test_an_arrow_file_with_wrong_offsets_breaks_off_where_they_are(tmp_path):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("text", pa.string())])) as writer:
        for texts_ in (["aaaa", "bbbb"], ["ccccc", "ddddd"]):
            writer.write_batch(pa.record_batch({"text": texts_}))
    data, offsets = sink.getvalue().to_pybytes(), struct.pack("<3i", 0, 5, 10)
    assert data.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(data.replace(offsets, struct.pack("<3i", 0, 2**30, 10)))
    assert texts(tmp_path / "a.arrow") == ["aaaa", "bbbb"]
    assert skipped(tmp_path / "a.arrow") == [("the file breaks off", 1)]


def test_a_lone_surrogate_in_an_id_is_left_out_alone(tmp_path):
    write(tmp_path, **{"a.jsonl": b'{"id": "\\ud800", "text": "a"}\n{"id": "b", "text": "b"}\n'})
    _, result = prepare_source(tmp_path, tmp_path / "a.jsonl")
    assert result.meta.documents == 1
    assert result.meta.account["left_out"] == {"holds a lone surrogate, which no UTF-8 text has": {"records": 1, "bytes": 30}}


# Instructions


def segments(values):
    return readers.to_record(values, "a.jsonl", 1, "text").segments


def test_sharegpt_conversations_and_parts_of_contents_are_chats():
    chat = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    assert segments({"conversations": chat}) == (
        ("<|user|>\n", False),
        ("hi", False),
        ("\n", False),
        ("<|assistant|>\n", False),
        ("hello", True),
    )
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    found = segments({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": parts}]})
    assert "".join(text for text, scored in found if scored) == "one two"
    image = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    assert "holds dict where text" in readers.to_record({"messages": image}, "a.jsonl", 1, "text").why


def test_alpaca_instructions_score_the_output():
    asked = {"instruction": "Add.", "input": "2 2", "output": "4"}
    assert segments(asked) == (("Add.", False), ("\n\n", False), ("2 2", False), ("\n\n", False), ("4", True))
    assert segments({**asked, "input": ""}) == (("Add.", False), ("\n\n", False), ("4", True))
