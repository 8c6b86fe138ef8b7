"""What a network costs, how well it does, and what its routing is worth."""

from sigmabranch.measure.accuracy import evaluate, evaluate_dense
from sigmabranch.measure.cost import cost

__all__ = ["cost", "evaluate", "evaluate_dense"]
