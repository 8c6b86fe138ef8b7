"""ModelNet40's two public forms: read exactly, and every damage is named."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from sigmabranch.data import Dataset, ResidentSplit, open_data
from sigmabranch.data.modelnet import HDF5_FOLDER, TEXT_FOLDER
from sigmabranch.errors import ConfigError, DataError, MissingDependency
from sigmabranch.points import in_farthest_order

CLASSES = ("airplane", "night_stand", "xbox")
TRAIN = np.array([2, 0, 1, 1, 0, 2])
TEST = np.array([1, 0])


def raw_clouds(count: int, points: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (3 * rng.standard_normal((count, points, 3)) + 5).astype(np.float32)


TRAIN_CLOUDS, TEST_CLOUDS = raw_clouds(6, 1100, 0), raw_clouds(2, 1100, 1)


def write_h5(file: Path, clouds: np.ndarray, labels: np.ndarray) -> None:
    with h5py.File(file, "w") as content:
        content["data"] = clouds
        content["label"] = labels[:, None].astype(np.uint8)


@pytest.fixture
def hdf5(tmp_path: Path) -> Path:
    """A folder in the HDF5 form; its training clouds are in two files."""
    root = tmp_path / HDF5_FOLDER
    root.mkdir()
    (root / "shape_names.txt").write_text("\n".join(CLASSES) + "\n")
    parts = {"train": [(TRAIN_CLOUDS[:4], TRAIN[:4]), (TRAIN_CLOUDS[4:], TRAIN[4:])]}
    parts["test"] = [(TEST_CLOUDS, TEST)]
    for split, pieces in parts.items():
        names = [f"ply_data_{split}{number}.h5" for number in range(len(pieces))]
        for name, piece in zip(names, pieces, strict=True):
            write_h5(root / name, *piece)
        lines = "".join(f"data/modelnet40_ply_hdf5_2048/{name}\n" for name in names)
        (root / f"{split}_files.txt").write_text(lines)
    return root


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """The same clouds in the text form."""
    root = tmp_path / TEXT_FOLDER
    (root / "elsewhere").mkdir(parents=True)
    (root / "modelnet40_shape_names.txt").write_text("\n".join(CLASSES) + "\n")
    for split, clouds, labels in (("train", TRAIN_CLOUDS, TRAIN), ("test", TEST_CLOUDS, TEST)):
        ids = [f"{CLASSES[k]}_{n + len(split):04d}" for n, k in enumerate(labels)]
        for shape, label, cloud in zip(ids, labels, clouds, strict=True):
            file = root / CLASSES[label] / f"{shape}.txt"
            file.parent.mkdir(exist_ok=True)
            np.savetxt(file, np.concatenate([cloud, cloud], 1), fmt="%.9g", delimiter=",")
        (root / f"modelnet40_{split}.txt").write_text("\n".join(ids) + "\n")
    return root


def same_points(split: ResidentSplit, raw: np.ndarray) -> bool:
    """Whether the split holds the first 1,024 raw points, centred and scaled, in any order."""
    expected = raw[:, :1024].astype(np.float64)
    expected -= expected.mean(1, keepdims=True)
    expected /= np.linalg.norm(expected, axis=2).max(1)[:, None, None]
    found = split.inputs.double().numpy()

    def ordered(clouds: np.ndarray) -> np.ndarray:
        return np.stack([cloud[cloud[:, 0].argsort()] for cloud in clouds])

    return np.allclose(ordered(found), ordered(expected), atol=1e-6)


def check(data: Dataset) -> None:
    assert (data.name, data.class_names, data.shape) == ("modelnet40", CLASSES, (1024, 3))
    for split, clouds, labels in (
        (data.train, TRAIN_CLOUDS, TRAIN),
        (data.test, TEST_CLOUDS, TEST),
    ):
        assert isinstance(split, ResidentSplit)
        assert split.labels.tolist() == labels.tolist()
        assert split.inputs.dtype == torch.float32
        assert same_points(split, clouds)
        assert in_farthest_order(split.inputs, 512)


def test_both_forms_are_found_and_give_the_first_points_farthest_first(
    hdf5: Path, text: Path
) -> None:
    assert hdf5.parent == text.parent
    check(open_data("modelnet40", hdf5.parent))
    (hdf5 / "train_files.txt").unlink()
    check(open_data("modelnet40", text.parent))


def test_batches_are_the_clouds_as_they_lie_and_augmented_ones_differ_by_seed(hdf5: Path) -> None:
    train = open_data("modelnet40", hdf5).train
    order = torch.tensor([3, 0])
    plain, augmented, again, other = (
        next(train.batches(order, 2, augment_seed=seed))[0] for seed in (None, 7, 7, 8)
    )
    assert torch.equal(plain, train.inputs[order])
    assert torch.equal(augmented, again)
    assert not torch.equal(augmented, other)
    assert not torch.equal(augmented, plain)


def drop_points(root: Path) -> None:
    write_h5(root / "ply_data_train1.h5", TRAIN_CLOUDS[4:, :1023], TRAIN[4:])


def truncate(root: Path) -> None:
    file = root / "ply_data_train1.h5"
    file.write_bytes(file.read_bytes()[:-2000])


def replace_by_text(root: Path) -> None:
    (root / "ply_data_train1.h5").write_text("404: not found")


def forget_labels(root: Path) -> None:
    with h5py.File(root / "ply_data_train1.h5", "a") as content:
        del content["label"]


def mislabel(root: Path) -> None:
    write_h5(root / "ply_data_train1.h5", TRAIN_CLOUDS[4:], np.array([0, 3]))


def label_by_fractions(root: Path) -> None:
    forget_labels(root)
    with h5py.File(root / "ply_data_train1.h5", "a") as content:
        content["label"] = np.array([[0.0], [0.9]])


def too_few_labels(root: Path) -> None:
    write_h5(root / "ply_data_train1.h5", TRAIN_CLOUDS[4:], np.array([0]))


def spoil(value: float) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        clouds = TRAIN_CLOUDS[4:].copy()
        clouds[1, 1023, 2] = value
        write_h5(root / "ply_data_train1.h5", clouds, TRAIN[4:])

    return write


def collapse(root: Path) -> None:
    clouds = TRAIN_CLOUDS[4:].copy()
    clouds[1, :1024] = clouds[1, 0]
    write_h5(root / "ply_data_train1.h5", clouds, TRAIN[4:])


def empty_a_class(root: Path) -> None:
    for number, some in enumerate((slice(4), slice(4, 6))):
        labels = np.minimum(TRAIN[some], 1)
        write_h5(root / f"ply_data_train{number}.h5", TRAIN_CLOUDS[some], labels)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_points, r"ply_data_train1\.h5 have 1023 points, expected 1,024"),
        (truncate, r"ply_data_train1\.h5 is truncated"),
        (replace_by_text, r"ply_data_train1\.h5 is truncated or damaged"),
        (forget_labels, r"ply_data_train1\.h5 is .* data sets data and label"),
        (mislabel, r"cloud 1 of \S+ply_data_train1\.h5 has label 3, expected 0 to 2"),
        (label_by_fractions, r"ply_data_train1\.h5 is .* data sets data and label"),
        (too_few_labels, r"ply_data_train1\.h5 .*labels of shape \(1, 1\)"),
        (spoil(float("nan")), r"cloud 1 of \S+ply_data_train1\.h5 .* NaN"),
        (spoil(float("-inf")), r"cloud 1 of \S+ply_data_train1\.h5 .* infinite"),
        (collapse, r"cloud 1 of \S+ply_data_train1\.h5 has all its points in one place"),
        (empty_a_class, r"train_files\.txt names no cloud of the class xbox"),
        (lambda root: (root / "ply_data_train1.h5").unlink(), r"no file \S+ply_data_train1\.h5"),
        (lambda root: (root / "shape_names.txt").unlink(), r"cannot read \S+shape_names\.txt"),
        (lambda root: (root / "test_files.txt").write_text("\n"), r"test_files\.txt is empty"),
    ],
)
def test_damaged_hdf5_is_one_line_that_names_file_and_cloud(
    hdf5: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(hdf5)
    with pytest.raises(DataError, match=message) as caught:
        open_data("modelnet40", hdf5)
    assert "\n" not in str(caught.value)


def rewrite(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    """Change the lines of the second training cloud, which is of class 0."""

    def write(root: Path) -> None:
        file = root / "airplane" / "airplane_0006.txt"
        file.write_text("".join(line + "\n" for line in change(file.read_text().splitlines())))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewrite(lambda lines: lines[:1000]), r"airplane_0006\.txt has 1000 points"),
        (rewrite(lambda lines: []), r"airplane_0006\.txt has 0 points"),
        (rewrite(lambda lines: ["x,y,z", *lines]), r"airplane_0006\.txt is damaged"),
        (rewrite(lambda lines: ["1,2", *lines]), r"airplane_0006\.txt is damaged"),
        (rewrite(lambda lines: ["1,nan,2", *lines]), r"airplane_0006 in \S+ has .* NaN"),
        (rewrite(lambda lines: lines[:1] * 1024), r"airplane_0006 in \S+ has all its points"),
        (
            lambda root: (root / "airplane" / "airplane_0006.txt").unlink(),
            r"cannot read \S+airplane_0006\.txt",
        ),
        (
            lambda root: (root / "modelnet40_test.txt").write_text("night_0001\n"),
            r"night_0001, .* is of no class",
        ),
    ],
)
def test_damaged_text_is_one_line_that_names_the_cloud(
    text: Path, damage: Callable[[Path], object], message: str, recwarn: pytest.WarningsRecorder
) -> None:
    damage(text)
    with pytest.raises(DataError, match=message) as caught:
        open_data("modelnet40", text)
    assert "\n" not in str(caught.value)
    assert not recwarn.list


def test_a_folder_without_modelnet_and_a_size_for_clouds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no ModelNet40 in .*{HDF5_FOLDER}.*{TEXT_FOLDER}"):
        open_data("modelnet40", tmp_path)
    with pytest.raises(DataError, match=f"--data.*{HDF5_FOLDER}"):
        open_data("modelnet40")
    with pytest.raises(ConfigError, match="no image_size"):
        open_data("modelnet40", tmp_path, image_size=32)


def test_hdf5_without_h5py_names_the_extra_and_text_needs_none(
    hdf5: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingDependency, match=r"h5py: pip install 'sigma-branch\[data\]'"):
        open_data("modelnet40", hdf5)
    assert len(open_data("modelnet40", text).train) == 6
