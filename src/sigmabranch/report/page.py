"""One run as a folder of pictures and a single-file page that opens offline, on any screen.

The pictures are inlined as SVG whose inks become CSS variables, so that they follow the reader's
light or dark mode with the text around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from sigmabranch.files import atomic_write
from sigmabranch.report import figures, style
from sigmabranch.report.proposal_table import proposal_table
from sigmabranch.report.tables import (
    Table,
    change_percent,
    comparison,
    node_table,
    percent,
    short,
    signed_points,
)

_INKS = {style.INK: "ink", style.MUTED: "muted", style.RULE: "rule", style.PAPER: "paper"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a report shows, as the plain dictionaries that a run writes.

    Attributes:
        title: what was run, normally the task's name.
        cost: from :func:`sigmabranch.measure.cost`, with ``dense`` and ``net``.
        evaluation: of the branched network.
        dense_evaluation: of the dense network.
        record: the conversion record.
        dense_history, finetune_history: one row per epoch.
        recipe: settings, by section.
        provenance: name → value: command, seed, commit, data, hardware, date, …
        warnings: one line each, shown first.
        class_names: one per class; numbers if None.
        controls: see :func:`~sigmabranch.report.tables.comparison`.
    """

    title: str
    cost: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    dense_evaluation: Mapping[str, Any] | None
    record: Mapping[str, Any]
    dense_history: Sequence[Mapping[str, Any]] = ()
    finetune_history: Sequence[Mapping[str, Any]] = ()
    recipe: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    class_names: Sequence[str] | None = None
    controls: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def usage(self) -> dict[str, float]:
        """Leaf → fraction of the inputs."""
        return dict(zip(self.evaluation["leaves"], self.evaluation["usage"], strict=True))

    @property
    def table(self) -> Table:
        """Dense against branched."""
        return comparison(self.cost, self.dense_evaluation, self.evaluation, self.controls)


def write_report(run: Run, folder: Path | str) -> Path:
    """Write ``report.html``, ``table.md`` and ``figures/*.png`` and ``*.svg`` into ``folder``.

    Returns:
        The page's path. The page needs none of the other files.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    pictures = []
    for name, (caption, draw) in _pictures(run).items():
        _, svg = style.save_figure(draw(), folder / "figures" / name)
        pictures.append((caption, inline_svg(svg.read_text(encoding="utf-8"), name, caption)))
    page = folder / "report.html"
    for path, text in (
        (folder / "table.md", run.table.to_markdown()),
        (page, _page(run, pictures)),
    ):
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return page


def _pictures(run: Run) -> dict[str, tuple[str, Any]]:
    """File name → (caption, function that draws it)."""
    dense_top1 = run.dense_evaluation["top1"] if run.dense_evaluation else None
    pictures: dict[str, tuple[str, Any]] = {
        "tree": (
            "The trunk runs for every input, then one box per level. The router at the end of each "
            "box chooses the next.",
            partial(figures.tree_figure, run.cost, run.usage),
        ),
        "classes": (
            "Share of each class that each leaf receives; under the leaf's name, its share of all "
            "inputs. Steps mean that the tree sorts by class, a blur that it does not.",
            partial(figures.class_leaf_map, run.evaluation, run.class_names),
        ),
    }
    if any(split["channel_mean"] for split in run.record["splits"].values()):
        pictures["channels"] = (
            "Mean activation of every channel of the dense stage in the clusters of each "
            "split. Channels strong in all are shared, channels that tell the clusters apart "
            "belong to one branch.",
            partial(figures.channel_partition, run.record),
        )
    if run.dense_history or run.finetune_history:
        pictures["training"] = (
            "Sharp routing has a mean max P well above the dashed line. Leaves that agree almost "
            "always, and a routing gain near zero, are one path stored several times.",
            partial(
                figures.training_curves,
                run.dense_history,
                run.finetune_history,
                leaves=len(run.evaluation["leaves"]),
                dense_top1=dense_top1,
            ),
        )
    return pictures


def _page(run: Run, pictures: Iterable[tuple[str, str]]) -> str:
    proposal = run.record.get("proposal")
    environment = Environment(
        loader=PackageLoader("sigmabranch.report"), autoescape=True, trim_blocks=True
    )
    return environment.get_template("report.html").render(
        run=run,
        tiles=_tiles(run),
        table=Markup(run.table.to_html()),
        nodes=Markup(node_table(run.cost, run.usage).to_html()),
        proposal=Markup(proposal_table(proposal).to_html()) if proposal else None,
        pictures=[(caption, Markup(svg)) for caption, svg in pictures],
    )


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(big figure, its name, what it is compared with): the run in four glances."""
    dense, net, top1 = run.cost["dense"], run.cost["net"], run.evaluation["top1"]
    tiles = [
        (
            change_percent(before, after),
            name,
            f"{short(after)}, dense {short(before)}",
        )
        for name, before, after in (
            ("parameters run", dense["params"], net["active_params"]),
            ("MACs per input", dense["macs"], net["macs"]),
        )
    ]
    if run.dense_evaluation:
        before = run.dense_evaluation["top1"]
        compared = f"{percent(top1)}, dense {percent(before)}"
        tiles.append((signed_points(top1 - before), "top-1", compared))
    else:
        tiles.append((percent(top1), "top-1", "one path per input"))
    gain = run.evaluation["routing_gain"]
    tiles.append((signed_points(gain), "routing gain", "over shuffled routes"))
    return tiles


def inline_svg(svg: str, prefix: str, label: str) -> str:
    """An SVG file as an element of a page: own ids, the page's colours, a text for the blind."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    for colour, variable in _INKS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
    opening = f'<svg role="img" aria-label="{Markup.escape(label)}" style="--width:{width:.0f}pt"'
    svg = re.sub(r'^<svg width="[^"]+" height="[^"]+"', opening, svg)
    return svg
