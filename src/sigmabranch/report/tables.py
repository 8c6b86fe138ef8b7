"""What the branching saved and what it cost, as tables for people.

A :class:`Table` is plain text in cells; it can be printed, put into Markdown, or into a page.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

NOTHING = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of cells under a header.

    Attributes:
        header: one text per column; the first column names the rows.
        groups: (heading, rows); an empty heading is not shown.
        notes: footnotes, one sentence or paragraph each.
    """

    header: tuple[str, ...]
    groups: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]
    notes: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """A GitHub table; group headings are bold rows, notes paragraphs under it."""
        lines = [_pipes(self.header), "|---|" + "---:|" * (len(self.header) - 1)]
        for heading, rows in self.groups:
            if heading:
                lines.append(_pipes((f"**{heading}**", *[""] * (len(self.header) - 1))))
            lines += [_pipes(row) for row in rows]
        return "\n\n".join(["\n".join(lines), *self.notes]) + "\n"

    def to_text(self, width: int = 100) -> str:
        """Aligned columns for a terminal; notes are left out when ``width`` is 0."""
        rows = [self.header, *(row for _, rows in self.groups for row in rows)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.header))]

        def line(row: Sequence[str]) -> str:
            first, *rest = row
            cells = [cell.rjust(size) for cell, size in zip(rest, widths[1:], strict=True)]
            return "   ".join([first.ljust(widths[0]), *cells]).rstrip()

        lines = [line(self.header), "─" * (sum(widths) + 3 * (len(widths) - 1))]
        for number, (heading, group) in enumerate(self.groups):
            if number:
                lines.append("")
            lines += [heading] * bool(heading and len(self.groups) > 1)
            lines += [line(row) for row in group]
        if width:
            for note in self.notes:
                lines += ["", *textwrap.wrap(note, width)]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """A ``<table>`` in a scrolling box, then its notes; everything is escaped."""
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.header)
        body = []
        for heading, rows in self.groups:
            if heading:
                span = len(self.header)
                body.append(
                    f'<tr class="group"><th scope="colgroup" colspan="{span}">'
                    f"{escape(heading)}</th></tr>"
                )
            for name, *cells in rows:
                values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
                body.append(f'<tr><th scope="row">{escape(name)}</th>{values}</tr>')
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in self.notes)
        return (
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>{notes}"
        )


def comparison(
    cost: Mapping[str, Any],
    dense: Mapping[str, Any] | None,
    branched: Mapping[str, Any],
    controls: Mapping[str, Mapping[str, Any]] | None = None,
) -> Table:
    """The honest table: dense against branched, with controls between them if there are any.

    Args:
        cost: from :func:`sigmabranch.measure.cost`, with ``dense`` and ``net``.
        dense: evaluation of the dense network; its accuracy cells stay empty if None.
        branched: evaluation of the branched network.
        controls: name → ``params``, ``macs`` and ``top1`` of a network trained for comparison.
    """
    controls = controls or {}
    theirs, ours = cost["dense"], cost["net"]
    dense = dense or {}

    def row(
        name: str, show: Any, before: Any, after: Any, key: str = "", change: str | None = None
    ) -> tuple[str, ...]:
        middle = [_cell(show, control.get(key)) for control in controls.values()]
        if change is None:
            change = _change(before, after)
        return (name, _cell(show, before), *middle, _cell(show, after), change)

    def points(name: str, key: str) -> tuple[str, ...]:
        before, after = dense.get(key), branched[key]
        change = NOTHING if before is None else f"{_signed(after - before)} pp"
        return row(name, percent, before, after, key, change)

    size = (
        row("Parameters stored", count, theirs["params"], ours["total_params"], "params"),
        row("Parameters run per input", count, theirs["params"], ours["active_params"], "params"),
        row("MACs per input", count, theirs["macs"], ours["macs"], "macs"),
        *(
            row(f"Weights read per input, as {kind}", megabytes, theirs["bytes"][kind], path)
            for kind, path in ours["bytes_per_path"].items()
            if kind != "fp16"
        ),
    )
    accuracy = (points("Top-1", "top1"), points("Top-5", "top5"))

    def routed(name: str, show: Any, key: str) -> tuple[str, ...]:
        return row(name, show, None, branched.get(key), change=NOTHING)

    routing = (
        routed("Top-1, all leaves weighted by P", percent, "soft_top1"),
        routed("Top-1, mean single leaf", percent, "mean_leaf"),
        routed("Top-1, routes shuffled over the inputs", percent, "shuffled_routes"),
        routed("Routing gain over shuffled routes", signed_points, "routing_gain"),
        routed("Top-1, best leaf of the true class", percent, "leaf_by_class"),
        routed("Top-1, best leaf of each input (oracle)", percent, "oracle_leaf"),
        routed("Balance of the leaves (1 = even)", fraction, "balance"),
        routed("Mean max P of a leaf", fraction, "mean_max_p"),
        routed("Agreement of two leaves", fraction, "agreement"),
        routed("Information leaf–class (1 = all)", fraction, "leaf_class_mi"),
    )
    return Table(
        header=("", "dense", *controls, "branched", "change"),
        groups=(("Size", size), ("Accuracy", accuracy), ("Routing", routing)),
        notes=(_sampling_note(branched), *_ceiling_note(branched), cost["convention"]),
    )


def node_table(cost: Mapping[str, Any], usage: Mapping[str, float] | None = None) -> Table:
    """One row per node: width, parameters, MACs and, with leaf ``usage``, share of the inputs."""

    def share(key: str) -> str:
        if usage is None:
            return NOTHING
        below = [part for leaf, part in usage.items() if _is_below(leaf, key)]
        return f"{100 * sum(below):.1f}%"

    rows = tuple(
        (
            "trunk" if row["node"] == "root" else row["node"],
            count(row["width"]) if row["width"] else NOTHING,
            count(row["params"]),
            count(row["macs"]),
            share(row["node"]),
        )
        for row in cost["nodes"]
    )
    total = ("all nodes", "", count(cost["net"]["total_params"]), count(cost["net"]["soft_macs"]), "")
    path = ("one path", "", count(cost["net"]["active_params"]), count(cost["net"]["macs"]), "")
    return Table(
        header=("node", "channels", "parameters", "MACs", "inputs"),
        groups=(("", rows), ("Sums", (total, path))),
        notes=("Each node includes its router or its head.",),
    )


def count(value: float) -> str:
    """1234567 → "1,234,567"."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """Already in percent: 76.923 → "76.92%"."""
    return f"{value:.2f}%"


def signed_points(value: float) -> str:
    """Percentage points: -0.071 → "−0.07 pp"."""
    return f"{_signed(value)} pp"


def fraction(value: float) -> str:
    """0.98431 → "0.984"."""
    return f"{value:.3f}"


def megabytes(value: float) -> str:
    """Bytes in units of 10^6: 37623336 → "37.62 MB"; "kB" below one."""
    return f"{value / 1e6:,.2f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"


def _cell(show: Any, value: Any) -> str:
    return NOTHING if value is None else show(value)


def _change(before: float, after: float) -> str:
    return f"{_signed(100 * (after / before - 1), 1)}%"


def _signed(value: float, digits: int = 2) -> str:
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text.lstrip("+−") if float(f"{value:.{digits}f}") == 0 else text


def _sampling_note(evaluation: Mapping[str, Any]) -> str:
    share = evaluation["top1"] / 100
    error = 100 * math.sqrt(share * (1 - share) / evaluation["samples"])
    return (
        f"Accuracy on {count(evaluation['samples'])} held-out samples: sampling alone moves it by "
        f"±{error:.2f} pp (one standard error); read smaller differences as none."
    )


def _ceiling_note(evaluation: Mapping[str, Any]) -> tuple[str, ...]:
    source = evaluation.get("leaf_by_class_from")
    if source is None:
        return ()
    chosen = (
        "chosen on the training split"
        if source == "training split"
        else "chosen on these same samples, which flatters it"
    )
    return (
        "The oracle takes whichever leaf happens to be right and is no ceiling for a router; "
        f"knowing the true class is, with each class's best leaf {chosen}.",
    )


def _is_below(leaf: str, key: str) -> bool:
    return key == "root" or f"{leaf}-".startswith(f"{key}-")


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
