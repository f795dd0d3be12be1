"""Gather pairs of a long and a short text from Debian: {"id", "source", "prompt", "response"}, one JSON object a line.

Each Debian package has a description of a few sentences (prompt) and a synopsis of a few words (response), both written by its
maintainer. apt fetches them, about 16 MB, into the folder apt/ beside the output; the lists of the system are not changed.
Packages of one source package, such as a library and its headers, have similar descriptions, so all of them are in the same part:

    python launch/gather_pairs.py data/pairs                  train.jsonl, validation.jsonl, test.jsonl: 90, 5 and 5 percent
    python launch/gather_pairs.py data/pairs --most-words 60  without the longer descriptions, about a third
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FEWEST_WORDS = 20  # of a description; a shorter one is hardly longer than its synopsis
PARTS = {"test": 0.05, "validation": 0.10, "train": 1.0}  # name: upper end of its share of the hashes


def fetch(folder: Path) -> tuple[str, str]:
    """The texts of apt's indexes, fetched into `folder`: (packages with their sources, descriptions in English)."""
    (folder / "lists/partial").mkdir(parents=True, exist_ok=True)
    lists, cache = (folder / "lists").resolve(), (folder / "cache").resolve()
    options = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}", "-o", "Acquire::Languages=en"]
    subprocess.run(["apt-get", "-qq", "update", *options], check=True)

    def texts(kind: str) -> str:
        command = ["apt-get", "indextargets", *options, "--format", "$(FILENAME)", f"Created-By: {kind}"]
        files = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
        command = ["/usr/lib/apt/apt-helper", "cat-file", *sorted(filter(None, files))]
        return subprocess.run(command, check=True, capture_output=True).stdout.decode(errors="replace")

    return texts("Packages"), texts("Translations")


def sources_of(packages: str) -> dict[str, str]:
    """{package: its source package}."""
    sources, name = {}, ""
    for line in packages.split("\n"):
        if line.startswith("Package: "):
            name = line[9:]
            sources.setdefault(name, name)
        elif line.startswith("Source: "):
            sources[name] = line.split()[1]
    return sources


def text_of(lines: list[str]) -> str:
    """A description without its markup (Debian policy 5.6.13): " ." is an empty line, and a line that begins with two blanks
    stands alone."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == ".":
            paragraphs.append([])
        elif line.startswith("  "):
            paragraphs += [[line.strip()], []]
        else:
            paragraphs[-1].append(line.strip())
    return "\n".join(" ".join(paragraph) for paragraph in paragraphs if paragraph)


def pairs_of(descriptions: str, most_words: float) -> Iterator[tuple[str, str, str]]:
    """(package, description, synopsis) of each description that has FEWEST_WORDS to most_words and was not seen before."""
    seen = set()
    for stanza in descriptions.split("\n\n"):
        lines = stanza.strip("\n").split("\n")
        at = next((i for i, line in enumerate(lines) if line.startswith("Description-en: ")), None)
        if at is None:
            continue
        name = lines[0].removeprefix("Package: ")
        long = text_of([line for line in lines[at + 1 :] if line.startswith(" ")])
        short = lines[at].removeprefix("Description-en: ").strip()
        if short and FEWEST_WORDS <= len(long.split()) <= most_words and long not in seen:
            seen.add(long)
            yield name, long, short


def share_of(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def part_of(source: str) -> str:
    return next(part for part, end in PARTS.items() if share_of(source) < end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most-words", type=float, default=float("inf"), metavar="N", help="leave out longer descriptions")
    options = parser.parse_args()
    folder = options.folder
    if not shutil.which("apt-get"):
        sys.exit("error: apt-get: not found; gather the pairs on Debian, Ubuntu or in a container of theirs, and copy the folder")
    try:
        packages, descriptions = fetch(folder / "apt")
    except subprocess.CalledProcessError as problem:
        sys.exit(f"error: {' '.join(problem.cmd[:2])}: exit code {problem.returncode}; see its message above")
    sources = sources_of(packages)
    # In an order without meaning, so that the first N records of a file are a sample of it.
    pairs = sorted(pairs_of(descriptions, options.most_words), key=lambda pair: share_of(f"{pair[0]}\n{pair[1]}"))
    records: dict[str, list[dict]] = {part: [] for part in PARTS}
    for name, long, short in pairs:
        source = sources.get(name, name)
        records[part_of(source)].append({"id": name, "source": source, "prompt": long, "response": short})
    if not all(records.values()):
        sys.exit("error: apt-get: its indexes hold no descriptions in English; enable a Debian archive in apt's sources")
    for part, rows in records.items():
        unfinished = folder / f"{part}.unfinished"  # an interrupted run leaves no partial output
        unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(unfinished, folder / f"{part}.jsonl")
        print(f"{folder / part}.jsonl: {len(rows):,} pairs of {len({row['source'] for row in rows}):,} source packages")


if __name__ == "__main__":
    main()
