"""Measure a Qwen vision-language checkpoint: run questions, keep the predictions, score them.

    annotation file -> task -> runner (a qwen_vl_serve back end) -> store (JSONL) -> scoring -> report

Importing this package, and all of :mod:`qwenvl_eval.scoring`, loads neither torch nor transformers.
"""

from qwenvl_eval.report import Summary, blind_accuracy, is_right, summarise
from qwenvl_eval.runner import describe_run, run_task
from qwenvl_eval.store import Prediction, Run, Store, read_predictions
from qwenvl_eval.task import Sample, load_samples, question_answer_pairs

__all__ = [
    "Prediction",
    "Run",
    "Sample",
    "Store",
    "Summary",
    "blind_accuracy",
    "describe_run",
    "is_right",
    "load_samples",
    "question_answer_pairs",
    "read_predictions",
    "run_task",
    "summarise",
]
