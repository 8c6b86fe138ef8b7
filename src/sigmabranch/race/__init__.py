"""The best network for a budget: tree, single path and narrow dense network in one race."""

from sigmabranch.race.api import Best, best
from sigmabranch.race.choice import METHOD, RULE, Interval, accuracy, choose, lead, losers
from sigmabranch.race.race import Race
from sigmabranch.race.task import TaskRace

__all__ = [
    "METHOD",
    "RULE",
    "Best",
    "Interval",
    "Race",
    "TaskRace",
    "accuracy",
    "best",
    "choose",
    "lead",
    "losers",
]
