"""What a network costs, how well it does, and what its routing is worth."""

from sigmabranch.measure.accuracy import correctness, evaluate, evaluate_dense, evaluate_dynamic
from sigmabranch.measure.cost import cost, count_parameters, module_costs
from sigmabranch.measure.latency import latency
from sigmabranch.measure.load import Dynamic, Load

__all__ = [
    "Dynamic",
    "Load",
    "correctness",
    "cost",
    "count_parameters",
    "evaluate",
    "evaluate_dense",
    "evaluate_dynamic",
    "latency",
    "module_costs",
]
