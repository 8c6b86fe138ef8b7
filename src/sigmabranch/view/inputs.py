"""Where inputs come from: numbered test samples, and pictures that somebody uploads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sigmabranch.data import EMBEDDED, Split, open_data
from sigmabranch.deploy import Package
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.tasks import Task
from sigmabranch.view.preview import preview


@dataclass(frozen=True, slots=True)
class Shown:
    """One input.

    Attributes:
        x: (1, ...) float32 as the network takes it.
        title: what to call it.
        truth: name of its class, where that is known.
    """

    x: Tensor
    title: str
    truth: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What can be put into networks of one data set.

    Attributes:
        data: its name.
        shape: of one input.
        test: its test samples, where its files are there.
        class_names: in label order.
    """

    data: str
    shape: tuple[int, ...]
    test: Split | None
    class_names: Sequence[str]

    @property
    def samples(self) -> int:
        """How many samples there are, numbered from 0."""
        return 0 if self.test is None else len(self.test)

    @property
    def takes_pictures(self) -> bool:
        """Whether inputs are colour images."""
        return len(self.shape) == 3 and self.shape[0] == 3

    def sample(self, number: int) -> Shown:
        """The test sample of this number.

        Raises:
            DataError: there is none.
        """
        if self.test is None or not 0 <= number < self.samples:
            raise DataError(f"there is no sample {number}: there are {self.samples}, from 0")
        x, label = next(iter(self.test.batches(torch.tensor([number]), 1)))
        return Shown(x, f"Sample {number}", self.class_names[int(label)])

    def picture(self, encoded: bytes) -> Shown:
        """A picture file's contents.

        Raises:
            DataError: no picture, a damaged or a huge one, or networks that take none.
            MissingDependency: Pillow is not installed.
        """
        from sigmabranch.data.single import encoded_input  # noqa: PLC0415 (loads Pillow)

        x = encoded_input(self.data, encoded, self.shape[-1], what="the upload")
        return Shown(x, "Your picture", None)

    def described(self) -> dict[str, Any]:
        """How many samples the page offers, and whether it takes pictures."""
        return {"samples": self.samples, "pictures": self.takes_pictures}

    def shown(self, chosen: Shown) -> dict[str, Any]:
        """What the page shows of one of them."""
        picture = preview(self.data, chosen.x[0])
        return {"title": chosen.title, "truth": chosen.truth, "preview": picture}


def open_inputs(
    package: Package, task: Task, class_names: Sequence[str], folder: Path | None
) -> Inputs:
    """What a package can be fed.

    Args:
        package: the network's.
        task: what it was made for.
        class_names: of its classes, where the data set is not there to name them.
        folder: of the data set; the embedded ones need none.

    Raises:
        ConfigError: neither samples nor pictures.
        DataError: files that are missing or damaged, or that do not fit the package.
        MissingDependency: the reader's package is not installed.
    """
    data, test = task.data.name, None
    if folder is not None or data in EMBEDDED:
        # A forked decoder could inherit a lock that another request holds.
        dataset = open_data(data, folder, image_size=task.data.image_size, workers=0)
        if (dataset.shape, dataset.classes) != (package.input_shape, package.classes):
            raise DataError(
                f"{package.folder} takes inputs {package.input_shape} of {package.classes} "
                f"classes, but {folder} holds {dataset.shape} of {dataset.classes}"
            )
        test, class_names = dataset.limit(test=task.data.test_limit).test, dataset.class_names
    inputs = Inputs(data=data, shape=package.input_shape, test=test, class_names=class_names)
    if not (inputs.samples or inputs.takes_pictures):
        raise ConfigError(f"a network for {data} takes no pictures: give its data set with --data")
    return inputs
