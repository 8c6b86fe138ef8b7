"""Batched crops and mirror images against one slice at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmabranch.data.augment import CropFlip, gather_windows

SIZES = st.integers(1, 7)


@settings(max_examples=60, deadline=None)
@given(st.tuples(SIZES, SIZES, SIZES), st.integers(0, 3), st.booleans(), st.integers(0, 2**63 - 1))
def test_every_augmented_image_is_a_window_of_the_padded_one(
    size: tuple[int, int, int], pad: int, flip: bool, seed: int
) -> None:
    batch, height, width = size
    images = torch.randint(1, 256, (batch, 2, height, width), dtype=torch.uint8)
    index = torch.randint(0, 50_000, (batch,))
    augmented = CropFlip(pad=pad, flip=flip)(images, index, seed)
    assert augmented.shape == images.shape
    assert augmented.dtype == images.dtype
    for image, result in zip(F.pad(images, (pad,) * 4), augmented, strict=True):
        windows = image.unfold(1, height, 1).unfold(2, width, 1).permute(1, 2, 0, 3, 4)
        candidates = windows.flatten(0, 1)
        if flip:
            candidates = torch.cat([candidates, candidates.flip(-1)])
        assert (candidates == result).flatten(1).all(1).any()


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES, st.data())
def test_gathered_windows_equal_indexing_each_image(
    batch: int, height: int, width: int, data: st.DataObject
) -> None:
    images = torch.rand(batch, 3, height, width)
    rows = torch.randint(0, height, (batch, data.draw(SIZES)))
    cols = torch.randint(0, width, (batch, data.draw(SIZES)))
    expected = [im[:, r][:, :, c] for im, r, c in zip(images, rows, cols, strict=True)]
    assert torch.equal(gather_windows(images, rows, cols), torch.stack(expected))


def test_all_places_and_both_directions_come_up_equally_often() -> None:
    # One bright pixel per image shows where the window started and whether it was mirrored.
    samples, pad = 9_000, 1
    images = torch.zeros(samples, 1, 5, 5, dtype=torch.uint8)
    images[:, 0, 2, 1] = 1
    images[:, 0, 2, 2] = 2
    augmented = CropFlip(pad=pad, flip=True)(images, torch.arange(samples), 11)[:, 0]
    row = (augmented == 2).any(2).int().argmax(1)
    ones = (augmented == 1).any(1).int().argmax(1)
    twos = (augmented == 2).any(1).int().argmax(1)
    mirrored = ones > twos
    assert row.bincount().tolist()[0] == 0
    for counts in (row.bincount()[1:], twos.bincount()[1:]):
        assert len(counts) == 3
        assert (counts - samples / 3).abs().max() < 5 * (samples * 2 / 9) ** 0.5
    assert abs(int(mirrored.sum()) - samples / 2) < 5 * (samples / 4) ** 0.5
    plain = CropFlip(pad=pad, flip=False)(images, torch.arange(samples), 11)[:, 0]
    ones, twos = ((plain == v).any(1).int().argmax(1) for v in (1, 2))
    assert (ones < twos).all()
