"""All that one CUDA GPU is asked, in a few minutes: python tests/benchmarks/gpu.py --output FOLDER

The tests that need a GPU, `olmo-train bench` of OLMo-1B at two sequence lengths, and the same steps through the peers that
are installed. Writes gpu.json and the table gpu.md, as far as it came: a part that fails is told, and the next one begins.

    python tests/benchmarks/gpu.py --at olmo-core=FOLDER       where peers lie in folders of their own
    python tests/benchmarks/gpu.py --tiny                       a rehearsal, on a CPU too
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
OLMO_1B = ROOT / "configs" / "models" / "olmo-1b.yaml"
ROWS = [  # tokens of a sequence, sequences of a micro-batch, activation checkpointing; 65,536 tokens a step
    (2048, 8, "none"),
    (2048, 16, "selective"),
    (4096, 4, "none"),
    (4096, 8, "selective"),
]
TINY = ["model.d_model=64", "model.n_layers=2", "model.n_heads=2", "model.mlp_hidden=128", "parallel.compile=false",
        "model.vocab_size=512", "model.padded_vocab_size=512"]  # fmt: skip
TINY_ROWS = [(64, 2, "selective")]
PEERS = ("plain-compiled", "transformers", "olmo-core", "torchtitan", "litgpt")  # each beside ours: two fit one GPU
PATIENCE = 900  # seconds for each command


def python(*words: object, **environment: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a python of the same environment, in this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "disabled", **environment}
    try:
        out = subprocess.run(
            [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"was still running after {PATIENCE} s"
    return out.returncode, out.stdout, out.stderr


def run_tests(tiny: bool) -> dict:
    """{test: passed, failed, skipped or error}, and the last lines of what pytest said when one failed."""
    rehearsal = {"REHEARSE_ON_CPU": "1"} if tiny else {}
    files = ("tests/test_gpu.py",) if tiny else ("tests/test_gpu.py", "tests/test_speed.py")
    code, said, error = python("-m", "pytest", "-v", "-p", "no:cacheprovider", *files, **rehearsal)
    outcomes = dict(re.findall(r"^tests/\w+\.py::(\S+) (PASSED|FAILED|SKIPPED|ERROR)", said, re.MULTILINE))
    return {"outcomes": outcomes, "said": "" if code == 0 else "\n".join((said + error).splitlines()[-40:])}


def run_bench(row: tuple[int, int, str], tiny: bool) -> dict:
    """The figures of `olmo-train bench` for a row, with the peak memory that the planner tells; or what went wrong."""
    seq_len, micro_batch, checkpointing = row
    batch = max(65_536 // seq_len, micro_batch) if not tiny else 2 * micro_batch
    words = [OLMO_1B, f"model.seq_len={seq_len}", f"global_batch_size={batch}", f"micro_batch_size={micro_batch}",
             f"parallel.activation_checkpointing={checkpointing}", "parallel.compile=true", *(TINY if tiny else [])]  # fmt: skip
    steps = ("--steps", 2, "--warmup", 1) if tiny else ("--steps", 10, "--warmup", 5)
    about = {"seq_len": seq_len, "micro_batch_size": micro_batch, "activation_checkpointing": checkpointing}
    code, said, error = python("-m", "olmo_train", "bench", *words, *steps, "--json")
    if code:
        return about | {"error": (error.splitlines() or ["nothing was said"])[-1]}
    _, plan, _ = python("-m", "olmo_train", "plan", *words, "--json")
    return about | json.loads(said[said.index("{\n") :]) | {"planned_bytes": json.loads(plan)["memory_peak_bytes"]}


def run_peers(work: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """{peer: all figures of peers.py for us and that peer, or what it said}."""
    found = {}
    for peer in ("plain",) if arguments.tiny else PEERS:
        file = folder / f"peers-{work}-{peer}.json"
        ours = "ours" if arguments.tiny else "ours-compiled"
        words = ["--work", work, "--peers", f"{ours},{peer}", "--json", file, "--rounds", 1 if arguments.tiny else 5]
        words += ["--steps", 1, "--warmup", 1] if arguments.tiny else []
        for place in arguments.at:
            words += ["--at", place]
        code, said, error = python("tests/benchmarks/peers.py", *words)
        found[peer] = {"table": said} | (json.loads(file.read_text()) if code == 0 and file.exists() else {"error": error[-500:]})
    return found


def report(results: dict) -> str:
    """All results as Markdown."""
    lines = [f"{results['device']}, torch {results['torch']}, {results['seconds']:.0f} s in all", ""]
    outcomes = results["tests"]["outcomes"]
    lines += [f"Tests: {list(outcomes.values()).count('PASSED')} of {len(outcomes)} passed", ""]
    lines += [f"- {name}: {outcome}" for name, outcome in outcomes.items() if outcome != "PASSED"]
    lines += [results["tests"]["said"], ""] if results["tests"]["said"] else [""]
    lines += [
        "| T | micro-batch | recomputed | tokens/s | MFU | step s | first step s | peak GB | planned GB |",
        "|" + "---|" * 9,
    ]
    for row in results["bench"]:
        start = f"| {row['seq_len']} | {row['micro_batch_size']} | {row['activation_checkpointing']} "
        if "error" in row:
            lines.append(f"{start}| {row['error']} | | | | | |")
            continue
        mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else "unknown"
        memory = f"{row['peak_memory_bytes'] / 1e9:.2f} | {row['planned_bytes'] / 1e9:.2f}"
        seconds = f"{row['step_seconds']:.3f} | {row['first_step_seconds']:.1f}"
        lines.append(f"{start}| {row['tokens_per_second']:,.0f} | {mfu} | {seconds} | {memory} |")
    for work, peers in results["peers"].items():
        for peer, figures in peers.items():
            lines += ["", f"{work}, beside {peer}:", "", figures["table"].strip() or figures.get("error", "")]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-bench"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with a tiny shape, without compiling, on a CPU too")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out")
    parser.add_argument("--at", action="append", default=[], metavar="NAME=FOLDER", help="where a peer lies, as in peers.py")
    arguments = parser.parse_args()
    import torch

    if not (torch.cuda.is_available() or arguments.tiny):
        sys.exit("there is no CUDA GPU here; --tiny rehearses on the CPU")
    started, folder = time.perf_counter(), arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results = {"device": device, "torch": torch.__version__, "tests": run_tests(arguments.tiny), "bench": [], "peers": {}}

    def write() -> None:
        results["seconds"] = time.perf_counter() - started
        (folder / "gpu.json").write_text(json.dumps(results, indent=1))
        (folder / "gpu.md").write_text(report(results))

    write()
    for row in TINY_ROWS if arguments.tiny else ROWS:
        results["bench"].append(run_bench(row, arguments.tiny))
        write()
    for work in () if arguments.no_peers else ("tiny",) if arguments.tiny else ("olmo-1b-2048", "olmo-1b-4096"):
        results["peers"][work] = run_peers(work, folder, arguments)
        write()
    print(report(results))


if __name__ == "__main__":
    main()
