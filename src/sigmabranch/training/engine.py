"""Devices and processes behind a narrow protocol; the only file that knows Lightning Fabric."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sigmabranch.errors import ConfigError, MissingDependency


class Engine(Protocol):
    """What the training loop needs from the machinery below it.

    Attributes:
        device: where this process computes.
        rank: number of this process, from 0.
        world_size: number of processes.
        is_main: whether this process writes files and shows progress.
    """

    device: torch.device
    rank: int
    world_size: int
    is_main: bool

    def setup(self, module: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        """Wrap module and optimizer so that gradients are averaged over processes."""

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Context of a forward pass in ``"fp32"`` or ``"bf16"``."""

    def accumulating(self, module: Any, enabled: bool) -> AbstractContextManager[Any]:
        """Context in which, if ``enabled``, gradients are not yet exchanged."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""

    def clip(self, module: Any, optimizer: Any, max_norm: float) -> Tensor:
        """Scale gradients to at most ``max_norm``; returns their norm before, on the device."""

    def mean(self, tensor: Tensor) -> Tensor:
        """A new tensor: the average over processes."""

    def agree(self, flag: bool) -> bool:
        """Whether any process raised its flag, the same answer everywhere."""

    def barrier(self) -> None:
        """Wait for all processes."""


class FabricEngine:
    """:class:`Engine` on Lightning Fabric: one device, or data parallelism over many.

    Under ``torchrun`` the number of processes is taken from its environment. With ``devices`` or
    ``nodes`` above one and no launcher, Fabric starts the other processes itself by running the
    script again.

    Args:
        device: ``"auto"`` (CUDA where there is one), ``"cpu"`` or ``"cuda"``.
        devices: processes on this machine.
        nodes: machines.

    Raises:
        ConfigError: an unknown device, or CUDA asked for where there is none.
        MissingDependency: Lightning Fabric is not installed.
    """

    def __init__(self, device: str = "auto", *, devices: int = 1, nodes: int = 1) -> None:
        try:
            from lightning_fabric import Fabric  # noqa: PLC0415
        except ImportError as error:
            raise MissingDependency("lightning-fabric", "train", "training") from error
        kind = resolve_device(device).type
        if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = int(os.environ["WORLD_SIZE"]) // devices
        strategy = "ddp" if devices * nodes > 1 else "auto"
        self._fabric = Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy=strategy)
        self._fabric.launch()
        self.device: torch.device = self._fabric.device
        self.rank: int = self._fabric.global_rank
        self.world_size: int = self._fabric.world_size
        self.is_main: bool = self._fabric.is_global_zero
        if kind == "cuda":
            torch.backends.cudnn.benchmark = True

    def setup(self, module: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        """Wrap module and optimizer so that gradients are averaged over processes."""
        wrapped, stepper = self._fabric.setup(module, optimizer)
        return wrapped, stepper

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Context of a forward pass in ``"fp32"`` or ``"bf16"``."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def accumulating(self, module: Any, enabled: bool) -> AbstractContextManager[Any]:
        """Context in which, if ``enabled``, gradients are not yet exchanged."""
        return self._fabric.no_backward_sync(module, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""
        self._fabric.backward(loss)

    def clip(self, module: Any, optimizer: Any, max_norm: float) -> Tensor:
        """Scale gradients to at most ``max_norm``; returns their norm before, on the device."""
        norm = self._fabric.clip_gradients(
            module, optimizer, max_norm=max_norm, error_if_nonfinite=False
        )
        assert norm is not None  # only None when clipping by value
        return norm

    def mean(self, tensor: Tensor) -> Tensor:
        """A new tensor: the average over processes."""
        # Fabric's own reduction waits at a barrier first, too slow for every step.
        total = tensor.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total / self.world_size

    def agree(self, flag: bool) -> bool:
        """Whether any process raised its flag, the same answer everywhere."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def barrier(self) -> None:
        """Wait for all processes."""
        self._fabric.barrier()


def resolve_device(device: str) -> torch.device:
    """``"auto"``, ``"cpu"`` or ``"cuda"`` as a device of this machine.

    Raises:
        ConfigError: an unknown name, or CUDA asked for where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {device!r}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda asked for, but torch finds no CUDA GPU: use cpu or auto")
    return torch.device(device)
