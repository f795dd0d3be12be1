"""Energy of NVIDIA GPUs, read through NVML."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)


class EnergyMeter:
    """The energy that one NVIDIA GPU has used since the meter was opened, from the GPU's counter."""

    def __init__(self, nvml: Any, uuid: str):
        """`nvml` is the module pynvml. Raises its NVMLError if the GPU or its driver has no counter."""
        nvml.nvmlInit()
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._start = self._millijoules()

    def kwh(self) -> float:
        return (self._millijoules() - self._start) / 3.6e9

    def _millijoules(self) -> int:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)


def open_energy_meter(nvml: Any = None) -> EnergyMeter | None:
    """The meter of this process's GPU; None on a CPU, for a MIG instance, and if the counter cannot be read."""
    import torch

    if not torch.cuda.is_available() or "MIG" in torch.cuda.get_device_name():
        return None
    try:
        if nvml is None:
            import pynvml as nvml  # type: ignore[no-redef]
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return EnergyMeter(nvml, f"GPU-{uuid}")  # by UUID: CUDA_VISIBLE_DEVICES changes the indices
    except Exception as problem:  # no package, no driver, an unsupported GPU: then no energy is logged
        log.info("no throughput/energy_kwh, because the GPU's energy counter cannot be read: %s", problem)
        return None
