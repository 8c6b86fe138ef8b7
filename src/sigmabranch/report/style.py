"""How every picture looks: one palette, one typeface, one way to save.

Colours tell branches apart for colour-blind readers, and keep their contrast on light and on dark
paper; the page swaps :data:`INK`, :data:`MUTED`, :data:`RULE` and :data:`PAPER` in the dark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

from sigmabranch.files import atomic_write

INK = "#1d2330"
MUTED = "#6a7282"
RULE = "#dfe3ea"
PAPER = "#fefefe"
BRANCH = ("#2f6fdb", "#dd7a1c", "#c73a63", "#8a8f1a")
SHARED = "#20a387"
BOTH = "#a24fc4"
DROPPED = "#aab2bf"
DENSE = "#7d8797"

_LEAVES = LinearSegmentedColormap.from_list("leaves", ["#1f4fb0", "#46a0e6", "#efae3e", "#cf4f17"])
_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # the first is matplotlib's own
    "font.size": 9.0,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.facecolor": PAPER,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's settings inside the block; the caller's own return afterwards."""
    with matplotlib.rc_context(_RC):
        yield


def branch_colour(branch: int) -> str:
    """The colour of a branch; from the fifth on they come again."""
    return BRANCH[branch % len(BRANCH)]


def leaf_colours(leaves: int) -> list[str]:
    """One colour per leaf, from blues at the left to oranges at the right."""
    return [to_hex(_LEAVES(leaf / max(leaves - 1, 1))) for leaf in range(leaves)]


def ink_on(colour: Sequence[float], opacity: float) -> str:
    """A text colour that reads on ``colour`` laid over the paper, be that light or dark.

    Where the paper shines through it is :data:`INK`, which follows the paper; on a full deep
    colour white, on a full light one near-black.
    """
    red, green, blue = (channel**2.2 for channel in colour)
    deep = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.25
    if opacity < (0.55 if deep else 0.7):
        return INK
    return "#ffffff" if deep else "#101319"


def bare(axes: Axes) -> None:
    """Take frame, ticks and grid away, for pictures that are no charts."""
    axes.set_axis_off()
    axes.grid(False)


def canvas(width: float, height: float, title: str, detail: str) -> Figure:
    """A figure (inches) with a title, one explaining line under it, and the rest for panels."""
    figure = Figure(figsize=(width, height))
    figure.text(0.1 / width, 1 - 0.1 / height, title, va="top", fontsize=12.5, fontweight="bold")
    figure.text(0.1 / width, 1 - 0.38 / height, detail, va="top", fontsize=9, color=MUTED)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.66 / height))
    return figure


def save_figure(
    figure: Figure, stem: Path | str, *, formats: Sequence[str] = ("png", "svg")
) -> tuple[Path, ...]:
    """Write ``stem.png`` and ``stem.svg``, atomically and with the same bytes every time.

    Returns:
        The paths, in the order of ``formats``.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    stem = Path(stem)
    paths = tuple(stem.with_name(f"{stem.name}.{suffix}") for suffix in formats)
    # The salt names the clip paths; without it an SVG differs from one run to the next.
    with matplotlib.rc_context({**_RC, "svg.hashsalt": stem.name}):
        for path, suffix in zip(paths, formats, strict=True):
            with atomic_write(path) as temporary:
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(temporary, format=suffix, metadata=metadata)
    return paths
