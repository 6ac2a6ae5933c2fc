"""Scores as pure functions: no torch, no files, no network."""

from qwenvl_eval.scoring.blind import BlindAnswers
from qwenvl_eval.scoring.exact import exact_match, normalise
from qwenvl_eval.scoring.intervals import Accuracy, accuracy

__all__ = ["Accuracy", "BlindAnswers", "accuracy", "exact_match", "normalise"]
