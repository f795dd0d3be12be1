"""prepare-data: turn text files into a source folder.

The output depends only on the inputs, the tokenizer and the options (together: the recipe), not on the number of workers or
interruptions. OUTPUT/.unfinished holds the state from which an interrupted run of the same recipe continues. A finished folder
has a meta.json and no .unfinished.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

from olmo_train.data.meta import META_FILE, PREPARE_AGAIN, Meta, hash_blocks, read_meta, write_json
from olmo_train.data.prepare.chunks import Chunk, Skipped, Unit
from olmo_train.data.prepare.inputs import WORK_FOLDER, find_units
from olmo_train.data.prepare.readers import Tail, chunks, records
from olmo_train.data.prepare.tokenize import HARMLESS, NO_TEXT, ChunkResult, Encoding, count_left_out, tokenize_chunks
from olmo_train.data.prepare.tokenized import Tokenized
from olmo_train.data.prepare.writer import SourceWriter, WriterState
from olmo_train.data.shards import check_prepared
from olmo_train.data.templates import ChatFormat, open_format
from olmo_train.data.tokenizer import Tokenizer, load_tokenizer
from olmo_train.errors import ConfigError, DataError, UserError, check_choice
from olmo_train.formats import counted
from olmo_train.storage import lock

VALIDATION = "validation"  # folder of the held-out documents, inside the output
SAVE_SECONDS = 10.0  # between saves; the most work that a kill costs
SAVE_ROWS = 2**17  # most documents with rows in memory
LATER = ("template", "instruction", "pack", "cut")  # keys of the recipe that earlier versions did not have: null
NAMED = 20  # most skipped records that meta.json and the console name; the others are only counted


@dataclass(frozen=True)
class PrepareOptions:
    """The arguments of prepare-data."""

    inputs: tuple[str, ...]
    output: Path
    tokenizer: str  # a tokenizer.json or the name of an OLMo tokenizer
    eos: str | None = None  # the token that ends a document; null: as load_tokenizer finds it
    text_field: str = "text"
    workers: int = 1
    max_shard_tokens: int = 2**28  # 512 MiB as uint16
    validation_fraction: float | None = None  # of the documents; null: none is held out
    on_error: str = "skip"  # skip a corrupt record, or stop at the first one
    template: str | None = None  # a row of TEMPLATES, for instructions and chats
    instruction: str | None = None  # text before the first message of the user; needs a template
    pack: int | None = None  # tokens of a window, which no document crosses; null: documents follow one another
    cut: str | None = None  # prompt: the prompts of documents longer than a window are cut

    def __post_init__(self) -> None:
        check_choice("--on-error", self.on_error, ("skip", "stop"))
        for name in ("workers", "max_shard_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}", f"must be at least 1, got {getattr(self, name)}")
        fraction = self.validation_fraction
        if fraction is not None and not 0 < fraction <= 0.5:
            raise ConfigError("--validation-fraction", f"must be above 0 and at most 0.5, got {fraction}")
        self._check_template()

    def _check_template(self) -> None:
        if self.pack is not None and self.pack < 8:
            raise ConfigError("--pack", f"must be at least 8 tokens, got {self.pack}; use the model.seq_len of the run")
        if self.cut is not None:
            check_choice("--cut", self.cut, ("prompt",))
        needed = {"--cut": "which says what the prompt is", "--instruction": "which puts it before the prompt"}
        for option, why in needed.items():
            if getattr(self, option[2:]) is not None and self.template is None:
                raise ConfigError(option, f"needs --template, {why}; add --template plain, or another one")
        if self.cut is not None and self.pack is None:
            raise ConfigError("--cut", "needs --pack, the tokens of a window that a document must fit in; add --pack N")

    def encoding(self, tail: Tail | None) -> Encoding:
        """How records become documents; `tail`: the one that becomes two."""
        return Encoding(self.text_field, self.template, self.instruction, self.pack, self.cut, tail)

    @property
    def hold_out_every(self) -> int | None:
        """N, if every N-th document is held out."""
        return None if self.validation_fraction is None else round(1 / self.validation_fraction)


@dataclass(frozen=True)
class Progress:
    """How far the work is, for a progress bar."""

    input_bytes: int  # done, of total_bytes
    total_bytes: int
    tokens: int
    resumed_tokens: int  # of `tokens`, those of an earlier run


@dataclass(frozen=True)
class PrepareResult:
    """The finished folders."""

    meta: Meta
    validation: Meta | None
    already_finished: bool = False


@dataclass
class _State:
    """What a restart needs, stored as JSON in the work folder."""

    recipe: dict
    unit: int = 0  # (unit, chunk): the next chunk
    chunk: int = 0
    input_bytes: int = 0
    documents: int = 0  # held-out ones included
    left_out: dict = field(default_factory=dict)  # reason: {"records": n, "bytes": n}
    cut_prompts: int = 0
    first: list = field(default_factory=list)  # the first corrupt records: {"where", "why"}
    train: WriterState = field(default_factory=WriterState)
    validation: WriterState = field(default_factory=WriterState)


def prepare(
    options: PrepareOptions,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> PrepareResult:
    """Tokenize the inputs into the output folder, continuing an interrupted run of the same recipe.

    `on_note` is called with a line for each skipped record, up to NAMED, and for files that are not read.
    Raises ConfigError for wrong options or an output with another recipe, and DataError for inputs without documents or, with
    on_error 'stop', for the first corrupt record; after a DataError the output folder is as before.
    """
    chat = None
    if options.template is None:
        tokenizer = load_tokenizer(options.tokenizer, eos=options.eos)
    else:
        chat = open_format(options.template, options.tokenizer, options.eos, options.instruction)
        tokenizer = chat.tokenizer
    unread: dict[str, dict[str, int]] = {}  # files of the inputs that are not opened: {reason: {"records": files, "bytes": n}}

    def on_left_out(skipped: Skipped) -> None:
        if skipped.records:
            count_left_out(unread, skipped.reason, skipped.records, skipped.size)
        if skipped.detail:
            on_note(f"{skipped.where}: {skipped.why}")

    units = find_units(list(options.inputs), on_left_out)
    recipe = _recipe(options, tokenizer, units)
    output = options.output
    if (output / META_FILE).exists():
        meta = read_meta(output)
        _same_recipe(output, meta.recipe, recipe)
        shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)
        check_prepared(output, meta)
        held_out = None
        if options.hold_out_every:
            if not (output / VALIDATION / META_FILE).exists():
                raise DataError(output / VALIDATION / META_FILE, f"is missing; {PREPARE_AGAIN}")
            held_out = read_meta(output / VALIDATION)
            check_prepared(output / VALIDATION, held_out)
        return PrepareResult(meta, held_out, already_finished=True)
    existed = output.exists()
    with _locked(output) as work:
        tail = _tail(options, units, on_note)
        run = _Run(options, tokenizer, chat, units, unread, _load_state(output, work, recipe), work, on_note, tail)
        try:
            meta, held_out = run.run(on_progress)
        except UserError:
            run.discard()
            if not existed:
                shutil.rmtree(output)
            raise
        except OSError as problem:  # most often a full disk; what was saved stays
            raise DataError(problem.filename or output, f"{problem.strerror}; the same command continues from here") from problem
        finally:
            run.close()
        shutil.rmtree(work)
    return PrepareResult(meta, held_out)


class _Run:
    """One run, from the state that it finds to the finished folder."""

    def __init__(self, options, tokenizer, chat: ChatFormat | None, units, unread, state, work, on_note, tail):
        self.options, self.tokenizer, self.units, self.state, self.work = options, tokenizer, units, state, work
        self.unread, self.on_note, self.tail = unread, on_note, tail
        most, output, self.every = options.max_shard_tokens, options.output, options.hold_out_every
        layout = {"pack": options.pack, "template": chat and chat.record()}
        self.train = SourceWriter(output, work / "train", tokenizer, most, state.train, **layout)
        self.writers = [self.train]
        if self.every:
            self.held_out = SourceWriter(output / VALIDATION, work / VALIDATION, tokenizer, most, state.validation, **layout)
            self.writers.insert(0, self.held_out)  # the output folder itself is finished last

    def run(self, on_progress: Callable[[Progress], None]) -> tuple[Meta, Meta | None]:
        """Process the remaining chunks and finish the folders; returns their meta.json, the second of the held-out documents."""
        state, saved = self.state, time.monotonic()
        if state.first and self.options.on_error == "stop":
            raise DataError(state.first[0]["where"], state.first[0]["why"])
        total_bytes, resumed_tokens = sum(unit.size for unit in self.units), self._n_tokens()
        places: deque[tuple[int, int]] = deque()
        how, workers = self.options.encoding(self.tail), self.options.workers
        for result in tokenize_chunks(self._chunks(places), self.tokenizer, how, workers):
            self._take(result)
            state.unit, state.chunk = places.popleft()
            on_progress(Progress(state.input_bytes, total_bytes, self._n_tokens(), resumed_tokens))
            rows = sum(writer.unsaved_rows for writer in self.writers)
            if time.monotonic() - saved > SAVE_SECONDS or rows > SAVE_ROWS:
                self._save()
                saved = time.monotonic()
        for writer in self.writers:
            writer.end()
        on_progress(Progress(state.input_bytes, total_bytes, self._n_tokens(), resumed_tokens))  # with the last open windows
        self._save()
        self._refuse_nothing()
        account = self._account()
        corrupt = sum(n["records"] for reason, n in state.left_out.items() if reason not in HARMLESS)
        empty = state.left_out.get(NO_TEXT, {"records": 0})["records"]
        skipped = {"records": corrupt, "empty": empty, "first": state.first}
        metas = [writer.finish(skipped, account, state.recipe) for writer in self.writers]
        return metas[-1], metas[0] if self.every else None

    def _n_tokens(self) -> int:
        return sum(writer.n_tokens for writer in self.writers)

    def _chunks(self, places: deque[tuple[int, int]]) -> Iterator[Chunk]:
        """The remaining chunks; for each, the (unit, chunk) after it is appended to `places`."""
        for unit in range(self.state.unit, len(self.units)):
            skip = self.state.chunk if unit == self.state.unit else 0
            for number, chunk in enumerate(chunks(self.units[unit], self.options.text_field)):
                if number >= skip:
                    places.append((unit, number + 1))
                    yield chunk

    def _take(self, result: ChunkResult) -> None:
        state = self.state
        for skipped in result.skipped:
            if self.options.on_error == "stop" and skipped.reason not in HARMLESS:
                raise DataError(skipped.where, f"{skipped.why}; correct it, or leave it out with --on-error skip")
            if len(state.first) < NAMED:
                state.first.append({"where": skipped.where, "why": skipped.why})
                self.on_note(f"{skipped.where}: {skipped.why}; left out")
        for reason, n in result.left_out.items():
            count_left_out(state.left_out, reason, **n)
        state.input_bytes += result.input_bytes
        state.cut_prompts += result.cut_prompts
        self._write(result.documents)
        state.documents += len(result.documents)

    def _write(self, documents: Tokenized) -> None:
        """Hold out the last of every `every` documents of the whole input, or a tail, which follows the rest of its document."""
        if self.every is None:
            self.train.add(documents)
            return
        low, n = 0, len(documents)
        if self.tail:
            places = list(zip(documents.origins, documents.records, strict=True))
            end = n - (places[-1:] == places[-2:-1] != [])
            self.train.add(documents.part(0, end))
            self.held_out.add(documents.part(end, n))
            return
        for held in range((self.every - 1 - self.state.documents) % self.every, n, self.every):
            self.train.add(documents.part(low, held))
            self.held_out.add(documents.part(held, held + 1))
            low = held + 1
        self.train.add(documents.part(low, n))

    def _refuse_nothing(self) -> None:
        state = self.state
        if not state.documents:
            records = sum(n["records"] for n in state.left_out.values())
            why = f"{state.first[0]['where']}: {state.first[0]['why']}" if state.first else "name a file or folder with text"
            skipped = f"{counted(records, 'record')} skipped"
            raise DataError(" ".join(self.options.inputs), f"contains no documents ({skipped}); {why}")
        if self.every and not self.held_out.state.documents:
            fraction = self.options.validation_fraction
            raised = f"raise it to {math.ceil(1000 / state.documents) / 1000:g} or " * (state.documents > 1)
            what = f"{fraction} holds out one document in {self.every}, of {state.documents}; {raised}leave it out"
            raise DataError("--validation-fraction", what)

    def _account(self) -> dict:
        """Where every byte and record of the input went. Bytes are those of the files on disk, compressed or not."""
        state, recipe = self.state, self.state.recipe
        assert state.input_bytes == recipe["input_bytes"], (state.input_bytes, recipe["input_bytes"])
        assert state.documents == sum(writer.state.documents for writer in self.writers), state.documents
        left_out = {reason: dict(n) for reason, n in state.left_out.items()}
        for reason, n in self.unread.items():
            count_left_out(left_out, reason, **n)
        records, bytes = (sum(n[key] for n in left_out.values()) for key in ("records", "bytes"))
        unread_files, unread_bytes = (sum(n[key] for n in self.unread.values()) for key in ("records", "bytes"))
        read = {"files": recipe["input_files"] + unread_files, "bytes": state.input_bytes + unread_bytes}
        written = {"documents": state.documents, "bytes": read["bytes"] - bytes, "tokens": self._n_tokens()}
        account = {"in": {**read, "records": state.documents + records}, "out": written, "left_out": left_out}
        return account | ({"cut_prompts": state.cut_prompts} if self.options.cut else {})

    def _save(self) -> None:
        for writer in self.writers:
            writer.save()
        write_json(self.work / "state.json", asdict(self.state))

    def discard(self) -> None:
        """Delete everything that was written."""
        self.close()
        for folder in {writer.folder for writer in self.writers}:
            for pattern in ("tokens-*.bin", "labels-*.bin", "documents.*", "tokenizer.json", META_FILE):
                for file in folder.glob(pattern):
                    file.unlink()
        if self.every:
            self.held_out.folder.rmdir()
        shutil.rmtree(self.work)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def _tail(options: PrepareOptions, units: list[Unit], on_note: Callable[[str], None]) -> Tail | None:
    """The end of the last document, to be held out where there are too few documents to hold out one in `hold_out_every`."""
    if not options.hold_out_every or options.template:
        return None
    lengths: dict[str, int] = {}  # characters of each document, by its place
    last = None
    pieces = chain.from_iterable(chunks(unit, options.text_field) for unit in units)
    for record in chain.from_iterable(records(chunk, options.text_field) for chunk in pieces):
        if not isinstance(record, Skipped) and (length := sum(len(text) for text, _ in record.segments)):
            if record.place in lengths or len(lengths) + 1 == options.hold_out_every:  # a file that is named twice is not cut
                return None
            lengths[record.place], last = length, record
    if last is None or len(last.segments) > 1:  # `cut` does not cut a conversation
        return None
    share = min(0.5, options.validation_fraction * sum(lengths.values()) / lengths[last.place])
    on_note(f"{last.place}: its last {share:.0%} is held out, as there are fewer than {options.hold_out_every} documents")
    return Tail(last.place, share)


def _recipe(options: PrepareOptions, tokenizer: Tokenizer, units: list[Unit]) -> dict:
    """All that the output depends on. Contents of large inputs are compared by blocks."""
    digest, files, size = hashlib.sha256(), 0, 0
    for unit in units:
        for path, origin in zip(unit.files, unit.origins, strict=True):
            digest.update(json.dumps([unit.format, origin, path.stat().st_size, hash_blocks(path)]).encode())
        files, size = files + len(unit.files), size + unit.size
    return {
        "inputs": list(options.inputs),
        "input_files": files,
        "input_bytes": size,
        "input_sha256": digest.hexdigest(),
        "tokenizer_sha256": tokenizer.sha256,
        "eos_text": tokenizer.eos_text,
        "text_field": options.text_field,
        "max_shard_tokens": options.max_shard_tokens,
        "validation_fraction": options.validation_fraction,
        **{key: getattr(options, key) for key in LATER},
    }


def _same_recipe(output: Path, before: dict, now: dict) -> None:
    for key in now:
        if before.get(key, None if key in LATER else now[key]) != now[key]:  # an earlier version may not have stored it
            was, is_now = (reprlib.repr(recipe.get(key)) for recipe in (before, now))
            raise ConfigError(output, f"was prepared with {key} {was}, now it is {is_now}; choose another --output")


def _load_state(output: Path, work: Path, recipe: dict) -> _State:
    file = work / "state.json"
    if file.exists():
        values = json.loads(file.read_bytes())
        _same_recipe(output, values["recipe"], recipe)
        if "left_out" not in values:
            raise ConfigError(output, "holds the unfinished work of an older version; remove it, or choose another --output")
        train, validation = WriterState(**values.pop("train")), WriterState(**values.pop("validation"))
        return _State(**values, train=train, validation=validation)
    others = [path.name for path in output.iterdir() if path != work]
    if others:
        shutil.rmtree(work)
        raise ConfigError(output, f"holds other files ({sorted(others)[0]}); choose an empty --output")
    state = _State(recipe)
    write_json(file, asdict(state))
    return state


@contextmanager
def _locked(output: Path) -> Iterator[Path]:
    """The work folder, locked for this process."""
    work = output / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)

    def in_use(holder: str) -> ConfigError:
        return ConfigError(output, f"is being written by {holder}; wait for it, or choose another --output")

    with lock(work / "lock", in_use):
        yield work
