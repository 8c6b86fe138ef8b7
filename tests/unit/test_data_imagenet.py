"""Image folders: the layout, the crops, exact resumption, unreadable images."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sigmabranch.data import Dataset, EpochBatches, open_data
from sigmabranch.errors import DataError

Image = pytest.importorskip("PIL.Image")
from sigmabranch.data import decode, imagenet  # noqa: E402
from sigmabranch.data.crops import centre_crop  # noqa: E402
from sigmabranch.data.decode import read_picture  # noqa: E402

CLASSES = ("n01", "n02", "n03")


def write_image(path: Path, rng: np.random.Generator, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = rng.integers(20, 60, 2)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 6 test images of 3 classes, some grey, one CMYK."""
    root = tmp_path_factory.mktemp("folders")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        for i in range(20):
            write_image(root / "train" / name / f"{i:02d}.JPEG", rng, "L" if i % 5 == 0 else "RGB")
        write_image(root / "val" / name / "a.png", rng)
        write_image(root / "val" / name / "b.jpg", rng, "CMYK")
    (root / "train" / "n01" / "notes.txt").write_text("not an image")
    return root


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(intact, tmp_path / "copy"))


def open_folder(root: Path, workers: int = 0) -> Dataset:
    return open_data("imagenet", root, image_size=16, workers=workers)


def test_layout_gives_classes_labels_and_batches(intact: Path) -> None:
    data = open_folder(intact)
    assert data.class_names == CLASSES
    assert (len(data.train), len(data.test), data.shape) == (60, 6, (3, 16, 16))
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    batches = list(data.test.batches(torch.tensor([4, 0, 3]), 2))
    assert [tuple(x.shape) for x, _ in batches] == [(2, 3, 16, 16), (1, 3, 16, 16)]
    assert torch.cat([y for _, y in batches]).tolist() == [2, 0, 1]
    assert batches[0][0].dtype == torch.float32


def test_batches_are_the_normalised_crops_of_their_files(intact: Path) -> None:
    split = open_folder(intact).train
    (x, _) = next(split.batches(torch.arange(60), 60))
    mean, std = (torch.tensor(v)[:, None, None] for v in (imagenet.MEAN, imagenet.STD))
    for image, name in zip(x, split.files, strict=True):
        crop = centre_crop(read_picture(str(intact / "train" / name.decode())).pixels(), 16)
        assert torch.allclose(image, (crop / 255 - mean) / std, atol=1e-5)


def test_augmentation_follows_from_seed_epoch_and_sample_alone(intact: Path) -> None:
    split = open_folder(intact).train
    whole = list(EpochBatches(split, 8, seed=5).epoch(2))
    rest = list(EpochBatches(split, 8, seed=5).epoch(2, start=5))
    assert len(rest) == 3
    for share, expected in zip(rest, whole[5:], strict=True):
        assert torch.equal(share.x, expected.x)
        assert torch.equal(share.y, expected.y)
    (one,) = split.batches(torch.arange(10), 10, augment_seed=1)
    (two,) = split.batches(torch.arange(10), 10, augment_seed=2)
    (reverse,) = split.batches(torch.arange(10).flip(0), 10, augment_seed=1)
    assert torch.equal(one[0], reverse[0].flip(0))
    assert (one[0] != two[0]).flatten(1).any(1).all()


def test_copies_of_one_image_get_crops_of_their_own_half_of_them_mirrored(tmp_path: Path) -> None:
    column, row = np.meshgrid(np.arange(0, 240, 4), np.arange(0, 240, 4))
    ramp = np.stack([column, row, row], axis=2).astype(np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "ramp").mkdir(parents=True)
        for i in range(200):
            Image.fromarray(ramp).save(tmp_path / part / "ramp" / f"{i}.png")
    split = open_folder(tmp_path).train
    ((x, _),) = split.batches(torch.arange(200), 200, augment_seed=0)
    assert len(x.unique(dim=0)) > 190
    mirrored = x[:, 0, 8, 0] > x[:, 0, 8, -1]
    assert abs(int(mirrored.sum()) - 100) < 35
    ((x, _),) = split.batches(torch.arange(200), 200)
    assert len(x.unique(dim=0)) == 1


def test_worker_processes_give_the_same_and_leave_the_global_generator_alone(
    intact: Path,
) -> None:
    state = torch.get_rng_state()
    here, there = (
        [x for x, *_ in EpochBatches(open_folder(intact, workers).train, 16, seed=0).epoch(0)]
        for workers in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_the_same_without_simplejpeg(
    intact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg")
    split = open_folder(intact).train
    ((fast, _),) = split.batches(torch.arange(60), 60, augment_seed=3)
    monkeypatch.setattr(decode, "simplejpeg", None)
    ((slow, _),) = split.batches(torch.arange(60), 60, augment_seed=3)
    assert (fast - slow).abs().mean() < 0.02


def test_spawned_workers_read_the_same_files(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (open_folder(intact, workers).test for workers in (0, 1))
    ((expected, _),) = here.batches(torch.arange(6), 6)
    spawned = functools.partial(imagenet.DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr(imagenet, "DataLoader", spawned)
    ((x, _),) = there.batches(torch.arange(6), 6)
    assert torch.equal(x, expected)


def test_few_unreadable_images_are_named_and_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet, "UNREADABLE_SHARE", 0.05)
    truncated = folder / "train" / "n02" / "03.JPEG"
    truncated.write_bytes(truncated.read_bytes()[:200])
    (folder / "train" / "n02" / "04.JPEG").write_bytes(b"not a picture")
    split = open_folder(folder).train
    with pytest.warns(UserWarning) as warned:
        batches = list(split.batches(torch.arange(60), 16))
        list(split.batches(torch.arange(60), 16))
    assert sorted(str(w.message).split(" cannot")[0][-12:] for w in warned) == [
        "/n02/03.JPEG",
        "/n02/04.JPEG",
    ]
    assert split.unreadable == {"n02/03.JPEG", "n02/04.JPEG"}
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(labels, split.labels)
    assert torch.equal(images[23], images[25]) and torch.equal(images[24], images[25])


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_are_an_error_of_one_line(folder: Path, workers: int) -> None:
    (folder / "train" / "n03" / "19.JPEG").write_bytes(b"")
    split = open_folder(folder, workers).train
    with pytest.raises(DataError, match=r"n03/19\.JPEG.* 1 of 60, 0 are tolerated") as caught:
        list(split.batches(torch.arange(60), 16))
    assert "\n" not in str(caught.value)


def test_a_replacement_brings_its_own_label(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "UNREADABLE_SHARE", 0.05)
    (folder / "train" / "n01" / "19.JPEG").unlink()
    (folder / "train" / "n01" / "19.JPEG").mkdir()
    split = open_folder(folder).train
    with pytest.warns(UserWarning, match=r"n01/19\.JPEG"):
        ((_, y),) = split.batches(torch.tensor([18, 19]), 2)
    assert y.tolist() == [0, 1]


def test_a_split_without_one_readable_image_ends(folder: Path) -> None:
    for path in (folder / "val").glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="tolerated"):
        list(open_folder(folder).test.batches(torch.arange(6), 2))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda root: shutil.rmtree(root / "val"), "no folder .*val"),
        (lambda root: shutil.rmtree(root / "val" / "n02"), "differ in 1 classes, first 'n02'"),
        (lambda root: [p.unlink() for p in (root / "val" / "n01").iterdir()], "n01 holds no"),
        (lambda root: [shutil.rmtree(p) for p in (root / "train").iterdir()], "no class folders"),
    ],
)
def test_incomplete_folders_are_refused(folder: Path, damage: object, named: str) -> None:
    damage(folder)  # type: ignore[operator]
    with pytest.raises(DataError, match=named):
        open_folder(folder)


def test_limit_keeps_whole_classes_in_proportion(intact: Path) -> None:
    limited = open_folder(intact).limit(train=9, test=3)
    assert limited.train.labels.bincount().tolist() == [3, 3, 3]
    (_, y) = next(limited.test.batches(torch.arange(3), 3))
    assert y.tolist() == [0, 1, 2]
