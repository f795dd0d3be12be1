"""Numbers, amounts and durations as text, for the console, tables and axes."""

from __future__ import annotations

import math
from collections.abc import Iterable


def short(number: float, digits: int = 3) -> str:
    """`12.3k`, `1.5M`, `7B`, `3e-4`: a number in few characters."""
    number = float(f"{number:.{digits}g}")  # round first: 999.96 is 1k
    digits = max(digits, 3)  # as 180 has three, although two are exact
    if 0 < abs(number) < 1e-3 or 1e15 <= abs(number) < math.inf:
        exponent = math.floor(math.log10(abs(number)))
        return f"{number / 10.0**exponent:.{digits}g}e{exponent}"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= abs(number) < 1e15:
            return f"{number / size:.{digits}g}{letter}"
    return f"{number:.{digits}g}"


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2,000 shards`, `2 processes`."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith(('s', 'ch')) else 's'}"


def extent(numbers: Iterable[int], noun: str = "") -> str:
    """`512`, or `512 to 1,024`: the smallest and the largest; with their noun `512 to 1,024 instances`."""
    known = sorted(numbers)
    last = counted(known[-1], noun) if noun else f"{known[-1]:,}"
    return last if known[0] == known[-1] else f"{known[0]:,} to {last}"


def duration(seconds: float) -> str:
    """`45 s`, `62.1 min`, `3.2 h`, `1,200.0 days`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"


def rounded(number: float) -> float:
    """Two digits: an estimate has no more."""
    return float(f"{number:.2g}")


def amount(number: float, unit: str, thousands: str) -> str:
    """`750 kWh`, `1.2 MWh`: a number of `unit`, or of `thousands`, which is 1000 times as large."""
    return f"{number / 1000:,.4g} {thousands}" if number >= 1000 else f"{number:.3g} {unit}"


def byte_size(n_bytes: float) -> str:
    """`18.83 GB`, `650.25 MB`."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.2f} MB"


def decimal(number: float | None, digits: int = 4) -> str:
    """`1,234.5000`, or a dash for None."""
    return "-" if number is None else f"{number:,.{digits}f}"
