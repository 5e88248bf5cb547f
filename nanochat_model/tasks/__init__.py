"""Tasks of fine-tuning and chat evaluation: their files, their problems, and what makes an answer right."""

from nanochat_model.tasks.catalog import CHAT_TASKS, DATASETS, Dataset, task_problems
from nanochat_model.tasks.problem import Problem

__all__ = ["CHAT_TASKS", "DATASETS", "Dataset", "Problem", "task_problems"]
