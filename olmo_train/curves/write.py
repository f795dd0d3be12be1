"""Write curves to a file: a page or a figure, by its ending."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from olmo_train.errors import ConfigError

if TYPE_CHECKING:
    from olmo_train.curves.panels import Curves, View
    from olmo_train.curves.runs import Run


def check_format(file: Path) -> None:
    """Raises ConfigError for an ending that is not known."""
    if file.suffix not in (".html", ".png", ".svg", ".pdf"):
        raise ConfigError("--output", f"'{file.suffix}' is not a format; use .html, .png, .svg or .pdf")


def write_curves(runs: list[Run], chosen: list[Curves], file: Path, view: View) -> None:
    """Write the panels in `chosen` to `file`, whose folder is made if it is missing."""
    from olmo_train.curves import figure, page

    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".html":
        file.write_text(page.page_text(runs, chosen, view), encoding="utf-8")
    else:
        figure.write_figure(runs, chosen, file, view)
