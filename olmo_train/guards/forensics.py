"""Reports on bad steps: the documents, the loss of each sequence, the norm of each gradient.

The figures of a step are small and stay on the device until its flags are read, so a healthy step pays nothing. The documents
are computed again from the step's number.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olmo_train.data.inspect import Row, TextReader, rows_of_step
from olmo_train.data.mixture import Mixture
from olmo_train.errors import reason
from olmo_train.formats import counted
from olmo_train.guards.watchdog import Watchdog
from olmo_train.log.interval import StepStats
from olmo_train.log.version import code_version
from olmo_train.parallel.shard import full_tensor
from olmo_train.parallel.world import World
from olmo_train.storage import commit_folder, remove_folder, temporary_folder, write_file

log = logging.getLogger(__name__)
MOST_FOLDERS = 20  # of a run, so that a diverging run does not fill the disk
MOST_DOCUMENTED = 64  # worst sequences whose documents and texts are looked up, which takes most of the time
DONE = {
    "skip": "its update was skipped on every rank",
    "record": "its update was applied",
    "stop": "the run stopped without saving it",
    "rewind": "the run rewinds to its last checkpoint and passes over this batch, unless guards.max_rewinds is reached",
}
SHOWN_SEQUENCES, SHOWN_DOCUMENTS, SHOWN_CHARACTERS, SHOWN_PARAMETERS = 5, 5, 500, 10  # in README.txt


def folder_of(run_dir: Path, step: int) -> Path:
    """The folder with the forensics of a step."""
    return run_dir / "forensics" / f"step-{step:07d}"


def scored_tokens(mixture: Mixture, step: int) -> list[int]:
    """How many tokens of each sequence of the global batch are scored."""
    batch = mixture.global_batch(step)
    mask = mixture.read_label_mask(batch)
    if mask is None:
        return [mixture.seq_len - mixture.shifted] * len(batch)
    return mask[:, 1:].sum(axis=1, dtype=np.int64).tolist()


class Forensics:
    """Writes run_dir/forensics/step-N. Made and called on every rank; rank 0 writes."""

    def __init__(self, run_dir: Path, mixture: Mixture, world: World, attempt: int, watchdog: Watchdog):
        self.run_dir, self.mixture, self.world, self.attempt, self.watchdog = run_dir, mixture, world, attempt, watchdog
        self._warned = False  # that MOST_FOLDERS is reached

    def write(self, stats: StepStats, why: str, done: str) -> Path | None:
        """Write the folder and return it on every rank; None if it was not written. `why`: skip or spike; `done`: a key of DONE.
        A failure in here is logged and never ends the run."""
        names, norms = stats.norms
        device = torch.cuda.get_device_name(stats.loss.device) if stats.loss.is_cuda else stats.loss.device.type
        about = {"data_rank": self.world.data_rank, "host": socket.gethostname(), "device": device}
        ranks = self.world.gather(about | {"losses": stats.losses.tolist()})
        by_name = dict(zip(names, full_tensor(norms).tolist(), strict=True))
        with self.watchdog.patient("writes forensics"):
            return self.world.on_main(lambda: self._try_to_write(stats, {"why": why, "done": done}, ranks, by_name))

    def _try_to_write(
        self, stats: StepStats, why: dict[str, str], ranks: list[dict[str, Any]], norms: dict[str, float]
    ) -> Path | None:
        folder = folder_of(self.run_dir, stats.step)
        try:
            if not folder.exists() and len(list(folder.parent.glob("step-*"))) >= MOST_FOLDERS:
                if not self._warned:
                    log.warning("%s holds %d steps; no more are written until some are removed", folder.parent, MOST_FOLDERS)
                self._warned = True
                return None
            about = self._about(stats, why, ranks)
            _commit(folder, {
                "step.json": _json(about),
                "gradients.json": _json({"total": about["grad_norm"], "parameters": norms}),
                "README.txt": "\n".join(_readme(about, norms, self.run_dir)) + "\n",
            })  # fmt: skip
            return folder
        except Exception as problem:  # a full disk, missing data: training does not depend on it
            log.warning("forensics of step %d could not be written: %s", stats.step, reason(problem))
            return None

    def _about(self, stats: StepStats, why: dict[str, str], ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """The contents of step.json."""
        parts = {rank["data_rank"]: rank.pop("losses") for rank in ranks}
        losses = [loss for part in range(self.world.data_size) for loss in parts[part]]
        return {
            "step": stats.step,
            **why,
            "loss": stats.loss.item(),
            "grad_norm": stats.grad_norm.item(),
            "learning_rate": stats.lr,
            "attempt": self.attempt,
            "world_size": self.world.size,
            "sample_hash": self.mixture.sample_hash(self.mixture.global_batch(stats.step)),
            "environment": {
                "code_version": code_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "python": platform.python_version(),
                "ranks": ranks,
            },
            "sequences": self._sequences(stats.step, losses),
        }

    def _sequences(self, step: int, losses: list[float]) -> list[dict[str, Any]]:
        """The sequences of the global batch, worst first; the first MOST_DOCUMENTED with their documents."""
        rows = rows_of_step(self.mixture, step, self.world.data_size, documents=False)
        means = [loss / max(scored, 1) for loss, scored in zip(losses, scored_tokens(self.mixture, step), strict=True)]
        order = sorted(range(len(rows)), key=lambda i: (math.isfinite(means[i]), -means[i] if math.isfinite(means[i]) else 0.0))
        texts, sequences = TextReader(self.mixture), []
        for place, i in enumerate(order):
            sequence = asdict(rows[i]) | {"loss": means[i]}
            del sequence["documents"]
            if place < MOST_DOCUMENTED:
                sequence["documents"] = self._documents(rows[i], texts)
            sequences.append(sequence)
        return sequences

    def _documents(self, row: Row, texts: TextReader) -> list[dict[str, Any]]:
        """The part of each document in the row; for raw files without an EOS id, the row as one document."""
        source = self.mixture.sources[self.mixture.names.index(row.source)]
        found = [asdict(document) for document in source.documents(row.start, row.end)]
        found = found or [{"id": None, "origin": ", ".join(map(str, source.files[:3])), "start": row.start, "end": row.end}]
        spans = [replace(row, start=max(row.start, d["start"]), end=min(row.end, d["end"])) for d in found]
        for document, span, text in zip(found, spans, texts.of(spans), strict=True):
            if text is not None:
                document["text"] = text
            else:
                tokens = np.empty(max(span.end - span.start, 0), dtype=np.int64)
                source.read(span.start, tokens)
                document["tokens"] = tokens.tolist()
        return found


def _commit(folder: Path, files: dict[str, str]) -> None:
    """Write the folder and rename it to its final name, replacing an older one of the same step."""
    temporary = temporary_folder(folder)
    try:
        for name, text in files.items():
            write_file(temporary / name, text.encode())
        if folder.exists():
            remove_folder(folder)
        commit_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _json(value: Any) -> str:
    return json.dumps(_without_nan(value), indent=1, ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    """Non-finite numbers, which JSON lacks, as "nan", "inf" and "-inf": here they are the point."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---- README.txt


def _readme(about: dict[str, Any], norms: dict[str, float], run_dir: Path) -> list[str]:
    step, done, ranks = about["step"], about["done"], about["environment"]["ranks"]
    broken = "gradient" if math.isfinite(about["loss"]) else "loss"
    what = "is a spike" if about["why"] == "spike" else f"has a {broken} that is not finite"
    lines = [
        f"Step {step} {what}: {DONE[done]}.",
        "",
        f"loss {about['loss']:.6g}, gradient norm {about['grad_norm']:.6g}, learning rate {about['learning_rate']:.6g}",
        f"attempt {about['attempt']}, {about['world_size']} x {ranks[0]['device']}, torch {about['environment']['torch']}, "
        f"code {about['environment']['code_version'] or 'outside a checkout'}",
        "",
        *_describe_sequences(about["sequences"], ranks),
        "",
        *_describe_norms(norms),
        "",
        "What to do next",
        "  look at the documents above; this shows the whole batch:",
        f"    olmo-train inspect-data {run_dir} --step {step}",
    ]
    if done in ("skip", "record"):
        lines += ["  if its metrics were logged, compute it again to see whether the data or a faulty device is to blame:"]
        lines += [f"    olmo-train replay {run_dir} --step {step}"]
    if done in ("record", "stop"):
        lines += [f"  resume from a checkpoint before it and pass over its batch: guards.skip_steps=[{step}]"]
    return [*lines, "  lower optim.peak_lr, if steps with good documents do the same"]


def _describe_sequences(sequences: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> list[str]:
    broken = sum(not math.isfinite(sequence["loss"]) for sequence in sequences)
    state = f"{broken} of them not finite" if broken else "all of them finite"
    median = sequences[len(sequences) // 2]["loss"]
    lines = [
        f"The sequences with the largest mean loss (nats a token), of {len(sequences)}, {state}, the median {median:.4g}; "
        "step.json has all"
    ]
    for number, sequence in enumerate(sequences[:SHOWN_SEQUENCES], start=1):
        documents = sequence["documents"]
        host = next(rank["host"] for rank in ranks if rank["data_rank"] == sequence["rank"])
        lines.append(
            f"{number:3}. loss {sequence['loss']:.4g}: source {sequence['source']}, instance {sequence['instance']}, epoch "
            f"{sequence['epoch']}, row {sequence['row']}, on rank {sequence['rank']} ({host})"
        )
        for document in documents[:SHOWN_DOCUMENTS]:
            lines += _describe_document(document)
        if len(documents) > SHOWN_DOCUMENTS:
            lines.append(f"     ... and {counted(len(documents) - SHOWN_DOCUMENTS, 'more document')}")
    return lines


def _describe_document(document: dict[str, Any]) -> list[str]:
    name = f"document {document['id']} of" if document["id"] is not None else "tokens of"
    lines = [f"     {name} {document['origin']}, tokens {document['start']:,} to {document['end']:,} of its source"]
    if "text" in document:
        text = " ".join(document["text"].split())
        return [*lines, f"       {text[:SHOWN_CHARACTERS]}{' ...' if len(text) > SHOWN_CHARACTERS else ''}"]
    tokens = document["tokens"]
    return [*lines, f"       token ids {' '.join(map(str, tokens[:50]))}{' ...' if len(tokens) > 50 else ''}"]


def _describe_norms(norms: dict[str, float]) -> list[str]:
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        lines = [f"Gradients that are not finite: {len(broken)} of {counted(len(norms), 'parameter')}; gradients.json has all"]
        shown = broken[:SHOWN_PARAMETERS]
    else:
        lines = [f"The parameters with the largest gradient norms, of {len(norms)}, all of them finite; gradients.json has all"]
        shown = sorted(norms, key=lambda name: -norms[name])[:SHOWN_PARAMETERS]
    lines += [f"  {norms[name]:<10.4g} {name}" for name in shown]
    return lines + (["  ..."] if len(shown) < len(broken) else [])
