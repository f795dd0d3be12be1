"""Peak figures of GPUs from their data sheets, for MFU, plans and energy, and the memory that this machine has free.

Every figure has a source. For an unknown name the functions return None, and no MFU is logged: a guessed peak would lead
to an MFU that looks right and is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hardware:
    """One device as PyTorch sees it."""

    name: str
    peak_flops: float  # FLOP/s of dense bf16 matrix products that accumulate in fp32; no sparsity
    memory_gb: float  # 10^9 bytes
    power_watts: float  # the highest configured board power (TDP)

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 1e9)


# The makers quote bf16 for newer parts with 2:4 sparsity; that is twice the dense figure, which is the one here.
# Memory is the advertised figure taken as 10^9 bytes. Drivers report up to 7% more on HBM parts and the same on GDDR6
# parts with ECC, so a plan is on the safe side.
GPUS = {
    # NVIDIA A100 data sheet (2021): 312 TFLOPS dense; 400 W SXM; PCIe 250 W (40 GB) and 300 W (80 GB)
    "a100-40gb": Hardware("NVIDIA A100 SXM 40GB", 312e12, 40, 400),
    "a100-80gb": Hardware("NVIDIA A100 SXM 80GB", 312e12, 80, 400),
    "a100-pcie-40gb": Hardware("NVIDIA A100 PCIe 40GB", 312e12, 40, 250),
    "a100-pcie-80gb": Hardware("NVIDIA A100 PCIe 80GB", 312e12, 80, 300),
    # NVIDIA H100 architecture white paper, table 2: 989.4 TFLOPS dense (SXM5), 756 (PCIe); data sheet: 700 W and 350 W
    "h100": Hardware("NVIDIA H100 SXM 80GB", 989.4e12, 80, 700),
    "h100-pcie": Hardware("NVIDIA H100 PCIe 80GB", 756e12, 80, 350),
    # NVIDIA H100 data sheet: H100 NVL 1,671 TFLOPS with sparsity, 94 GB, 350 to 400 W
    "h100-nvl": Hardware("NVIDIA H100 NVL 94GB", 835.5e12, 94, 400),
    # NVIDIA H200 data sheet: SXM 1,979 TFLOPS with sparsity (the H100's die), 141 GB, 700 W; NVL 1,671, 141 GB, 600 W
    "h200": Hardware("NVIDIA H200 SXM 141GB", 989.4e12, 141, 700),
    "h200-nvl": Hardware("NVIDIA H200 NVL 141GB", 835.5e12, 141, 600),
    # NVIDIA Blackwell architecture brief, HGX B200: 4.5 PFLOPS with sparsity, 1000 W; DGX B200: 1440 GB in 8 GPUs
    "b200": Hardware("NVIDIA B200 SXM 180GB", 2250e12, 180, 1000),
    # NVIDIA L40S data sheet: 362.05 TFLOPS dense, 48 GB GDDR6 with ECC, 350 W
    "l40s": Hardware("NVIDIA L40S 48GB", 362.05e12, 48, 350),
    # NVIDIA A10G data sheet (published by AWS, 2022): 70 TFLOPS dense (the A10 has 125), 24 GB GDDR6 with ECC, 300 W
    "a10g": Hardware("NVIDIA A10G 24GB", 70e12, 24, 300),
    # NVIDIA GA102 white paper, appendix: RTX 3090, bf16 with fp32 accumulation 71 TFLOPS dense, 24 GB, 350 W
    "rtx-3090": Hardware("NVIDIA GeForce RTX 3090 24GB", 71e12, 24, 350),
    # NVIDIA Ada white paper, appendix: RTX 4090, bf16 with fp32 accumulation 165.2 TFLOPS dense, 24 GB, 450 W
    "rtx-4090": Hardware("NVIDIA GeForce RTX 4090 24GB", 165.2e12, 24, 450),
    # AMD Instinct MI200 series brochure: MI250X 383 TFLOPS, 128 GB; up to 560 W (AMD, November 2021). A card is two devices
    # (GCDs) to PyTorch.
    "mi250x": Hardware("AMD Instinct MI250X (one of its two GCDs) 64GB", 191.5e12, 64, 280),
    # AMD Instinct MI300X data sheet: 1307.4 TFLOPS dense, 192 GB, 750 W
    "mi300x": Hardware("AMD Instinct MI300X 192GB", 1307.4e12, 192, 750),
}

# Other spellings of a row: what people say, and what drivers report (NVIDIA's reach the longest forms here).
_ALIASES = {
    "a100-sxm4-40gb": "a100-40gb", "a100-sxm-40gb": "a100-40gb", "a100-sxm4-80gb": "a100-80gb",
    "a100-sxm-80gb": "a100-80gb", "a100-80gb-pcie": "a100-pcie-80gb", "a100-40gb-pcie": "a100-pcie-40gb",
    "h100-sxm": "h100", "h100-sxm5": "h100", "h100-80gb-hbm3": "h100", "h100-sxm-80gb": "h100", "h100-80gb": "h100",
    "h100-pcie-80gb": "h100-pcie", "h100-nvl-94gb": "h100-nvl", "h200-sxm": "h200", "h200-141gb": "h200",
    "h200-sxm-141gb": "h200", "b200-sxm": "b200", "b200-180gb": "b200", "rtx3090": "rtx-3090", "3090": "rtx-3090",
    "rtx4090": "rtx-4090", "4090": "rtx-4090", "mi300x-oam": "mi300x",
}  # fmt: skip


def lookup(name: str) -> Hardware | None:
    """The row of a GPU by its key (`h100`) or by the name a driver reports (`NVIDIA H100 80GB HBM3`); else None.

    The whole name must match: `NVIDIA GeForce RTX 4090 Laptop GPU` is not the RTX 4090, so it returns None.
    """
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    key = re.sub(r"^(nvidia-|amd-)?(geforce-|instinct-|tesla-)?", "", key)
    return GPUS.get(_ALIASES.get(key, key))


def detect() -> Hardware | None:
    """The current accelerator's row, or None on a CPU and on a device that is not in the table."""
    import torch

    return lookup(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def cpuinfo(root: Path = Path("/")) -> list[str]:
    """The lines of /proc/cpuinfo; none where the kernel has no such file."""
    try:
        return (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def computes_bf16(root: Path = Path("/")) -> bool | None:
    """Whether this machine's processor has instructions for bf16 products; None where the kernel does not say."""
    lines = cpuinfo(root)
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(" ".join(lines).split()) if lines else None


# Files of a memory cgroup: its limit, its use, and the line of memory.stat with the cached files that the kernel would drop.
_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this machine's processes can still allocate: free and reclaimable memory and swap, and no more than the limits
    of this process's cgroups (containers, Slurm jobs) leave. None where the kernel is not Linux."""
    try:
        lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines())
        available = 1024 * sum(int(lines[key].split()[0]) for key in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None
    return min([available, *_left_in_cgroups(root)])


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """What the limits of this process's memory cgroup and of those above it leave, versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        folder = mount / path.strip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(mount):
                yield from _left_in(place)


def _left_in(folder: Path) -> Iterator[int]:
    for limit, use, cached in _CGROUPS:
        try:
            numbers = [int((folder / name).read_text(encoding="utf-8")) for name in (limit, use)]  # "max": no limit
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        except (OSError, ValueError):
            continue
        yield max(0, numbers[0] - numbers[1] + int(stat.get(cached, 0)))
