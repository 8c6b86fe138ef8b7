"""Phases 0 to 5: from a dense network and its data to a branched network."""

from sigmabranch.conversion.budget import Budget, BudgetPlan, Candidate, plan_budget
from sigmabranch.conversion.cluster import Clusters, spherical_kmeans
from sigmabranch.conversion.convert import blueprint, convert, rebuild, single_path
from sigmabranch.conversion.propose import Proposal, propose_tree
from sigmabranch.conversion.record import ConversionRecord, ConversionSpec, class_targets
from sigmabranch.conversion.shape import SplitScores, split_scores
from sigmabranch.conversion.shards import Shards

__all__ = [
    "Budget",
    "BudgetPlan",
    "Candidate",
    "Clusters",
    "ConversionRecord",
    "ConversionSpec",
    "Proposal",
    "Shards",
    "SplitScores",
    "blueprint",
    "class_targets",
    "convert",
    "plan_budget",
    "propose_tree",
    "rebuild",
    "single_path",
    "spherical_kmeans",
    "split_scores",
]
