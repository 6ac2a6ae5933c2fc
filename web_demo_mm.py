"""The web demo: a chat about pictures and videos with any checkpoint, in the browser.

    python web_demo_mm.py                     # the small checkpoint that comes along, http://127.0.0.1:7860
    python web_demo_mm.py -c Qwen/Qwen3-VL-8B-Instruct --backend vllm

    text box, settings --turns_of, to_messages--> messages --backend.stream--> thoughts, text
      --Marker--> places drawn on the picture, a table;  seconds and tokens below the chat

With --compare OTHER a second part asks two checkpoints the same question, side by side.

Each visitor's chat lives in the visitor's browser. Files live in a folder of this process's own, under names
nobody can guess, and go after a day or with the process. Needs requirements_web_demo.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import gradio as gr
from PIL import Image

from qwen_vl_serve import Backend, BackendError, Finished, ReasoningDelta, Sampling, TextDelta, open_backend
from qwen_vl_serve.chat import Limits, Turn, to_messages, training_row
from qwen_vl_serve.checkpoint import find_checkpoint
from qwen_vl_serve.marks import Marker, Marks
from qwen_vl_utils import MediaPolicy, count_tokens, fetch_image
from qwen_vl_utils.grounding import parse_html

ROOT = Path(__file__).resolve().parent
NANO = ROOT / "models/qwen3-vl-nano"
DAY = 24 * 60 * 60
MOST_CHARACTERS = 50_000
PAUSE = 0.1
"""Seconds between two states of an answer in the making: a browser that gets more than it can draw no longer
hears its buttons."""
EXAMPLES = (
    ("Describe the picture.", "qwen-vl-finetune/demo/images/scene-05.png"),
    ("How many objects are here?", "qwen-vl-finetune/demo/images/scene-11.png"),
    ("Where is the green cross?", "qwen-vl-finetune/demo/images/scene-04.png"),
    ("What happens in the video?", "qwen-vl-finetune/demo/videos/right.mp4"),
)
WORDS = {
    "en": {
        "ask": "Ask about a picture or a video; drop, paste or upload it here",
        "settings": "Settings",
        "system": "System prompt",
        "temperature": "Temperature (0: greedy)",
        "max_tokens": "Most tokens of an answer",
        "max_pixels": "Most pixels of a picture or frame (0: as the checkpoint has it)",
        "fps": "Frames a second of a video (0: as the checkpoint has it)",
        "max_frames": "Most frames of a video (0: as the checkpoint has it)",
        "add": "A picture from the camera or by address",
        "camera": "Camera",
        "address": "https address of a picture",
        "fetch": "Fetch",
        "export": "Export this chat",
        "as_json": "As JSON",
        "as_row": "As a training row",
        "file": "File",
        "compare": "Ask both checkpoints one question",
    },
    "zh": {
        "ask": "就图片或视频提问；可拖入、粘贴或上传",
        "settings": "设置",
        "system": "系统提示词",
        "temperature": "温度（0 为贪心解码）",
        "max_tokens": "回答的最多 token 数",
        "max_pixels": "图片或每帧的最多像素（0 为模型默认）",
        "fps": "视频每秒帧数（0 为模型默认）",
        "max_frames": "视频的最多帧数（0 为模型默认）",
        "add": "用摄像头或网址添加图片",
        "camera": "摄像头",
        "address": "图片的 https 网址",
        "fetch": "获取",
        "export": "导出对话",
        "as_json": "导出 JSON",
        "as_row": "导出训练数据",
        "file": "文件",
        "compare": "向两个模型提出同一问题",
    },
}
MATHS: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
# HTML that somebody typed, or an answer holds, loads no picture and no video from elsewhere.
SOURCES = "'self' data: blob:"
HEAD = f'<meta http-equiv="Content-Security-Policy" content="img-src {SOURCES}; media-src {SOURCES}">'
# The button "Share" posts to a site of Gradio's maker and does nothing elsewhere.
STYLE = """
footer, button[aria-label="Share"] {display: none !important}
.numbers {min-height: 1.6em; opacity: .75; font-size: .85em}
"""


@dataclass(frozen=True)
class Settings:
    """What stands in the settings, in the order in which the page shows it."""

    system: str
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    max_pixels: int
    fps: float
    max_frames: int

    @property
    def sampling(self) -> Sampling:
        greedy = self.temperature == 0
        return Sampling(
            temperature=self.temperature,
            top_p=None if greedy else self.top_p,
            top_k=None if greedy else int(self.top_k),
            max_new_tokens=int(self.max_new_tokens),
        )

    @property
    def limits(self) -> Limits:
        return Limits(
            max_pixels=int(self.max_pixels) or None,
            fps=self.fps or None,
            max_frames=int(self.max_frames) or None,
        )


def turns_of(history: Sequence[dict[str, Any]]) -> list[Turn]:
    """A chat as the page keeps it, without thoughts, drawn pictures and questions that had no answer."""
    turns: list[Turn] = []
    for message in history:
        if (message.get("metadata") or {}).get("title"):
            continue
        content = message["content"]
        parts = content if isinstance(content, list) else [content]
        text = "".join(part if isinstance(part, str) else part.get("text") or "" for part in parts)
        files = [_path(part) for part in parts if isinstance(part, dict) and _path(part)]
        if message["role"] == "assistant":
            if not text or not turns or turns[-1].role == "assistant":  # A drawn picture.
                continue
        elif turns and turns[-1].role == "user":  # Nobody answered it.
            turns.pop()
        turns.append(Turn(message["role"], text, tuple(files)))
    return turns[:-1] if turns and turns[-1].role == "user" else turns


def _path(part: dict[str, Any]) -> str:
    return str((part.get("file") or part).get("path") or "")


class Page:
    """What the controls of the page do.

    name: of the model. processor, marker: None where an endpoint is asked and no checkpoint was named.

    folder: where uploads lie and drawn pictures go.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        processor: Any,
        marker: Marker | None,
        policy: MediaPolicy,
        folder: Path,
    ):
        self.name = name
        self.backend = backend
        self.processor = processor
        self.marker = marker
        self.policy = policy
        self.folder = folder

    def answer(self, message: dict[str, Any], history: list[dict[str, Any]], *settings: Any) -> Iterator[Any]:
        """The answer as it is made: (messages for the chat, a line of numbers)."""
        chosen = Settings(*settings)
        said: list[dict[str, Any]] = []
        began, first, reply = time.perf_counter(), 0.0, None
        try:
            turn = _question(message)
            messages = to_messages([*turns_of(history), turn], system=chosen.system, limits=chosen.limits)
            thought, text, due = "", "", began
            with closing(self.backend.stream(messages, chosen.sampling)) as events:  # pyright: ignore[reportArgumentType]
                for event in events:
                    now = time.perf_counter()
                    first = first or now - began
                    match event:
                        case ReasoningDelta(piece):
                            thought += piece
                        case TextDelta(piece):
                            text += piece
                        case Finished(reply):
                            thought, text = reply.reasoning, reply.text
                    said = _thought(thought, done=bool(text or reply)) + ([_text(text)] if text else [])
                    if now >= due or reply:
                        due = now + PAUSE
                        yield said, ""
            assert reply is not None
            seconds = time.perf_counter() - began
            speed = reply.completion_tokens / max(seconds - first, 1e-9)
            numbers = (
                f"{seconds:.1f} s, first token after {first:.2f} s · {reply.completion_tokens} tokens, "
                f"{speed:.1f} tokens/s · prompt {reply.prompt_tokens} tokens"
            )
            numbers += " · cut at the most tokens" if reply.finish_reason == "length" else ""
            said += self._drawn(text, messages) if text else [_note("No text", "The answer has no text.")]
            yield said, numbers
        except (ValueError, BackendError) as error:
            yield [*said, _note("Not answered", str(error))], ""

    def _drawn(self, text: str, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The document that the answer spells out, a table of what it names in the picture or video last
        asked about, and that with the places on it.
        """
        items = [item for message in messages if message["role"] == "user" for item in message["content"]]
        media = [item for item in items if item["type"] != "text"]
        marks = self.marker.mark(text, media[-1]) if self.marker and media else None
        document = _document(text)
        if marks is None:
            return document
        table = _note("Places", _table(marks))
        return [*document, table, {"role": "assistant", "content": {"path": self._keep(marks.picture)}}]

    def _keep(self, picture: Image.Image) -> str:
        handle, name = tempfile.mkstemp(suffix=".png", dir=self.folder)
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format="PNG")
        return name

    def count(self, message: dict[str, Any], history: list[dict[str, Any]], *settings: Any) -> str:
        """How long the prompt would be, said before it is sent."""
        chosen = Settings(*settings)
        if self.processor is None or not (message["text"] or message["files"]):
            return ""
        try:
            turns = [*turns_of(history), _question(message)]
            messages = to_messages(turns, system=chosen.system, limits=chosen.limits)
            return f"prompt {count_tokens(messages, self.processor, policy=self.policy)} tokens"
        except ValueError as error:
            return str(error)

    def fetch(self, address: str, message: dict[str, Any]) -> dict[str, Any]:
        """The picture at an https address, laid beside the question. Raises gr.Error with the reason."""
        try:
            if not address.startswith("https://"):
                raise ValueError(f"{address}: give an address that begins with https://")
            picture = fetch_image({"image": address}, policy=self.policy)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return {"text": message["text"], "files": [*message["files"], self._keep(picture)]}

    def export(self, history: list[dict[str, Any]], system: str, *, row: bool) -> str:
        """A file with the chat: its turns as JSON, or a row to train on."""
        turns = turns_of(history)
        try:
            said = [
                {"role": turn.role, "text": turn.text, "files": [Path(path).name for path in turn.files]}
                for turn in turns
            ]
            found = [training_row(turns, system=system)] if row else {"system": system, "turns": said}
        except ValueError as error:
            raise gr.Error(str(error)) from error
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        path = folder / ("training.json" if row else "chat.json")
        path.write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        return str(path)


def _edited(history: list[Any], edit: gr.EditData) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """The chat up to the edited turn, which comes back into the box with its files, to be sent from there."""
    at = edit.index[0] if isinstance(edit.index, list | tuple) else edit.index
    files = [path for part in history[at]["content"] if (path := _path(part))]
    return history[:at], history[:at], {"text": edit.value, "files": files}


def side_by_side(pages: Sequence[Page], message: dict[str, Any], *settings: Any) -> Iterator[tuple[Any, ...]]:
    """The answers of all pages as they are made: the chat and the line of numbers of the first, of the next.

    Each page answers in a thread of its own. Closing the iterator stops them all.
    """
    asked = [{"role": "user", "content": [*({"path": path} for path in message["files"]), message["text"]]}]
    latest: list[tuple[Any, str]] = [([], "")] * len(pages)
    news: SimpleQueue[int | None] = SimpleQueue()
    stopped = threading.Event()

    def ask(place: int) -> None:
        try:
            with closing(pages[place].answer(message, [], *settings)) as answers:  # pyright: ignore[reportArgumentType]
                for latest[place] in answers:
                    news.put(place)
                    if stopped.is_set():
                        return
        finally:
            news.put(None)

    with ThreadPoolExecutor(len(pages)) as threads:
        running = [threads.submit(ask, place) for place in range(len(pages))]
        try:
            left = len(pages)
            while left:
                left -= news.get() is None
                yield tuple(part for said, numbers in latest for part in (asked + said, numbers))
        finally:
            stopped.set()
        for each in running:
            each.result()


def _question(message: dict[str, Any]) -> Turn:
    text = message["text"].strip()
    if not text and not message["files"]:
        raise ValueError("nothing was asked: write a question or add a picture")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text)} characters; shorten the question to at most {MOST_CHARACTERS}")
    return Turn("user", text, tuple(message["files"]))


def _with_picture(path: str, message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "files": [*message["files"], path]}


def _text(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _thought(text: str, *, done: bool) -> list[dict[str, Any]]:
    if not text:
        return []
    metadata = {"title": "Thinking", "status": "done" if done else "pending"}
    return [{"role": "assistant", "content": text, "metadata": metadata}]


def _note(title: str, text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "metadata": {"title": title}}


def _document(answer: str) -> list[dict[str, Any]]:
    """QwenVL HTML that the answer shows as code, as the document that it stands for; the page cleans it."""
    if "```html" not in answer or not parse_html(answer).items:
        return []
    return [_note("Document", answer.replace("```html", "").replace("```", ""))]


def _table(marks: Marks) -> str:
    lines = [marks.header, ("---",) * len(marks.header), *marks.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def build_demo(
    page: Page, *, settings: Settings, other: Page | None = None, concurrency: int = 8
) -> gr.Blocks:
    """The page. settings: what stands in the controls at first; other: what it is compared with."""
    text = gr.I18n(**WORDS)
    numbers = gr.Markdown(elem_classes="numbers", elem_id="numbers", render=False)
    box = gr.MultimodalTextbox(
        label=text("ask"), placeholder=cast(Any, text("ask")), show_label=False, render=False,
        file_types=["image", "video"], file_count="multiple", sources=["upload"], elem_id="question",
        max_plain_text_length=MOST_CHARACTERS, stop_btn=True,
    )  # fmt: skip
    chat = gr.Chatbot(
        label=page.name, render=False, allow_tags=False, buttons=["copy", "copy_all"], feedback_options=None,
        latex_delimiters=MATHS, scale=1, min_height=360, elem_id="chat",
        group_consecutive_messages=False,  # Gradio 6.31 fails to send the edit of a group with a picture.
        editable="user",
    )  # fmt: skip
    shelf = gr.Accordion(text("settings"), open=False, render=False)
    controls = _controls(settings, text)
    examples = [
        [{"text": question, "files": [str(ROOT / path)]}]
        for question, path in EXAMPLES
        if (ROOT / path).is_file()
    ]
    demo = gr.ChatInterface(
        page.answer, title=page.name, multimodal=True, save_history=True, chatbot=chat, textbox=box,
        additional_inputs=controls, additional_outputs=[numbers], additional_inputs_accordion=shelf,
        examples=examples, run_examples_on_click=False, cache_examples=False, flagging_mode="never",
        concurrency_limit=concurrency, api_name="chat", analytics_enabled=False,
        delete_cache=(DAY // 24, DAY),
    )  # fmt: skip
    with demo:
        numbers.render()
        count = gr.Markdown(elem_classes="numbers", elem_id="count")
        if other is not None:
            _comparison([page, other], text, controls, concurrency)
        with gr.Accordion(text("add"), open=False), gr.Row():
            camera = gr.Image(sources=["webcam"], type="filepath", label=text("camera"), elem_id="camera")
            with gr.Column():
                address = gr.Textbox(label=text("address"), elem_id="address")
                fetch = gr.Button(text("fetch"), elem_id="fetch")
        with gr.Accordion(text("export"), open=False), gr.Row():
            as_json = gr.Button(text("as_json"), elem_id="as-json")
            as_row = gr.Button(text("as_row"), elem_id="as-row")
            file = gr.File(label=text("file"), elem_id="exported")
        hidden = partial(partial, show_progress="hidden", api_visibility="private")
        hidden(box.change)(page.count, [box, chat, *controls], count, trigger_mode="always_last")
        # Not by ChatInterface(editable=True), which asks the new text without the files of the turn.
        hidden(chat.edit)(_edited, [demo.chatbot_state], [chat, demo.chatbot_state, box])
        hidden(camera.input)(_with_picture, [camera, box], box)
        hidden(fetch.click)(page.fetch, [address, box], box)
        hidden(as_json.click)(partial(page.export, row=False), [chat, controls[0]], file)
        hidden(as_row.click)(partial(page.export, row=True), [chat, controls[0]], file)
    return demo


def _comparison(pages: Sequence[Page], text: gr.I18n, controls: Sequence[Any], concurrency: int) -> None:
    """A question of its own, and below it a chat for each page."""
    with gr.Accordion(text("compare"), open=False, elem_id="compare"):
        box = gr.MultimodalTextbox(
            label=text("ask"), placeholder=cast(Any, text("ask")), show_label=False, file_count="multiple",
            file_types=["image", "video"], sources=["upload"], elem_id="both",
            max_plain_text_length=MOST_CHARACTERS, stop_btn=True,
        )  # fmt: skip
        outputs = []
        with gr.Row():
            for place, page in enumerate(pages):
                with gr.Column(min_width=280):
                    outputs += [
                        gr.Chatbot(
                            label=page.name, allow_tags=False, buttons=["copy"], latex_delimiters=MATHS,
                            height=360, elem_id=f"side-{place}",
                        ),
                        gr.Markdown(elem_classes="numbers"),
                    ]  # fmt: skip
        asked = box.submit(
            partial(side_by_side, pages), [box, *controls], outputs, api_name="compare",
            concurrency_limit=concurrency,
        )  # fmt: skip
        box.stop(None, cancels=asked, api_visibility="private")


def _controls(settings: Settings, text: gr.I18n) -> list[Any]:
    """One for each field of Settings, in its order."""
    number = partial(gr.Number, minimum=0, render=False)
    slider = partial(gr.Slider, render=False)
    return [
        gr.Textbox(settings.system, label=text("system"), lines=2, render=False),
        slider(0, 2, settings.temperature, step=0.05, label=text("temperature")),
        slider(0.01, 1, settings.top_p, step=0.01, label="top-p"),
        slider(1, 200, settings.top_k, step=1, label="top-k"),
        slider(1, 32_768, settings.max_new_tokens, step=1, label=text("max_tokens")),
        number(settings.max_pixels, precision=0, label=text("max_pixels")),
        number(settings.fps, label=text("fps")),
        number(settings.max_frames, precision=0, label=text("max_frames")),
    ]


def launch(demo: gr.Blocks, **options: Any) -> None:
    """Serve the page with its words and its looks; `options` are those of gr.Blocks.launch."""
    demo.launch(i18n=gr.I18n(**WORDS), css=STYLE, head=HEAD, footer_links=[], **options)


def first_settings(folder: Path | None) -> Settings:
    """What the checkpoint's generation_config says; the model library's own defaults where it is silent."""
    path = folder / "generation_config.json" if folder else None
    said = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    greedy = not said.get("do_sample", False)
    return Settings(
        system="", temperature=0 if greedy else said.get("temperature", 1.0), top_p=said.get("top_p") or 1.0,
        top_k=said.get("top_k") or 50, max_new_tokens=said.get("max_new_tokens") or 1024,
        max_pixels=0, fps=0, max_frames=0,
    )  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "web_demo_mm.py", description="Chat with a Qwen-VL checkpoint in the browser."
    )
    parser.add_argument(
        "-c", "--checkpoint-path", help=f"folder or hub name (default: {NANO.relative_to(ROOT)})"
    )
    parser.add_argument(
        "--compare", metavar="CHECKPOINT", help="a second one, asked beside the first; openai: its name there"
    )
    parser.add_argument("--backend", choices=["hf", "vllm", "openai"], default="hf")
    parser.add_argument("--cpu-only", action="store_true", help="hf: don't use a GPU")
    parser.add_argument("--flash-attn2", action="store_true", help="hf: attention by the package flash-attn")
    parser.add_argument("--gpu-memory-utilization", type=float, help="vllm: share of the GPU's memory")
    parser.add_argument("--tensor-parallel-size", type=int, help="vllm: GPUs that share the model")
    parser.add_argument("--base-url", help="openai: the endpoint, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", help="openai; default: the variable OPENAI_API_KEY")
    parser.add_argument("--model", help="openai: the model's name there, where it serves several")
    parser.add_argument("--share", action="store_true", help="a public address through Gradio's servers")
    parser.add_argument("--inbrowser", action="store_true", help="open a browser window")
    parser.add_argument(
        "--server-name", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--server-port", type=int, default=7860)
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for it")
    parser.add_argument(
        "--max-file-size", type=int, default=64, metavar="MB", help="of an upload (default: 64)"
    )
    parser.add_argument("--concurrency", type=int, default=8, help="answers at a time (default: 8)")
    parser.add_argument("--queue-size", type=int, default=64, help="questions that may wait (default: 64)")
    parser.add_argument("--mcp", action="store_true", help="also an MCP server; needs gradio[mcp]")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError, naming the flag."""
    if options.auth is not None and ":" not in options.auth:
        raise ValueError("--auth: give USER:PASSWORD, with a colon between them")
    if options.backend == "openai" and not options.base_url:
        raise ValueError("--backend openai: --base-url is missing, such as http://127.0.0.1:8000/v1")
    if options.mcp and find_spec("mcp") is None:
        raise ValueError("--mcp: the package mcp is missing; install it with: pip install 'gradio[mcp]'")


def open_page(options: argparse.Namespace, folder: Path, *, second: bool = False) -> tuple[Page, Settings]:
    """The page's back end, with uploads in `folder`, and its first settings.

    second: of the checkpoint that --compare names.
    """
    policy = MediaPolicy.strict(folders=[folder], max_bytes=options.max_file_size * 2**20)
    checkpoint, model = options.checkpoint_path, options.model
    if options.backend == "openai":
        model = options.compare if second else model
        given, engine, where = {"name": model, "api_key": options.api_key}, "openai", options.base_url
    else:
        checkpoint = options.compare if second else checkpoint or str(NANO)
        where = checkpoint
        if options.backend == "vllm":
            engine = "vllm"
            given = {"gpu_memory_utilization": options.gpu_memory_utilization}
            given |= {"tensor_parallel_size": options.tensor_parallel_size}
        else:
            engine = "transformers"
            given = {"device": "cpu" if options.cpu_only else None}
            given |= {"attention": "flash_attention_2" if options.flash_attn2 else None}
    found = find_checkpoint(checkpoint) if checkpoint else None
    given = {name: value for name, value in given.items() if value is not None}
    backend = open_backend(where, engine=engine, policy=policy, **given)  # pyright: ignore[reportArgumentType]
    processor = marker = None
    if found is not None:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(found.folder or checkpoint)
        marker = Marker.of(processor, found.config, policy) if found.config else None
    name = model or Path(checkpoint or options.base_url).name
    page = Page(name, backend, processor, marker, policy, folder)
    return page, first_settings(found.folder if found else None)


def main() -> None:
    """Serve the page until Ctrl-C."""
    options = arguments().parse_args()
    # A stopped container or service ends as with Ctrl-C: the uploads go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="qwenvl-demo-") as name:
        os.environ["GRADIO_TEMP_DIR"] = name
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        try:
            check_options(options)
            page, settings = open_page(options, Path(name))
            other = open_page(options, Path(name), second=True)[0] if options.compare else None
        except (ValueError, OSError, ModuleNotFoundError, BackendError) as error:
            sys.exit(f"web_demo_mm.py: {error}")
        demo = build_demo(page, settings=settings, other=other, concurrency=options.concurrency)
        demo.queue(max_size=options.queue_size)
        with closing(page.backend), closing(other.backend) if other else nullcontext():
            launch(
                demo, server_name=options.server_name, server_port=options.server_port, share=options.share,
                inbrowser=options.inbrowser, max_file_size=f"{options.max_file_size}mb",
                auth=[tuple(options.auth.split(":", 1))] if options.auth else None, mcp_server=options.mcp,
            )  # fmt: skip


if __name__ == "__main__":
    main()
