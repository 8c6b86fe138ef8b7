"""How a segment is computed, given its weights."""

from sigmabranch.deploy.engines.eager import EagerEngine

__all__ = ["EagerEngine"]
