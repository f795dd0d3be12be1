"""Energy of NVIDIA GPUs, read through NVML."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


def energy_meter(nvml: Any, uuid: str) -> Callable[[], float]:
    """A function that returns the kWh that one NVIDIA GPU has used from now on, by the GPU's counter.

    `nvml` is the module pynvml. Raises its NVMLError if the GPU or its driver has no counter.
    """
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    start = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # millijoules
    return lambda: (nvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start) / 3.6e9


def open_energy_meter(nvml: Any = None) -> Callable[[], float] | None:
    """The meter of this process's GPU; None on a CPU, for a MIG instance, and if the counter cannot be read."""
    import torch

    if not torch.cuda.is_available() or "MIG" in torch.cuda.get_device_name():
        return None
    try:
        if nvml is None:
            import pynvml as nvml  # type: ignore[no-redef]
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return energy_meter(nvml, f"GPU-{uuid}")  # by UUID: CUDA_VISIBLE_DEVICES changes the indices
    except Exception as problem:  # no package, no driver, an unsupported GPU: then no energy is logged
        log.info("no throughput/energy_kwh, because the GPU's energy counter cannot be read: %s", problem)
        return None
