"""What a file of predictions comes to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwenvl_eval.scoring import Accuracy, BlindAnswers, accuracy, exact_match
from qwenvl_eval.store import Prediction, Run


@dataclass(frozen=True)
class Summary:
    """Exact match over all samples of the run. ``truncated`` answers, cut at the token limit, count as wrong.

    ``tokens_per_second`` counts prompt and answer; both speeds include loading the media, not the model.
    """

    accuracy: Accuracy
    truncated: int
    samples_per_second: float
    tokens_per_second: float


def is_right(prediction: Prediction) -> bool:
    """Exact match of an answer that was given to its end."""
    return prediction.finish_reason == "stop" and exact_match(prediction.answer, prediction.target)


def picture_of(prediction: Prediction) -> tuple[str, ...] | int:
    """What clusters predictions: their media, or where there are none the row itself."""
    return tuple(prediction.media) or prediction.row


def summarise(run: Run, predictions: Sequence[Prediction]) -> Summary:
    """Score a complete run. Raises ValueError where predictions are missing."""
    if len(predictions) != run.samples:
        raise ValueError(
            f"{len(predictions)} of {run.samples} predictions are there; "
            "start the same `qwenvl-eval run` again, it goes on where it was"
        )
    seconds = sum(prediction.seconds for prediction in predictions)
    return Summary(
        accuracy([is_right(p) for p in predictions], [picture_of(p) for p in predictions]),
        sum(p.finish_reason == "length" for p in predictions),
        len(predictions) / seconds,
        sum(p.prompt_tokens + p.completion_tokens for p in predictions) / seconds,
    )


def blind_accuracy(predictions: Sequence[Prediction], training: Iterable[tuple[str, str]]) -> Accuracy:
    """The same questions answered without looking: see :class:`~qwenvl_eval.scoring.BlindAnswers`."""
    blind = BlindAnswers(training)
    verdicts = [exact_match(blind.answer(p.question), p.target) for p in predictions]
    return accuracy(verdicts, [picture_of(p) for p in predictions])
