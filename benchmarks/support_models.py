"""The networks that the support sweep tries: the smallest member of each family.

All are untrained. What an initialisation sets to zero or close to it, the last batch norm of a
block or a layer scale, would hide a wrong channel; so their vectors are drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sigmabranch.backbones import (
    ConvNeXt,
    ConvNeXtSpec,
    PointNet2,
    PointNet2Spec,
    ResNet,
    ResNetSpec,
    ViT,
    ViTSpec,
    WideResNet,
    WideResNetSpec,
)
from sigmabranch.backbones.timm import create_timm

CLASSES = 10
_IMAGE_SIZES = (64, 96)

# Heading → family → names.
TIMM: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Residual networks": {
        "ResNet": ("resnet18", "resnet50"),
        "ResNet-D": ("resnet26d",),
        "ResNetV2": ("resnetv2_18", "resnetv2_50x1_bit"),
        "ResNeXt": ("resnext50_32x4d",),
        "SE-ResNet": ("seresnet18",),
        "SK-ResNet": ("skresnet18",),
        "ECA-ResNet": ("ecaresnet26t",),
        "ResNeSt": ("resnest14d",),
        "Res2Net": ("res2net50_14w_8s",),
        "RegNet": ("regnetx_002", "regnety_002", "regnetz_005"),
        "NFNet": ("eca_nfnet_l0",),
    },
    "Other convolutional networks": {
        "VGG": ("vgg11_bn",),
        "DenseNet": ("densenet121",),
        "DPN": ("dpn68",),
        "Inception": ("inception_v3",),
        "Xception": ("xception41",),
        "DarkNet": ("darknet17",),
        "CSP": ("cs3darknet_s",),
        "VoVNet": ("ese_vovnet19b_slim_dw",),
        "DLA": ("dla46_c",),
        "HRNet": ("hrnet_w18_small",),
        "ConvNeXt": ("convnext_atto", "convnextv2_atto"),
        "InceptionNeXt": ("inception_next_atto",),
        "FocalNet": ("focalnet_tiny_srf",),
        "MambaOut": ("mambaout_femto",),
    },
    "Small networks for devices": {
        "MobileNet": (
            "mobilenetv1_100",
            "mobilenetv2_050",
            "mobilenetv3_small_050",
            "mobilenetv4_conv_small_035",
        ),
        "EfficientNet": ("efficientnet_b0", "tf_efficientnetv2_b0", "tinynet_e"),
        "MNASNet": ("mnasnet_small",),
        "FBNet": ("fbnetc_100",),
        "ReXNet": ("rexnet_100",),
        "GhostNet": ("ghostnet_050",),
        "RepVGG": ("repvgg_a0",),
        "MobileOne": ("mobileone_s0",),
        "RepViT": ("repvit_m0_9",),
        "StarNet": ("starnet_s1",),
    },
    "Transformers": {
        "ViT": ("vit_tiny_patch16_224",),
        "DeiT": (
            "deit_tiny_patch16_224",
            "deit_tiny_distilled_patch16_224",
            "deit3_small_patch16_224",
        ),
        "SigLIP": ("vit_base_patch16_siglip_224",),
        "DINOv3": ("vit_small_patch16_dinov3",),
        "BEiT": ("beit_base_patch16_224",),
        "EVA": ("eva02_tiny_patch14_224",),
        "CaiT": ("cait_xxs24_224",),
        "PiT": ("pit_ti_224",),
        "LeViT": ("levit_128s",),
        "Swin": ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"),
        "PVT": ("pvt_v2_b0",),
        "XCiT": ("xcit_nano_12_p16_224",),
        "Twins": ("twins_svt_small",),
        "CoaT": ("coat_lite_tiny",),
        "MViT": ("mvitv2_tiny",),
        "Hiera": ("hiera_tiny_224",),
        "DaViT": ("davit_tiny",),
    },
    "Token mixers": {
        "MLP-Mixer": ("mixer_s32_224",),
        "ResMLP": ("resmlp_12_224",),
        "gMLP": ("gmlp_ti16_224",),
        "MetaFormer": ("poolformer_s12", "caformer_s18"),
    },
    "Convolutions with attention": {
        "MaxViT": ("maxvit_pico_rw_256",),
        "CoAtNet": ("coatnet_pico_rw_224",),
        "EfficientFormer": ("efficientformer_l1", "efficientformerv2_s0"),
        "EfficientViT": ("efficientvit_b0", "efficientvit_m0"),
        "FastViT": ("fastvit_t8",),
        "MobileViT": ("mobilevit_xxs", "mobilevitv2_050"),
        "TinyViT": ("tiny_vit_5m_224",),
        "EdgeNeXt": ("edgenext_xx_small",),
    },
}
# Where even the smallest member is large, some of it is left out.
LESS: Mapping[str, Mapping[str, float]] = {
    "vgg11_bn": {"mlp_ratio": 0.125},
    "beit_base_patch16_224": {"depth": 4},
    "vit_base_patch16_siglip_224": {"depth": 4},
}


@dataclass(frozen=True, slots=True)
class Subject:
    """A network to try.

    Attributes:
        name: what ``--models`` calls it.
        group: the heading of its table.
        family: what it is one of.
        origin: ``"timm"``, ``"sigmabranch"``, or ``"own"`` for a module as a user writes it.
    """

    name: str
    group: str
    family: str
    origin: str


def subjects() -> tuple[Subject, ...]:
    """All networks of the sweep, in the order of the table."""
    found = [
        Subject(name, group, family, "timm")
        for group, families in TIMM.items()
        for family, names in families.items()
        for name in names
    ]
    found += [Subject(name, "Without timm", "sigmabranch", "sigmabranch") for name in _LIBRARY]
    found += [Subject(name, "Without timm", "a user's own", "own") for name in _OWN]
    return tuple(found)


def subject(name: str) -> Subject:
    """The network of that name, in the list or any other of timm's."""
    known = {found.name: found for found in subjects()}
    return known.get(name) or Subject(name, "Others", name, "timm")


def built(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network in eval mode with meaningful random weights, and one of the smallest legal inputs.

    Args:
        name: of one of :func:`subjects`, or of any model of timm.
        seed: of weights and input.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    build = {**_LIBRARY, **_OWN}.get(name)
    if build is None:
        model = create_timm(name, num_classes=CLASSES, **LESS.get(name, {})).eval()
        sizes = [(3, side, side) for side in _IMAGE_SIZES]
        sizes.append(tuple(model.pretrained_cfg["input_size"]))
    else:
        model, sizes = build()
        model.eval()
    example = next(_legal(model, sizes, generator))
    randomise(model, example, generator)
    return model, example[:1]


def _legal(
    model: nn.Module, sizes: list[tuple[int, ...]], generator: torch.Generator
) -> Iterator[Tensor]:
    """Batches of eight inputs, of the sizes that the model takes and of the last."""
    for size in sizes:
        example = torch.randn(8, *size, generator=generator)
        try:
            with torch.no_grad():
                model(example[:1])
        except Exception:  # foreign code may refuse in any way
            if size != sizes[-1]:
                continue
        yield example


def randomise(model: nn.Module, example: Tensor, generator: torch.Generator) -> None:
    """Random vectors in place, and the batch norms' statistics those of ``example``."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or name.endswith(("running_mean", "running_var")):
            continue
        if name.endswith("bias"):
            tensor.normal_(0, 0.1, generator=generator)
        elif tensor.numel() == max(tensor.shape, default=0):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif not tensor.any():
            tensor.normal_(0, 0.05, generator=generator)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the statistics of this one batch
    with torch.no_grad():
        model(example)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


# -- networks without timm ------------------------------------------------------------------------

_Built = tuple[nn.Module, list[tuple[int, ...]]]


def _resnet() -> _Built:
    spec = ResNetSpec(stem="cifar", strides=(1, 2, 2, 2), planes=(16, 32, 64, 128), classes=CLASSES)
    return ResNet(spec), [(3, 32, 32)]


def _wide_resnet() -> _Built:
    return WideResNet(WideResNetSpec(depth=16, widen=2, classes=CLASSES)), [(3, 32, 32)]


def _vit() -> _Built:
    return ViT(ViTSpec(classes=CLASSES)), [(3, 32, 32)]


def _convnext() -> _Built:
    return ConvNeXt(ConvNeXtSpec(classes=CLASSES)), [(3, 32, 32)]


def _pointnet2() -> _Built:
    spec = PointNet2Spec(centroids=(64, 16), radii=(1.0, 2.0), neighbours=(16, 16), classes=CLASSES)
    return PointNet2(spec), [(128, 3)]


class MLP(nn.Sequential):
    """Linear layers in a row."""

    def __init__(self) -> None:
        sizes = [20, 64, 96, 128, 128]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers, nn.Linear(sizes[-1], CLASSES))


class PointNet(nn.Module):
    """Every point through the same layers, then the largest of each channel."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 32, 64, 128, 256]
        self.convs = nn.ModuleList(nn.Conv1d(before, after, 1) for before, after in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(size) for size in sizes[1:])
        self.classifier = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, N) → (B, V)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return self.classifier(x.amax(dim=2))


_LIBRARY: Mapping[str, Callable[[], _Built]] = {
    "sb.ResNet": _resnet,
    "sb.WideResNet": _wide_resnet,
    "sb.PointNet2": _pointnet2,
    "sb.ViT": _vit,
    "sb.ConvNeXt": _convnext,
}
_OWN: Mapping[str, Callable[[], _Built]] = {
    "own.MLP": lambda: (MLP(), [(20,)]),
    "own.PointNet": lambda: (PointNet(), [(3, 64)]),
}
