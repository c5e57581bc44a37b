"""Plots of a run as SVG. Equal evaluations give equal files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from gmp_atl.config import Config
from gmp_atl.evaluations import load
from gmp_atl.formats import Output, write_text
from gmp_atl.plots import PLOTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures(*, config: Config, evaluations: Path, output: Output) -> None:
    """Write one SVG for each of `plots.PLOTS`, of its name, into the folder `output`.

    Raises:
        UserError: as `evaluations.load` does, or a history or example is damaged.
    """
    run = load(config, evaluations)
    for plot in PLOTS:
        _write(plot(run), output / f"{plot.__name__}.svg")


def _write(figure: Figure, path: Path) -> None:
    import matplotlib

    stream = io.StringIO()
    # Without these two, every file would carry random identifiers and the time.
    with matplotlib.rc_context({"svg.hashsalt": "gmp-atl"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    write_text(path, stream.getvalue())
