"""``sigmabranch predict``: run a package on pictures or samples, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from sigmabranch.cli import options
from sigmabranch.cli.screen import print_result
from sigmabranch.deploy import Prediction, Runtime
from sigmabranch.deploy.engines import ENGINES
from sigmabranch.deploy.stream import STICKINESS
from sigmabranch.errors import CheckpointError, ConfigError
from sigmabranch.tasks import Task, open_task_data

TOP = 5
#: The engine that runs ONNX nodes rather than a package.
ONNX = "onnx"


def command(
    package: Annotated[
        Path, typer.Argument(help="Folder made by pack; with --engine onnx one of ONNX nodes.")
    ],
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Picture files.", show_default=False)
    ] = None,
    sample: Annotated[
        list[int] | None,
        typer.Option(
            help="Number of a test sample of the data set. Repeatable.",
            min=0,
            show_default=False,
        ),
    ] = None,
    data: options.Data = None,
    budget: options.Budget = None,
    bandwidth: options.Bandwidth = None,
    prefetch: Annotated[
        bool, typer.Option(help="Read likely branches before they are decided.")
    ] = True,
    engine: Annotated[str, typer.Option(help=f"One of {', '.join(ENGINES)}, {ONNX}.")] = "eager",
    stream: Annotated[
        bool, typer.Option("--stream", help="The inputs are a stream: filter the answers.")
    ] = False,
    stickiness: Annotated[
        float | None,
        typer.Option(
            help="Probability that the next input of a stream is of the same group of classes.",
            show_default=str(STICKINESS),
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Run a package on one input after the other, reading only each one's path."""
    if not pictures and not sample:
        raise ConfigError("nothing to predict: give picture files, or --sample NUMBER")
    if stickiness is not None and not stream:
        raise ConfigError("--stickiness is that of a stream: add --stream")
    if stream and stickiness is None:
        stickiness = STICKINESS
    with _opened(package, engine, budget, bandwidth, prefetch, stickiness) as (
        runtime,
        shape,
        notes,
    ):
        task, names = described(package, notes)
        rows = [
            {"input": title, **row(runtime.predict(x), names)}
            for title, x in (
                *_pictures(shape, task, pictures or ()),
                *_samples(task, sample or (), data),
            )
        ]
        result = {"budget": runtime.budget, "peak_bytes": runtime.peak_bytes, "inputs": rows}
    print_result(result, "\n".join(map(_line, rows)), as_json)


@contextmanager
def _opened(
    folder: Path,
    engine: str,
    budget: str | None,
    bandwidth: str | None,
    prefetch: bool,
    stickiness: float | None,
) -> Iterator[tuple[Any, tuple[int, ...], Mapping[str, Any]]]:
    """What predicts, the shape of an input, and the notes of the folder."""
    if engine == ONNX:
        if not prefetch:
            raise ConfigError("the engine onnx never guesses a branch: leave out --no-prefetch")
        if stickiness is not None:
            raise ConfigError("the engine onnx filters no streams: predict with a package")
        from sigmabranch.deploy.onnx_path import OnnxPath  # noqa: PLC0415 (loads ONNX Runtime)

        with OnnxPath(folder, budget=budget, bytes_per_second=bandwidth) as path:
            yield path, path.input_shape, path.manifest.get("notes", {})
        return
    with Runtime.open(
        folder,
        budget=budget,
        engine=engine,
        prefetch=prefetch,
        bytes_per_second=bandwidth,
        stream=stickiness is not None,
        stickiness=STICKINESS if stickiness is None else stickiness,
    ) as runtime:
        yield runtime, runtime.package.input_shape, runtime.package.notes


def described(folder: Path, notes: Mapping[str, Any]) -> tuple[Task, Sequence[str]]:
    """The task that a network belongs to, and the names of its classes.

    Raises:
        CheckpointError: it was written without its task.
    """
    if "task" not in notes:
        raise CheckpointError(
            f"{folder} was written without its task: use the Python API, or pack with one"
        )
    task = Task.from_dict(notes["task"])
    return task, notes.get("classes") or [str(number) for number in range(task.model.classes)]


def _pictures(
    shape: tuple[int, ...], task: Task, paths: Sequence[Path]
) -> Iterator[tuple[str, Tensor]]:
    if not paths:
        return
    from sigmabranch.data.single import picture_input  # noqa: PLC0415 (loads Pillow)

    for path in paths:
        yield str(path), picture_input(task.data.name, path, shape[-1])


def _samples(task: Task, numbers: Sequence[int], data: Path | None) -> Iterator[tuple[str, Tensor]]:
    if not numbers:
        return
    test = open_task_data(task, data, torch.device("cpu")).test
    for number in numbers:
        if number >= len(test):
            raise ConfigError(f"there is no sample {number}: the last one is {len(test) - 1}")
        x, _ = next(iter(test.batches(torch.tensor([number]), 1)))
        yield f"sample {number}", x


def row(prediction: Prediction, names: Sequence[str]) -> dict[str, Any]:
    """One prediction, JSON-able: its leaf, the likeliest classes by name, and its trace."""
    probability, label = prediction.logits.softmax(0).topk(min(TOP, len(names)))
    top = zip(probability.tolist(), label.tolist(), strict=True)
    return {
        "leaf": prediction.leaf,
        "top": [{"class": names[label], "probability": p} for p, label in top],
        "trace": prediction.trace.to_dict(),
    }


def _line(row: dict[str, Any]) -> str:
    best, trace = row["top"][0], row["trace"]
    return (
        f"{row['input']}: {best['class']} ({best['probability']:.1%}), leaf {row['leaf']}, "
        f"{trace['bytes_read'] / 1e6:.3f} MB read, {trace['total_ms']:.1f} ms "
        f"({trace['wait_ms']:.1f} waiting)"
    )
