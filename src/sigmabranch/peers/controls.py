"""Controls: networks of the same cost or the same training, without routing.

Every control shares the task's data, recipe and seed, and has as many epochs behind it as the
branched network.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sigmabranch import files
from sigmabranch.backbones import ModelSpec
from sigmabranch.conversion import single_path
from sigmabranch.errors import ConfigError
from sigmabranch.measure import cost, evaluate_dense
from sigmabranch.tasks import Chain, Task
from sigmabranch.tasks.chain import ordered, seeded
from sigmabranch.tasks.counting import example, sketch
from sigmabranch.training import Recipe

TOLERANCE = 0.01


def run_control(chain: Chain, name: str) -> dict[str, Any]:
    """Train and measure one control in the chain's folder, or read it back.

    Args:
        chain: of the task; its dense and branched networks are made first where they are needed.
        name: one of :data:`CONTROLS`.

    Returns:
        JSON-able: ``params``, ``macs`` (fvcore, batch 1), ``epochs``, and the accuracies of
        :func:`~sigmabranch.measure.evaluate_dense`.

    Raises:
        ConfigError: see :func:`check_controls`.
        Stopped: the chain's time is up; the checkpoint holds the state.
    """
    folder = chain.folder / "controls" / name
    path = folder / "measured.json"
    if not path.exists():
        model, epochs = CONTROLS[name](chain, folder)
        counted = cost(model.cpu(), example(chain.task))["dense"]
        accuracy = evaluate_dense(model.to(chain.engine.device), ordered(chain.dataset.test))
        measured = {"params": counted["params"], "macs": counted["macs"], "epochs": epochs}
        chain.once(lambda: files.write_json(path, measured | accuracy))
    return files.read_json(path)


def check_controls(names: Iterable[str], task: Task) -> None:
    """Raise :class:`ConfigError` at a control that is unknown or impossible for ``task``.

    To be called before any work is done.
    """
    for name in names:
        if name not in CONTROLS:
            raise ConfigError(f"unknown control {name!r}: choose from {', '.join(CONTROLS)}")
        if name == "dense-equal":
            _equal_spec(task)


def _single_path(chain: Chain, folder: Path) -> tuple[nn.Module, int]:
    """One path cut from the trained dense network, without routers, and fine-tuned alike."""
    model = single_path(
        chain.dense(), chain.calibration(), chain.task.tree, spec=chain.task.conversion
    )
    chain.train(model, chain.task.finetune, folder)
    return model, _epochs(chain)


def _dense_continued(chain: Chain, folder: Path) -> tuple[nn.Module, int]:
    """The full dense network, trained on with the fine-tuning recipe."""
    model = chain.dense()
    chain.train(model, chain.task.finetune, folder)
    return model, _epochs(chain)


def _dense_equal(chain: Chain, folder: Path) -> tuple[nn.Module, int]:
    """A narrow dense network of equal active size, trained from scratch in one schedule."""
    with seeded(chain.seed):
        model: nn.Module = _equal_spec(chain.task).build()
    recipe: Recipe = replace(chain.task.dense, epochs=_epochs(chain))
    chain.train(model, recipe, folder)
    return model, recipe.epochs


CONTROLS: Mapping[str, Callable[[Chain, Path], tuple[nn.Module, int]]] = {
    "single-path": _single_path,
    "dense-equal": _dense_equal,
    "dense-continued": _dense_continued,
}


def _equal_spec(task: Task) -> ModelSpec:
    """The narrow network whose size is that of one path of the task's tree."""
    _, net = sketch(task)
    active = max(
        sum(parameter.numel() for parameter in net.path(leaf).parameters())
        for leaf in net.tree.leaves
    )
    return dense_of_size(task.model, active)


def dense_of_size(spec: ModelSpec, params: int) -> ModelSpec:
    """The narrower network of the same depth whose size is nearest to ``params``.

    All widths shrink by one factor, the widest a little more or less to hit the size.

    Raises:
        ConfigError: no width comes within one percent.
    """
    grid = range(1, 1001)
    middle = bisect_left(grid, params, key=lambda step: _params(spec.narrowed(step / 1000, 0)))
    candidates = [
        spec.narrowed(step / 1000, nudge)
        for step in grid[max(0, middle - 2) : middle + 2]
        for nudge in (-1, 0, 1)
    ]
    best = min(candidates, key=lambda candidate: abs(_params(candidate) - params))
    if abs(_params(best) - params) > TOLERANCE * params:
        raise ConfigError(
            f"no narrower network has {params:,} parameters within {TOLERANCE:.0%}: the nearest "
            f"has {_params(best):,}"
        )
    return best


def _params(spec: ModelSpec) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in spec.build().parameters())


def _epochs(chain: Chain) -> int:
    return chain.task.dense.epochs + chain.task.finetune.epochs
