"""The page of the support sweep, written from its rows alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

INTRODUCTION = """\
# Model support

Which networks convert, at which price, and what happens where one does not. Written by
`python -m benchmarks.support --json results/support.json --markdown MODEL_SUPPORT.md` from
[results/support.json](results/support.json); a test compares the two. Any other network of timm is
tried with `--models NAME`.

{summary}

Every network is untrained, with random norms and layer scales, so that no zero hides a mistake; its
input is the smallest of 64, 96 and its own size that it takes. Its forward is followed
(`sb.as_backbone`), its channels are traced, and a tree of two levels and four leaves is solved for
half of the dense parameters or, where even the smallest path is larger, for the middle between that
path and the dense network (marked *m*). It is converted on eight random inputs.

- **exact**: every path computes what the dense network computes with the dropped channels set to
  zero, to 1e-5 of the largest logit in fp64.
- **approximate**: channels are dropped under an operation that looks at all of them at once, such
  as a layer norm; the table says which, and in how many of the groups of channels that are cut. The
  rest is exact: with these operations replaced by sums, which zeros do not change, the path again
  equals the masked dense network to 1e-5. Conversion fits the layer norms' scales and shifts to
  what the dense ones gave (`conversion.affine_samples`); fine-tuning does the rest.
- **kept *n***: in *n* forwards a number of channels is written where it should be read from the
  tensor. Those channels are kept whole, and cuts are made elsewhere; the JSON file names the
  modules.
- **refused**: conversion stopped with one line that names the operation, and nothing was built.

No outcome is taken on trust. Besides the check of every piece when it is cut, each path was
compared from the input to the logits, and the parameters of the built paths were counted.

**After a refusal.** If it names an operation without a rule, say in `sigmabranch.coupling.rules`
what the operation does to channels ([how](CONTRIBUTING.md#add-a-rule)), or rewrite the module. If a
size is written into a forward, read it from the tensor instead (`x.shape`, `flatten`). If the
forward cannot be followed, or hands on several tensors at once, describe the network with a
`sb.Backbone` ([example](examples/minimal.py)), or name other places with `tree.cuts`.

*Begins by* lists how a level may begin, each shown by a conversion: *project* makes new channels,
*inner* keeps the channels and cuts inside the blocks, *gather* takes some of its input's channels.
*Path* is the active share of the parameters, *spent* its part of what was asked for. Seconds are
those of following, tracing and converting, on {hardware}.
"""

_TIMES = "\N{MULTIPLICATION SIGN}"
_COLUMNS = (
    *("family", "model", "input", "parameters", "outcome", "cut at", "begins by"),
    *("smallest path", "path", "spent", "seconds"),
)


def page(result: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    rows = list(result["rows"].values())
    refused = [row for row in rows if row["outcome"] not in ("exact", "approximate")]
    notes = {row["name"]: number for number, row in enumerate(refused, start=1)}
    hardware = result["provenance"]["hardware"]
    parts = [INTRODUCTION.format(summary=_summary(rows), hardware=hardware)]
    for group in dict.fromkeys(row["group"] for row in rows):
        members = [row for row in rows if row["group"] == group]
        parts.append(f"## {group}\n\n{_table([_cells(row, notes) for row in members])}\n")
    if refused:
        reasons = [f"{notes[row['name']]}. `{row['name']}`: {row['reason']}" for row in refused]
        parts.append("## Refused\n\n" + "\n".join(reasons) + "\n")
    parts.append(_origin(result))
    return "\n".join(parts)


def _summary(rows: Sequence[Row]) -> str:
    timm = [row for row in rows if row.get("origin") == "timm"]
    found = Counter(row["outcome"] for row in timm)
    converted = found["exact"] + found["approximate"]
    families = len({row["family"] for row in timm})
    others = [row for row in rows if row not in timm]
    return (
        f"Of {len(timm)} networks of timm, from {families} families, {converted} convert: "
        f"{found['exact']} exactly, {found['approximate']} approximately. "
        f"{len(timm) - converted} are refused. Of {len(others)} networks without timm, "
        f"{sum(row['outcome'] in ('exact', 'approximate') for row in others)} convert."
    )


def _cells(row: Row, notes: Mapping[str, int]) -> list[str]:
    first = [row["family"], f"`{row['name']}`{_less(row)}"]
    if "input" not in row:
        return [*first, "", "", f"{row['outcome']} [{notes[row['name']]}]", *[""] * 6]
    first += [_TIMES.join(map(str, row["input"])), f"{row['params']:,}"]
    if row["name"] in notes:
        return [*first, f"{row['outcome']} [{notes[row['name']]}]", *[""] * 5, _seconds(row)]
    middle = " *m*" if row["request"] == "middle" else ""
    return [
        *first,
        _outcome(row),
        ", ".join(f"`{cut}`" for cut in row["cuts"]),
        ", ".join(entry for entry, found in row["entries"].items() if found["cuts"]),
        f"{row['smallest_params']:,}",
        f"{row['active_params'] / row['params']:.1%}{middle}",
        f"{row['spent']:.2%}",
        _seconds(row),
    ]


def _less(row: Row) -> str:
    """What was left out of a large network."""
    return "".join(f", {name} {value}" for name, value in row.get("less", {}).items())


def _outcome(row: Row) -> str:
    whole = f", kept {len(row['whole'])}" if row["whole"] else ""
    if row["outcome"] == "exact":
        return f"exact{whole}"
    names = ", ".join(name.replace("_", " ") for name in row["inexact_by"])
    return f"approximate: {names} in {row['groups_inexact']} of {row['groups_cut']}{whole}"


def _seconds(row: Row) -> str:
    found = row["seconds"]
    phases = [phase for phase in ("follow", "trace", "convert") if phase in found]
    return " + ".join(f"{found[phase]:.1f}" for phase in phases)


def _table(rows: Iterable[Sequence[str]]) -> str:
    lines = [_COLUMNS, ["---"] * 7 + ["---:"] * 4, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _origin(result: Mapping[str, Any]) -> str:
    made = result["provenance"]
    return (
        f"Measured {made['date']} with sigmabranch {made['version']}, Python {made['python']}, "
        f"torch {made['torch']}, timm {made['timm']}, seed {result['seed']}. The JSON file "
        "also has the memory, widths, shares and errors of every row.\n"
    )
