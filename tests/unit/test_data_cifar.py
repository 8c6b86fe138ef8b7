"""CIFAR-100's binary files: read exactly, and every damage is named."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sigmabranch.data import cifar, open_data
from sigmabranch.errors import DataError

RECORDS = {"train.bin": 30, "test.bin": 10}


def records(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 256, (count, cifar.RECORD_BYTES), dtype=np.uint8)
    table[:, 0] %= cifar.COARSE_CLASSES
    table[:, 1] %= cifar.FINE_CLASSES
    return table


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the official layout, with few records."""
    folder = tmp_path / "data" / cifar.FOLDER
    folder.mkdir(parents=True)
    for seed, (file, count) in enumerate(RECORDS.items()):
        (folder / file).write_bytes(records(count, seed).tobytes())
    names = "".join(f"class_{i:02d}\n" for i in range(100)) + "\n"
    (folder / cifar.NAMES).write_text(names)
    monkeypatch.setattr(cifar, "RELEASE", replace(cifar.RELEASE, train_records=30, test_records=10))
    return folder


@pytest.fixture
def archive(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, packed as published, and nothing beside it."""
    path = unpacked.parent / cifar.ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        tar.add(unpacked, cifar.FOLDER)
    shutil.rmtree(unpacked)
    publish(path, monkeypatch)
    return path


def publish(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(cifar, "RELEASE", replace(cifar.RELEASE, archive_md5=md5))


def check_content(folder: Path) -> None:
    data = open_data("cifar100", folder)
    assert (len(data.train), len(data.test), data.classes, data.shape) == (30, 10, 100, (3, 32, 32))
    assert data.class_names[42] == "class_42"
    for seed, split in enumerate((data.train, data.test)):
        table = records(len(split), seed)
        assert split.labels.tolist() == table[:, 1].tolist()
        (x, _) = next(split.batches(torch.arange(len(split)), 64))
        # Byte 2 + 1024 c + 32 h + w of a record is channel c of pixel (h, w).
        pixel = table[7, 2 + 1024 * 2 + 32 * 5 + 9] / 255
        assert x[7, 2, 5, 9].item() == pytest.approx((pixel - cifar.MEAN[2]) / cifar.STD[2], 1e-5)


def test_unpacked_folder_or_its_parent_is_read_exactly(unpacked: Path) -> None:
    check_content(unpacked)
    check_content(unpacked.parent)


def test_conditions_are_read_from_the_same_files(unpacked: Path) -> None:
    plain, seen = (open_data(name, unpacked) for name in ("cifar100", "cifar100-conditions"))
    assert (seen.name, seen.classes, seen.shape) == ("cifar100-conditions", 100, (3, 32, 32))
    assert (len(seen.train), len(seen.test)) == (30, 40)
    assert torch.equal(seen.test.labels, plain.test.labels.repeat_interleave(4))
    (x, _) = next(plain.test.batches(torch.arange(10), 10))
    (by_day, _) = next(seen.test.batches(torch.arange(0, 40, 4), 10))
    assert torch.equal(by_day, x)


def test_archive_or_its_folder_is_read_exactly(archive: Path) -> None:
    check_content(archive)
    check_content(archive.parent)
    assert [p.name for p in archive.parent.iterdir()] == [cifar.ARCHIVE]


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        open_data("cifar100", folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, cifar.PAGE):
        assert word in message


def test_missing_data_says_what_to_put_where(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", cifar.ARCHIVE, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="--data") as caught:
        open_data("cifar100")
    assert cifar.PAGE in str(caught.value)


def test_missing_file_is_named(unpacked: Path) -> None:
    (unpacked / "test.bin").unlink()
    assert_refused(unpacked, "test.bin")


@pytest.mark.parametrize("change", [-1, 1, cifar.RECORD_BYTES])
def test_wrong_size_is_refused(unpacked: Path, change: int) -> None:
    content = (unpacked / "train.bin").read_bytes()
    longer = content + bytes(max(change, 0))
    (unpacked / "train.bin").write_bytes(longer[: len(content) + change])
    assert_refused(unpacked, "train.bin", f"{len(content) + change:,} bytes")


@pytest.mark.parametrize(("column", "value", "kind"), [(0, 20, "coarse"), (1, 100, "fine")])
def test_label_out_of_range_is_refused(unpacked: Path, column: int, value: int, kind: str) -> None:
    table = records(10, 1)
    table[6, column] = value
    (unpacked / "test.bin").write_bytes(table.tobytes())
    assert_refused(unpacked, "test.bin", f"{kind} label {value} in record 6")


def test_wrong_number_of_class_names_is_refused(unpacked: Path) -> None:
    (unpacked / cifar.NAMES).write_text("apple\nbear\n")
    assert_refused(unpacked, cifar.NAMES, "2 names")


def test_archive_with_one_changed_byte_is_refused(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    assert_refused(archive, "MD5", cifar.RELEASE.archive_md5)


def test_archive_without_the_records_is_refused(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo(f"{cifar.FOLDER}/readme"), io.BytesIO())
    publish(archive, monkeypatch)
    assert_refused(archive, "train.bin")


def test_truncated_archive_is_refused_even_if_its_checksum_were_right(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.write_bytes(archive.read_bytes()[:-2000])
    publish(archive, monkeypatch)
    assert_refused(archive, cifar.ARCHIVE)


def test_published_release_is_expected() -> None:
    release = cifar.RELEASE
    assert (release.train_records, release.test_records) == (50_000, 10_000)
    assert release.archive_md5 == "03b5dce01913d631647c71ecec9e9cb8"
