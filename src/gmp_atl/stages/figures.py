"""Plots of a run as SVG. Equal evaluations give equal files."""

from __future__ import annotations

from pathlib import Path

from gmp_atl.config import Config
from gmp_atl.evaluations import load
from gmp_atl.files import Output, write_text
from gmp_atl.plots import PLOTS, svg


def figures(*, config: Config, evaluations: Path, output: Output) -> None:
    """Write one SVG for each of `plots.PLOTS`, of its name, into the folder `output`.

    Raises:
        UserError: as `evaluations.load` does, or a history or example is damaged.
    """
    run = load(config, evaluations)
    for plot in PLOTS:
        write_text(output / f"{plot.__name__}.svg", svg(plot(run)))
