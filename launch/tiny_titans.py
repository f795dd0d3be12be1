"""Finetune a small model on pairs of prompt and response with several methods, and compare the summaries that they write.

    python launch/tiny_titans.py --base data/tiny-titans/base --data data/tiny-titans --runs runs/tiny-titans

reads train.jsonl, validation.jsonl and test.jsonl of --data. Words that follow go to each training run, such as
parallel.precision=bf16. The same command again continues where it stopped. Every step is a command of olmo-train, which is
printed first; this script only chooses them, and reads the JSON that `evaluate` writes.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml

METHODS = {"lora": "LoRA", "full": "full finetuning", "dora": "DoRA", "lora-plus": "LoRA+"}  # configs/finetune/NAME.yaml: title
CONFIGS = Path(__file__).parent.parent / "configs/finetune"
SCORES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
VALIDATION = 32  # pairs of the loss that is measured during a run


@dataclass(frozen=True)
class Run:
    """A model that is evaluated: `folder` holds evaluation.json, answers.jsonl and, unless it is the base, the training."""

    title: str
    folder: Path

    @property
    def rouge(self) -> dict:
        return json.loads((self.folder / "evaluation.json").read_text("utf-8"))["rouge"]


def olmo_train(*words: object) -> None:
    """Run a command of olmo-train; its error ends this script with its exit code."""
    command = [str(word) for word in words]
    print(f"\n$ olmo-train {shlex.join(command)}", flush=True)
    if code := subprocess.run([sys.executable, "-m", "olmo_train", *command]).returncode:
        sys.exit(code)


def prepare(options: argparse.Namespace, part: str, n: int, name: str) -> Path:
    """The first n pairs of a file as a packed source. Returns its folder."""
    folder = options.data / "prepared" / name
    if not (folder / "meta.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(options.data / f"{part}.jsonl", encoding="utf-8") as lines:
            first = list(islice(lines, n))
        file = folder.with_suffix(".jsonl")
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text("".join(first), encoding="utf-8")
        os.replace(unfinished, file)
        words = ["--tokenizer", options.base / "tokenizer.json", *form(options), "--pack", options.pack, "--cut", "prompt"]
        olmo_train("prepare-data", file, "--output", folder, *words)
    return folder


def form(options: argparse.Namespace) -> list[str]:
    """How a prompt is written, for the base and all runs alike."""
    return ["--template", options.template, *(["--instruction", options.instruction] if options.instruction else [])]


def shape(options: argparse.Namespace) -> Path:
    """A configuration with the base's model alone: a base that is a run has data and a length too."""
    file = options.runs / "model.yaml"
    model = yaml.safe_load((options.base / "config.yaml").read_text("utf-8"))["model"]
    file.write_text(yaml.safe_dump({"model": model}, sort_keys=False), encoding="utf-8")
    return file


def evaluate(run: Run, options: argparse.Namespace, checkpoint: Path | None = None) -> Run:
    if not (run.folder / "evaluation.json").is_file():
        words = ["--rouge", options.data / "test.jsonl", "--limit", options.limit, "--max-new-tokens", options.max_new_tokens]
        words += ["--batch-size", 64]
        files = ["--predictions", run.folder / "answers.jsonl", "--output", run.folder / "evaluation.json"]
        olmo_train("evaluate", checkpoint or run.folder, *words, *(form(options) if checkpoint else []), *files)
    return run


def finetune(method: str, n: int, options: argparse.Namespace) -> Run:
    """Train on the first n pairs, each once, and evaluate."""
    run = Run(f"{METHODS[method]}, {n} pairs", options.runs / f"{method}-{n}")
    if not (run.folder / "evaluation.json").is_file():
        source = prepare(options, "train", n, f"train-{n}")
        files = [shape(options), CONFIGS / "tiny-titans.yaml", CONFIGS / f"{method}.yaml"]
        words = [f"run_dir={run.folder}", f"init_from={options.base}", f"data.sources.pairs.path={source}"]
        words += [f"data.validation.pairs.path={options.data / 'prepared/validation'}", f"model.seq_len={options.pack}"]
        olmo_train("train", *files, *words, *options.words)
    return evaluate(run, options)


def table(runs: Sequence[Run]) -> str:
    """A Markdown table: F1 in percent, with 95% intervals by bootstrap over the test pairs."""

    def row(title: str, scores: dict, words: float, ended: str) -> str:
        cells = (f"{100 * scores[s]['f1']:.2f} ({100 * scores[s]['low']:.2f} to {100 * scores[s]['high']:.2f})" for s in SCORES)
        return f"| {' | '.join((title, *cells, f'{words:.1f}', ended))} |"

    results = [(run.title, run.rouge) for run in runs]
    base = results[0][1]  # the lead sentences are the same for all
    head = (f"{base['examples']} test pairs", *SCORES.values(), "words", "ended by itself")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows += [row("lead-1, the first sentence", base["lead_1"], base["words"]["lead_1"], "")]
    rows += [row(title, r["scores"], r["words"]["prediction"], f"{100 * r['ended']:.1f}%") for title, r in results]
    return "\n".join(rows)


def side_by_side(runs: Sequence[Run], n: int = 4) -> str:
    """Some test pairs, evenly spread, with what each model wrote."""
    answers = {run.title: read_lines(run.folder / "answers.jsonl") for run in runs}
    first = next(iter(answers.values()))
    blocks = []
    for i in (len(first) * k // n for k in range(n)):
        texts = {"reference": first[i]["reference"]} | {title: rows[i]["prediction"] for title, rows in answers.items()}
        lines = [f"- {name}: {' '.join(text.split())}" for name, text in texts.items()]
        blocks.append("\n".join([first[i]["prompt"], "", *lines]))
    return "\n\n".join(blocks)


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def report(runs: Iterable[Run], options: argparse.Namespace) -> None:
    """report.md, and the curves of the trained runs as a page and a figure."""
    runs = list(runs)
    text = f"{table(runs)}\n\n{side_by_side(runs)}\n"
    (options.runs / "report.md").write_text(text, encoding="utf-8")
    trained = [run for run in runs if (run.folder / "metrics.jsonl").is_file()]
    labels = [word for run in trained for word in ("--label", run.title)]
    for name in ("curves.html", "curves.png"):
        olmo_train("curves", *(run.folder for run in trained), *labels, "--output", options.runs / name)
    print(f"\n{text}\n{options.runs} has report.md, curves.html and curves.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint folder with a tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="folder of train.jsonl, validation.jsonl and test.jsonl")
    parser.add_argument("--runs", type=Path, required=True, help="folder to write the runs and the report in")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--examples", type=int, default=320, help="pairs that each method is trained on")
    parser.add_argument("--more", type=int, default=800, help="pairs that the best method is then trained on; 0: none")
    parser.add_argument("--limit", type=int, default=500, help="test pairs")
    parser.add_argument("--template", default="chatml", help="as in prepare-data")
    parser.add_argument("--instruction", default="Summarize in at most ten words.", help="as in prepare-data")
    parser.add_argument("--pack", type=int, default=256, help="tokens of a training window")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="of a summary")
    options, options.words = parser.parse_known_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    prepare(options, "validation", VALIDATION, "validation")
    base = evaluate(Run("the base, without finetuning", options.runs / "base"), options, options.base)
    tuned = [finetune(method, options.examples, options) for method in options.methods]
    if options.more:
        best = max(range(len(tuned)), key=lambda i: tuned[i].rouge["scores"]["rougeL"]["f1"])
        tuned.append(finetune(options.methods[best], options.more, options))
    report([base, *tuned], options)


if __name__ == "__main__":
    main()
