"""Image folders as every ImageNet user has them: ``train/<class>/*.JPEG``, ``val/<class>/*.JPEG``.

Any number of classes and any image size. Worker processes decode, cut and scale; the batch is
normalised on the device.

B batch, N samples, S side of an image in pixels.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as IndexedDataset

from sigmabranch.data.crops import centre_crop, random_crop
from sigmabranch.data.decode import Picture, Unreadable, read_picture
from sigmabranch.data.seeds import derive_seed
from sigmabranch.data.split import Dataset, Normalise
from sigmabranch.errors import DataError

IMAGE_SIZE = 224
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# More unreadable images than this share of a split are an error.
UNREADABLE_SHARE = 0.01
MOST_WORKERS = 16

Decoded = tuple[Tensor, int, list[int]]


def open_imagenet(
    folder: Path | str,
    device: torch.device | str,
    *,
    image_size: int = IMAGE_SIZE,
    channels_last: bool = False,
    workers: int | None = None,
) -> Dataset:
    """ImageNet-1K, or any data set in its folder layout.

    Training crops cover 8 to 100 % of the image at a ratio of 3:4 to 4:3 and are mirrored half of
    the time; test images are scaled to 256/224 of the crop and cut at the centre.

    Args:
        folder: holds ``train`` and ``val``, each with one folder of images a class.
        device: where the batches go.
        image_size: side of the images handed out, in pixels.
        channels_last: memory format of the batches.
        workers: processes that decode; 0 decodes in this one, None takes one a core up to 16.

    Raises:
        DataError: a folder that is missing or empty, or classes that differ between the two.
    """
    root = Path(folder)
    class_names = _class_folders(root / "train")
    _check_same_classes(root, class_names, _class_folders(root / "val"))
    normalise = Normalise(MEAN, STD, device=device, channels_last=channels_last)

    def split(part: str) -> FolderSplit:
        files, labels = _scan(root / part, class_names)
        return FolderSplit(
            root=str(root / part),
            files=files,
            labels=labels.to(device),
            image_size=image_size,
            normalise=normalise,
            workers=_usable_cores() if workers is None else workers,
        )

    return Dataset(
        name="imagenet",
        train=split("train"),
        test=split("val"),
        class_names=class_names,
        shape=(3, image_size, image_size),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSplit:
    """A split that is decoded from files as it is asked for.

    An unreadable image is replaced by the next readable one in file order, as a rule of the same
    class; its name is warned of once and kept in ``unreadable``. More of them than 1 % of the
    split raise :class:`DataError`.

    Attributes:
        root: folder of the class folders.
        files: (N,) file names relative to ``root``, as bytes.
        labels: (N,) int64 on the device of the batches.
        image_size: side of the images handed out, in pixels.
        normalise: maps uint8 images to float32.
        workers: processes that decode; 0 decodes in this one.
        unreadable: names of the images that could not be read so far.
    """

    root: str
    files: np.ndarray
    labels: Tensor
    image_size: int
    normalise: Normalise
    workers: int
    unreadable: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.files)

    def batches(
        self, order: Tensor, batch_size: int, *, augment_seed: int | None = None, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`Split.batches`."""
        device = self.labels.device
        order = order[start * batch_size :]
        loader = DataLoader(
            _Decoder(
                root=self.root,
                names_NL=torch.from_numpy(self.files.view(np.uint8).reshape(len(self), -1)),
                image_size=self.image_size,
                augment_seed=augment_seed,
                tries=self._tolerated + 1,
            ),
            sampler=order.tolist(),
            batch_size=batch_size,
            num_workers=min(self.workers, math.ceil(len(order) / batch_size)),
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            # Its own generator: the loader's seed must not be drawn from the global one.
            generator=torch.Generator(),
        )
        for images, used, failed in loader:
            self._note_unreadable(failed)
            labels = self.labels[used.to(device, non_blocking=True)]
            yield self.normalise(images.to(device, non_blocking=True)), labels

    def select(self, index: Tensor) -> FolderSplit:
        """See :meth:`Split.select`."""
        return replace(
            self,
            files=self.files[index.cpu().numpy()],
            labels=self.labels[index.to(self.labels.device)],
            unreadable=set(),
        )

    def as_measured(self) -> FolderSplit:
        """See :meth:`Split.as_measured`."""
        return self

    @property
    def _tolerated(self) -> int:
        return int(UNREADABLE_SHARE * len(self))

    def _note_unreadable(self, failed: Sequence[int]) -> None:
        for name in {os.fsdecode(self.files[index]) for index in failed} - self.unreadable:
            self.unreadable.add(name)
            path = os.path.join(self.root, name)
            if len(self.unreadable) > self._tolerated:
                raise DataError(
                    f"{path} cannot be read: unreadable images are now {len(self.unreadable)} of "
                    f"{len(self)}, {self._tolerated} are tolerated; get these files again"
                )
            warnings.warn(f"{path} cannot be read and is replaced by its neighbour", stacklevel=3)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Decoder(IndexedDataset[Decoded]):
    """What a worker process needs: sample number -> (image, sample number used, failed ones).

    Images are (3, S, S) uint8. The names are a tensor because tensors are shared with workers
    that are spawned, where a million names as an array would be sent to one after the other.
    """

    root: str
    names_NL: Tensor
    image_size: int
    augment_seed: int | None
    tries: int

    def __getitem__(self, index: int) -> Decoded:
        failed: list[int] = []
        for attempt in range(self.tries):
            candidate = (index + attempt) % len(self.names_NL)
            try:
                picture = read_picture(os.path.join(self.root, self._name(candidate)))
                return self._crop(picture, index), candidate, failed
            except Unreadable:
                failed.append(candidate)
        # So many failures make the split raise; an error raised here would lose its one line.
        size = self.image_size
        return torch.zeros(3, size, size, dtype=torch.uint8), index, failed

    def _crop(self, picture: Picture, index: int) -> Tensor:
        if self.augment_seed is None:
            return centre_crop(picture.pixels(), self.image_size)
        return random_crop(picture, self.image_size, derive_seed(self.augment_seed, index))

    def _name(self, index: int) -> str:
        return os.fsdecode(self.names_NL[index].numpy().tobytes().rstrip(b"\0"))


def _collate(samples: Sequence[Decoded]) -> tuple[Tensor, Tensor, list[int]]:
    images, index, failed = zip(*samples, strict=True)
    # default_collate writes the batch of a worker straight into memory shared with this process.
    return default_collate(list(images)), torch.tensor(index), [i for few in failed for i in few]


def _class_folders(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder}: expected image folders train/<class>/*.JPEG and "
            f"val/<class>/*.JPEG in {folder.parent}"
        )
    names = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    if not names:
        raise DataError(f"{folder} has no class folders: sort its images into one folder a class")
    for name in names:
        if os.fsencode(name).decode(errors="ignore") != name:
            raise DataError(f"{folder} has a class folder {name!r}: give it a name that is text")
    return names


def _check_same_classes(root: Path, train: Sequence[str], val: Sequence[str]) -> None:
    different = sorted(set(train) ^ set(val))
    if different:
        raise DataError(
            f"{root / 'train'} and {root / 'val'} differ in {len(different)} classes, first "
            f"{different[0]!r}: both need the same class folders"
        )


def _scan(folder: Path, class_names: Sequence[str]) -> tuple[np.ndarray, Tensor]:
    """File names as bytes (compact: worker processes share them) and labels, by class and name."""
    files: list[bytes] = []
    counts: list[int] = []
    for name in class_names:
        with os.scandir(folder / name) as entries:
            images = sorted(e.name for e in entries if e.name.lower().endswith(SUFFIXES))
        if not images:
            raise DataError(
                f"{folder / name} holds no images ({', '.join(SUFFIXES)}): fill or remove it"
            )
        files += [os.fsencode(os.path.join(name, image)) for image in images]
        counts.append(len(images))
    return np.array(files), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    return min(MOST_WORKERS, os.cpu_count() or 1)
