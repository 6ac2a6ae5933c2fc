"""Measure a Qwen vision-language checkpoint: run questions, keep the predictions, score them.

    data -> task -> runner (a qwen_vl_serve back end) -> store (JSONL) -> scoring -> report

Importing this package, and all of :mod:`qwenvl_eval.scoring`, loads neither torch nor transformers.
"""

from qwenvl_eval.report import Report, blind_accuracy, build
from qwenvl_eval.runner import infer
from qwenvl_eval.store import Prediction, Predictions, Run, Store
from qwenvl_eval.summary import Summary, judge, summarise, verdict_of
from qwenvl_eval.task import Dataset, Judged, Metric, Sample, Task, option, task_class, task_names

__all__ = [
    "Dataset",
    "Judged",
    "Metric",
    "Prediction",
    "Predictions",
    "Report",
    "Run",
    "Sample",
    "Store",
    "Summary",
    "Task",
    "blind_accuracy",
    "build",
    "infer",
    "judge",
    "option",
    "summarise",
    "task_class",
    "task_names",
    "verdict_of",
]
