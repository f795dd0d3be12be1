"""Names that drivers report find their row; anything else finds none."""

import pytest

from olmo_train.hardware import _ALIASES, GPUS, detect, lookup


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
def test_an_unknown_or_ambiguous_name_gives_none_and_never_a_neighbour(name):
    assert lookup(name) is None


def test_every_alias_leads_to_a_row():
    assert set(_ALIASES.values()) <= set(GPUS)
    assert not set(_ALIASES) & set(GPUS)


def test_the_peaks_that_published_utilizations_rest_on():
    assert lookup("a100-80gb").peak_flops == 312e12
    assert lookup("h100").peak_flops == 989.4e12
    assert lookup("h100").memory_bytes == 80_000_000_000


def test_a_cpu_has_no_peak(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect() is None


def test_the_current_gpu_is_found_by_the_name_that_torch_reports(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert detect() is GPUS["h100"]
