"""What a model looks like, as data: its task, its stacks of layers, its head, and where its positions come from."""

from hf_memtune.architectures.describe import Architecture, Stack, Task, describe, is_sharded

__all__ = ["Architecture", "Stack", "Task", "describe", "is_sharded"]
