"""Scores as pure functions: no torch, no files, no network."""

from qwenvl_eval.scoring.blind import BlindAnswers
from qwenvl_eval.scoring.exact import exact_match, normalise
from qwenvl_eval.scoring.intervals import Accuracy, accuracy
from qwenvl_eval.scoring.verdict import Outcome, Scorer, Verdict

__all__ = [
    "Accuracy",
    "BlindAnswers",
    "Outcome",
    "Scorer",
    "Verdict",
    "accuracy",
    "exact_match",
    "normalise",
]
