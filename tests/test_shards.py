import numpy as np
import pytest
from data_sources import flip_bit, prepare_source, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_train.data.config import SourceConfig
from olmo_train.data.shards import check_ids, open_source
from olmo_train.data.tokenizer import load_tokenizer
from olmo_train.errors import DataError

VOCAB = 50280
EOS = 50279


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def raw(folder, *lengths, seed=0, dtype="<u2"):
    generator = np.random.default_rng(seed)
    arrays = [generator.integers(0, 1000, n).astype(dtype) for n in lengths]
    for i, array in enumerate(arrays):
        array.tofile(folder / f"part-{i}.npy")
    return arrays


def refused(path, match, vocab_size=VOCAB, **options):
    with pytest.raises(DataError, match=match):
        open_source("test", SourceConfig(str(path), **options), vocab_size)


def test_raw_files_are_one_stream_in_the_order_of_their_names(tmp_path):
    arrays = raw(tmp_path, 10, 3, 20)
    source = open_source("test", SourceConfig(str(tmp_path / "*.npy")), VOCAB)
    assert source.starts.tolist() == [0, 10, 13, 33]
    out = np.zeros(33, np.int64)
    source.read(0, out)
    assert out.tolist() == np.concatenate(arrays).tolist()


def test_a_list_keeps_the_order_it_is_written_in(tmp_path):
    arrays = raw(tmp_path, 4, 5)
    files = (str(tmp_path / "part-1.npy"), str(tmp_path / "part-0.npy"))
    out = np.zeros(9, np.int32)
    open_source("test", SourceConfig(files), VOCAB).read(0, out)
    assert out.tolist() == [*arrays[1], *arrays[0]]


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    arrays = raw(folder, 50, 1, 7, 120, dtype="<u4")
    return open_source("test", SourceConfig(str(folder / "*.npy"), dtype="uint32"), VOCAB), np.concatenate(arrays)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_span_is_read_across_any_border(stream, data):
    source, expected = stream
    start = data.draw(st.integers(0, len(expected) - 1))
    stop = data.draw(st.integers(start, len(expected)))
    out = np.zeros(stop - start, data.draw(st.sampled_from(["int64", "int32", "uint32"])))
    source.read(start, out)
    assert out.tolist() == expected[start:stop].tolist()
    mask = np.zeros(stop - start, np.uint8)
    source.read_label_mask(start, mask)
    assert mask.all()


def test_a_numpy_header_is_skipped_when_it_tells_the_same_dtype(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100, dtype=np.uint16))
    out = np.zeros(100, np.int64)
    open_source("test", SourceConfig(str(tmp_path / "a.npy")), VOCAB).read(0, out)
    assert out.tolist() == list(range(100))


@pytest.mark.parametrize("array", [np.arange(100), np.arange(100, dtype=np.uint32), np.zeros((4, 5), np.uint16)])
def test_a_numpy_header_that_tells_something_else_is_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    refused(tmp_path / "a.npy", r"a.npy: has a NumPy header of .* expected one row of uint16")


def test_damaged_raw_files_are_refused_by_name(tmp_path):
    refused(tmp_path / "none.npy", "none.npy does not exist; name an existing token file")
    refused(tmp_path / "*.npy", "matches no file")
    (tmp_path / "empty.npy").write_bytes(b"")
    refused(tmp_path / "empty.npy", "empty.npy: is an empty shard")
    (tmp_path / "odd.npy").write_bytes(b"abc")
    refused(tmp_path / "odd.npy", "odd.npy: has 3 bytes, no multiple of 2")
    refused(tmp_path, "has no meta.json")


def test_uint16_read_as_uint32_is_refused(tmp_path):
    raw(tmp_path, 100)
    refused(tmp_path / "part-0.npy", r"token 0 has id \d{6,}.*read as uint32", dtype="uint32")


def test_an_id_beyond_the_vocabulary_is_found_anywhere_and_a_passed_shard_is_remembered(tmp_path):
    array = np.zeros(5_000_000, np.uint16)
    array.tofile(tmp_path / "a.npy")
    source = open_source("test", SourceConfig(str(tmp_path / "a.npy")), 1000)
    check_ids(source, 1000)
    assert len(list((tmp_path / "cache").rglob("checked/*"))) == 1
    array[4_567_891] = 1000
    array.tofile(tmp_path / "a.npy")
    source = open_source("test", SourceConfig(str(tmp_path / "a.npy")), 1000)  # the sample does not meet it
    with pytest.raises(DataError, match=r"a.npy: token 4567891 has id 1000, .* is 999"):
        check_ids(source, 1000)


def test_the_fingerprint_is_of_contents_not_of_paths(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    raw(tmp_path / "a", 100, 50)
    raw(tmp_path / "b", 100, 50)
    first, second = (open_source("test", SourceConfig(str(tmp_path / f / "*.npy")), VOCAB) for f in "ab")
    assert first.fingerprint == second.fingerprint
    flip_bit(tmp_path / "b" / "part-1.npy", 60)
    changed = open_source("test", SourceConfig(str(tmp_path / "b" / "*.npy")), VOCAB)
    assert changed.fingerprint != first.fingerprint
    swapped = tuple(str(tmp_path / "a" / f"part-{i}.npy") for i in (1, 0))
    assert open_source("test", SourceConfig(swapped), VOCAB).fingerprint != first.fingerprint


def test_raw_documents_are_found_by_their_eos(tmp_path):
    np.array([1, 2, EOS, 3, EOS, EOS, 4, 5, 6], np.uint16).tofile(tmp_path / "a.npy")
    np.array([7, 8], np.uint16).tofile(tmp_path / "b.npy")
    source = open_source("test", SourceConfig(str(tmp_path / "*.npy")), VOCAB, EOS)
    spans = [(d.start, d.end) for d in source.documents(0, 11)]
    assert spans == [(0, 2), (3, 4), (5, 5), (6, 9), (9, 11)]
    assert [(d.start, d.end) for d in source.documents(7, 8)] == [(6, 9)]
    assert [(d.start, d.end) for d in source.documents(2, 4)] == [(0, 2), (3, 4)]
    assert source.documents(0, 1)[0].id is None
    with pytest.raises(DataError, match="keep no ids"):
        source.find_documents({"x"})[0]


def test_documents_of_a_prepared_source_are_found_by_position_and_id(tmp_path):
    folder, _ = prepare_source(tmp_path)
    tokenizer = load_tokenizer(folder)
    source = open_source("test", SourceConfig(str(folder)), tokenizer.vocab_size)
    assert len(source.files) > 2
    documents = source.documents(0, source.n_tokens)
    assert [d.id for d in documents] == [f"doc-{i}" for i in range(60)]
    for document, text in zip(documents, texts(60), strict=True):
        assert source.find_documents({document.id})[0] == document
        ids = np.zeros(document.end - document.start + 1, np.int64)
        source.read(document.start, ids)
        assert tokenizer.decode(ids[:-1]) == text
        assert ids[-1] == tokenizer.eos_id
        assert source.documents(document.end, document.end + 1) == [document]  # its EOS is the document's
    assert documents[6].origin == f"{tmp_path}/source.jsonl:7"
    with pytest.raises(DataError, match="knows no document 'doc-60'"):
        source.find_documents({"doc-60"})[0]


def test_a_changed_prepared_source_is_refused(tmp_path):
    folder, _ = prepare_source(tmp_path)
    file = folder / "tokens-00001.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    refused(folder, "tokens-00001.bin: has .* bytes, but meta.json says", 280)
    file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    refused(folder, "tokens-00001.bin: contents changed", 280)
    file.unlink()
    refused(folder, "tokens-00001.bin: cannot be opened: No such file", 280)


def test_a_prepared_source_must_fit_the_model(tmp_path):
    folder, _ = prepare_source(tmp_path)
    refused(folder, "vocab_size is 280, above the model's; raise model.vocab_size from 279 to at least 280", 279)
    refused(folder, "dtype is uint16, but the configuration says uint32", 280, dtype="uint32")
    with pytest.raises(DataError, match=r"eos_id is 0 \('<\|endoftext\|>'\), but the configuration says 7"):
        open_source("test", SourceConfig(str(folder)), 280, eos_id=7)


def test_a_meta_file_that_leads_out_of_its_folder_is_refused(tmp_path):
    folder, _ = prepare_source(tmp_path)
    meta = folder / "meta.json"
    meta.write_text(meta.read_text().replace("tokens-00001.bin", "../tokens-00001.bin"))
    refused(folder, "which is not in the folder", 280)


def test_a_glob_of_folders_and_an_unreadable_file_are_named(tmp_path, monkeypatch):
    (tmp_path / "a1").mkdir()
    with pytest.raises(DataError, match=r"a\*: names the folder .*a1; name raw token files"):
        open_source("s", SourceConfig(str(tmp_path / "a*")), vocab_size=10)
    (tmp_path / "raw.npy").write_bytes(bytes(8))

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root may read everything
    with pytest.raises(DataError, match="raw.npy: cannot be read: Permission denied; "):
        open_source("s", SourceConfig(str(tmp_path / "raw.npy")), vocab_size=10)
