"""Test and measure on one CUDA GPU all that needs one: python tests/benchmarks/gpu.py --output FOLDER --parts PART,PART,...

Made for a machine that is lent for minutes and has no network: Python 3.11 or newer with torch 2.11 or newer, pyarrow,
safetensors, tokenizers, fsspec, rich, matplotlib, PyYAML and pytest. `make gpu-bundle`, where there is a network, puts the other
packages into gpu-bundle/, with the peers; copy the repository there together with that folder, and call in its root:

    PYTHONUNBUFFERED=1 python3 tests/benchmarks/gpu.py --output OUT --seconds 570 --parts bench
    PYTHONUNBUFFERED=1 python3 tests/benchmarks/gpu.py --output OUT --seconds 570 --parts tests,float8 --add gpu.json
    python3 tests/benchmarks/gpu.py --tiny --output OUT           a rehearsal of the parts, on a CPU too

OUT gets two files, gpu.json and gpu.md, written after each part, so that a call that is cut short keeps what it has. A part that
fails is reported, and the next one begins; one that cannot end within --seconds is stopped. --add takes over the parts of
an earlier call's gpu.json. An importable package of the machine itself wins only where gpu-bundle/ has none. A row takes about
a minute and a half, the tests two to five minutes, the peers two minutes each.

Parts, and their order without --parts:
    bench           OLMo-1B at 2048 and 4096 tokens, with 65,536 and 262,144 tokens a step: MFU, parts of a step, memory
    tests           tests/test_gpu.py and tests/test_speed.py; tests:EXPRESSION selects some as pytest -k does
    float8          beside bf16, for OLMo-1B and for layers as wide as OLMo-7B's
    peers           the same steps through other frameworks, one after the other; peers:olmo-1b-4096 for longer sequences
    compile, checkpointing, muon, documents, determinism      what each costs
    cpu             attention on two cores of this machine's processor; cpu:tiny and cpu:small are peers without the GPU, on two
                    cores: a lent machine may have the matrix tiles (AMX) that others lack
    row:TxM:WORD:...  one configuration: T tokens a sequence, M sequences a micro-batch, then keys of WORDS, a number of tokens a
                    step, or key=value words of a configuration, such as row:2048x8:selective:parallel.replicas=1
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import peers  # noqa: E402

BUNDLE = ROOT / "gpu-bundle"  # of `make gpu-bundle`: packages/ for all commands, peers/NAME/ for each peer
MODELS = ROOT / "configs" / "models"
TOKENS = 65_536  # in a step of a row that names no number of tokens
WORDS = {  # of a row: what it changes in the configuration
    "eager": "parallel.compile=false",
    "selective": "parallel.activation_checkpointing=selective",
    "full": "parallel.activation_checkpointing=full",
    "float8": "parallel.float8=true",
    "rowwise": "parallel.float8=rowwise",
    "muon": "optim.name=muon",
    "run": "determinism=run",
    "world": "determinism=world",
    "documents": "data.document_mask=true data.eos_id=7",
    "7b": "model.n_layers=8",  # of OLMo-7B, so that weights and optimizer state fit on one GPU
}
ROWS = {
    "bench": ("2048x8", "4096x4", "2048x8:262144", "4096x4:262144"),
    "float8": ("2048x8:float8", "2048x4:7b", "2048x4:7b:float8", "2048x4:7b:rowwise"),
    "compile": ("2048x8:eager",),
    "checkpointing": ("2048x8:selective", "2048x16:selective", "2048x8:full"),
    "muon": ("2048x8:muon",),
    "documents": ("2048x8:documents",),
    "determinism": ("2048x8:run", "2048x8:eager", "2048x8:eager:world"),
}
ORDER = ("bench", "tests", "float8", "peers", "compile", "checkpointing", "muon", "documents", "determinism", "cpu")
CPU_PEERS = "ours,ours-compiled,plain-compiled,olmo-core,transformers"
PEERS = "ours-compiled,torchtitan,olmo-core,plain-compiled,litgpt,transformers"  # a call that ends early has the first ones
TINY = ["model.d_model=64", "model.n_layers=2", "model.n_heads=2", "model.mlp_hidden=128", "parallel.compile=false",
        "model.vocab_size=512", "model.padded_vocab_size=512"]  # fmt: skip
TINY_ORDER = ("tests", "row:64x2", "row:64x2:selective", "peers", "cpu")
XDIST_LINE = r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|SKIPPED|ERROR) tests/\w+\.py::(\S+)"  # of pytest -v in several processes
LEAST = 20  # seconds: with fewer before the end of --seconds no command is started


class Commands:
    """Runs commands in processes, until a common deadline."""

    def __init__(self, seconds: float):
        self.seconds, self.deadline = seconds, time.monotonic() + seconds

    def python(self, *words: object, **environment: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of a Python of the same environment, in this checkout. 124 and what was printed so far if
        the deadline ends it, with all processes that it started."""
        remaining = self.deadline - time.monotonic() - 5  # to write the results
        if remaining < LEAST:
            return 124, "", f"not started: {remaining:.0f} of {self.seconds:.0f} s remain"
        places = [ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep), BUNDLE / "packages"]
        path = os.pathsep.join(str(place) for place in places if place != "")
        fixed = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "WANDB_MODE": "disabled"}
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, env={**os.environ, **fixed, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            said, error = process.communicate(timeout=remaining)
            return process.returncode, said, error
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, error = process.communicate()
            return 124, said, f"{error}\nstopped: it ran for the remaining {remaining:.0f} of {self.seconds:.0f} s"


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was printed"])[-1]


def run_tests(part: str, commands: Commands, tiny: bool) -> dict:
    """{test: PASSED, FAILED, SKIPPED or ERROR}, pytest's line for each that did not pass, and its last lines if one failed."""
    rehearsal = {"REHEARSE_ON_CPU": "1"} if tiny else {}
    files = ("tests/test_gpu.py",) if tiny else ("tests/test_gpu.py", "tests/test_speed.py")
    chosen = part.partition(":")[2]
    words = ["-v", "-rfEs", "-p", "no:cacheprovider", "--color=no", *(("-k", chosen) if chosen else ())]
    # The models are tiny, so that several share the GPU: what takes time is importing, compiling and starting processes.
    words += ["-n", str(min(8, (os.cpu_count() or 1) // 2))] if importlib.util.find_spec("xdist") and not tiny else []
    code, said, error = commands.python("-m", "pytest", *words, *files, **rehearsal)
    outcomes = dict(re.findall(r"^tests/\w+\.py::(\S+) (PASSED|FAILED|SKIPPED|ERROR)", said, re.MULTILINE))
    outcomes |= {name: outcome for outcome, name in re.findall(XDIST_LINE, said, re.MULTILINE)}
    reasons = re.findall(r"^(?:FAILED|ERROR|SKIPPED) .+", said, re.MULTILINE)
    return {"outcomes": outcomes, "reasons": reasons, "said": "" if code == 0 else "\n".join((said + error).splitlines()[-300:])}


def row_words(row: str) -> list[str]:
    """The configuration of a row TxM:WORD:..., as words of the command line. Raises ValueError."""
    shape, *names = row.split(":")
    if not (match := re.fullmatch(r"(\d+)x(\d+)", shape)):
        raise ValueError(f"row:{row}: begins with TxM, tokens of a sequence and sequences of a micro-batch, such as 2048x8")
    seq_len, micro_batch = map(int, match.groups())
    tokens, words = TOKENS, []
    for name in names:
        if name.isdecimal():
            tokens = int(name)
        elif name in WORDS or "=" in name:
            words += WORDS.get(name, name).split()
        else:
            raise ValueError(f"row:{row}: {name} is none of {', '.join(WORDS)}, no number of tokens and no key=value")
    compiled = [] if {"eager", "world"} & {*names} else ["parallel.compile=true"]
    batch = max(tokens // seq_len // micro_batch, 1) * micro_batch
    return [str(MODELS / ("olmo-7b.yaml" if "7b" in names else "olmo-1b.yaml")), f"model.seq_len={seq_len}",
            f"global_batch_size={batch}", f"micro_batch_size={micro_batch}", *compiled, *words]  # fmt: skip


def run_row(part: str, commands: Commands, tiny: bool) -> dict:
    """The figures of `olmo-train bench` with the peak memory that `plan` computes; or {"error": the last line printed}."""
    words = [*row_words(part.removeprefix("row:")), *(["global_batch_size=4", *TINY] if tiny else [])]
    steps = (2, 1) if tiny else (5, 3) if part.endswith(":262144") else (10, 5)
    code, said, error = commands.python("-m", "olmo_train", "bench", *words, "--steps", steps[0], "--warmup", steps[1], "--json")
    if code:
        return {"error": last_line(error)}
    code, plan, error = commands.python("-m", "olmo_train", "plan", *words, "--json")
    planned = json.loads(plan)["memory_peak_bytes"] if code == 0 else None
    return json.loads(said[said.index("{\n") :]) | {"planned_bytes": planned}


def run_peers(part: str, commands: Commands, tiny: bool) -> dict:
    """What beside_peers returns."""
    work = part.partition(":")[2] or ("rehearsal" if tiny else "olmo-1b-2048")
    return beside_peers(work, PEERS, commands, tiny, "--in-turn")


def beside_peers(work: str, names: str, commands: Commands, tiny: bool, *words: object, **environment: str) -> dict:
    """{"figures": what peers.py found for each contestant, "said": its lines about those that it skipped or could
    not time}."""
    folders = sorted((BUNDLE / "peers").glob("*"))
    names = ",".join(["ours", "plain", *(folder.name for folder in folders)]) if tiny else names
    words = ("--work", work, "--peers", names, *words, *(("--rounds", 1, "--steps", 1, "--warmup", 1) if tiny else ()))
    for folder in folders:
        words += ("--at", f"{folder.name}={folder}")
    with tempfile.TemporaryDirectory() as work_dir:
        file = Path(work_dir) / "peers.json"
        code, said, error = commands.python("tests/benchmarks/peers.py", *words, "--json", file, **environment)
        figures = {"figures": json.loads(file.read_text())} if file.exists() else {}  # written after each round
    found: dict[str, Any] = {"said": re.findall("^(?:.* is skipped: |0 rounds taken; ).*", said, re.MULTILINE)} | figures
    return found if code == 0 else found | {"error": last_line(error)}


def run_cpu(part: str, commands: Commands, tiny: bool) -> dict:
    """`cpu`: {"said": the lines of attention.py}; `cpu:WORK`: what beside_peers returns. On two cores, without the GPU."""
    work, allowed = part.partition(":")[2], os.sched_getaffinity(0)
    cores = sorted(allowed)[:2]
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(len(cores))}
    os.sched_setaffinity(0, cores)  # which the commands inherit
    try:
        if work:
            fewer = ("--steps", 1, "--warmup", 2) if work == "small" else ()  # a step of it takes ten seconds
            return beside_peers(work, CPU_PEERS, commands, tiny, *fewer, **environment)
        words = ["--shape", "1,2,2,64,32", "--rounds", 1] if tiny else []
        code, said, error = commands.python("tests/benchmarks/attention.py", *words, **environment)
    finally:
        os.sched_setaffinity(0, allowed)
    return {"error": last_line(error), "said": []} if code else {"said": ["```", *said.strip().splitlines(), "```"]}


RUNS: dict[str, Callable[[str, Commands, bool], dict]] = {"tests": run_tests, "row": run_row, "peers": run_peers, "cpu": run_cpu}


def expanded(parts: list[str]) -> list[str]:
    """The parts that are run, each once: rows for a group of rows. Raises ValueError for a name that is none."""
    found = []
    for part in parts:
        found += [f"row:{row}" for row in ROWS[part]] if part in ROWS else [part]
    for part in found:
        if (kind := part.partition(":")[0]) not in RUNS:
            raise ValueError(f"--parts: {part} is none of {', '.join(ORDER)} and row:TxM")
        if kind == "row":
            row_words(part.removeprefix("row:"))
    return list(dict.fromkeys(found))


def report_tests(results: dict) -> list[str]:
    outcomes = results["outcomes"]
    lines = [f"{list(outcomes.values()).count('PASSED')} of {len(outcomes)} passed", ""]
    lines += [f"- {name}: {outcome}" for name, outcome in outcomes.items()]
    lines += ["", *results["reasons"]] if results["reasons"] else []
    return [*lines, "", "```", results["said"], "```"] if results["said"] else lines


def base_of(row: str, rows: dict) -> str | None:
    """The row without its last word, with which it is compared; None if that was not measured."""
    base, _, word = row.rpartition(":")
    return base if base in rows and "error" not in rows[base] and not word.isdecimal() and word != "7b" else None


def report_rows(rows: dict[str, dict]) -> list[str]:
    """A table. Speed is also relative to the row without the last word."""
    phases = ("forward", "backward", "clip", "optimizer", "other")
    names = ("row", "tokens/s", "relative", "MFU", "step s", *phases, "first step s", "peak GB", "planned GB")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row, found in rows.items():
        if "error" in found:
            lines.append(f"| {row} | {found['error']} |" + " |" * (len(names) - 2))
            continue
        base = base_of(row, rows)
        cells = [row, f"{found['tokens_per_second']:,.0f}"]
        cells.append(f"{found['tokens_per_second'] / rows[base]['tokens_per_second']:.2f}" if base else "")
        cells += ["unknown" if found["mfu"] is None else f"{found['mfu']:.1%}", f"{found['step_seconds']:.3f}"]
        cells += [f"{found['phase_seconds'][phase]:.4f}" for phase in phases]
        planned = found["planned_bytes"]
        cells += [f"{found['first_step_seconds']:.1f}", f"{found['peak_memory_bytes'] / 1e9:.2f}"]
        lines.append(f"| {' | '.join([*cells, f'{planned / 1e9:.2f}' if planned else ''])} |")
    return lines


def report(results: dict) -> str:
    """All results as Markdown."""
    lines = [f"{results['device']}, torch {results['torch']}, Python {results['python']}, commit {results['commit']}"]
    rows = {part.removeprefix("row:"): found for part, found in results["parts"].items() if part.startswith("row:")}
    if rows:
        lines += ["", "## Rows", "", *report_rows(rows)]
    for part, found in results["parts"].items():
        if part.startswith("row:"):
            continue
        lines += ["", f"## {part}", ""]
        if part.startswith("tests"):
            lines += report_tests(found)
        else:
            measured = {name: row for name, row in found.get("figures", {}).items() if "peak_gb" in row}
            lines += ([peers.table(measured), ""] if measured else []) + found["said"] + [found.get("error", "")]
    return "\n".join(lines).rstrip() + "\n"


def about() -> dict:
    """Device, versions and commit."""
    import torch

    try:
        commit = subprocess.check_output(
            ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], stderr=subprocess.DEVNULL, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    return {"device": device, **versions, "commit": commit.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-bench"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--parts", help="what to run, separated by commas; default: all")
    parser.add_argument("--seconds", type=float, default=3600, help="stop in time to write the results within this time")
    parser.add_argument("--add", type=Path, action="append", default=[], metavar="FILE", help="gpu.json of an earlier call")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with a tiny shape, without compiling, on a CPU too")
    arguments = parser.parse_args()
    commands = Commands(arguments.seconds)
    default = TINY_ORDER if arguments.tiny else ORDER
    try:
        parts = expanded(list(default) if arguments.parts is None else list(filter(None, arguments.parts.split(","))))
    except ValueError as problem:
        sys.exit(f"error: {problem}")
    results = {**about(), "parts": {}}
    if results["device"] == "cpu" and not arguments.tiny and parts:
        sys.exit("error: there is no CUDA GPU here; --tiny rehearses on the CPU")
    for file in arguments.add:
        earlier = json.loads(file.read_text())
        results |= {name: earlier[name] for name in ("device", "torch", "python", "commit")} if not parts else {}
        results["parts"] |= earlier["parts"]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for part in [*parts, None]:
        if part is not None:
            began = time.monotonic()
            print(f"{part} ...", flush=True)
            results["parts"][part] = RUNS[part.partition(":")[0]](part, commands, arguments.tiny)
            results["parts"][part]["seconds"] = round(time.monotonic() - began, 1)
        (arguments.output / "gpu.json").write_text(json.dumps(results, indent=1))
        (arguments.output / "gpu.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
