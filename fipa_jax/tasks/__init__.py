"""What is learned? The `Task` record, and the tasks known by name."""

from fipa_jax.tasks.task import TASKS, Problem, Task, build, check, head_only

__all__ = ["TASKS", "Problem", "Task", "build", "check", "head_only"]
