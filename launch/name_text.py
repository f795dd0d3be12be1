"""Name the folders of `make train TEXT=...`: prints NAME/HASH for the prepared data, and NAME for the run.

NAME is the name of the text, with a hash of its path unless it is in the working directory. HASH covers the contents of the
text and the share that is held out, so an edited text is prepared into a new folder.

    python launch/name_text.py my-folder 0.05
"""

import hashlib
import re
import sys
from pathlib import Path


def name(text: Path) -> str:
    path = text.resolve()
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    plain = re.sub(r"[^\w.-]+", "-", path.stem if text.is_file() else path.name, flags=re.ASCII)
    short = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:6]
    return plain if str(path) == plain or str(path) == plain + path.suffix else f"{plain}-{short}"


def contents(text: Path, held_out: str) -> str:
    """A hash of all files and their names. Names that begin with a dot are skipped, as in prepare-data."""
    files = [text] if text.is_file() else sorted(file for file in text.rglob("*") if file.is_file())
    digest = hashlib.sha256(held_out.encode())
    for file in files:
        inside = file.relative_to(text)
        if not any(part.startswith(".") for part in inside.parts):
            digest.update(str(inside).encode("utf-8", "surrogateescape") + b"\0")
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:8]


if __name__ == "__main__":
    text, held_out = Path(sys.argv[1]), sys.argv[2]
    try:
        text.stat()
        print(f"{name(text)}/{contents(text, held_out)}", name(text))
    except FileNotFoundError as problem:
        sys.exit(f"error: TEXT={text}: there is no such file or folder: {problem.filename}")
    except OSError as problem:
        sys.exit(f"error: TEXT={text}: {problem.filename}: {problem.strerror}; make it readable, or name another text")
