"""CIFAR-100 from its public binary version; nothing is unpickled.

A record is 3,074 bytes: coarse label, fine label, then 32 x 32 bytes each of red, green and blue.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sigmabranch.data.augment import CropFlip
from sigmabranch.data.split import Dataset, Normalise, ResidentSplit
from sigmabranch.errors import DataError

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
ARCHIVE = "cifar-100-binary.tar.gz"
FOLDER = "cifar-100-binary"
NAMES = "fine_label_names.txt"
FILES = ("train.bin", "test.bin", NAMES)
COARSE_CLASSES, FINE_CLASSES = 20, 100
RECORD_BYTES = 2 + 3 * 32 * 32
# Of the training images, pixels scaled to 0..1.
MEAN = (0.5070752, 0.4865489, 0.4409178)
STD = (0.2673343, 0.2564385, 0.2761505)


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What the publisher's files must look like."""

    train_records: int
    test_records: int
    archive_md5: str


RELEASE = Release(
    train_records=50_000, test_records=10_000, archive_md5="03b5dce01913d631647c71ecec9e9cb8"
)


def open_cifar100(
    folder: Path | str, device: torch.device | str, *, channels_last: bool = False
) -> Dataset:
    """CIFAR-100 on ``device``: 50,000 images to train, 10,000 to test, 3 x 32 x 32, 100 classes.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Augmentation
    is a random crop from 4 pixels of padding and a mirror image.

    Args:
        folder: holds ``cifar-100-binary/`` or ``cifar-100-binary.tar.gz``, or is either of them.
        device: where the images stay, as uint8 (184 MB).
        channels_last: memory format of the batches.

    Raises:
        DataError: files that are missing or damaged.
    """
    content = _read(Path(folder))
    augment = CropFlip(pad=4, flip=True)
    normalise = Normalise(MEAN, STD, device=device, channels_last=channels_last)

    def split(file: str, records: int) -> ResidentSplit:
        images, labels = _parse(file, content[file], records)
        return ResidentSplit(
            inputs=images.to(device),
            labels=labels.to(device),
            augment=augment,
            normalise=normalise,
        )

    return Dataset(
        name="cifar100",
        train=split("train.bin", RELEASE.train_records),
        test=split("test.bin", RELEASE.test_records),
        class_names=_class_names(content[NAMES]),
        shape=(3, 32, 32),
    )


def _read(path: Path) -> dict[str, bytes]:
    """Content of :data:`FILES`, from the folder or the archive found at ``path`` or in it."""
    for folder in (path, path / FOLDER):
        if (folder / FILES[0]).is_file():
            return {file: _read_unpacked(folder / file) for file in FILES}
    for archive in (path, path / ARCHIVE):
        if archive.is_file():
            return _read_packed(archive)
    raise DataError(
        f"no CIFAR-100 in {path}: download {ARCHIVE} (the binary version) from {PAGE} "
        f"and put it there, packed or unpacked"
    )


def _read_unpacked(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {file} ({error.strerror}): unpack {ARCHIVE} from {PAGE} again"
        ) from error


def _read_packed(archive: Path) -> dict[str, bytes]:
    with open(archive, "rb") as packed:
        md5 = hashlib.file_digest(packed, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if md5 != RELEASE.archive_md5:
        raise DataError(
            f"{archive} is damaged or not the binary version of CIFAR-100: its MD5 is {md5}, "
            f"expected {RELEASE.archive_md5}; download {ARCHIVE} again from {PAGE}"
        )
    content: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r|gz") as tar:  # one pass: seeking back unpacks anew
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stream = tar.extractfile(member) if folder == FOLDER and file in FILES else None
                if stream is not None:
                    content[file] = stream.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"cannot unpack {archive}: download it again from {PAGE}") from error
    for file in FILES:
        if file not in content:
            raise DataError(f"{archive} holds no {FOLDER}/{file}: download it again from {PAGE}")
    return content


def _parse(file: str, content: bytes, records: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, 3, 32, 32) and fine labels int64 (N,) of one file."""
    expected = records * RECORD_BYTES
    if len(content) != expected:
        raise DataError(
            f"CIFAR-100's {file} is damaged: {len(content):,} bytes, expected {expected:,}; "
            f"get {ARCHIVE} again from {PAGE}"
        )
    table = np.frombuffer(content, dtype=np.uint8).reshape(records, RECORD_BYTES)
    for column, (kind, classes) in enumerate((("coarse", COARSE_CLASSES), ("fine", FINE_CLASSES))):
        bad = np.flatnonzero(table[:, column] >= classes)
        if len(bad):
            raise DataError(
                f"CIFAR-100's {file} is damaged: {kind} label {table[bad[0], column]} in record "
                f"{bad[0]}, expected 0 to {classes - 1}; get {ARCHIVE} again from {PAGE}"
            )
    images = torch.from_numpy(table[:, 2:].copy().reshape(records, 3, 32, 32))
    return images, torch.from_numpy(table[:, 1].astype(np.int64))


def _class_names(content: bytes) -> tuple[str, ...]:
    names = tuple(content.decode("utf-8", errors="replace").split())
    if len(names) != FINE_CLASSES:
        raise DataError(
            f"CIFAR-100's {NAMES} is damaged: {len(names)} names, expected {FINE_CLASSES}; "
            f"get {ARCHIVE} again from {PAGE}"
        )
    return names
