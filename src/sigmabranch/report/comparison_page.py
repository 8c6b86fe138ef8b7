"""A comparison as a folder: the table in three forms, pictures, and a page that needs neither."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from sigmabranch.files import atomic_write
from sigmabranch.report import style
from sigmabranch.report.ablation_table import compared_ablations
from sigmabranch.report.compared import Compared, Entry
from sigmabranch.report.comparison import compared_table
from sigmabranch.report.comparison_figures import accuracy_by_bytes, accuracy_by_macs
from sigmabranch.report.comparison_reader import read_comparison
from sigmabranch.report.leaf_maps import leaf_maps
from sigmabranch.report.page import inline_svg
from sigmabranch.report.recipe_table import written
from sigmabranch.report.tables import Table, change_percent, percent, signed_points

_CLOSE = 1.01  # what costs up to so much more counts as no more


def write_comparison(found: Mapping[str, Any], folder: Path | str) -> tuple[Table, Path]:
    """Write ``index.html``, ``comparison.csv``, ``.md``, ``.tex`` and the figures into ``folder``.

    Args:
        found: what ``sigmabranch compare`` writes.
        folder: made if it is missing.

    Returns:
        The table, and the path of the page, which needs none of the other files.

    Raises:
        CheckpointError, ConfigError: see :func:`.read_comparison`;
            CheckpointError also where the folder cannot be written.
    """
    folder, compared = Path(folder), read_comparison(found)
    table = compared_table(compared)
    pictures = []
    for name, (caption, draw) in _pictures(compared).items():
        _, svg = style.save_figure(draw(), folder / "figures" / name)
        pictures.append((caption, inline_svg(svg.read_text(encoding="utf-8"), name, caption)))
    page = folder / "index.html"
    for path, text in (
        (folder / "comparison.csv", table.to_csv()),
        (folder / "comparison.md", table.to_markdown()),
        (folder / "comparison.tex", table.to_latex()),
        (page, _page(compared, table, pictures)),
    ):
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return table, page


def _pictures(compared: Compared) -> dict[str, tuple[str, Any]]:
    """File name → (caption, function that draws it)."""
    pictures: dict[str, tuple[str, Any]] = {
        "accuracy-bytes": (
            "Top-1 against the bytes of weights that one input reads at batch 1, as stored.",
            partial(accuracy_by_bytes, compared),
        ),
        "accuracy-macs": (
            "Top-1 against the multiply-adds of one input.",
            partial(accuracy_by_macs, compared),
        ),
    }
    if any(entry.routing for entry in compared.entries):
        pictures["leaves"] = (
            "Share of each class that each leaf receives, for the first seed of every row with a "
            "tree. Colours are leaves; those of two rows have nothing to do with each other.",
            partial(leaf_maps, compared),
        )
    return pictures


def _page(compared: Compared, table: Table, pictures: Iterable[tuple[str, str]]) -> str:
    environment = Environment(
        loader=PackageLoader("sigmabranch.report"), autoescape=True, trim_blocks=True
    )
    ablated = compared.branched and compared.ablations
    return environment.get_template("comparison.html").render(
        compared=compared,
        tiles=list(_tiles(compared)),
        table=Markup(table.to_html()),
        ablations=Markup(compared_ablations(compared).to_html()) if ablated else "",
        pictures=[(caption, Markup(svg)) for caption, svg in pictures],
        settings={entry.name: _settings(entry) for entry in compared.entries},
    )


def _tiles(compared: Compared) -> Iterator[tuple[str, str, str]]:
    """(big figure, its name, what it is compared with): how the branched network fares."""
    branched, dense = compared.branched, compared.reference
    if branched is None:
        return
    ours = branched.top1.mean
    yield (
        change_percent(dense.read.mean, branched.read.mean),
        "weights read per input",
        "against the source network",
    )
    yield (
        signed_points(ours - dense.top1.mean),
        "top-1 against the source",
        f"{percent(ours)}, source {percent(dense.top1.mean)}",
    )
    for group in ("peers", "controls"):
        rival = _rival(branched, compared.groups.get(group, ()))
        change = rival and branched.change_from(rival)
        if rival and change:
            yield (
                signed_points(change.mean),
                f"top-1 against the best of the {group}",
                f"{rival.name}, {percent(rival.top1.mean)}, reads about as much or less; "
                f"over {change.n} common seed{'s' * (change.n > 1)}",
            )


def _rival(branched: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The most accurate system that reads about as much on average, or less."""
    affordable = [
        entry
        for entry in entries
        if not entry.ceiling and entry.read.mean <= _CLOSE * branched.read.mean
    ]
    return max(affordable, key=lambda entry: entry.top1.mean, default=None)


def _settings(entry: Entry) -> dict[str, str]:
    """Name → value of the system's settings, then of its recipe."""
    system = {name: value for name, value in entry.system.items() if name != "name"}
    recipe = {f"recipe {name}": value for name, value in (entry.recipe or {}).items()}
    values = {name: written(value) for name, value in (system | recipe).items()}
    return {"system": entry.system["name"], **values}
