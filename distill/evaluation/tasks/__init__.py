"""The tasks by name: recall and length, MAD-like, RegBench-like, state tracking, the Long Range Arena."""

from .classification import CLASSIFICATION
from .listops import LISTOPS
from .mad import MAD
from .pathfinder import PATHFINDER
from .recall import RECALL
from .regbench import REGBENCH
from .states import STATES
from .task import Task

EVERYTHING = (*RECALL, *MAD, *REGBENCH, *STATES, *LISTOPS, *PATHFINDER, *CLASSIFICATION)
TASKS: dict[str, Task] = {task.name: task for task in EVERYTHING}
