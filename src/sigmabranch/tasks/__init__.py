"""Named tasks and the chain of steps that carries one from data to a result."""

from sigmabranch.tasks.catalog import TASKS, find_task
from sigmabranch.tasks.chain import Chain, Stopped, open_task_data, ordered
from sigmabranch.tasks.counting import count_net, count_task
from sigmabranch.tasks.task import DataSpec, Task, setting_keys

__all__ = [
    "TASKS",
    "Chain",
    "DataSpec",
    "Stopped",
    "Task",
    "count_net",
    "count_task",
    "find_task",
    "open_task_data",
    "ordered",
    "setting_keys",
]
