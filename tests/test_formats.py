"""Numbers as people read them."""

import math

import pytest

from olmo_train.formats import amount, byte_size, decimal, duration, short


@pytest.mark.parametrize(
    "number, text",
    [(0, "0"), (0.84, "0.84"), (999.96, "1k"), (12345, "12.3k"), (-1.5e6, "-1.5M"), (7e9, "7B"), (2e12, "2T"), (3e18, "3e18"),
     (3e-4, "3e-4"), (-2.5e-5, "-2.5e-5"), (math.inf, "inf"), (math.nan, "nan")],
)  # fmt: skip
def test_a_number_in_few_characters(number, text):
    assert short(number) == text


def test_a_number_with_two_digits_is_written_out():
    assert [short(n, 2) for n in (183e9, 347, 1.84e12, 0.0123)] == ["180B", "350", "1.8T", "0.012"]


def test_amounts_have_a_unit_of_a_readable_size():
    assert [duration(s) for s in (0.0245, 45, 3725, 9000, 2e5)] == ["0.0245 s", "45 s", "62.1 min", "2.5 h", "2.3 days"]
    assert [byte_size(n) for n in (18.8282e9, 6.5e8, 1.2e12)] == ["18.83 GB", "650.00 MB", "1,200.00 GB"]
    assert [amount(n, "kWh", "MWh") for n in (0.0314, 1500)] == ["0.0314 kWh", "1.5 MWh"]
    assert [decimal(n, 2) for n in (None, 1234.5)] == ["-", "1,234.50"]
