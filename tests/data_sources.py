"""Tiny texts, tokenizers and prepared sources for the tests of data/."""

import json
import random
from pathlib import Path

from olmo_train.data.prepare.prepare import PrepareOptions, PrepareResult, prepare
from olmo_train.data.tokenizer import save_tokenizer, train_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "his", "über", "naïve", "東京", "1234", ":=", "\n\n\t"]


def texts(n: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 30))) for _ in range(n)]


def write_jsonl(file: Path, n: int, seed: int = 0, ids: bool = True) -> Path:
    rows = [{"text": text, **({"id": f"doc-{i}"} if ids else {})} for i, text in enumerate(texts(n, seed))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_tokenizer(file: Path, vocab_size: int = 280) -> Path:
    save_tokenizer(train_tokenizer(texts(50), vocab_size), file)
    return file


def prepare_source(
    folder: Path, *inputs: Path, name: str = "source", on_note=lambda note: None, **options
) -> tuple[Path, PrepareResult]:
    """Prepare `inputs`, or 60 documents in 3 shards; the tokenizer lies beside them."""
    inputs = inputs or (write_jsonl(folder / f"{name}.jsonl", 60),)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        write_tokenizer(tokenizer)
    options = {"max_shard_tokens": 1000, **options}
    result = prepare(PrepareOptions(tuple(map(str, inputs)), folder / name, str(tokenizer), **options), on_note=on_note)
    return folder / name, result


def flip_bit(file: Path, at: int) -> None:
    """Change the lowest bit of the byte at `at`."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
