"""The command line: ``qwenvl-eval COMMAND --help``.

list                            the tasks, their protocols and presets
make-sample TASK FOLDER         a small set of one's own in the benchmark's format
infer TASK --model-path M --data-dir D --output-file P.jsonl
score P.jsonl [--protocol all]
report P.jsonl                  JSON, Markdown, and a page with the samples
run TASK ...                    infer, score and report
compare A.jsonl B.jsonl         which one is better, and whether that is chance
reproduce P.jsonl               the same run again, refused where something is not the same
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from qwen_vl_serve import BackendError
from qwenvl_eval import commands


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``qwenvl-eval``; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run("qwenvl-eval", lambda: _parser(words).parse_args(words))


def run(program: str, parse: Callable[[], argparse.Namespace]) -> int:
    """Run the command of a command line; what is wrong is told in one line. Returns the exit status."""
    try:
        arguments = parse()
        return arguments.command(arguments) or 0
    except (ValueError, OSError, BackendError, ModuleNotFoundError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: stopped; the same command goes on where it was", file=sys.stderr)
        return 130


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(
        "qwenvl-eval",
        description="Measure a Qwen vision-language checkpoint.",
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_subparsers(required=True, metavar="COMMAND").add_parser
    commands.list_tasks.add(add("list", help="the tasks that there are"))
    commands.make_sample.add(add("make-sample", help="write a small set in a benchmark's own format"))
    task = words[1] if len(words) > 1 and words[0] in ("infer", "run") else ""
    commands.infer.add(add("infer", help="ask the questions and keep the answers"), task)
    commands.infer.add(add("run", help="infer, score and report"), task, then=commands.report.after_run)
    commands.score.add(add("score", help="what a file of predictions comes to"))
    commands.report.add(add("report", help="JSON, Markdown and a page with the samples"))
    commands.compare.add(add("compare", help="two files of predictions, sample by sample"))
    commands.reproduce.add(add("reproduce", help="make a run again"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
