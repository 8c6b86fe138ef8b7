"""What a package holds, node by node."""

from __future__ import annotations

from sigmabranch.deploy import Package
from sigmabranch.report.tables import NOTHING, Table


def package_table(package: Package) -> Table:
    """One row per node, and what one input reads."""
    rows = tuple(
        (
            key,
            str(len(node.blocks)),
            f"{node.weight_bytes / 1e6:.3f}",
            f"{package.usage[key]:.1%}" if key in package.usage else NOTHING,
        )
        for key, node in package.nodes.items()
    )
    paths = [package.path_bytes(leaf) for leaf in package.leaves]
    total = sum(node.weight_bytes for node in package.nodes.values())
    least, most = min(paths), max(paths)
    read = f"{most / 1e6:.3f}" if least == most else f"{least / 1e6:.3f} to {most / 1e6:.3f}"
    return Table(
        header=("node", "blocks", "MB", "inputs"),
        groups=(("", rows),),
        notes=(
            f"{package.folder}: {total / 1e6:.3f} MB of weights in fp32, of which one input reads "
            f"{read} MB.",
        ),
    )
