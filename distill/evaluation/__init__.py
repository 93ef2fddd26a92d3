"""What a student can do, beside its teacher: language, tasks, speed and memory, and a page that shows it.

`deltanet-eval` calls `command.run`. Every measurement takes a `Subject` and returns plain numbers.
"""
