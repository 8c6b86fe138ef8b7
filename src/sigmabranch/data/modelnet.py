"""ModelNet40 from its public point clouds, as HDF5 or as resampled text.

N clouds, P points.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sigmabranch.data.augment import ScaleShiftDrop
from sigmabranch.data.clouds import POINTS, arrange, unchanged
from sigmabranch.data.split import Dataset, ResidentSplit
from sigmabranch.errors import DataError, MissingDependency

HDF5_FOLDER = "modelnet40_ply_hdf5_2048"
TEXT_FOLDER = "modelnet40_normal_resampled"

Clouds = tuple[np.ndarray, np.ndarray]
# Of the folder, its class names and the lines of a split's list: (N, P, 3) float32 and (N,) int64.
Reader = Callable[[Path, Sequence[str], Sequence[str]], Clouds]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """A layout in which ModelNet40 is distributed.

    Attributes:
        folder: what its archive unpacks to.
        names: file of the class names, in label order.
        train: file that lists the training data.
        test: file that lists the test data.
        read: reads what such a list names.
    """

    folder: str
    names: str
    train: str
    test: str
    read: Reader


def open_modelnet40(folder: Path | str, device: torch.device | str) -> Dataset:
    """ModelNet40 on ``device``: 1,024 points of each cloud, 40 classes.

    Source: Wu et al., "3D ShapeNets", 2015; points sampled by Qi et al. (PointNet, PointNet++).
    Augmentation scales, shifts and drops points.

    Args:
        folder: one of :data:`FORMS`, or holds one.
        device: where the clouds stay, as float32 (151 MB).

    Raises:
        DataError: files that are missing or damaged, or clouds that are unusable.
        MissingDependency: h5py is not installed (HDF5 only).
    """
    form, root = _find(Path(folder))
    class_names = tuple(_lines(root / form.names))
    # Everything is read and checked before the first cloud is arranged, which takes longer.
    train, test = (
        form.read(root, class_names, _lines(root / listed)) for listed in (form.train, form.test)
    )
    _check_no_class_is_empty(root / form.train, class_names, train[1])

    def split(clouds: np.ndarray, labels: np.ndarray) -> ResidentSplit:
        return ResidentSplit(
            inputs=arrange(torch.from_numpy(clouds), device),
            labels=torch.from_numpy(labels).to(device),
            augment=ScaleShiftDrop(),
            normalise=unchanged,
        )

    return Dataset(
        name="modelnet40",
        train=split(*train),
        test=split(*test),
        class_names=class_names,
        shape=(POINTS, 3),
    )


def read_hdf5(root: Path, class_names: Sequence[str], listed: Sequence[str]) -> Clouds:
    """The clouds of HDF5 files with the data sets "data" (N, P, 3) and "label" (N, 1)."""
    # Lists name the files by where their makers had them.
    pieces = [_read_hdf5_file(root / Path(line).name, class_names) for line in listed]
    clouds, labels = zip(*pieces, strict=True)
    return np.concatenate(clouds), np.concatenate(labels)


def _read_hdf5_file(file: Path, class_names: Sequence[str]) -> Clouds:
    try:
        import h5py  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise MissingDependency("h5py", "data", "reading ModelNet40's HDF5 files") from error
    if not file.is_file():
        raise _fault(f"no file {file}, which the list beside it names")
    try:
        with h5py.File(file, "r") as content:
            _check_shapes(file, content["data"].shape, content["label"].shape)
            clouds = content["data"][:, :POINTS].astype(np.float32)
            if content["label"].dtype.kind not in "iu":
                raise ValueError("labels that are no whole numbers")
            labels = content["label"][:].astype(np.int64).reshape(-1)
    except (OSError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise _fault(
            f"{file} is truncated or damaged, expected HDF5 with the data sets data and label"
        ) from error
    _check_clouds(clouds, lambda number: f"cloud {number} of {file}")
    outside = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(outside):
        raise _fault(
            f"cloud {outside[0]} of {file} has label {labels[outside[0]]}, expected 0 to "
            f"{len(class_names) - 1}"
        )
    return clouds, labels


def _check_shapes(file: Path, data: tuple[int, ...], label: tuple[int, ...]) -> None:
    if len(data) != 3 or data[0] < 1 or data[2] != 3 or label not in ((data[0], 1), (data[0],)):
        raise _fault(
            f"{file} holds data of shape {data} and labels of shape {label}, expected (N, P, 3) "
            "and (N, 1)"
        )
    if data[1] < POINTS:
        raise _fault(f"the clouds of {file} have {data[1]} points, expected {POINTS:,} or more")


def read_text(root: Path, class_names: Sequence[str], listed: Sequence[str]) -> Clouds:
    """The clouds of text files <class>/<class>_<number>.txt, one point a line."""
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = np.empty(len(listed), np.int64)
    clouds = np.empty((len(listed), POINTS, 3), np.float32)
    for number, shape in enumerate(listed):
        name = shape.rpartition("_")[0]
        if name not in label_of:
            raise _fault(f"{shape}, which a list in {root} names, is of no class of its class list")
        labels[number] = label_of[name]
        clouds[number] = _read_text_file(root / name / f"{shape}.txt")
    _check_clouds(clouds, lambda number: f"cloud {listed[number]} in {root}")
    return clouds, labels


def _read_text_file(file: Path) -> np.ndarray:
    """(P, 3) from lines "x,y,z,nx,ny,nz", of which the first 1,024 are read."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of an empty file: it has 0 points
            points = np.loadtxt(
                file, np.float32, delimiter=",", usecols=(0, 1, 2), max_rows=POINTS, ndmin=2
            )
    except OSError as error:
        raise _fault(f"cannot read {file} ({error.strerror})") from error
    except ValueError as error:
        raise _fault(f"{file} is damaged, expected lines of x,y,z") from error
    if len(points) < POINTS:
        raise _fault(f"{file} has {len(points)} points, expected {POINTS:,} or more")
    return points


FORMS = (
    Form(
        folder=HDF5_FOLDER,
        names="shape_names.txt",
        train="train_files.txt",
        test="test_files.txt",
        read=read_hdf5,
    ),
    Form(
        folder=TEXT_FOLDER,
        names="modelnet40_shape_names.txt",
        train="modelnet40_train.txt",
        test="modelnet40_test.txt",
        read=read_text,
    ),
)


def _find(path: Path) -> tuple[Form, Path]:
    for form in FORMS:
        for root in (path, path / form.folder):
            if (root / form.train).is_file():
                return form, root
    expected = " or ".join(f"{form.folder}/{form.train}" for form in FORMS)
    raise DataError(f"no ModelNet40 in {path}, expected {expected}: unpack its archive there")


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise _fault(f"cannot read {file}") from error
    if not any(lines):
        raise _fault(f"{file} is empty")
    return [line for line in lines if line]


def _check_clouds(clouds_NP3: np.ndarray, name: Callable[[int], str]) -> None:
    unusable = {
        "has a coordinate that is NaN or infinite": ~np.isfinite(clouds_NP3).all((1, 2)),
        "has all its points in one place": (clouds_NP3 == clouds_NP3[:, :1]).all((1, 2)),
    }
    for fault, is_bad_N in unusable.items():
        if is_bad_N.any():
            raise _fault(f"{name(int(is_bad_N.argmax()))} {fault}")


def _check_no_class_is_empty(file: Path, class_names: Sequence[str], labels_N: np.ndarray) -> None:
    counts = np.bincount(labels_N, minlength=len(class_names)).tolist()
    if 0 in counts:
        raise _fault(f"{file} names no cloud of the class {class_names[counts.index(0)]}")


def _fault(what: str) -> DataError:
    return DataError(f"{what}: unpack ModelNet40's archive again")
