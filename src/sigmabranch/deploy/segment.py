"""What is loaded, kept and run as one: neighbouring blocks of a node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sigmabranch.deploy.storage import checksum
from sigmabranch.deploy.stored import StoredBlock
from sigmabranch.errors import StorageError


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """A stretch of one node's file.

    Attributes:
        node: key of the node.
        blocks: neighbours in the file.
    """

    node: str
    blocks: tuple[StoredBlock, ...]

    @property
    def offset(self) -> int:
        """Where it begins in the file."""
        return self.blocks[0].offset

    @property
    def bytes(self) -> int:
        """Its length."""
        return self.blocks[-1].offset + self.blocks[-1].bytes - self.offset

    @property
    def macs(self) -> int:
        """Multiply-adds of its convolutions and matrix products."""
        return sum(block.macs for block in self.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its blocks."""
        return tuple(block.name for block in self.blocks)

    def tensors(self, memory: memoryview) -> dict[str, Tensor]:
        """Views of ``memory``, into which the stretch has been read.

        Raises:
            StorageError: the bytes are not those that were packed.
        """
        tensors = {}
        for block, part in self._parts(memory):
            if checksum(part) != block.crc32:
                raise StorageError(
                    f"block {block.name} of node {self.node} is damaged or has been changed: "
                    "copy the package again"
                )
            tensors.update(block.tensors_in(part))
        return tensors

    def _parts(self, memory: memoryview) -> Iterator[tuple[StoredBlock, memoryview]]:
        for block in self.blocks:
            start = block.offset - self.offset
            yield block, memory[start : start + block.bytes]
