"""The embedded digits and the registry."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sigmabranch.data import Dataset, EpochBatches, open_data
from sigmabranch.errors import ConfigError, DataError, MissingDependency

load_digits = pytest.importorskip("sklearn.datasets").load_digits


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_data("digits")


def test_split_is_complete_disjoint_and_stratified(digits: Dataset) -> None:
    assert (len(digits.train), len(digits.test), digits.classes) == (1297, 500, 10)
    both = torch.cat([digits.train.inputs, digits.test.inputs]).flatten(1)
    source = torch.from_numpy(load_digits().images * 15).to(torch.uint8).flatten(1)
    assert torch.equal(both.unique(dim=0), source.unique(dim=0))
    expected = torch.from_numpy(load_digits().target).bincount() * 500 / 1797
    assert (digits.test.labels.bincount() - expected).abs().max() <= 1


def test_held_out_split_never_changes(digits: Dataset) -> None:
    assert digits.test.labels[:12].tolist() == [4, 6, 7, 8, 0, 5, 6, 9, 0, 6, 8, 4]
    assert digits.test.inputs.sum().item() == 2_354_520


def test_training_images_are_normalised(digits: Dataset) -> None:
    (x, _) = next(digits.train.batches(torch.arange(1297), 1297))
    assert x.shape == (1297, *digits.shape)
    assert abs(x.mean().item()) < 1e-5
    assert abs(x.std(correction=0).item() - 1) < 1e-5


def test_training_shifts_by_at_most_one_pixel_and_never_mirrors(digits: Dataset) -> None:
    batches = EpochBatches(digits.train, 1297, seed=0)
    x, *_ = next(batches.epoch(0))
    (plain, _) = next(digits.train.batches(batches.order(0), 1297))
    background = plain.min()
    padded = torch.nn.functional.pad(plain, (1,) * 4, value=background.item())
    shifts = [padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    equal = torch.stack([torch.isclose(x, s, atol=1e-6).flatten(1).all(1) for s in shifts])
    assert equal.any(0).all()
    assert (equal.float().mean(1) > 0.05).all()


def test_missing_scikit_learn_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependency, match="scikit-learn"):
        open_data("digits")


def test_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"known: digits, .*, shapes; did you mean cifar100\?"):
        open_data("cifar-100")


@pytest.mark.parametrize(("name", "size"), [("digits", 28), ("cifar100", 224), ("imagenet", 0)])
def test_image_size_a_data_set_does_not_have_is_refused(name: str, size: int) -> None:
    with pytest.raises(ConfigError, match=str(size)):
        open_data(name, "/nowhere", image_size=size)


def test_image_folders_need_a_folder() -> None:
    with pytest.raises(DataError, match="train/<class>"):
        open_data("imagenet")


def test_importing_data_loads_neither_pillow_nor_scikit_learn() -> None:
    code = (
        "import sys, sigmabranch.data\n"
        "print([m for m in ('PIL', 'sklearn', 'torchvision') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, check=True, capture_output=True).stdout.strip() == b"[]"
