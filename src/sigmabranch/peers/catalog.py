"""Every system by name, and the rows of a comparison."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sigmabranch.errors import ConfigError, ConversionError, MissingDependency
from sigmabranch.peers.branched import SigmaBranch
from sigmabranch.peers.controls import DenseContinued, DenseEqual, SinglePath
from sigmabranch.peers.decisionet import DecisioNet
from sigmabranch.peers.deepmoe import DeepMoE
from sigmabranch.peers.efficient import Efficient
from sigmabranch.peers.ffn_moe import FfnMoE
from sigmabranch.peers.fpgm import Fpgm
from sigmabranch.peers.hrank import HRank
from sigmabranch.peers.quantized import DenseInt8
from sigmabranch.peers.rerouted import FlatRouting, HashRouting, Rerouted
from sigmabranch.peers.sizing import active_params
from sigmabranch.peers.skipnet import SkipNet
from sigmabranch.peers.system import System
from sigmabranch.peers.torch_pruning import Magnitude, Taylor
from sigmabranch.tasks import Task, find_task

#: Every system by its name.
SYSTEMS: Mapping[str, type[System]] = {
    system.name: system
    for system in (
        SigmaBranch,
        DenseContinued,
        DenseEqual,
        SinglePath,
        Rerouted,
        HashRouting,
        FlatRouting,
        DenseInt8,
        Efficient,
        Fpgm,
        HRank,
        Magnitude,
        Taylor,
        SkipNet,
        DeepMoE,
        DecisioNet,
        FfnMoE,
    )
}

#: Systems of other papers, as rows; each is sized to the tree's active parameters.
PEERS: Mapping[str, System] = {
    "fpgm": Fpgm(convention="coupled"),
    "hrank": HRank(convention="physical"),
    "hrank-progressive": HRank(mode="progressive", convention="physical"),
    "l1": Magnitude(),
    "taylor": Taylor(),
    "skipnet": SkipNet(),
    "deepmoe": DeepMoE(),
    "decisionet": DecisioNet(),
    "decisionet-tree": DecisioNet(topology="tree"),
    "decisionet-source": DecisioNet(topology="tree", start="source"),
    "ffn-moe": FfnMoE(),
    "ffn-moe-untrained": FfnMoE(tuned=False),
}

#: Networks without the routing, or with another.
CONTROLS: Mapping[str, System] = {
    "single-path": SinglePath(),
    "single-path-compute": SinglePath(match="training"),
    "dense-equal": DenseEqual(),
    "dense-equal-macs": DenseEqual(match="macs"),
    "dense-equal-distilled": DenseEqual(distill_weight=0.5),
    "dense-continued": DenseContinued(),
    "dense-int8": DenseInt8(),
    "regnety": Efficient(),
    "random-routing": Rerouted(rule="random"),
    "shuffled-routing": Rerouted(rule="shuffled"),
    "class-leaf": Rerouted(rule="class"),
    "oracle-leaf": Rerouted(rule="oracle"),
    **{f"always-leaf-{leaf}": Rerouted(rule=str(leaf)) for leaf in range(4)},
    "hash-routing": HashRouting(),
    "flat-routing": FlatRouting(),
}


def _changed(*settings: str) -> SigmaBranch:
    return SigmaBranch(settings=settings)


#: The branched network with one thing changed at a time (the paper's table VI, and more).
ABLATIONS: Mapping[str, System] = {
    "random-partition": _changed("conversion.channels=random"),
    "uniform-channels": _changed("conversion.channels=uniform"),
    "no-responsibility": _changed("finetune.resp_weight=0"),
    "no-sharing": _changed("conversion.shared_fraction=0"),
    "shared-25": _changed("conversion.shared_fraction=0.25"),
    "shared-75": _changed("conversion.shared_fraction=0.75"),
    "temperature-0.5": _changed("finetune.resp_temperature=0.5"),
    "temperature-2": _changed("finetune.resp_temperature=2"),
    "centred": _changed("conversion.centred=true"),
    "centred-pca": _changed("conversion.centred=true", "conversion.projection=pca"),
    "node-scale": _changed("finetune.node_grad_scale=true"),
    "no-node-scale": _changed("finetune.node_grad_scale=false"),
    "sharp": _changed(
        "conversion.centred=true", "conversion.balanced=true",
        "finetune.resp_prior=true", "finetune.balance_weight=0.3",
    ),
    "shared-first": _changed(
        "conversion.centred=true", "conversion.balanced=true", "finetune.resp_prior=true",
        "finetune.balance_weight=0.3", "finetune.share_first=0.7",
    ),
    "class-clusters": _changed(
        "conversion.clusters=classes", "finetune.class_target=true", "finetune.resp_prior=false",
        "finetune.resp_weight=1",
    ),
    "distilled": _changed("finetune.distill_weight=0.5"),
    **{
        f"depth-{depth}": SigmaBranch(settings=(f"tree.depth={depth}",), same_size=True)
        for depth in (1, 3)
    },
    "slim-trunk-50": _changed("tree.trunk_share=0.5"),
    "slim-trunk-75": _changed("tree.trunk_share=0.75"),
    "early-trunk": SigmaBranch(trunk_left=0),
    "early-inside": SigmaBranch(trunk_left=1),
    **{f"active-{share}": SigmaBranch(active_share=share / 100) for share in (15, 25, 50, 60)},
}  # fmt: skip


def _sized(share: int) -> dict[str, System]:
    """A tree whose paths have so many percent of the parameters, and controls of that size."""
    name, active = f"active-{share}", share / 100
    return {
        name: SigmaBranch(active_share=active),
        f"{name}-path": SinglePath(active_share=active),
        f"{name}-dense": DenseEqual(active_share=active),
        f"{name}-distilled": DenseEqual(active_share=active, distill_weight=0.5),
    }


#: Smaller trees, each beside networks of its own size that do not route.
SIZES: Mapping[str, System] = {**_sized(15), **_sized(20), **_sized(25)}

#: Groups that ``--rows`` knows beside single rows.
GROUPS: Mapping[str, Mapping[str, System]] = {
    "branched": {"sigma-branch": SigmaBranch()},
    "peers": PEERS,
    "controls": CONTROLS,
    "sizes": SIZES,
    "ablations": ABLATIONS,
}


def find_system(name: str, settings: Mapping[str, Any] | None = None) -> System:
    """A system by its name, or a row by its own, with settings changed.

    Raises:
        ConfigError: an unknown name or setting; the message lists the known ones.
    """
    rows = {name: row for group in GROUPS.values() for name, row in group.items()}
    if name not in rows and name not in SYSTEMS:
        raise ConfigError(f"unknown peer {name!r}: {_known(name, [*SYSTEMS, *rows])}")
    system = rows[name] if name in rows else SYSTEMS[name]()
    return system.changed(settings) if settings else system


def published_counts() -> dict[str, dict[str, Any]]:
    """Counts on ResNet-50 at 224 pixels that printed figures of other systems refer to."""
    task = find_task("imagenet-resnet50")
    systems = {
        "sigma-branch": SigmaBranch(),
        **{
            f"fpgm rate={rate} {convention}": Fpgm(rate=rate, convention=convention)
            for rate in (0.3, 0.4)
            for convention in ("inner", "official", "coupled")
        },
        **{
            f"hrank rates=62 {convention}": HRank(convention=convention)
            for convention in ("literal", "official", "physical")
        },
        "skipnet": SkipNet(),
        "deepmoe": DeepMoE(),
    }
    return {name: system.count(task) for name, system in systems.items()}


def groups_of(rows: Iterable[str]) -> dict[str, list[str]]:
    """Group → those of its rows that are among ``rows``; the rest under "others"."""
    rows = list(rows)
    grouped = {
        group: [name for name in rows if name in members] for group, members in GROUPS.items()
    }
    known = {name for names in grouped.values() for name in names}
    grouped["others"] = [name for name in rows if name not in known]
    return {group: names for group, names in grouped.items() if names}


def find_control(name: str) -> System:
    """A control by its name.

    Raises:
        ConfigError: there is none; the message lists the known ones.
    """
    if name not in CONTROLS:
        raise ConfigError(f"unknown control {name!r}: {_known(name, CONTROLS)}")
    return CONTROLS[name]


def find_rows(
    task: Task, names: Iterable[str], settings: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, System], dict[str, str]]:
    """The rows of a comparison, those of other papers sized to the task's tree.

    Args:
        task: what they are compared on.
        names: rows, systems or groups; the same row twice counts once.
        settings: row → field → value; a row keeps its size unless they say something of it.

    Returns:
        The rows; and those members of groups that are impossible for the task, with the reason.

    Raises:
        ConfigError: an unknown row, settings for a row that is not among them, or a row that was
            named and is impossible.
    """
    names = list(names)
    rows: dict[str, System] = {}
    for name in names:
        rows |= GROUPS.get(name) or {name: find_system(name)}
    for name in settings.keys() - rows.keys():
        raise ConfigError(f"settings for {name!r}, which is not compared: {_known(name, rows)}")
    possible, skipped = {}, {}
    for name, row in rows.items():
        try:
            possible[name] = _made_for(task, name, row, settings.get(name, {}))
        except (ConfigError, ConversionError, MissingDependency) as error:
            if name in names or name in settings:
                raise
            skipped[name] = str(error)
    return possible, skipped


def _made_for(task: Task, name: str, row: System, settings: Mapping[str, Any]) -> System:
    row = row.changed(settings)
    row.check(task)
    sized = name in PEERS and not settings.keys() & set(row.sized_by)
    size = _path_size(task) if sized else None
    # What was asked for goes before what a size would set along with itself.
    return row if size is None else row.fitted(task, size).changed(settings)


def _path_size(task: Task) -> int | None:
    """Active parameters of the task's tree; None if its network cannot have one."""
    try:
        return active_params(task)
    except (ConfigError, ConversionError):
        return None


def _known(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"known are {', '.join(dict.fromkeys(known))}{hint}"
