"""What a branched network must be compared with, on one bench and by one yardstick."""

from sigmabranch.peers.catalog import (
    CONTROLS,
    GROUPS,
    SYSTEMS,
    find_control,
    find_rows,
    find_system,
    groups_of,
    published_counts,
)
from sigmabranch.peers.compare import Comparison, check_rows, run_control
from sigmabranch.peers.sizing import dense_of_size
from sigmabranch.peers.system import System, Trained
from sigmabranch.peers.traits import TRAITS

__all__ = [
    "CONTROLS",
    "GROUPS",
    "SYSTEMS",
    "TRAITS",
    "Comparison",
    "System",
    "Trained",
    "check_rows",
    "dense_of_size",
    "find_control",
    "find_rows",
    "find_system",
    "groups_of",
    "published_counts",
    "run_control",
]
