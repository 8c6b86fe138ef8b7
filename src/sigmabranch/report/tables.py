"""What the branching saved and what it cost, as tables for people.

A :class:`Table` is plain text in cells; it can be printed, put into Markdown, or into a page.
"""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

from sigmabranch.tree import is_shared

NOTHING, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"

Show: TypeAlias = Callable[[float], str]
Change: TypeAlias = Callable[[float, float], str]


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

    def to_latex(self) -> str:
        """A ``tabular`` for the package booktabs, then its notes as paragraphs."""
        columns = len(self.header)
        lines = [
            rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}",
            r"\toprule",
            _ampersands(self.header),
        ]
        for heading, rows in self.groups:
            lines.append(r"\midrule")
            if heading:
                lines.append(
                    rf"\multicolumn{{{columns}}}{{p{{0.9\linewidth}}}}{{{_latex(heading)}}} \\"
                )
            lines += map(_ampersands, rows)
        lines += [r"\bottomrule", r"\end{tabular}"]
        return "\n\n".join(["\n".join(lines), *map(_latex, self.notes)]) + "\n"

    def to_csv(self) -> str:
        """Comma-separated, with the group as the first column; numbers as machines read them.

        Notes are left out.
        """
        written = io.StringIO()
        writer = csv.writer(written, lineterminator="\n")
        writer.writerow(("group", self.header[0] or "row", *self.header[1:]))
        for heading, rows in self.groups:
            for name, *cells in rows:
                writer.writerow((heading, name, *map(_machine_readable, cells)))
        return written.getvalue()

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
        controls: name → ``params``, ``macs``, ``top1`` and other values of
            networks trained for comparison; cells without a value stay empty.
    """
    theirs, ours = cost["dense"], cost["net"]
    runs = {
        "dense": _values(theirs["params"], theirs["params"], theirs["macs"], dense or {}),
        **{
            name: _values(control["params"], control["params"], control.get("macs"), control)
            for name, control in (controls or {}).items()
        },
        "branched": _values(ours["total_params"], ours["active_params"], ours["macs"], branched),
    }
    first, last = runs["dense"], runs["branched"]

    def row(name: str, key: str, show: Show, change: Change | None = None) -> tuple[str, ...]:
        cells = [_cell(show, run.get(key)) for run in runs.values()]
        both = change and first.get(key) is not None and last.get(key) is not None
        return (name, *cells, change(first[key], last[key]) if change and both else NOTHING)

    return Table(
        header=("", *runs, "change"),
        groups=tuple(
            (heading, tuple(row(*specification) for specification in rows))
            for heading, rows in _COMPARED
        ),
        notes=(sampling_note(branched), *_ceiling_note(branched), cost["convention"]),
    )


def cost_table(cost: Mapping[str, Any]) -> Table:
    """Sizes and operations alone: dense against another network, all of it and one path."""
    header, rows = ("", "dense", "stored", "one path"), _cost_rows(cost["dense"], cost["net"])
    return Table(header=header, groups=(("", tuple(rows)),), notes=(cost["convention"],))


def _cost_rows(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    yield (
        "parameters",
        *map(count, (theirs["params"], ours["total_params"], ours["active_params"])),
    )
    for name, dtype in (("fp32", "fp32"), ("fp16", "fp16"), ("int8", "int8")):
        sizes = (theirs["bytes"], ours["bytes_total"], ours["bytes_per_path"])
        yield (f"MB as {name}", *(megabytes(size[dtype]) for size in sizes))
    yield ("MACs", *map(count, (theirs["macs"], ours["soft_macs"], ours["macs"])))
    doubled = (count(part["flops_doubled"]) for part in (theirs, ours))
    yield ("FLOPs, doubled", next(doubled), NOTHING, next(doubled))
    if "routed_macs_share" in ours:  # trees only, and no result of an earlier version
        yield ("MACs routed", NOTHING, NOTHING, f"{100 * ours['routed_macs_share']:.1f}%")


def accuracy_table(evaluation: Mapping[str, Any]) -> Table:
    """One network's evaluation, figure by figure; tables are left out."""
    rows = tuple(
        (name.replace("_", " "), _plain(value))
        for name, value in evaluation.items()
        if name not in ("class_leaf_share", "best_leaf_of_class", "condition_leaf_share")
    )
    return Table(header=("", "value"), groups=(("", rows),))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "  ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return "  ".join(f"{name} {_plain(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def node_table(cost: Mapping[str, Any], usage: Mapping[str, float] | None = None) -> Table:
    """One row per node: width, parameters, MACs and, with leaf ``usage``, share of the inputs."""

    def share(key: str) -> str:
        if usage is None:
            return NOTHING
        passed = (key.rpartition("-")[0] or "root") if is_shared(key) else key
        below = [part for leaf, part in usage.items() if _is_below(leaf, passed)]
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
    total = (
        "all nodes",
        "",
        count(cost["net"]["total_params"]),
        count(cost["net"]["soft_macs"]),
        "",
    )
    path = ("one path", "", count(cost["net"]["active_params"]), count(cost["net"]["macs"]), "")
    return Table(
        header=("node", "channels", "parameters", "MACs", "inputs"),
        groups=(("", rows), ("Sums", (total, path))),
        notes=("Each node includes its router or its head.",),
    )


def count(value: float) -> str:
    """1234567 → "1,234,567"."""
    return f"{value:,.0f}"


def short(value: float) -> str:
    """1234567 → "1.23 M"."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f}"


def percent(value: float) -> str:
    """Already in percent: 76.923 → "76.92%"."""
    return f"{value:.2f}%"


def signed_points(value: float) -> str:
    """Percentage points: -0.071 → "−0.07 pp"."""
    return f"{_signed(value)} pp"


def change_percent(before: float, after: float) -> str:
    """From 200 to 150: "−25.0%"."""
    return f"{_signed(100 * (after / before - 1), 1)}%"


def change_points(before: float, after: float) -> str:
    """From 76.99 to 76.92: "−0.07 pp"."""
    return signed_points(after - before)


def fraction(value: float) -> str:
    """0.98431 → "0.984"."""
    return f"{value:.3f}"


def megabytes(value: float) -> str:
    """Bytes in units of 10^6: 37623336 → "37.62 MB"; "kB" below one."""
    return f"{value / 1e6:,.2f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"


# Heading → (name, key, how to show it, how to compare it).
_COMPARED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (
        "Size",
        (
            ("Parameters stored", "stored", count, change_percent),
            ("Parameters run per input", "run", count, change_percent),
            ("MACs per input", "macs", count, change_percent),
            ("Weights read per input, as fp32", "fp32", megabytes, change_percent),
            ("Weights read per input, as int8", "int8", megabytes, change_percent),
        ),
    ),
    (
        "Accuracy",
        (
            ("Top-1", "top1", percent, change_points),
            ("Top-5", "top5", percent, change_points),
        ),
    ),
    (
        "Routing",
        (
            ("Top-1, all leaves weighted by P", "soft_top1", percent),
            ("Top-1, mean single leaf", "mean_leaf", percent),
            ("Top-1, routes shuffled over the inputs", "shuffled_routes", percent),
            ("Routing gain over shuffled routes", "routing_gain", signed_points),
            ("Top-1, best leaf of the true class", "leaf_by_class", percent),
            ("Top-1, best leaf of each input (oracle)", "oracle_leaf", percent),
            ("Balance of the leaves (1 = even)", "balance", fraction),
            ("Mean max P of a leaf", "mean_max_p", fraction),
            ("Agreement of two leaves", "agreement", fraction),
            ("Class information in the leaf (1 = all)", "leaf_class_mi", fraction),
        ),
    ),
)


def _values(
    stored: int, run: int, macs: int | None, evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    return {**evaluation, "stored": stored, "run": run, "macs": macs, "fp32": 4 * run, "int8": run}


def _cell(show: Show, value: Any) -> str:
    return NOTHING if value is None else show(value)


def _signed(value: float, digits: int = 2) -> str:
    text = f"{value:+.{digits}f}".replace("-", _MINUS)
    return text.lstrip("+" + _MINUS) if float(f"{value:.{digits}f}") == 0 else text


def sampling_note(evaluation: Mapping[str, Any]) -> str:
    """How much the choice of the test samples alone moves an accuracy."""
    share = evaluation["top1"] / 100
    error = 100 * math.sqrt(share * (1 - share) / evaluation["samples"])
    return (
        f"Accuracy on {count(evaluation['samples'])} test samples: sampling alone moves it by "
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
        "The oracle takes whichever leaf happens to be right: it counts lucky guesses, and no "
        f"router can reach it. The best leaf of the true class is {chosen}.",
    )


def minus(text: str) -> str:
    """Numbers in a text with a minus sign for the hyphen."""
    return text.replace("-", _MINUS)


def _machine_readable(cell: str) -> str:
    """A cell for a spreadsheet: plain digits, a hyphen for minus, nothing for nothing."""
    if cell == NOTHING:
        return ""
    plain = cell.replace(_MINUS, "-")
    return re.sub(r"(?<=\d),(?=\d{3})", "", plain)


def _is_below(leaf: str, key: str) -> bool:
    return key == "root" or f"{leaf}-".startswith(f"{key}-")


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _ampersands(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex, cells)) + r" \\"


_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    NOTHING: r"\textendash{}",
    _MINUS: "$-$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text).replace("--", "-{}-")
