"""Devices and processes behind a narrow protocol; the only file that knows Lightning Fabric."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from sigmabranch.conversion import Shards
from sigmabranch.errors import ConfigError, MissingDependency, ProcessLost

# A process that is silent for so long counts as lost. Only what one process does alone, such as
# writing a checkpoint, makes the others wait.
TIMEOUT = timedelta(minutes=5)
# CPU generations, as torch names them, without bf16 instructions.
_EMULATING = ("DEFAULT", "AVX2")
# How torch's CPU transport reports that the other end is gone; CUDA's has an exception of its own.
_LOST_WORDS = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe")


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

    @property
    def shards(self) -> Shards:
        """This process's part of work that is divided by batches."""

    def joint_norms(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context in which batch norms see all processes' samples, where the device can."""

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

    def totals(self, values: Sequence[float]) -> list[float]:
        """Each number summed over processes, the same answer everywhere."""

    def unify(self, module: nn.Module) -> None:
        """Give every process the buffers of the main one."""

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
            from lightning_fabric.strategies import DDPStrategy  # noqa: PLC0415
        except ImportError as error:
            raise MissingDependency("lightning-fabric", "train", "training") from error
        # Its import sets its own level; what it says is for its developers.
        logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
        kind = resolve_device(device).type
        if launched() and "LOCAL_WORLD_SIZE" in os.environ:
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = int(os.environ["WORLD_SIZE"]) // devices
        several = DDPStrategy(timeout=TIMEOUT) if devices * nodes > 1 else "auto"
        self._fabric = Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy=several)
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
        enabled = precision == "bf16" and computes_in_bf16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

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

    @property
    def shards(self) -> Shards:
        """This process's part of work that is divided by batches."""
        if self.world_size == 1:
            return Shards()
        return Shards(rank=self.rank, world=self.world_size, sum=self._sum)

    @contextmanager
    def joint_norms(self, model: nn.Module) -> Iterator[None]:
        """Context in which batch norms see all processes' samples, where the device can.

        A recipe's batch is that of all processes together, and so are its statistics: torch's
        ``SyncBatchNorm`` stands in for every batch norm. It exists for CUDA only; on the CPU each
        process normalises by its own samples.
        """
        if self.world_size == 1 or self.device.type != "cuda":
            yield
            return
        model.to(self.device)  # before, so that both kinds of norm hold the same tensors
        places = [
            (parent, name, norm)
            for parent in model.modules()
            for name, norm in parent.named_children()
            if isinstance(norm, _BatchNorm)
        ]
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        try:
            yield
        finally:
            for parent, name, norm in places:
                norm.train(getattr(parent, name).training)
                setattr(parent, name, norm)

    def mean(self, tensor: Tensor) -> Tensor:
        """A new tensor: the average over processes."""
        return self._sum(tensor) / self.world_size

    def totals(self, values: Sequence[float]) -> list[float]:
        """Each number summed over processes, the same answer everywhere."""
        if self.world_size == 1:
            return list(values)
        return self._sum(torch.tensor(values, dtype=torch.float64)).tolist()

    def unify(self, module: nn.Module) -> None:
        """Give every process the buffers of the main one."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        self._fabric.barrier()

    def _sum(self, tensor: Tensor) -> Tensor:
        # Fabric's own reduction waits at a barrier first, too slow for every step.
        total = tensor.detach().to(self.device, copy=True)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.to(tensor.device)


@contextmanager
def naming_lost_processes(where: object) -> Iterator[None]:
    """Turn a broken connection to another process into one line.

    Args:
        where: what the same command continues from.

    Raises:
        ProcessLost: the other process ended, or was silent for :data:`TIMEOUT`.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise ProcessLost(
            "another process of this run has ended or has gone silent; "
            f"the same command, with any number of processes, continues from {where}"
        ) from error


def _is_loss(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    words = str(error).lower()
    return dist.is_initialized() and any(known in words for known in _LOST_WORDS)


def leave_processes() -> None:
    """Close the connections to a run's other processes, which must not outlive its work."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def launched() -> bool:
    """Whether a launcher such as ``torchrun`` has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched_rank() -> int:
    """The number that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bf16 saves ``device`` anything: older CPUs only emulate it, many times slower."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in _EMULATING


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
