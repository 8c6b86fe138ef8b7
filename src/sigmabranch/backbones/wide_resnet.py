"""Wide ResNets (Zagoruyko & Komodakis, 2016, arXiv 1605.07146) for small images.

Blocks are pre-activated: norm and ReLU come before each convolution, so a stage hands on its bare
residual stream and the norm that reads it belongs to the next one. A shortcut is the identity, or
a 1×1 convolution of the block's activated input where width or stride changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from sigmabranch.backbones.base import Backbone, check_image
from sigmabranch.backbones.pools import GlobalAveragePool
from sigmabranch.errors import ConfigError
from sigmabranch.fields import from_fields, to_fields

_NARROWEST = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class WideResNetSpec:
    """Shape of a Wide ResNet; WRN-28-10 by default.

    Attributes:
        depth: layers with weights on the longest way, 4 + 2 · stages · (blocks per stage).
        widen: the first stage has 16 times as many channels, each further one twice as many.
        widths: channels of each stage, instead of what ``widen`` gives.
        strides: stride of the first block of each stage.
        stem_width: channels after the stem.
        in_channels: channels of the image.
        classes: length of the output.
    """

    family: ClassVar[str] = "wide-resnet"

    depth: int = 28
    widen: int = 10
    widths: tuple[int, ...] | None = None
    strides: tuple[int, ...] = (1, 2, 2)
    stem_width: int = 16
    in_channels: int = 3
    classes: int = 100

    def __post_init__(self) -> None:
        if not self.strides or len(self.stage_widths) != len(self.strides):
            raise ConfigError("a Wide ResNet needs as many widths as strides, at least one")
        sizes = (*self.stage_widths, *self.strides, self.stem_width, self.in_channels)
        if min(*sizes, self.widen, self.classes) < 1:
            raise ConfigError("every size of a Wide ResNet must be at least 1")
        layers = 2 * len(self.strides)
        if self.blocks < 1 or (self.depth - 4) % layers:
            raise ConfigError(
                f"a Wide ResNet of {len(self.strides)} stages has a depth of 4 and a multiple of "
                f"{layers}, got {self.depth}"
            )

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        if self.widths is not None:
            return self.widths
        return tuple(_NARROWEST * self.widen * 2**stage for stage in range(len(self.strides)))

    @property
    def blocks(self) -> int:
        """Blocks per stage."""
        return (self.depth - 4) // (2 * len(self.strides))

    def build(self) -> WideResNet:
        """A freshly initialised network of this shape."""
        return WideResNet(self)

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise :class:`DataError` unless one input of ``shape`` fits the network."""
        check_image(shape, self.in_channels)

    def narrowed(self, factor: float, nudge: int) -> WideResNetSpec:
        """All widths times ``factor``; the last stage ``nudge`` channels wider."""
        widths = [max(1, round(width * factor)) for width in self.stage_widths]
        widths[-1] = max(1, widths[-1] + nudge)
        stem_width = max(1, round(self.stem_width * factor))
        return replace(self, widths=tuple(widths), stem_width=stem_width)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {name: to_fields(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> WideResNetSpec:
        """Inverse of :meth:`to_dict`; unknown keys raise :class:`ConfigError`."""
        return from_fields(cls, "Wide ResNet", value)


class PreActivatedBlock(nn.Module):
    """Norm, ReLU, 3×3 convolution (strided), the same again, and the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        activated = self.act1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        x = self.act2(self.bn2(self.conv1(activated)))
        return self.conv2(x) + shortcut


class WideResNet(nn.Module):
    """A Wide ResNet of the given shape: (B, in_channels, H, W) float → (B, classes) logits."""

    def __init__(self, spec: WideResNetSpec) -> None:
        super().__init__()
        self.skeleton_source = {"builder": spec.family, "config": spec.to_dict()}
        self.conv1 = nn.Conv2d(spec.in_channels, spec.stem_width, 3, 1, 1, bias=False)
        width = spec.stem_width
        shapes = zip(spec.stage_widths, spec.strides, strict=True)
        for number, (outputs, stride) in enumerate(shapes, start=1):
            first = PreActivatedBlock(width, outputs, stride)
            rest = [PreActivatedBlock(outputs, outputs, 1) for _ in range(spec.blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            width = outputs
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.global_pool = GlobalAveragePool()
        self.fc = nn.Linear(width, spec.classes)
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, classes)."""
        for module in self.children():
            x = module(x)
        return x

    def _initialise(self) -> None:
        """He initialisation, as its authors do, and no bias."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)


def wide_resnet_backbone(model: nn.Module) -> Backbone | None:
    """Where to cut a :class:`WideResNet`; None for any other module."""
    if not isinstance(model, WideResNet):
        return None
    names = [name for name, _ in model.named_children()]
    chain = tuple(names[: names.index("global_pool")])
    return Backbone(
        model=model,
        chain=chain,
        stages=tuple(name for name in chain if name.startswith("layer")),
        pool=GlobalAveragePool(),
        head=("fc",),
        source=model.skeleton_source,
    )


def build_wide_resnet(config: Mapping[str, Any]) -> WideResNet:
    """A freshly initialised Wide ResNet from the JSON form of its spec."""
    return WideResNet(WideResNetSpec.from_dict(config))
