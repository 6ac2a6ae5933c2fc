"""``qwenvl-eval run`` asks a checkpoint the questions of a file; ``qwenvl-eval score`` scores the answers.

qwenvl-eval run --model-path CKPT --annotations test.jsonl --data-path pictures --output-file out.jsonl
qwenvl-eval score out.jsonl --train-annotations train.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qwenvl_eval.report import blind_accuracy, summarise
from qwenvl_eval.runner import describe_run, run_task
from qwenvl_eval.store import Store, read_predictions
from qwenvl_eval.task import load_samples, question_answer_pairs


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``qwenvl-eval``; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, OSError) as error:
        print(f"qwenvl-eval: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qwenvl-eval: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("qwenvl-eval", description="Measure a Qwen vision-language checkpoint.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="ask every question of an annotation file and keep the answers")
    run.set_defaults(command=_run)
    run.add_argument("--model-path", required=True, help="checkpoint folder (or a model hub's name)")
    run.add_argument("--annotations", required=True, type=Path, help=".json or .jsonl in the training format")
    run.add_argument("--data-path", type=Path, help="folder of the media; default: the annotation file's")
    run.add_argument(
        "--output-file", required=True, type=Path, help="predictions; an unfinished file goes on"
    )
    run.add_argument("--max-new-tokens", type=_positive, default=128)
    run.add_argument("--batch-size", type=_positive, default=64)
    run.add_argument("--limit", type=_positive, help="only the first N rows")
    run.add_argument("--device", help="cpu, cuda, cuda:1; default: CUDA where there is some")

    score = commands.add_parser("score", help="accuracy of a file of predictions, with its 95 % interval")
    score.set_defaults(command=_score)
    score.add_argument("predictions", type=Path, help="what `qwenvl-eval run` wrote")
    score.add_argument(
        "--train-annotations",
        type=Path,
        help="also score answering without looking: the most frequent answer here to the same question",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 up")
    return value


def _run(arguments: argparse.Namespace) -> None:
    data_path = arguments.data_path or arguments.annotations.parent
    samples = load_samples(arguments.annotations, data_path, limit=arguments.limit)
    run = describe_run(arguments.model_path, arguments.annotations, samples, arguments.max_new_tokens)
    with Store(arguments.output_file, run) as store:
        if len(store.done) < len(samples):
            from qwen_vl_serve import open_backend

            backend = open_backend(arguments.model_path, device=arguments.device)
            run_task(
                backend,
                samples,
                store,
                max_new_tokens=arguments.max_new_tokens,
                batch_size=arguments.batch_size,
            )
    _print_summary(arguments.output_file)


def _score(arguments: argparse.Namespace) -> None:
    _print_summary(arguments.predictions)
    if arguments.train_annotations is not None:
        _, predictions = read_predictions(arguments.predictions)
        training = question_answer_pairs(arguments.train_annotations)
        print(f"without looking  {blind_accuracy(predictions, training)}")


def _print_summary(path: Path) -> None:
    run, predictions = read_predictions(path)
    try:
        summary = summarise(run, predictions)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    score = summary.accuracy
    speed = f"{summary.samples_per_second:.1f} samples/s, {summary.tokens_per_second:,.0f} tokens/s"
    print(f"predictions      {path} by {run.model_path}")
    print(f"questions        {score.total} about {score.clusters} pictures")
    print(f"accuracy         {score} (exact match; 95 % interval clustered by picture)")
    print(f"cut off          {summary.truncated} answers at {run.max_new_tokens} tokens (counted as wrong)")
    print(f"speed            {speed}")


if __name__ == "__main__":
    sys.exit(main())
