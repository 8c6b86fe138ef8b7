"""Images under four conditions, as a camera may meet them: day, night, fog and infrared.

What suits one condition does not suit another, so a network that knows which one it is in may do
with fewer weights: a question that routing can answer.

B batch, C channels, H height, W width, I images, N views, K conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sigmabranch.data.seeds import below, derive_seed, sample_bits
from sigmabranch.data.split import Augment, Dataset, ResidentSplit

_CONDITION, _NOISE = 0, 1
# Rec. 601: what a colour contributes to brightness.
_LUMA = (0.299, 0.587, 0.114)
# Two uniform numbers of 16 bits added, of mean 0 and deviation 1.
_HALF = 2**16
_NOISE_SCALE = (6.0 / (_HALF**2 - 1)) ** 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What becomes of an image whose pixels run from 0 to 1.

    Attributes:
        name: of the condition.
        grey: its colours give way to their brightness.
        blurred: by a binomial filter of 5 x 5 pixels.
        gain, offset: a pixel p becomes gain * p + offset.
        noise: deviation of what is added to each pixel; the sum stays in 0 to 1.
    """

    name: str
    grey: bool = False
    blurred: bool = False
    gain: float = 1.0
    offset: float = 0.0
    noise: float = 0.0


CONDITIONS = (
    Condition(name="day"),
    Condition(name="night", gain=0.2, noise=0.03),
    Condition(name="fog", blurred=True, gain=0.35, offset=0.6),
    Condition(name="infrared", grey=True, blurred=True, gain=-1.0, offset=1.0),
)


class Exposure:
    """Shows each image of a batch under a condition of its own, all images at once.

    Args:
        device: where the images are.
    """

    def __init__(self, device: torch.device | str) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None, None]

        self._grey = column([float(each.grey) for each in CONDITIONS])
        self._blurred = column([float(each.blurred) for each in CONDITIONS])
        self._gain = column([each.gain for each in CONDITIONS])
        self._offset = column([255 * each.offset for each in CONDITIONS])
        self._noise = column([255 * each.noise for each in CONDITIONS])
        self._luma_C11 = torch.tensor(_LUMA, device=device)[:, None, None]

    def __call__(self, images_BCHW: Tensor, condition_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """uint8 images to float32 ones with pixels in 0 to 255; by day they stay as they are.

        Args:
            images_BCHW: uint8, red, green and blue.
            condition_B: int64 number in :data:`CONDITIONS` of each.
            noise_BCHW: of mean 0 and deviation 1.
        """
        pixels = images_BCHW.to(torch.float32)
        grey_B1HW = (pixels * self._luma_C11).sum(1, keepdim=True)
        pixels = pixels.lerp(grey_B1HW, self._grey[condition_B])
        pixels = pixels.lerp(blur(pixels), self._blurred[condition_B])
        pixels.mul_(self._gain[condition_B]).add_(self._offset[condition_B])
        return pixels.addcmul_(noise_BCHW, self._noise[condition_B]).clamp_(0, 255)


def blur(images_BCHW: Tensor) -> Tensor:
    """Weighted means of 5 x 5 pixels, 1-4-6-4-1 each way; the edge goes on beyond the border."""
    height, width = images_BCHW.shape[-2:]
    padded = F.pad(images_BCHW, (2,) * 4, mode="replicate")
    rows = [padded.narrow(2, i, height) for i in range(5)]
    tall = (rows[1] + rows[3]).mul_(4).add_(rows[0]).add_(rows[4]).add_(rows[2], alpha=6)
    cols = [tall.narrow(3, i, width) for i in range(5)]
    wide = (cols[1] + cols[3]).mul_(4).add_(cols[0]).add_(cols[4]).add_(cols[2], alpha=6)
    return wide.mul_(1 / 256)


def noise_like(images_BCHW: Tensor, index_B: Tensor, seed: int) -> Tensor:
    """Independent float32 numbers of mean 0 and deviation 1, by seed and sample alone."""
    bits = sample_bits(seed, index_B, images_BCHW[0].numel())
    doubled = (bits >> 16) + (bits & (_HALF - 1)) - (_HALF - 1)
    return doubled.to(torch.float32).mul_(_NOISE_SCALE).view(images_BCHW.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditionSplit:
    """Views of images under conditions; the images lie on the device as a whole.

    With augmentation every sample gets a condition anew, each as likely. Without it a view has the
    condition and the noise that it always has.

    Attributes:
        images: (I, 3, H, W) uint8.
        image: (N,) int64, of which image each sample is a view.
        condition: (N,) int64, under which of :data:`CONDITIONS` it is seen without augmentation.
        labels: (N,) int64.
        seed: of the noise without augmentation.
        augment: maps (images, sample numbers, seed) to augmented images, before the condition.
        expose: shows them under their conditions.
        normalise: maps pixels of 0 to 255 to float32.
    """

    images: Tensor
    image: Tensor
    condition: Tensor
    labels: Tensor
    seed: int
    augment: Augment
    expose: Exposure
    normalise: Callable[[Tensor], Tensor]

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions' names."""
        return tuple(each.name for each in CONDITIONS)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, order: Tensor, batch_size: int, *, augment_seed: int | None = None, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`Split.batches`."""
        order = order.to(self.images.device)
        for index in torch.split(order[start * batch_size :], batch_size):
            if not len(index):  # split() of nothing is one empty piece
                return
            numbers, condition, seed = self.image[index], self.condition[index], self.seed
            images = self.images[numbers]
            if augment_seed is not None:
                images, numbers = self.augment(images, index, augment_seed), index
                condition = drawn(index, derive_seed(augment_seed, _CONDITION))
                seed = derive_seed(augment_seed, _NOISE)
            noise = noise_like(images, numbers, seed)
            yield self.normalise(self.expose(images, condition, noise)), self.labels[index]

    def select(self, index: Tensor) -> ConditionSplit:
        """See :meth:`Split.select`."""
        index = index.to(self.images.device)
        return replace(
            self,
            image=self.image[index],
            condition=self.condition[index],
            labels=self.labels[index],
        )

    def as_measured(self) -> ConditionSplit:
        """Each sample's image under all conditions, one after the other."""
        kinds = len(CONDITIONS)
        return replace(
            self,
            image=self.image.repeat_interleave(kinds),
            condition=torch.arange(kinds, device=self.image.device).repeat(len(self)),
            labels=self.labels.repeat_interleave(kinds),
        )


def drawn(index_B: Tensor, seed: int) -> Tensor:
    """A random condition for each sample number: (B,) int64."""
    return below(sample_bits(seed, index_B, 1)[:, 0], len(CONDITIONS))


def under_conditions(data: Dataset, name: str) -> Dataset:
    """A data set of colour images whose training shows each under a random condition.

    The test split, and what is held out of the training split, hold every image under each of
    them. Without augmentation a training image has one condition, chosen once.

    Args:
        data: of splits on a device, uint8 images of three channels.
        name: of the result.
    """

    def split(plain: ResidentSplit, seed: int) -> ConditionSplit:
        number = torch.arange(len(plain), device=plain.inputs.device)
        return ConditionSplit(
            images=plain.inputs,
            image=number,
            condition=drawn(number, derive_seed(seed, _CONDITION)),
            labels=plain.labels,
            seed=derive_seed(seed, _NOISE),
            augment=plain.augment,
            expose=Exposure(plain.inputs.device),
            normalise=plain.normalise,
        )

    assert isinstance(data.train, ResidentSplit)
    assert isinstance(data.test, ResidentSplit)
    train, test = split(data.train, 0), split(data.test, 1)
    return replace(data, name=name, train=train, test=test.as_measured())
