"""The generated tasks by name."""

TASKS: dict = {}
