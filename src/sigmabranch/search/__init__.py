"""A search over trees: many short fine-tunes of one dense network, judged on held-out samples."""

from sigmabranch.search.bench import Bench
from sigmabranch.search.outcome import RULE, best_of, pareto
from sigmabranch.search.search import Search
from sigmabranch.search.space import Space
from sigmabranch.search.trees import proposed

__all__ = ["RULE", "Bench", "Search", "Space", "best_of", "pareto", "proposed"]
