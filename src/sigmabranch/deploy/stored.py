"""How a node's blocks lie in its file: a standard safetensors file with pages for blocks.

Data begin at a multiple of 4096; blocks begin and end at multiples of 4096, so that each is one
direct read into page-aligned memory; tensors begin at multiples of 64. Gaps are ``__pad__``
tensors, because the standard allows none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.deploy.blocks import Block
from sigmabranch.deploy.storage import PAGE, checksum
from sigmabranch.errors import CheckpointError, ConfigError
from sigmabranch.fields import from_fields
from sigmabranch.shared import shared_tensors

_ALIGN = 64
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
# A convolution's weight lies as its kernels read a channels-last image: (O, H, W, I).
_FROM_CHANNELS_LAST = (0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies in its block.

    Attributes:
        name: in the block's module.
        dtype: as safetensors names it.
        shape: in the file.
        axes: the tensor is the stored one with its axes in this order.
        offset: in bytes from the start of the block.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    offset: int

    @property
    def form(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of the tensor in the module."""
        return tuple(self.shape[axis] for axis in self.axes), _BY_NAME[self.dtype]

    def view(self, block: memoryview) -> Tensor:
        """The tensor in a block's memory, without a copy."""
        dtype = _BY_NAME[self.dtype]
        count = math.prod(self.shape)
        flat = torch.frombuffer(block, dtype=dtype, count=count, offset=self.offset)
        return flat.view(self.shape).permute(self.axes)

    @property
    def bytes(self) -> int:
        """Its length."""
        return math.prod(self.shape) * _BY_NAME[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredBlock:
    """Where a block lies in its file.

    Attributes:
        name: of the :class:`~sigmabranch.deploy.blocks.Block`.
        offset, bytes: multiples of 4096.
        crc32: of its bytes, gaps included.
        macs: multiply-adds of its convolutions and matrix products on one input.
        tensors: in order.
    """

    name: str
    offset: int
    bytes: int
    crc32: int
    macs: int
    tensors: tuple[StoredTensor, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> StoredBlock:
        """Inverse of :meth:`to_dict`; what cannot be in a file raises :class:`ConfigError`."""
        tensors = tuple(from_fields(StoredTensor, "tensor", item) for item in value["tensors"])
        block = from_fields(cls, "block", {**value, "tensors": tensors})
        if block.offset < PAGE or block.offset % PAGE or block.bytes < PAGE or block.bytes % PAGE:
            raise ConfigError(f"block {block.name} does not lie on pages")
        if block.macs < 0:
            raise ConfigError(f"block {block.name} has {block.macs} multiply-adds")
        for tensor in tensors:
            if tensor.dtype not in _BY_NAME or sorted(tensor.axes) != [*range(len(tensor.shape))]:
                raise ConfigError(f"tensor {tensor.name} is of no known form")
            if tensor.offset < 0 or tensor.offset % _ALIGN or min(tensor.shape, default=1) < 1:
                raise ConfigError(f"tensor {tensor.name} does not lie in block {block.name}")
            if tensor.offset + tensor.bytes > block.bytes:
                raise ConfigError(f"tensor {tensor.name} does not lie in block {block.name}")
        return block

    def tensors_in(self, memory: memoryview) -> dict[str, Tensor]:
        """The block's tensors by name, as views of its memory."""
        return {tensor.name: tensor.view(memory) for tensor in self.tensors}


def layout(
    blocks: Sequence[Block], macs: Mapping[Block, int]
) -> tuple[bytes, tuple[StoredBlock, ...]]:
    """A node's file and its block table."""
    data, placed = bytearray(), []
    entries: dict[str, Any] = {}
    for block in blocks:
        start, tensors = len(data), []
        for name, tensor in block.tensors().items():
            value, axes = _stored_form(block.module, name, tensor)
            _pad(data, _ALIGN, entries)
            shape, dtype = tuple(value.shape), _DTYPES[value.dtype]
            offset = len(data) - start
            begin = len(data)
            data += value.reshape(-1).view(torch.uint8).numpy().tobytes()
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, len(data)]}
            tensors.append(
                StoredTensor(name=name, dtype=dtype, shape=shape, axes=axes, offset=offset)
            )
        _pad(data, PAGE, entries)
        if len(data) == start:
            if not shared_tensors(block.module):
                raise CheckpointError(f"block {block.name} holds no weights: nothing to store")
            _fill(data, PAGE, entries)  # siblings share all of it, but it has its place
        placed.append((block, start, len(data), tuple(tensors)))
    head = _header(entries)
    table = tuple(
        StoredBlock(
            name=block.name,
            offset=len(head) + start,
            bytes=stop - start,
            crc32=checksum(memoryview(data)[start:stop]),
            macs=macs[block],
            tensors=tensors,
        )
        for block, start, stop, tensors in placed
    )
    return head + bytes(data), table


def _stored_form(module: nn.Module, name: str, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    tensor = tensor.detach().cpu()
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Conv2d) and name.endswith("weight"):
        return tensor.permute(0, 2, 3, 1).contiguous(), _FROM_CHANNELS_LAST
    return tensor.contiguous(), tuple(range(tensor.ndim))


def _pad(data: bytearray, multiple: int, entries: dict[str, Any]) -> None:
    _fill(data, -len(data) % multiple, entries)


def _fill(data: bytearray, gap: int, entries: dict[str, Any]) -> None:
    if gap:
        begin = len(data)
        data += bytes(gap)
        entries[f"__pad__.{begin}"] = {
            "dtype": "U8",
            "shape": [gap],
            "data_offsets": [begin, len(data)],
        }


def _header(entries: Mapping[str, Any]) -> bytes:
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text
