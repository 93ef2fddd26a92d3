"""The generated tasks by name: recall and length, MAD-like, RegBench-like, state tracking, ListOps."""

from .listops import LISTOPS
from .mad import MAD
from .recall import RECALL
from .regbench import REGBENCH
from .states import STATES
from .task import Task

TASKS: dict[str, Task] = {task.name: task for task in (*RECALL, *MAD, *REGBENCH, *STATES, *LISTOPS)}
