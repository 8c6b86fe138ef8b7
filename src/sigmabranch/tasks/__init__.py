"""Named tasks and the chain of steps that carries one from data to a result."""

from sigmabranch.tasks.catalog import TASKS, find_task
from sigmabranch.tasks.chain import Chain, Stopped, open_task_data, ordered, shuffled
from sigmabranch.tasks.constants import Constant, constants
from sigmabranch.tasks.counting import count_net, count_task
from sigmabranch.tasks.paper import PAPER, PaperTask, Source
from sigmabranch.tasks.results import Group, Result, Spread, group_results, read_results
from sigmabranch.tasks.task import DataSpec, Task, setting_keys

__all__ = [
    "PAPER",
    "TASKS",
    "Chain",
    "Constant",
    "DataSpec",
    "Group",
    "PaperTask",
    "Result",
    "Source",
    "Spread",
    "Stopped",
    "Task",
    "constants",
    "count_net",
    "count_task",
    "find_task",
    "group_results",
    "open_task_data",
    "ordered",
    "read_results",
    "setting_keys",
    "shuffled",
]
