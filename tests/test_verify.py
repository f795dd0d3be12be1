import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_sources import flip_bit, prepare_source

from olmo_train.__main__ import main
from olmo_train.data.meta import hash_blocks, hash_file
from olmo_train.data.verify import verify


@pytest.fixture
def folder(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(50)] + [{"prompt": "a", "response": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare_source(tmp_path, tmp_path / "a.jsonl", max_shard_tokens=100)[0]


def problems(folder):
    return [(problem.file.name, problem.what) for problem in verify(folder)[1]]


def edit_tokens(folder, shard, at, id):
    """Change one token and the hashes, so that only the contents can tell."""
    file = folder / f"tokens-{shard:05d}.bin"
    tokens = np.fromfile(file, np.uint16)
    tokens[at] = id
    tokens.tofile(file)
    edit_meta(folder, lambda meta: meta["shards"][shard].update(sha256=hash_file(file), blocks_sha256=hash_blocks(file)))


def edit_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def test_a_folder_as_it_was_written_has_no_problems(folder):
    assert problems(folder) == []


def test_a_flipped_bit_is_found(folder):
    flip_bit(folder / "tokens-00001.bin", 10)
    (name, what), *_ = [found for found in problems(folder) if "sha256" in found[1]]
    assert name == "tokens-00001.bin"
    assert "expected sha256" in what and ", found " in what


def test_a_size_a_missing_shard_and_a_numpy_header_are_found(folder):
    file = folder / "tokens-00001.bin"
    tokens = np.fromfile(file, np.uint16)
    np.save(folder / "x.npy", tokens)
    (folder / "x.npy").rename(file)
    assert problems(folder)[0][1].endswith(f"found {len(tokens) * 2 + 128}, beginning with a NumPy header")
    file.unlink()
    assert problems(folder)[0] == (
        file.name,
        f"expected {len(tokens) * 2} bytes for {len(tokens)} tokens of uint16, found no such file",
    )


def test_a_wrong_dtype_is_found(folder):
    edit_meta(folder, lambda meta: meta.update(dtype="uint32"))
    assert "tokens of uint32, found" in problems(folder)[0][1]


def test_an_id_beyond_the_vocabulary_is_found_with_its_offset(folder):
    edit_tokens(folder, 1, 17, 999)
    assert ("tokens-00001.bin", "token 17: expected an id below 280, found 999") in problems(folder)


def test_a_lost_and_an_added_eos_are_found_with_their_offsets(folder):
    end = pq.read_table(folder / "documents.parquet", filters=[("shard", "=", 1)])["end"][2].as_py()
    edit_tokens(folder, 1, end, 5)
    assert problems(folder) == [("tokens-00001.bin", f"token {end}: expected EOS 0 (a document ends), found 5")]
    edit_tokens(folder, 1, end, 0)
    edit_tokens(folder, 1, end - 1, 0)
    assert problems(folder) == [("tokens-00001.bin", f"token {end - 1}: expected no EOS inside a document, found 0")]


def test_another_tokenizer_and_another_eos_are_found(folder):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<eos>"))
    found = problems(folder)
    assert found[0][1].startswith("expected sha256")
    assert found[1] == ("tokenizer.json", "eos_text: expected '<|endoftext|>' (meta.json), found '<eos>'")


def test_changed_spans_and_rows_are_found(folder):
    file = folder / "documents.parquet"
    table = pq.read_table(file)
    starts = table["start"].to_pylist()
    starts[3] += 1
    pq.write_table(table.set_column(2, "start", [starts]), file, row_group_size=table["shard"].to_pylist().count(0))
    assert any("shard 0, document 3: expected start" in what for _, what in problems(folder))
    file.write_bytes(b"PAR1 no more")
    assert problems(folder)[0][0] == "documents.parquet"


def test_a_wrong_label_mask_is_found(folder):
    (file,) = folder.glob("labels-*.bin")
    data = bytearray(file.read_bytes())
    data[4] = 7
    file.write_bytes(data)
    assert [what.split(",")[0] for _, what in problems(folder)][1] == "token 4: expected 0 or 1"


def test_a_wrong_index_of_ids_is_found(folder):
    file = folder / "documents.ids"
    rows = np.fromfile(file, np.uint64)
    rows[1] += 1
    rows.tofile(file)
    assert problems(folder)[0] == (
        "documents.ids",
        f"row 0: expected the start of a document with that id, found token {rows[1]}",
    )


def test_the_command_exits_3_and_names_the_file_last(folder, capsys):
    assert main(["verify-data", str(folder)]) == 0
    edit_tokens(folder, 1, 17, 999)
    assert main(["verify-data", str(folder)]) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: {folder}/tokens-00001.bin: token 17: expected an id below 280, found 999")
