"""Checks of this machine for what would stop a run, each finding with its remedy."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from olmo_train.errors import ConfigError, UserError
from olmo_train.formats import byte_size, counted, extent
from olmo_train.hardware import available_memory
from olmo_train.log.wandb import wandb_mode
from olmo_train.parallel import choices
from olmo_train.parallel.processes import announced, processes_on_machine
from olmo_train.plan import preflight
from olmo_train.plan.memory import checkpoint_bytes
from olmo_train.plan.plan import open_data, with_length
from olmo_train.storage import cache_folder
from olmo_train.train_config import TrainConfig


@dataclass(frozen=True)
class Finding:
    check: str
    status: str  # ok, warning or problem
    finding: str
    remedy: str = ""


def judge(check: str, is_ok: bool, finding: str, remedy: str, otherwise: str = "warning") -> Finding:
    """A finding whose remedy is shown only when it is not ok."""
    return Finding(check, "ok", finding) if is_ok else Finding(check, otherwise, finding, remedy)


def examine(config: TrainConfig | None) -> list[Finding]:
    """All findings, of the machine alone or of a configuration on it. Never raises: a check that fails is a finding."""
    checks: list[Callable[[], Iterator[Finding]]] = [environment, cache, launcher, processors, network, gpus]
    findings: list[Finding] = []
    if config is not None:
        config, findings = decided(config)
        checks += [functools.partial(check, config) for check in (world, memory, disk, kernels, data, tracking)]
    for check in checks:
        try:
            findings += check()
        except UserError as problem:
            findings.append(Finding(str(problem.where), "problem", problem.what, "change it as the finding says"))
        except Exception as problem:
            findings.append(Finding(getattr(check, "__name__", "check"), "problem", repr(problem), "report this"))
    return findings


def decided(config: TrainConfig) -> tuple[TrainConfig, list[Finding]]:
    """The configuration with what a new run on this machine would choose for `parallel`, and findings about it."""
    import torch

    from olmo_train.parallel.kernels import missing_for_compile

    on_gpu = torch.cuda.is_available()
    parallel, notes = choices.choose_precision(config.parallel, on_gpu)
    config, findings = choices.with_parallel(config, parallel), [Finding("parallel.precision", "ok", note) for note in notes]
    if parallel.compile is None and not on_gpu:
        try:
            lasting = with_length(config, *open_data(config))
        except ConfigError:  # the length follows from data that `data` finds to be missing
            return config, findings
        missing = functools.partial(missing_for_compile, on_gpu=False)
        compiled, notes = choices.choose_compile(lasting, torch.get_num_threads() * world_size(), missing)
        config = choices.with_parallel(config, replace(parallel, compile=compiled))
        findings += [Finding("parallel.compile", "ok", note) for note in notes]
    return config, findings


def environment() -> Iterator[Finding]:
    """The versions of Python and torch, and that wandb is installed."""
    import torch

    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    known = (2, 11) <= tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14)
    yield judge("environment", known, versions, "install torch>=2.11,<2.14, with which this version is tested")
    if importlib.util.find_spec("wandb") is None:
        yield Finding("wandb", "problem", "is not installed", "pip install wandb, or log.wandb.mode=disabled")


def processors() -> Iterator[Finding]:
    """Threads per core, and free memory."""
    import torch

    usable, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    remedy = f"set OMP_NUM_THREADS={usable}: more threads than cores wait for each other"
    yield judge(
        "processors", threads <= usable, f"{counted(usable, 'usable core')}, {counted(threads, 'thread')} per process", remedy
    )
    available = available_memory()
    yield Finding("memory", "ok", "unknown" if available is None else f"{byte_size(available)} of host memory are available")


def cache() -> Iterator[Finding]:
    """Whether the cache folder can be written."""
    folder = cache_folder()
    writable = os.access(existing_part(folder), os.W_OK)
    remedy = "set XDG_CACHE_HOME to a folder that you can write; without a cache every start checks the data again"
    yield judge("cache", writable, f"{folder}{'' if writable else ' cannot be written'}", remedy)


def existing_part(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def launcher() -> Iterator[Finding]:
    """The ranks that torchrun, Slurm or another launcher announces."""
    try:
        processes = announced()
    except ConfigError as problem:
        yield Finding(
            "launcher", "warning", str(problem), "change it as the finding says; train, bench and replay refuse this environment"
        )
        return
    yield Finding("launcher", "ok", f"rank {processes.rank} of {processes.size}" if processes.launched else "none: one process")


def network() -> Iterator[Finding]:
    """The address of this host, by which processes find each other."""
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
    """Whether torch can use the GPUs, whether they are free, and whether their peak is known."""
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
        found = f"{name}, {byte_size(free)} of {byte_size(total)} free"
        yield judge(f"gpu {index}", free > 0.9 * total, found, "another process holds its memory: see nvidia-smi")
        if hardware.lookup(name) is None:
            unknown = f"the peak of {name} is not known, so MFU is not logged"
            yield Finding(f"gpu {index}", "warning", unknown, "add a sourced row to hardware.py")


def world_size() -> int:
    """The number of processes by WORLD_SIZE; 1 if it is not set or is no number, which the launcher check reports."""
    word = os.environ.get("WORLD_SIZE", "1")
    return int(word) if word.isdecimal() and int(word) else 1


def world(config: TrainConfig) -> Iterator[Finding]:
    """The batch of a process."""
    size = world_size()
    config.check_world(size)
    each = f"{extent(config.batches.sizes, 'instance')} on {counted(size, 'process')}"
    yield Finding("batch", "ok", f"{each}, {config.micro_batch_on(size)} at a time")
    for note in config.batch_notes(size):
        yield Finding("batch", "ok", note)


def kernels(config: TrainConfig) -> Iterator[Finding]:
    """Which kernels compute attention and loss."""
    import torch

    from olmo_train.parallel.kernels import describe_attention, has_cpu_kernels, is_compiled, missing_for_compile

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if is_compiled(config.parallel, device):
        yield Finding("compile", "ok", "blocks are compiled, which takes half a minute the first time")
    elif device.type == "cuda":
        missing = missing_for_compile()
        remedy = f"install {missing}" if missing else "set parallel.compile=true, or leave it out, unless determinism is on"
        yield Finding("compile", "warning", "blocks are not compiled, which costs about a quarter of the speed", remedy)
    if has_cpu_kernels(config.parallel.cpu_kernels, device):
        attention = describe_attention(config)
        who = "the loss uses" if attention.startswith("torch") else "attention and loss use"
        yield Finding("kernels", "ok", f"{who} the C++ kernels, which are built; attention: {attention}")
    elif device.type == "cpu":
        remedy = "install a C++ compiler; parallel.cpu_kernels=true shows its errors"
        yield Finding("kernels", "ok", "attention and loss use torch, which is slower on a CPU", remedy)


def disk(config: TrainConfig) -> Iterator[Finding]:
    """Whether run_dir can be written and has room for the checkpoints."""
    existing = existing_part(Path(config.run_dir).absolute())
    if not os.access(existing, os.W_OK):
        yield Finding("run_dir", "problem", f"{existing} cannot be written", "choose another run_dir, or change its owner")
        return
    one = checkpoint_bytes(config.model, config.optim.name, config.adapter)
    needed, free = one * (config.checkpoint.keep_last + 1), shutil.disk_usage(existing).free
    kept = f"{counted(config.checkpoint.keep_last, 'checkpoint')} and one being written take {byte_size(needed)}"
    found = f"{byte_size(free)} free at {existing}; {kept}"
    remedy = "make room, keep fewer (checkpoint.keep_last), or choose another run_dir"
    yield judge("disk", free > needed, found, remedy, "problem")


def data(config: TrainConfig) -> Iterator[Finding]:
    """The sources, how often each is read, and what is probably a mistake."""
    import torch

    mixture = config.mixture()
    mixture.check_tokenizers(mixture.open_validation())
    config = config.with_length(mixture).in_steps()
    on_cpu = not torch.cuda.is_available()
    cautions = {caution.about: caution for caution in preflight.cautions(config, mixture, on_cpu)}
    for source, epoch in zip(mixture.sources, mixture.epochs(config.steps).values(), strict=True):
        about, found = f"data {source.name}", f"{source.n_tokens:,} tokens, read {epoch:.2f} times in the run"
        caution = cautions.pop(about, None)
        yield Finding(about, "warning", found, caution.remedy) if caution else Finding(about, "ok", found)
    for caution in cautions.values():
        yield Finding(caution.about, "warning", caution.what, caution.remedy)


def memory(config: TrainConfig) -> Iterator[Finding]:
    """The memory that the run needs."""
    import torch

    size, on_gpu = world_size(), torch.cuda.is_available()
    gpu_bytes = torch.cuda.mem_get_info()[1] if on_gpu else None
    found = preflight.memory_of(config, size, processes_on_machine(size), gpu_bytes)
    yield judge("run memory", found.fits is not False, f"needs about {found}", found.fix, "problem")


def tracking(config: TrainConfig) -> Iterator[Finding]:
    """Where W&B records the run."""
    mode = wandb_mode(config.log.wandb)
    remedy = "" if mode == "online" else "metrics.jsonl is complete without it; `wandb login` or WANDB_API_KEY makes it online"
    yield Finding("wandb", "ok", f"will be {mode}", remedy)
