"""Write the tables of README.md and results/README.md from the JSON files in this folder.

    python results/tables.py           # update the pages
    python results/tables.py --check   # exit 1 if a page differs from the files

A page marks a table's place with ``<!-- table:NAME -->`` and ``<!-- /table -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from sigmabranch import files
from sigmabranch.report import Table, ablation_table, comparison_table, main_rows, main_table
from sigmabranch.tasks import Group, find_task, group_results, read_results

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE / "README.md", HERE.parent / "docs" / "networks.md")
GROUPS = group_results(read_results(HERE))

SHARP = {
    "conversion.centred": True,
    "conversion.balanced": True,
    "finetune.resp_prior": True,
    "finetune.balance_weight": 0.3,
}
# Row of a table → the settings in which its runs depart from those of the table.
CIFAR_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "branched, the paper's loss": {"finetune.node_grad_scale": False},
    "branched, node gradients scaled": {},
    "branched, sharp routing": SHARP,
}
POINT_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "branched, the paper's loss": {},
    "branched, sharp routing": SHARP,
}
# Coarser sampling and a schedule that a CPU core gets through in two hours.
POINTS_ON_A_CPU: Mapping[str, Any] = {
    "model.centroids": [128, 32],
    "model.neighbours": [16, 16],
    "dense.epochs": 8,
    "dense.step_epochs": 1,
    "finetune.epochs": 4,
    "finetune.step_epochs": 1,
}
CONTROLS = {
    "dense-continued": "dense, trained on",
    "dense-equal": "narrow dense, equal size, from scratch",
    "single-path": "single path, no routing",
}


def runs_of(name: str, changes: Mapping[str, Any]) -> Group:
    """The runs of a task with exactly these changed settings."""
    task = find_task(name)
    for group in GROUPS:
        departures = {key: here for key, (here, _) in group.departures(task).items()}
        if group.task.name == name and departures == changes:
            return group
    raise SystemExit(f"no result of {name} with {dict(changes)} in {HERE.name}")


def cifar100_small() -> Table:
    """CIFAR-100, small ResNet: dense, controls and the branched variants."""
    return compared("CIFAR-100, ResNet of 0.57 M", "cifar100-small", {}, CIFAR_VARIANTS)


def modelnet40_on_a_cpu() -> Table:
    """ModelNet40, the paper's network on coarser samples, after a short schedule."""
    title = "ModelNet40, PointNet++ of 1.47 M"
    return compared(title, "modelnet40-pointnet2", POINTS_ON_A_CPU, POINT_VARIANTS)


def compared(
    title: str,
    name: str,
    settings: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]],
) -> Table:
    """Dense, controls and branched variants of one task under ``settings``."""
    main = runs_of(name, settings)
    dense_epochs, controls = main.task.dense.epochs, main.first["controls"]
    groups = {label: runs_of(name, {**settings, **more}) for label, more in variants.items()}
    rows = (
        _row("dense", dense_epochs, main.first["cost"]["dense"], main, "dense"),
        *(
            _row(label, controls[name]["epochs"], controls[name], main, "controls", name)
            for name, label in CONTROLS.items()
            if name in controls
        ),
        *(
            _row(label, dense_epochs + group.task.finetune.epochs, group.first["cost"]["net"],
                 group, "branched")
            for label, group in groups.items()
        ),
    )  # fmt: skip
    header = (
        title, "epochs", "parameters run", "MACs", "top-1 %",
        "routing gain", "mean max P", "balance",
    )  # fmt: skip
    return Table(header=header, groups=(("", rows),))


def demo(name: str) -> Table:
    """A demo's task over its seeds: mean ± standard deviation."""
    group = runs_of(name, {})
    cost, controls = group.first["cost"], group.first["controls"]

    def row(label: str, params: int, *where: str) -> tuple[str, ...]:
        return (label, f"{params:,}", group.spread(*where).to_text())

    active = cost["net"]["active_params"]
    rows = (
        row("dense", cost["dense"]["params"], "dense", "top1"),
        *(row(name, made["params"], "controls", name, "top1") for name, made in controls.items()),
        row("branched", active, "branched", "top1"),
        row("branched: routing gain", active, "branched", "routing_gain"),
        row("branched: balance (1 = even)", active, "branched", "balance"),
    )
    header = (
        f"{group.task.data.name}, seeds {', '.join(map(str, group.seeds))}", "parameters run",
        f"top-1 %, {group.first['branched']['samples']} held out",
    )  # fmt: skip
    return Table(header=header, groups=(("", rows),))


@cache
def paper_rows() -> list[dict[str, Any]]:
    """The figures of the paper's table III beside ours; counting them takes seconds."""
    return main_rows(GROUPS, "results")


def main_of_the_paper() -> Table:
    """The table that ``sigmabranch table main`` prints."""
    return main_table(paper_rows())


def systems(name: str) -> Table:
    """Every system on one bench, as ``sigmabranch table comparison`` prints it."""
    return comparison_table(files.read_json(HERE / f"compare-{name}.json"))


def ablations(name: str) -> Table:
    """One thing changed at a time, as ``sigmabranch table ablations`` prints it."""
    return ablation_table(files.read_json(HERE / f"compare-{name}.json"))


def entries() -> Table:
    """Accuracy right after conversion by how the levels begin."""
    networks = {"vit": "ViT of 0.48 M", "convnext": "ConvNeXt of 0.63 M"}

    def rows_of(name: str) -> tuple[tuple[str, ...], ...]:
        rows = files.read_json(HERE / "benchmarks" / f"entries-{name}.json")["rows"]
        by_entry: dict[str, dict[bool, Any]] = {}
        for row in rows:
            by_entry.setdefault(row["entry"], {})[row["norms_fitted"]] = row
        return tuple(
            (
                entry,
                both[True]["cuts"],
                f"{both[True]['active_params']:,}",
                f"{both[True]['smallest_share']:.2f}",
                *(f"{both[fitted]['top1']:.2f}" for fitted in (False, True)),
            )
            for entry, both in by_entry.items()
        )

    return Table(
        header=("entry", "cut at", "parameters run", "share kept", "top-1 %", "norms fitted"),
        groups=tuple((title, rows_of(name)) for name, title in networks.items()),
    )


def streaming() -> Table:
    """Milliseconds of one input from throttled storage, every system in one runtime."""
    measured = files.read_json(HERE / "benchmarks" / "deploy.json")["latency"]
    systems = list(dict.fromkeys(row["system"] for row in measured))
    memories = {"cold": "nothing in memory", "pinned": "the first 6.1 MB of each in memory"}

    def row(memory: str, rate: int | str) -> tuple[str, ...]:
        here = {
            one["system"]: one
            for one in measured
            if (one["memory"], one["mb_per_s"]) == (memory, rate)
        }
        path, early = here[systems[-2]], here[systems[-1]]
        return (
            str(rate),
            *(f"{here[name]['ms']:,.0f}" for name in systems),
            *(f"{one['dense_over']:.2f}" for one in (path, early)),
            *(f"{one['pruned_over']:.2f}" for one in (path, early)),
        )

    rates = list(dict.fromkeys(one["mb_per_s"] for one in measured))
    over = [f"{whole} / {part}" for whole in ("dense", "FPGM") for part in ("path", "early")]
    return Table(
        header=("MB/s", *(f"{name}, ms" for name in systems), *over),
        groups=tuple(
            (heading, tuple(row(memory, rate) for rate in rates))
            for memory, heading in memories.items()
        ),
    )


def few_bits() -> Table:
    """Accuracy of the quantized nodes on the held-out split."""
    rows = files.read_json(HERE / "quantize-cifar100-small.json")["rows"]
    return Table(
        header=("ONNX nodes", "top-1 %", "one input reads, MB", "all, MB", "take another leaf"),
        groups=(
            (
                "",
                tuple(
                    (
                        row["name"],
                        f"{row['top1']:.2f}",
                        f"{row['path_bytes'] / 1e6:.3f}",
                        f"{row['total_bytes'] / 1e6:.3f}",
                        f"{row['rerouted']:.1%}",
                    )
                    for row in rows
                ),
            ),
        ),
    )


_PERSISTENCE = {1.0: "there is one", 0.9: "nine times in ten", 0.0: "by chance"}


def streams() -> Table:
    """Bytes moved per input of a stream within a budget."""
    rows = files.read_json(HERE / "benchmarks" / "deploy-stream.json")["stream"]
    return Table(
        header=("in 42 MB of memory", "same leaf as before", "MB an input", "simulated"),
        groups=(
            (
                "",
                tuple(
                    (
                        row["system"],
                        _PERSISTENCE[row["persistence"]],
                        f"{row['measured_mb_per_input']:.1f}",
                        f"{row['simulated_mb_per_input']:.1f}",
                    )
                    for row in rows
                ),
            ),
        ),
    )


def over_the_bus() -> Table:
    """Weights streamed from the host's memory to a GPU."""
    rows = files.read_json(HERE / "benchmarks" / "deploy-gpu.json")["latency"]
    memories = {
        "whole": "GPU memory for all that is read, nothing stays",
        "equal": "GPU memory for one path, nothing stays",
        "pinned": "the same, as much as the trunk stays",
    }

    def line(row: Mapping[str, Any]) -> tuple[str, ...]:
        sizes = (f"{row[name]:.0f}" for name in ("gpu_mb", "copied_mb"))
        times = (f"{row[name]:.2f}" for name in ("ms", "p99_ms", "dense_over"))
        return (row["system"], *sizes, *times)

    return Table(
        header=("system", "GPU memory, MB", "over the bus, MB", "ms", "p99, ms", "dense / it"),
        groups=tuple(
            (heading, tuple(line(row) for row in rows if row["memory"] == memory))
            for memory, heading in memories.items()
        ),
    )


def in_eight_bits() -> Table:
    """Dense and path in eight bits on ONNX Runtime."""
    rows = files.read_json(HERE / "benchmarks" / "deploy-int8.json")["latency"]
    return Table(
        header=("MB/s", "int8", "read, MB", "ms", "one file / it", "three files / it"),
        groups=(
            (
                "",
                tuple(
                    (
                        str(row["mb_per_s"]),
                        row["system"],
                        f"{row['read_mb']:.1f}",
                        f"{row['ms']:,.0f}",
                        f"{row['over_file']:.2f}",
                        f"{row['over_parts']:.2f}",
                    )
                    for row in rows
                ),
            ),
        ),
    )


def by_vela() -> Table:
    """What Arm's compiler says of the slowest path of each tree."""
    paths = files.read_json(HERE / "benchmarks" / "vela.json")["paths"]
    networks = {"cifar100-resnet50": "ResNet-50 at 32 px", "imagenet-resnet50": "at 224 px"}
    ratios = ("ms", "weights", "off_chip", "our_bytes", "our_macs")
    of_tree: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in paths:
        of_tree.setdefault((row["chip"], row["network"], row["trunk"]), []).append(row)

    def line(network: str, trunk: float, rows: list[dict[str, Any]]) -> tuple[str, ...]:
        dense = next(row for row in rows if row["path"] == "dense")
        path = max((row for row in rows if row is not dense), key=lambda row: row["ms"])
        return (
            networks[network],
            f"{trunk:g}",
            *(f"{row['ms']:.2f}" for row in (dense, path)),
            *(f"{path[f'dense_over_{name}']:.2f}" for name in ratios),
        )

    chips = dict.fromkeys(chip for chip, _, _ in of_tree)
    return Table(
        header=("", "trunk", "dense, ms", "path, ms", "dense / path", "weights", "off-chip bytes",
                "our bytes", "our MACs"),
        groups=tuple(
            (
                f"Ethos-{chip.upper()}",
                tuple(line(name, trunk, rows) for (of, name, trunk), rows in of_tree.items()
                      if of == chip),
            )
            for chip in chips
        ),
    )  # fmt: skip


def slimmer_trunks() -> Table:
    """Trees whose trunks have fewer channels, on storage."""
    rows = files.read_json(HERE / "benchmarks" / "deploy-trunk.json")["latency"]
    rates = dict.fromkeys(row["mb_per_s"] for row in rows)

    def line(row: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            row["system"],
            f"{row['path_gmacs']:.2f}",
            f"{row['path_mb']:.1f}",
            f"{row['compute_ms']:,.0f}",
            f"{row['ms']:,.0f}",
            f"{row['dense_over']:.2f}",
        )

    return Table(
        header=("", "G MACs", "MB", "computing, ms", "ms", "dense / it"),
        groups=tuple(
            (
                f"{rate} MB/s" if rate != "unlimited" else "as fast as the disk is",
                tuple(line(row) for row in rows if row["mb_per_s"] == rate),
            )
            for rate in rates
        ),
    )


TABLES: Mapping[str, Callable[[], Table]] = {
    "ablations-cifar100-small": partial(ablations, "cifar100-small"),
    "cifar100-small": cifar100_small,
    "digits": partial(demo, "digits-resnet"),
    "shapes": partial(demo, "shapes-pointnet2"),
    "compare-cifar100-convnext": partial(systems, "cifar100-convnext"),
    "compare-cifar100-resnet50": partial(systems, "cifar100-resnet50"),
    "compare-cifar100-small": partial(systems, "cifar100-small"),
    "compare-cifar100-vit": partial(systems, "cifar100-vit"),
    "deploy-gpu": over_the_bus,
    "deploy-int8": in_eight_bits,
    "deploy-latency": streaming,
    "deploy-stream": streams,
    "deploy-trunk": slimmer_trunks,
    "deploy-vela": by_vela,
    "entries": entries,
    "main": main_of_the_paper,
    "quantize": few_bits,
    "modelnet40-cpu": modelnet40_on_a_cpu,
}


def _row(
    label: str, epochs: int, cost: Mapping[str, Any], group: Group, *where: str
) -> tuple[str, ...]:
    size = cost.get("active_params", cost.get("params"))
    routing = ("", "", "")
    if where == ("branched",):
        gain, sharpness, balance = (
            group.spread(*where, name) for name in ("routing_gain", "mean_max_p", "balance")
        )
        sign = "+" if gain.mean >= 0 else ""
        routing = (sign + gain.to_text(), sharpness.to_text(), balance.to_text())
    top1 = group.spread(*where, "top1").to_text()
    return (label, str(epochs), f"{size:,}", f"{cost['macs'] / 1e6:.2f} M", top1, *routing)


def filled(page: str) -> str:
    """The page with every marked table rendered anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]().to_markdown()}{match[3]}"

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
