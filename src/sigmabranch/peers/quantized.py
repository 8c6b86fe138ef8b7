"""The dense network in eight bits: what a user without a tree would do first."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from sigmabranch.backbones import GlobalAveragePool, PointNet2Spec
from sigmabranch.errors import ConfigError
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.system import System, Trained
from sigmabranch.tasks import Task

# Batches of calibration; more move no range by much.
_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class DenseInt8(System):
    """Static post-training quantization of the trained-on dense network, by PyTorch.

    Weights per channel and activations per tensor, in eight bits, with integer kernels on the CPU;
    batch norms are folded. The network is :class:`~sigmabranch.peers.controls.DenseContinued`'s.
    """

    name: ClassVar[str] = "dense-int8"
    summary: ClassVar[str] = "the dense network, trained on and quantized to eight bits"

    def check(self, task: Task) -> None:
        """The operators of point clouds have no integer kernels."""
        if isinstance(task.model, PointNet2Spec):
            raise ConfigError("dense-int8 quantizes networks on images, not on point clouds")

    def sketch(self, task: Task) -> nn.Module:
        """The dense network: it has as many weights."""
        return task.model.build()

    def run(self, bench: Bench) -> Trained:
        """Train the source network on, calibrate, quantize."""
        network = bench.continued()
        counted = copy.deepcopy(network).cpu()
        images = (x.cpu() for x, _ in islice(bench.calibration().part(0, 1), _BATCHES))
        quantized = quantize(network.cpu(), images, bench.example())
        return Trained(
            network=quantized,
            recipe=bench.recipe,
            epochs=bench.epochs,
            counted=counted,
            bytes_per_param=1.0,
        )


def quantize(network: nn.Module, batches: Iterable[Tensor], example: Tensor) -> nn.Module:
    """A copy of ``network`` with eight-bit weights and activations, for the CPU.

    Args:
        network: (B, C, H, W) → (B, V), in eval mode, on the CPU.
        batches: calibration inputs.
        example: one input.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its successor is a package of its own
        from torch.ao.quantization import get_default_qconfig_mapping  # noqa: PLC0415
        from torch.ao.quantization.fx.custom_config import PrepareCustomConfig  # noqa: PLC0415
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx  # noqa: PLC0415

        engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "qnnpack"
        torch.backends.quantized.engine = engine
        whole = PrepareCustomConfig().set_non_traceable_module_classes([GlobalAveragePool])
        prepared = prepare_fx(
            copy.deepcopy(network).eval(),
            get_default_qconfig_mapping(engine),
            (example,),
            prepare_custom_config=whole,
        )
        with torch.no_grad():
            for x in batches:
                prepared(x)
        return _OnCpu(convert_fx(prepared))


class _OnCpu(nn.Module):
    """Integer kernels live on the CPU; inputs come from and logits go wherever they are wanted."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # says which device

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.cpu()).to(x.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self  # integer weights stay where their kernels are
