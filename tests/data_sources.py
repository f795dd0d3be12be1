"""Texts, tokenizers and prepared sources for the tests of data/, and pairs to finetune on."""

import ast
import hashlib
import json
import random
import sysconfig
from pathlib import Path

from olmo_train.data.prepare.prepare import PrepareOptions, PrepareResult, prepare
from olmo_train.data.tokenizer import save_tokenizer, train_tokenizer

# Modules of Python's library that have many docstrings, and whose own docstring begins with what the module is for.
MODULES = ["_pydecimal", "_pyio", "configparser", "difflib", "doctest", "email/message", "http/cookiejar", "inspect", "ipaddress",
           "logging/__init__", "mailbox", "shutil", "smtplib", "tarfile", "threading", "typing",
           "xml/etree/ElementTree"]  # fmt: skip
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


def library_pairs(words: int = 25) -> list[tuple[str, str]]:
    """(at most `words` words of a docstring, what its module is for), from Python's library, shuffled: real text without a
    network. The second text stands in the docstring of the module alone, so a model must know which module the first is from."""
    found = {}
    for name in MODULES:
        tree = ast.parse((Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_bytes())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        about, *texts = (ast.get_docstring(node) or "" for node in nodes)
        summary = " ".join(about.split("\n\n")[0].split())
        for text in map(str.split, texts):
            found |= {" ".join(text[i : i + words]): summary for i in range(0, len(text) - 9, words)}
    return sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def flip_bit(file: Path, at: int) -> None:
    """Change the lowest bit of the byte at `at`."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
