"""The same training steps through this project and through others, side by side: python tests/benchmarks/peers.py --help

Every contestant is a separate process with separate packages. In each round each of them takes the same number of steps
while all others wait, in another order; a round has one ratio for each pair, and the table has the median over rounds.
A contestant that is not installed is skipped with a message.

    pip install --no-deps --target FOLDER ai2-olmo-core==3.0.0       and what its import asks for; the same for torchtitan, litgpt
    python tests/benchmarks/peers.py --work tiny --at olmo-core=FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

ROOT = Path(__file__).parents[2]
MARK = "[peers] "  # begins each line of a contestant for us; its other lines are ignored
# The allocator's settings that this project makes by itself, as glibc reads them, and huge pages.
TUNED = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000:glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1"

# d_model, layers, heads, SwiGLU's hidden width, tokens of a sequence, sequences of a step and of a micro-batch
WORK = {
    "rehearsal": SimpleNamespace(d=64, layers=2, heads=2, hidden=192, vocab=512, T=64, batch=4, micro=2),
    "tiny": SimpleNamespace(d=256, layers=8, heads=8, hidden=704, vocab=50304, T=512, batch=8, micro=4),
    "small": SimpleNamespace(d=768, layers=12, heads=12, hidden=2048, vocab=50304, T=1024, batch=8, micro=2),
    "smollm2": SimpleNamespace(  # SmolLM2-135M, for this project alone: the others' models lack its grouped heads and tied head
        d=576,
        layers=30,
        heads=9,
        hidden=1536,
        vocab=49152,
        T=512,
        batch=4,
        micro=4,
        words=("model.n_kv_heads=3", "model.norm=rms_norm", "model.tie_embeddings=true", "parallel.precision=fp32"),
    ),
    "olmo-1b-2048": SimpleNamespace(d=2048, layers=16, heads=16, hidden=8192, vocab=50304, T=2048, batch=32, micro=4),
    "olmo-1b-4096": SimpleNamespace(d=2048, layers=16, heads=16, hidden=8192, vocab=50304, T=4096, batch=16, micro=2),
}

OTHERS = 0.05  # of a core: a round in which other processes took more is not counted

Step = Callable[[], object]  # one optimizer update on one batch


def our_run(work: SimpleNamespace, folder: Path, *words: str):
    """The command line's own loop, with guard, logging and clipping: yields after each step."""
    import olmo_train.config  # noqa: F401, before torch
    from olmo_train.tools import bench

    folder.mkdir(exist_ok=True)
    shape = [f"model.d_model={work.d}", f"model.n_layers={work.layers}", f"model.n_heads={work.heads}",
             f"model.mlp_hidden={work.hidden}", f"model.vocab_size={work.vocab}", f"model.padded_vocab_size={work.vocab}",
             f"model.seq_len={work.T}", f"global_batch_size={work.batch}", f"micro_batch_size={work.micro}",
             "optim.warmup_steps=10", "parallel.precision=bf16", "parallel.compile=false",
             *getattr(work, "words", ()), *words]  # fmt: skip
    from olmo_train.train import train

    return train(bench.load([], shape, folder))


def ours(work: SimpleNamespace, folder: Path, *words: str) -> Step:
    run = our_run(work, folder, *words)
    return lambda: next(run)


def train_base(work: SimpleNamespace, folder: Path) -> None:
    for _ in our_run(work, folder, "total_steps=1"):
        pass


def adapted(work: SimpleNamespace, folder: Path, kind: str) -> Step:
    """Our loop with adapters beside the weights of a run of one step."""
    base = folder / "base"
    # In another process, so that the peak memory is that of the adapters' run.
    making = multiprocessing.get_context("spawn").Process(target=train_base, args=(work, base))
    making.start()
    making.join()
    if making.exitcode:
        raise SystemExit(f"the base could not be trained: exit code {making.exitcode}")
    return ours(work, folder, f"adapter.kind={kind}", f"init_from={base / 'run'}")


def batches(work: SimpleNamespace, device: str):
    """Endless (input_ids, labels) of random tokens, each (micro, T)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(work.vocab, (work.micro, work.T + 1), generator=generator).to(device)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loop(model, loss_of: Callable, work: SimpleNamespace) -> Step:
    """A plain loop: autocast, accumulation, clipping, torch's fused AdamW, and the loss read once a step."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, data, count = model.to(device), batches(work, device), work.batch // work.micro
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        total = 0.0
        for _ in range(count):
            input_ids, labels = next(data)
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = loss_of(model, input_ids, labels) / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step


def plain(work: SimpleNamespace, folder: Path, compiled: bool = False) -> Step:
    """What one writes by hand: a model of seventy lines and a loop of fifteen."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(work.d, 3 * work.d, bias=False), nn.Linear(work.d, work.d, bias=False)
            self.w1, self.w2 = nn.Linear(work.d, 2 * work.hidden, bias=False), nn.Linear(work.hidden, work.d, bias=False)

        def forward(self, x, cos, sin):
            B, T, C = x.shape
            q, k, v = (y.view(B, T, work.heads, -1).transpose(1, 2) for y in self.qkv(F.layer_norm(x, (C,))).split(C, -1))
            q, k = (torch.cat((-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]), -1) * sin + y * cos for y in (q, k))
            q, k = q.to(v.dtype), k.to(v.dtype)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
            gate, up = self.w1(F.layer_norm(x, (C,))).chunk(2, -1)
            return x + self.w2(F.silu(gate) * up)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(work.vocab, work.d), nn.Linear(work.d, work.vocab, bias=False)
            self.blocks = nn.ModuleList(Block() for _ in range(work.layers))
            nn.init.normal_(self.embed.weight, std=0.02)
            half = work.d // work.heads // 2
            angles = torch.outer(torch.arange(work.T), 10_000 ** (-torch.arange(half) / half)).repeat(1, 2)
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

        def forward(self, input_ids, labels):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            logits = self.head(F.layer_norm(x, (work.d,)))
            return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    model = Model()
    return loop(torch.compile(model) if compiled else model, lambda model, ids, labels: model(ids, labels), work)


def transformers(work: SimpleNamespace, folder: Path) -> Step:
    """The OLMo of transformers, with SDPA, in a plain loop."""
    import torch.nn.functional as F
    from transformers import OlmoConfig, OlmoForCausalLM

    config = OlmoConfig(vocab_size=work.vocab, hidden_size=work.d, intermediate_size=work.hidden, num_hidden_layers=work.layers,
                        num_attention_heads=work.heads, max_position_embeddings=work.T, use_cache=False)  # fmt: skip
    model = OlmoForCausalLM._from_config(config, attn_implementation="sdpa")

    def loss_of(model, input_ids, labels):
        logits = model(input_ids).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return loop(model, loss_of, work)


def stand_in(package: str, modules: dict[str, dict]) -> None:
    """If the package is not installed, make `import` find these modules: {name: contents}. A contestant imports them, and what
    is measured does not use them."""
    if importlib.util.find_spec(package) is None:
        for name, contents in modules.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(contents)


def olmo_core(work: SimpleNamespace, folder: Path) -> Step:
    """OLMo-core's own train module: its accumulation, loss, clipping and optimizer; on a GPU compiled, as its scripts do."""
    import torch

    client = type("Client", (), {"recoverable_errors": ()})  # of remote files
    clients = {"S3Client": client, "SchemeClient": client, "add_scheme_client": lambda *_: None}
    stand_in("cached_path", {"cached_path": {"cached_path": None}, "cached_path.schemes": clients})
    from olmo_core.config import DType
    from olmo_core.nn.layer_norm import LayerNormConfig
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import AdamWConfig
    from olmo_core.train.train_module import TransformerTrainModule

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    config = TransformerConfig.llama_like(d_model=work.d, vocab_size=work.vocab, n_layers=work.layers, n_heads=work.heads,
                                          rope_theta=10_000, hidden_size_multiple_of=1)  # fmt: skip
    config.block.feed_forward.hidden_size = work.hidden
    norm = LayerNormConfig(name="default", elementwise_affine=False, bias=False, eps=1e-5)
    config.block.layer_norm = config.lm_head.layer_norm = norm
    model = config.build(init_device="cpu")
    module = TransformerTrainModule(model, AdamWConfig(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
                                    rank_microbatch_size=work.micro * work.T, max_sequence_length=work.T, max_grad_norm=1.0,
                                    autocast_precision=DType.bfloat16.as_pt(), device=device, compile_model=on_gpu)  # fmt: skip
    model.init_weights(max_seq_len=work.T, max_local_microbatch_size=work.micro * work.T, device=device)
    module._trainer = SimpleNamespace(record_metric=lambda *a, **k: None, record_ce_loss=lambda *a, **k: None, global_step=1)
    data = batches(SimpleNamespace(**{**vars(work), "micro": work.batch}), str(device))

    def step() -> None:
        input_ids, _ = next(data)
        module.zero_grads()
        module.train_batch({"input_ids": input_ids})
        module.optim_step()

    return step


def litgpt(work: SimpleNamespace, folder: Path) -> Step:
    """litgpt's model and its chunked loss, compiled, as its pretraining script does."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = Config(name="peer", block_size=work.T, vocab_size=work.vocab, padded_vocab_size=work.vocab, n_layer=work.layers,
                    n_head=work.heads, n_embd=work.d, rotary_percentage=1.0, parallel_residual=False, bias=False,
                    norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=work.hidden)  # fmt: skip
    model = torch.compile(GPT(config))
    return loop(model, lambda model, ids, labels: chunked_cross_entropy(model(ids), labels, chunk_size=0), work)


def torchtitan(work: SimpleNamespace, folder: Path) -> Step:
    """The trainer of torchtitan 0.2.2, the newest release that torch 2.11 can import, with its Llama 3 and torch's SDPA. Compiled
    on a GPU, for which it is made; not on a CPU, as a rehearsal."""
    import torch

    texts = {"datasets": {"Dataset": None, "load_dataset": None}, "datasets.distributed": {"split_dataset_by_node": None}}
    stand_in("datasets", texts)
    stand_in("tensorboard", {"torch.utils.tensorboard": {"SummaryWriter": None}})
    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # it takes a machine without a GPU for one with, and would ask torch.cpu for what only torch.cuda has
        asked = dict.fromkeys(("set_device", "reset_peak_memory_stats", "empty_cache", "synchronize"), lambda *_: None)
        asked |= {"get_device_name": str, "current_device": lambda: 0, "memory_stats": lambda _: {}}
        device = SimpleNamespace(**asked, get_device_properties=lambda _: SimpleNamespace(total_memory=1))
        found = {"_get_available_device_type": lambda: "cpu", "_get_device_module": lambda _: device}
        with mock.patch.multiple(torch._utils, **found):
            importlib.import_module("torchtitan.tools.utils")  # asks once
    from torchtitan.config import JobConfig
    from torchtitan.models import llama3
    from torchtitan.protocols.train_spec import register_train_spec
    from torchtitan.train import Trainer

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    # The hidden width is 8/3 of d, rounded up to a multiple.
    shape = llama3.TransformerModelArgs(dim=work.d, n_layers=work.layers, n_heads=work.heads, vocab_size=work.vocab,
                                        multiple_of=work.hidden, max_seq_len=work.T)  # fmt: skip
    made = {"model_args": {"peer": shape}, "build_tokenizer_fn": None, "build_dataloader_fn": None}
    register_train_spec("peer", dataclasses.replace(llama3.get_train_spec(), **made))
    config = JobConfig()
    config.model.name, config.model.flavor, config.job.dump_folder = "peer", "peer", str(folder)
    config.optimizer.lr, config.activation_checkpoint.mode, config.compile.enable = 3e-4, "none", on_gpu
    config.training.local_batch_size, config.training.global_batch_size = work.micro, work.batch
    config.training.seq_len, config.training.steps = work.T, 10**6
    trainer = Trainer(config)
    assert trainer.model_parts[0].layers["0"].feed_forward.w1.out_features == work.hidden
    data = trainer.batch_generator(({"input": input_ids}, labels) for input_ids, labels in batches(work, "cpu"))

    def step() -> None:
        trainer.step += 1
        trainer.train_step(data)

    return step


CONTESTANTS = {  # name: (the package whose version is reported, how to make its step)
    "ours": ("torch", ours),
    "before": ("torch", ours),  # another checkout of this project: --at before=FOLDER
    "ours-by-torch": ("torch", lambda work, folder: ours(work, folder, "parallel.cpu_kernels=false")),
    "ours-compiled": ("torch", lambda work, folder: ours(work, folder, "parallel.compile=true")),
    "ours-lora": ("torch", lambda work, folder: adapted(work, folder, "lora")),
    "ours-dora": ("torch", lambda work, folder: adapted(work, folder, "dora")),
    "plain": ("torch", plain),
    "plain-compiled": ("torch", lambda work, folder: plain(work, folder, compiled=True)),
    "transformers": ("transformers", transformers),
    "olmo-core": ("ai2-olmo-core", olmo_core),
    "litgpt": ("litgpt", litgpt),
    "torchtitan": ("torchtitan", torchtitan),
}


def contestant(name: str, work: SimpleNamespace, warmup: int) -> None:
    """One process: warms up, then takes as many steps as each number on stdin says, and answers with the seconds."""
    if name.startswith("ours"):  # what `olmo-train` does first
        import olmo_train  # noqa: F401, before torch
    import torch

    package, make = CONTESTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        before = time.perf_counter()
        step = make(work, Path(folder))
        step()
        first = time.perf_counter() - before
        for _ in range(warmup - 1):
            step()
        say({"version": importlib.metadata.version(package), "first_step_seconds": first, "threads": torch.get_num_threads()})
        for line in sys.stdin:
            before, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
            for _ in range(int(line)):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - before
            others = (busy_seconds() - busy - (time.process_time() - own)) / seconds
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if torch.cuda.is_available():  # where the CPU's other work matters little
                peak, others = torch.cuda.max_memory_allocated(), 0.0
            say({"seconds": seconds, "others": others, "peak_gb": peak / 1e9})


def busy_seconds() -> float:
    """CPU seconds of all processes of this machine so far; 0 without /proc."""
    try:
        spent = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except OSError:
        return 0.0
    return (sum(spent) - spent[3] - spent[4]) / os.sysconf("SC_CLK_TCK")  # less idle and waiting for disks


def say(answer: dict) -> None:
    print(MARK + json.dumps(answer), flush=True)


class Contestant:
    """A contestant's process, seen from outside."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: str | None):
        python = Path(folder, "bin", "python") if folder else None
        python = str(python) if python and python.exists() else sys.executable
        paths = [*([folder] if folder and python == sys.executable else []), str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "WANDB_MODE": "disabled"}
        if arguments.tuned:
            env["GLIBC_TUNABLES"] = TUNED
        words = [python, __file__, "--contestant", name, "--work", arguments.work, "--warmup", str(arguments.warmup)]
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=env
        )
        self.about = self.listen()

    def listen(self) -> dict | None:
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self.process.wait()
        self.errors.seek(0)
        self.error = self.errors.read().strip().splitlines() or ["it said nothing"]
        print(f"{self.name} is skipped: {self.error[-1]}", flush=True)
        return None

    def seconds(self, steps: int) -> dict:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self.listen()

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def compete(arguments: argparse.Namespace) -> dict:
    """{name: its version, first step, peak memory, and tokens/s of each round}: all contestants in each round, or, with
    --in-turn, one after the other, each with all its rounds."""
    names, results = arguments.peers.split(","), {}
    for group in [[name] for name in names] if arguments.in_turn else [names]:
        folders = dict(word.split("=", 1) for word in arguments.at)
        peers = [Contestant(name, arguments, folders.get(name)) for name in group]
        running = [peer for peer in peers if peer.about]
        results |= {peer.name: {**peer.about, "tokens_per_second": []} for peer in running}
        results |= {peer.name: {"error": "\n".join(peer.error[-30:])} for peer in peers if not peer.about}
        if running:
            take_rounds(running, arguments, results)
        for peer in running:
            peer.end()
    if arguments.json:  # with the errors of those that were skipped
        arguments.json.write_text(json.dumps(results, indent=1))
    return results


def take_rounds(running: list[Contestant], arguments: argparse.Namespace, results: dict) -> None:
    """Take rounds. One in which other processes used the machine is repeated, at most three times as often as it succeeds."""
    work, taken, tries = WORK[arguments.work], 0, 0
    while taken < arguments.rounds and tries < 4 * arguments.rounds:
        tries += 1
        answers = {}
        for peer in random.Random(tries).sample(running, len(running)):
            answers[peer.name] = peer.seconds(arguments.steps)
            if answers[peer.name]["others"] > OTHERS:
                break
        else:
            taken += 1
            for name, answer in answers.items():
                rate = arguments.steps * work.batch * work.T / answer["seconds"]
                results[name]["tokens_per_second"].append(rate)
                results[name]["peak_gb"] = answer["peak_gb"]
            if arguments.json:  # after each round: a measurement may be cut short
                arguments.json.write_text(json.dumps(results, indent=1))
    print(f"{taken} rounds taken; {tries - taken} were thrown away because the machine did other work", flush=True)


def table(results: dict) -> str:
    """A line a contestant: the median speed, and the median of the first contestant's ratio to it, round by round."""
    first = next(iter(results))
    lines = [f"| contestant | version | tokens/s | {first} is faster by | peak GB | first step s |", "|---|---|---|---|---|---|"]
    for name, row in results.items():
        pairs = zip(results[first]["tokens_per_second"], row["tokens_per_second"], strict=False)
        ratios = [mine / theirs for mine, theirs in pairs] or [float("nan")]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rate = statistics.median(row["tokens_per_second"] or [float("nan")])
        lines.append(
            f"| {name} | {row['version']} | {rate:,.0f} | {spread} | {row['peak_gb']:.2f} | {row['first_step_seconds']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=WORK, default="tiny")
    parser.add_argument(
        "--peers",
        default=",".join(name for name in CONTESTANTS if name not in ("before", "ours-lora", "ours-dora")),
        help="names, separated by commas; ratios are those of the first",
    )
    parser.add_argument("--at", action="append", default=[], metavar="NAME=FOLDER", help="a virtual environment or target folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each contestant in each round")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tuned", action="store_true", help="tune everybody's allocator by the environment")
    parser.add_argument("--in-turn", action="store_true", help="one at a time, where two do not fit in memory")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        return contestant(arguments.contestant, WORK[arguments.work], arguments.warmup)
    results = compete(arguments)
    if all("error" in row for row in results.values()):
        sys.exit("no contestant ran")
    print(f"{arguments.work}, {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {arguments.rounds} rounds")
    if measured := {name: row for name, row in results.items() if "peak_gb" in row}:  # others were never alone on the machine
        print(table(measured))


if __name__ == "__main__":
    main()
