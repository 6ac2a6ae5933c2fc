"""The commands of ``qwenvl-eval``, one file each: ``add`` gives a parser its flags and what it runs."""

from qwenvl_eval.commands import compare, infer, list_tasks, make_sample, report, reproduce, score

__all__ = ["compare", "infer", "list_tasks", "make_sample", "report", "reproduce", "score"]
