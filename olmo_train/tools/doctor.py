"""What on this machine would keep a run from working, each finding with its remedy."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from olmo_train.errors import ConfigError, UserError
from olmo_train.log.wandb import wandb_mode
from olmo_train.model.cost import count_parameters
from olmo_train.parallel.processes import announced
from olmo_train.storage import cache_folder
from olmo_train.train_config import TrainConfig

BYTES_PER_PARAMETER = 12  # of a checkpoint: the fp32 weight and AdamW's two moments


@dataclass(frozen=True)
class Finding:
    check: str
    status: str  # ok, warning or problem
    finding: str
    remedy: str = ""


def examine(config: TrainConfig | None) -> list[Finding]:
    """All findings, of the machine alone or of a configuration on it. Never raises: a check that fails is a finding."""
    checks: list[Callable[[], Iterator[Finding]]] = [environment, cache, launcher, processors, network, gpus]
    if config is not None:
        checks += [
            lambda: world(config),
            lambda: disk(config),
            lambda: kernels(config),
            lambda: data(config),
            lambda: tracking(config),
        ]
    findings = []
    for check in checks:
        try:
            findings += check()
        except UserError as problem:
            findings.append(Finding(str(problem.where), "problem", problem.what, "as it says"))
        except Exception as problem:
            findings.append(Finding(getattr(check, "__name__", "check"), "problem", repr(problem), "report this"))
    return findings


def environment() -> Iterator[Finding]:
    import torch

    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    known = (2, 11) <= tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14)
    remedy = "" if known else "install torch>=2.11,<2.14, with which this version is tested"
    yield Finding("environment", "ok" if known else "warning", versions, remedy)
    if importlib.util.find_spec("wandb") is None:
        yield Finding("wandb", "problem", "is not installed", "pip install wandb, or log.wandb.mode=disabled")


def processors() -> Iterator[Finding]:
    import torch

    usable, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    status = "ok" if threads <= usable else "warning"
    remedy = "" if status == "ok" else f"set OMP_NUM_THREADS={usable}: more threads than cores wait for each other"
    yield Finding("processors", status, f"{usable} usable cores, {threads} threads a process", remedy)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding("memory", "ok", f"{available / 1e9:.1f} GB of host memory are free")


def cache() -> Iterator[Finding]:
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    writable = os.access(existing, os.W_OK)
    remedy = (
        "" if writable else "set XDG_CACHE_HOME to a folder that you can write; without a cache every start checks the data again"
    )
    yield Finding("cache", "ok" if writable else "warning", f"{folder}{'' if writable else ' cannot be written'}", remedy)


def launcher() -> Iterator[Finding]:
    try:
        processes = announced()
    except ConfigError as problem:
        yield Finding("launcher", "warning", str(problem), "as it says; train, bench and replay refuse this environment")
        return
    yield Finding("launcher", "ok", f"rank {processes.rank} of {processes.size}" if processes.launched else "none: one process")


def network() -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        remedy = f"add {name} to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface of the cluster"
        yield Finding("network", "warning", f"{name} does not resolve, so processes may not find each other", remedy)
        return
    interfaces = ", ".join(interface for _, interface in socket.if_nameindex())
    if address.startswith("127."):
        remedy = "for several machines set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to one of the interfaces"
        yield Finding("network", "ok", f"{name} is {address}, which serves one machine; interfaces: {interfaces}", remedy)
    else:
        yield Finding("network", "ok", f"{name} is {address}; interfaces: {interfaces}")


def gpus() -> Iterator[Finding]:
    import torch

    from olmo_train import hardware

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found = f"none that torch can use; this torch is built for {'CUDA ' + str(built) if built else 'the CPU alone'}"
        remedy = "on a GPU machine: install torch's CUDA build and a driver that is new enough for it; a CPU trains too"
        yield Finding("gpus", "ok", found, remedy)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        status = "ok" if free > 0.9 * total else "warning"
        remedy = "" if status == "ok" else "another process holds its memory: see nvidia-smi"
        yield Finding(f"gpu {index}", status, f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free", remedy)
        if hardware.lookup(name) is None:
            yield Finding(
                f"gpu {index}",
                "warning",
                f"the peak of {name} is not known, so MFU is not logged",
                "add a sourced row to hardware.py",
            )


def world(config: TrainConfig) -> Iterator[Finding]:
    word = os.environ.get("WORLD_SIZE", "1")
    size = int(word) if word.isdecimal() and int(word) else 1
    config.check_world(size)
    yield Finding("batch", "ok", f"{config.global_batch_size} instances fit {size} processes of {config.micro_batch_size}")


def kernels(config: TrainConfig) -> Iterator[Finding]:
    import torch

    from olmo_train.parallel.kernels import has_cpu_kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if has_cpu_kernels(config.parallel.cpu_kernels, device):
        yield Finding("kernels", "ok", "attention and loss are by C++ of our own, which is built")
    elif device.type == "cpu":
        remedy = "install a C++ compiler, and see with parallel.cpu_kernels=true what it says"
        yield Finding("kernels", "ok", "attention and loss are by torch, which takes a CPU longer", remedy)


def disk(config: TrainConfig) -> Iterator[Finding]:
    folder = Path(config.run_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        yield Finding("run_dir", "problem", f"{existing} cannot be written", "choose another run_dir, or change its owner")
        return
    one = count_parameters(config.model).total * BYTES_PER_PARAMETER
    needed, free = one * (config.checkpoint.keep_last + 1), shutil.disk_usage(existing).free
    kept = f"{config.checkpoint.keep_last} checkpoints and one being written take {needed / 1e9:.1f} GB"
    found = f"{free / 1e9:.1f} GB free at {existing}; {kept}"
    remedy = "" if free > needed else "make room, keep fewer (checkpoint.keep_last), or choose another run_dir"
    yield Finding("disk", "ok" if free > needed else "problem", found, remedy)


def data(config: TrainConfig) -> Iterator[Finding]:
    mixture = config.mixture()
    mixture.check_tokenizers(mixture.open_validation())
    epochs = mixture.epochs(config.steps).values()
    for source, epoch in zip(mixture.sources, epochs, strict=True):
        status = "warning" if epoch > 4 else "ok"  # Muennighoff et al. 2023: up to 4 epochs are nearly as good as new data
        remedy = "" if status == "ok" else "more than 4 epochs teach little: add data, or lower the weight"
        yield Finding(f"data {source.name}", status, f"{source.n_tokens:,} tokens, read {epoch:.2f} times in the run", remedy)


def tracking(config: TrainConfig) -> Iterator[Finding]:
    mode = wandb_mode(config.log.wandb)
    remedy = "" if mode == "online" else "metrics.jsonl is complete all the same; `wandb login`, or WANDB_API_KEY, goes online"
    yield Finding("wandb", "ok", f"will be {mode}", remedy)
