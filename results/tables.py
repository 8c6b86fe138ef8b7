"""Write the tables of README.md and results/README.md from the JSON files in this folder.

    python results/tables.py           # update the pages
    python results/tables.py --check   # exit 1 if a page differs from the files

A page marks a table's place with ``<!-- table:NAME -->`` and ``<!-- /table -->``.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE / "README.md")


def read(name: str) -> dict[str, Any]:
    """One result by file name without suffix."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def cifar100_small() -> str:
    """CIFAR-100, small ResNet: dense, controls and the branched variants, one seed."""
    main = read("cifar100-small-seed0")
    variants = {
        "branched, the paper's loss": read("cifar100-small-paper-seed0"),
        "branched, node gradients scaled": main,
        "branched, sharp routing": read("cifar100-small-sharp-seed0"),
    }
    dense_epochs = main["task"]["dense"]["epochs"]
    controls = main["controls"]
    rows = [
        _row("dense", dense_epochs, main["cost"]["dense"], main["dense"]),
        *(
            _row(label, controls[name]["epochs"], controls[name], controls[name])
            for label, name in (
                ("dense, trained on", "dense-continued"),
                ("narrow dense, equal size, from scratch", "dense-equal"),
                ("single path, no routing", "single-path"),
            )
        ),
        *(
            _row(label, dense_epochs + result["task"]["finetune"]["epochs"],
                 result["cost"]["net"], result["branched"])
            for label, result in variants.items()
        ),
    ]  # fmt: skip
    header = (
        "CIFAR-100, ResNet of 0.57 M", "epochs", "parameters run", "MACs", "top-1 %",
        "routing gain", "mean max P", "balance",
    )  # fmt: skip
    return _markdown(header, rows)


def digits() -> str:
    """The demo's task over its seeds: mean ± standard deviation."""
    runs = [read(f"digits-resnet-seed{seed}") for seed in range(3)]
    first = runs[0]

    def row(label: str, params: int, pick: Callable[[Mapping[str, Any]], float]) -> list[str]:
        values = [pick(run) for run in runs]
        spread = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        return [label, f"{params:,}", spread]

    dense, net, controls = first["cost"]["dense"], first["cost"]["net"], first["controls"]
    active = net["active_params"]

    def control(name: str) -> list[str]:
        return row(name, controls[name]["params"], lambda run: run["controls"][name]["top1"])

    rows = [
        row("dense", dense["params"], lambda run: run["dense"]["top1"]),
        *map(control, controls),
        row("branched", active, lambda run: run["branched"]["top1"]),
        row("branched: routing gain", active, lambda run: run["branched"]["routing_gain"]),
        row("branched: balance, %", active, lambda run: 100 * run["branched"]["balance"]),
    ]
    return _markdown(("digits, 3 seeds", "parameters run", "top-1 %, 500 held out"), rows)


TABLES: Mapping[str, Callable[[], str]] = {"cifar100-small": cifar100_small, "digits": digits}


def _row(label: str, epochs: int, cost: Mapping[str, Any], measured: Mapping[str, Any]) -> list:
    gain = measured.get("routing_gain")
    return [
        label,
        str(epochs),
        f"{cost.get('active_params', cost.get('params')):,}",
        f"{cost['macs'] / 1e6:.2f} M",
        f"{measured['top1']:.2f}",
        "" if gain is None else f"{gain:+.2f}",
        "" if gain is None else f"{measured['mean_max_p']:.2f}",
        "" if gain is None else f"{measured['balance']:.2f}",
    ]


def _markdown(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(page: str) -> str:
    """The page with every marked table rendered anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table:(\S+) -->\n).*?(<!-- /table -->)", fill, page, flags=re.DOTALL)


def main() -> int:
    """Update or check the pages."""
    stale = []
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            stale.append(page)
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{'stale' if '--check' in sys.argv else 'updated'}: {page.name}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
