"""Names that drivers report find their row; anything else finds none."""

from types import SimpleNamespace

import pytest

from olmo_train.hardware import _ALIASES, GPUS, detect, lookup
from olmo_train.log.energy import energy_meter, open_energy_meter


@pytest.mark.parametrize(
    ("reported", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI250X", "mi250x"),
        ("AMD Instinct MI300X", "mi300x"),
        ("H100", "h100"),
        ("rtx 4090", "rtx-4090"),
    ],
)
def test_names_that_drivers_report_find_their_row(reported, key):
    assert lookup(reported) is GPUS[key]


@pytest.mark.parametrize(
    "name",
    ["", "cpu", "a100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10",
     "NVIDIA L40", "NVIDIA GH200 480GB", "Tesla T4", "NVIDIA GeForce RTX 3090 Ti"],
)  # fmt: skip
def test_an_unknown_or_ambiguous_name_is_none_and_never_a_similar_gpu(name):
    assert lookup(name) is None


def test_every_alias_leads_to_a_row():
    assert set(_ALIASES.values()) <= set(GPUS)
    assert not set(_ALIASES) & set(GPUS)


def test_the_peaks_that_published_utilizations_rest_on():
    assert lookup("a100-80gb").peak_flops == 312e12
    assert lookup("h100").peak_flops == 989.4e12
    assert lookup("h100").memory_bytes == 80_000_000_000


def test_a_cpu_has_no_peak(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect() is None


def test_the_current_gpu_is_found_by_the_name_that_torch_reports(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert detect() is GPUS["h100"]


class FakeNvml:
    """A GPU whose counter stands at 5 MJ and has used `used` kWh since."""

    def __init__(self, used: float = 0.0):
        self.used = used

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-1234":
            raise LookupError("Not Found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        assert handle == "handle"
        return 5_000_000_000 + round(self.used * 3.6e9)


def fake_gpu(monkeypatch, name: str, uuid: str) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuid))


def test_a_meter_counts_kilowatt_hours_from_its_opening(monkeypatch):
    fake_gpu(monkeypatch, "NVIDIA H100 80GB HBM3", "1234")
    nvml = FakeNvml()
    meter = open_energy_meter(nvml)
    assert meter() == 0
    nvml.used = 0.25
    assert meter() == pytest.approx(0.25)


@pytest.mark.parametrize("name, uuid", [("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "1234"), ("NVIDIA H100 80GB HBM3", "5678")])
def test_a_part_of_a_gpu_and_one_that_nvml_does_not_know_have_no_meter(monkeypatch, name, uuid):
    fake_gpu(monkeypatch, name, uuid)
    assert open_energy_meter(FakeNvml()) is None


def test_the_energy_of_a_run_is_summed_over_ranks_and_resumes(tiny_args, read_metrics):
    from ranks import on_ranks

    from olmo_train import train as module
    from olmo_train.log import journal

    config = {"total_steps": 3, "checkpoint.interval_steps": 2}

    def run(world, last):
        nvml = FakeNvml()
        journal.open_energy_meter = lambda: energy_meter(nvml, "GPU-1234")
        for _ in module.train(tiny_args("run", **config | {"total_steps": last}), world):
            nvml.used += 1 + world.rank  # before the line of this step is written

    on_ranks(2, lambda world: run(world, 3))
    on_ranks(2, lambda world: run(world, 5))
    lines = read_metrics(tiny_args("run").run_dir)
    assert [line["throughput/energy_kwh"] for line in lines] == pytest.approx([3, 6, 9, 12, 15])
