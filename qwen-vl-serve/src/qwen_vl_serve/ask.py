"""``qwenvl-ask MODEL [--image P]... [--video P]... "QUESTION"``: print the answer as it is made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qwen_vl_serve.backends import is_address, open_backend
from qwen_vl_serve.backends.base import BackendError, Finished, Message, Sampling, TextDelta


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        "qwenvl-ask",
        description="Ask a Qwen vision-language model; the answer is printed as it is made.",
    )
    parser.add_argument(
        "model", help="checkpoint folder, a model hub's name, or an endpoint: http://127.0.0.1:8000/v1"
    )
    parser.add_argument("question")
    parser.add_argument("--image", action="append", default=[], metavar="P", help="a picture; repeatable")
    parser.add_argument("--video", action="append", default=[], metavar="P", help="a video; repeatable")
    parser.add_argument("--system", help="a system turn to put before the question")
    parser.add_argument("--max-new-tokens", type=int, help="default: the checkpoint's own, else 512")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: the checkpoint's own")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: CUDA where there is some")
    parser.add_argument("--name", help="at an endpoint: the model's name, where it serves several")
    parser.add_argument("--api-key", help="at an endpoint; default: OPENAI_API_KEY")
    return parser


def build_messages(
    question: str, *, images: Sequence[str] = (), videos: Sequence[str] = (), system: str | None = None
) -> list[Message]:
    """One user turn: the pictures, the videos, the question; before it the system turn, if any."""
    content: list[dict[str, str]] = [{"type": "image", "image": path} for path in images]
    content += [{"type": "video", "video": path} for path in videos]
    content.append({"type": "text", "text": question})
    turns: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return [*turns, {"role": "user", "content": content}]


def ask(arguments: argparse.Namespace) -> None:
    """Load the checkpoint, stream one answer to stdout."""
    options = {name: getattr(arguments, name) for name in ("device", "name", "api_key")}
    options = {name: value for name, value in options.items() if value is not None}
    if not is_address(arguments.model):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature)
    messages = build_messages(
        arguments.question, images=arguments.image, videos=arguments.video, system=arguments.system
    )
    backend = open_backend(arguments.model, **options)
    for event in backend.stream(messages, sampling):
        match event:
            case TextDelta(text):
                print(text, end="", flush=True)
            case Finished(reply):
                print()
                if reply.finish_reason == "length":
                    limit = f"[cut after {reply.completion_tokens} tokens; --max-new-tokens raises the limit]"
                    print(limit, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``qwenvl-ask``; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        ask(arguments)
    except (BackendError, ValueError, OSError, TypeError) as error:
        print(f"qwenvl-ask: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
