"""``sigmabranch view``: watch a package work, in a browser on the same machine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sigmabranch.cli import options, predict
from sigmabranch.deploy import Package, Runtime
from sigmabranch.errors import ConfigError
from sigmabranch.view import Network, Show, open_inputs, serve


def command(
    package: Annotated[Path, typer.Argument(help="Folder made by pack.")],
    data: options.Data = None,
    dense: Annotated[
        Path | None,
        typer.Option(
            help="Package of a dense network or a single path, to run beside it.",
            show_default=False,
        ),
    ] = None,
    budget: options.Budget = None,
    bandwidth: options.Bandwidth = None,
    port: Annotated[
        int, typer.Option(help="Port on 127.0.0.1; 0 is any that is free.", min=0, max=65535)
    ] = 0,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser.")
    ] = False,
) -> None:
    """Show in a browser what each input reads and runs; prints the page's address."""
    with ExitStack() as stack:
        runtimes = []
        for folder in (package, *([] if dense is None else [dense])):
            runtime = Runtime.open(folder, budget=budget, bytes_per_second=bandwidth)
            runtimes.append(stack.enter_context(runtime))
        _check_twins([runtime.package for runtime in runtimes])
        task, names = predict.described(package, runtimes[0].package.notes)
        inputs = open_inputs(runtimes[0].package, task, names, data)
        answer = partial(predict.row, names=inputs.class_names)
        networks = [Network(runtime, answer) for runtime in runtimes]
        show = stack.enter_context(Show(task.name, inputs, networks))
        serve(show, port, open_browser=open_browser)


def _check_twins(packages: Sequence[Package]) -> None:
    """Whether one input goes into all of them, and all but the first have no branches."""
    first, *others = packages
    for other in others:
        if len(other.leaves) > 1:
            raise ConfigError(f"{other.folder} holds no dense network: pack one")
        if (other.input_shape, other.classes) != (first.input_shape, first.classes):
            raise ConfigError(
                f"{other.folder} takes {other.input_shape} and has {other.classes} classes, but "
                f"{first.folder} {first.input_shape} and {first.classes}: give one of its task"
            )
