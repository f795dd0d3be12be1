"""Seconds a GB of saving and loading, beside torch's DCP with its defaults and OLMo-core, on the same state; and seconds
from SIGTERM to the end of a small run.

    python tests/benchmarks/checkpoints.py FOLDER [--olmo-core FOLDER_OF_ITS_PACKAGES] [--rounds 5] [--d-model 512]

Rounds are interleaved. What is timed ends with the files flushed, where the other system flushes them; ours also hashes
every byte and looks for non-finite values. `verify` compares the hashes before a load. Prints medians and ratios to ours.
"""

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from olmo_train import config as configuration
from olmo_train.checkpoint import folders
from olmo_train.checkpoint import load as checkpoint_load
from olmo_train.checkpoint.config import CheckpointConfig
from olmo_train.checkpoint.save import Checkpointer
from olmo_train.model.transformer import Transformer
from olmo_train.optim import build as optim
from olmo_train.parallel import shard
from olmo_train.parallel.world import join_world
from olmo_train.storage import hash_file
from olmo_train.train_config import TrainConfig


def build(config, world):
    with torch.device("meta"):
        model = Transformer(config.model)
    shard.shard(model, config.parallel, world)
    optimizer = optim.build_optimizer(dict(model.named_parameters()), config.optim)
    optim.allocate_state(optimizer)
    shard.init_weights(model, config.seed)
    return model, optimizer


def timed(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def ours(folder: Path, config, world, model, optimizer, step: int) -> dict[str, float]:
    files = {"config.yaml": configuration.dump(config).encode()}
    seconds = {}
    for name, in_background in (("save", False), ("stall", True)):
        saver = Checkpointer(folder, CheckpointConfig(async_save=in_background, keep_last=1), world, files)
        for _ in range(2):  # the second: host memory is there, as in a run
            step += 1
            shutil.rmtree(folder, ignore_errors=True)  # so that no system pays for another's deletions
            seconds[name] = timed(lambda saver=saver, step=step: saver.save(step, model, optimizer, {"data": {}}))
            saver.wait()
        saver.close()
    saved = folders.folder_of(folder, step)
    seconds["verify"] = timed(lambda: folders.newest(folder))
    seconds["load"] = timed(lambda: checkpoint_load.load(saved, model, optimizer, world))
    largest = max(saved.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    seconds["hash"] = timed(lambda: hash_file(largest))
    return seconds


def dcp_defaults(folder: Path, model, optimizer) -> dict[str, float]:
    def save():
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optim": state}, checkpoint_id=str(folder))

    def load():
        weights, state = get_state_dict(model, optimizer)
        whole = {"model": weights, "optim": state}
        dcp.load(whole, checkpoint_id=str(folder))
        set_state_dict(model, optimizer, model_state_dict=whole["model"], optim_state_dict=whole["optim"])

    return {"save": timed(save), "load": timed(load)}


def olmo_core(folder: Path, model, optimizer) -> dict[str, float]:
    from olmo_core.distributed.checkpoint import load_model_and_optim_state, save_model_and_optim_state

    return {
        "save": timed(lambda: save_model_and_optim_state(str(folder), model, optimizer, save_overwrite=True)),
        "load": timed(lambda: load_model_and_optim_state(str(folder), model, optimizer)),
    }


def stop(folder: Path, processes: int) -> float:
    """Seconds from SIGTERM, to the processes of a small run in the middle of its training, to the end of the last one."""
    tokens = folder / "tokens.npy"
    tokens.write_bytes(np.random.default_rng(0).integers(0, 500, 100_000, dtype=np.uint16).tobytes())
    run_dir = folder / "stopped"
    shutil.rmtree(run_dir, ignore_errors=True)
    words = [f"run_dir={run_dir}", f"data.sources.a.path={tokens}", "total_steps=100000", "global_batch_size=8",
             "log.interval_steps=1", "log.wandb.mode=disabled", "model.d_model=64", "model.n_layers=2", "model.n_heads=4",
             "model.mlp_hidden=176", "model.vocab_size=500", "model.padded_vocab_size=512", "model.seq_len=64"]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *torchrun, "-m", "olmo_train", "train", *words]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = run_dir / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 20:
        time.sleep(0.05)
    started = time.perf_counter()
    run.send_signal(signal.SIGTERM)
    run.wait()
    seconds = time.perf_counter() - started
    steps = log.read_text().count("\n")
    assert list(folders.committed(run_dir)) == [steps], "a step was lost"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--olmo-core", help="where OLMo-core was installed with pip --target")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--d-model", type=int, default=512)
    arguments = parser.parse_args()
    words = ["run_dir=unused", "data.sources.a.path=unused", f"model.d_model={arguments.d_model}", "model.n_layers=8",
             "model.n_heads=8", f"model.mlp_hidden={arguments.d_model * 11 // 4}", "parallel.precision=fp32"]  # fmt: skip
    config = configuration.load(TrainConfig, [], words)
    if arguments.olmo_core:
        sys.path.append(arguments.olmo_core)
    seen: dict[str, list[float]] = {}
    scratch = arguments.folder / "scratch"  # memory for the system's file cache, which a virtual machine gets slowly at first
    scratch.write_bytes(bytes(1 << 32))
    scratch.unlink()
    with join_world() as world:
        model, optimizer = build(config, world)
        for number in range(arguments.rounds):
            systems = {"ours": lambda folder, n=number: ours(folder, config, world, model, optimizer, 10 * n),
                       "dcp": lambda folder: dcp_defaults(folder, model, optimizer)}  # fmt: skip
            if arguments.olmo_core:
                systems["olmo-core"] = lambda folder: olmo_core(folder, model, optimizer)
            for name, system in systems.items():
                folder = arguments.folder / name
                shutil.rmtree(folder, ignore_errors=True)
                for what, seconds in system(folder).items():
                    seen.setdefault(f"{name} {what}", []).append(seconds)
                shutil.rmtree(folder)
        gigabytes = sum(t.numel() * 4 for t in checkpoint_load.state_tensors(model, optimizer).values()) / 1e9
    for processes in (1, 2):
        seconds = [stop(arguments.folder, processes) for _ in range(arguments.rounds)]
        print(
            f"SIGTERM to the end, {processes} process(es): median {statistics.median(seconds):.2f} s, most {max(seconds):.2f} s"
        )
    medians = {name: statistics.median(values) for name, values in seen.items()}
    for name, median in medians.items():
        what = name.split()[-1]
        base = medians["ours save" if what == "stall" else f"ours {what}"]
        print(f"{name:16} {median:7.3f} s  {median / gigabytes:6.3f} s/GB  {median / base:5.2f} x ours", flush=True)
    print(json.dumps({"gigabytes": gigabytes, "seconds": seen}))


if __name__ == "__main__":
    main()
