"""``qwenvl-serve MODEL [options] [flags of vllm serve]``: an OpenAI-compatible server for one checkpoint.

command line -> find_checkpoint, find_hardware -> make_plan -> vllm serve -> wait_until_ready -> "ready: ..."

Prints the command, runs it, hands signals on to it and ends with its status. Pictures and videos are prepared
inside the server by qwen_vl_utils, as they are in training. From Python:

    with running_server("models/qwen3-vl-nano") as base_url:
        ...
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from qwen_vl_serve import adapters
from qwen_vl_serve import checkpoint as checkpoints
from qwen_vl_serve.flags import Flag, given, read_flags
from qwen_vl_serve.hardware import find_hardware
from qwen_vl_serve.profiles import PROFILES, Plan, Wishes, make_plan
from qwen_vl_serve.ready import NotReady, wait_until_ready

COMMAND = "qwenvl-serve"
GRACE = 60.0
"""Seconds that vLLM has to end by itself; then its processes are killed."""
LAST = 2.0
"""Seconds to wait until killed processes are gone; where nobody buries them they never are."""
TAIL = 40
"""Lines of a failed server's log in the error."""
UNWATCHED = ("uds", "headless", "grpc")
"""Flags with which there is no HTTP address to ask."""


@dataclass(frozen=True)
class Server:
    """What is to be started: the command, and how to reach it once it runs."""

    command: tuple[str, ...]
    plan: Plan
    base_url: str | None
    """None where a flag takes HTTP away."""
    api_key: str | None
    certificate: str | None
    picture: bool
    """Whether it takes pictures at all."""

    def shown(self, *, secrets: bool) -> str:
        """The command as it is typed into a shell; keys as *** unless ``secrets``."""
        lines = [f"{name}={shlex.quote(value)}" for name, value in self.plan.environment.items()]
        command, serve, *rest = self.command
        program = os.path.relpath(command) if Path(command).is_relative_to(Path.cwd()) else command
        model, *arguments = rest
        lines.append(shlex.join([program, serve, model]))
        for flag in read_flags(arguments):
            hidden = flag.name == "api-key" and not secrets
            lines.append("    " + ("--api-key '***'" if hidden else shlex.join(flag.tokens)))
        return " \\\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command's own arguments; everything else is vLLM's."""
    profiles = "\n".join(f"  {name:10} {told}" for name, told in PROFILES.items())
    epilog = f"""
        profiles, chosen by the machine and the checkpoint:
        {textwrap.indent(profiles, " " * 8).lstrip()}

        All other flags are handed to `vllm serve` as they are, and win over the profile's. Flags that take
        JSON are put together key by key: --limit-mm-per-prompt.image 4 leaves the limit of videos as it is.
        What follows -- is vLLM's, whatever it is called.
    """
    result = argparse.ArgumentParser(
        COMMAND,
        usage=f"{COMMAND} MODEL [options] [flags of vllm serve]",
        description="Serve a Qwen vision-language checkpoint behind an OpenAI-compatible address, with vLLM.",
        epilog=textwrap.dedent(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("model", metavar="MODEL", help="checkpoint folder, or a model hub's name; before vLLM's flags")
    add("--profile", metavar="NAME", help="one of the profiles below instead of the automatic choice")
    add("--dry-run", action="store_true", help="print variables and command, start nothing")
    add("--long-context", nargs="?", type=float, const=3.0, metavar="FACTOR",
        help="YaRN: FACTOR times the checkpoint's context (default 3)")  # fmt: skip
    add("--rope-scaling", type=_json_object, metavar="JSON", help="as older vLLM took it")
    add("--images-only", action="store_true", help="refuse videos, and keep no memory for them")
    add("--client-frames", action="store_true",
        help="keep all frames of the videos that clients send, where --stock-media would sample")  # fmt: skip
    add("--reasoning", action="store_true",
        help="tell thinking and answer apart; by itself where the chat template opens a <think>")  # fmt: skip
    add("--tools", action="store_true", help="let models call tools: automatic choice, Qwen's format")
    add("--stock-media", action="store_true", help="vLLM's own loading and resizing, not qwen_vl_utils'")
    add("--media-policy", type=_json_object, metavar="JSON", default={},
        help='what media may cost, as {"max_frames": 256}: arguments of MediaPolicy.strict')  # fmt: skip
    return result


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is wanted, such as {{}}, not {text}")
    return value


def prepare(argv: Sequence[str], *, vllm: Path | None = None) -> tuple[Server, bool]:
    """The server that a command line asks for, and whether it only wants to see it.

    ``vllm``: the executable; without it the one that :func:`find_vllm` finds. Raises ValueError for what is
    wrong with the command or the checkpoint, FileNotFoundError without vLLM.
    """
    options, flags = _parse(argv)
    model, dry = options.model, options.dry_run
    revision = given(flags, "revision")
    checkpoint = checkpoints.find_checkpoint(model, revision[0] if revision else None)
    checkpoints.check_expert_layout(checkpoint)
    _check_policy(options.media_policy, options.stock_media)
    _check_adapters(given(flags, "lora-modules") or ())
    wishes = Wishes(
        profile=options.profile,
        long_context=options.long_context,
        rope_scaling=options.rope_scaling,
        images_only=options.images_only,
        client_frames=options.client_frames,
        reasoning=options.reasoning or _thinks(checkpoint, flags),
        tools=options.tools,
        stock_media=options.stock_media,
        media_policy=options.media_policy,
    )
    configured = _read_config_file(flags)
    plan = make_plan(
        checkpoint, find_hardware(), wishes, flags, configured=configured, environ=dict(os.environ)
    )
    executable = vllm or find_vllm(missing_ok=dry)
    return _server((str(executable), "serve", *plan.arguments), plan, configured), dry


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[Flag]]:
    """The command's own options, and the flags for vLLM."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    own, behind = argv[:cut], argv[cut + 1 :]
    options, rest = parser().parse_known_args(own)
    before = own[: own.index(options.model)]
    if stray := [token for token in before if token in rest]:
        raise ValueError(f"{stray[0]} stands before the model; write: {COMMAND} MODEL {stray[0]} ...")
    return options, read_flags([*rest, *behind])


def _thinks(checkpoint: checkpoints.Checkpoint, flags: Sequence[Flag]) -> bool:
    """Whether requests that say nothing about it make the model think."""
    named = given(flags, "chat-template")
    if named:
        template = Path(named[0]).read_text(encoding="utf-8") if Path(named[0]).is_file() else named[0]
    else:
        template = checkpoints.chat_template(checkpoint.folder) if checkpoint.folder else None
    kwargs = given(flags, "default-chat-template-kwargs")
    if template is None:
        return False
    try:
        defaults = json.loads(kwargs[0]) if kwargs else {}
    except ValueError as error:
        raise ValueError(f"--default-chat-template-kwargs: not JSON: {error}") from error
    return checkpoints.starts_thinking(template, defaults)


def _check_policy(policy: Mapping[str, Any], stock: bool) -> None:
    """Raise ValueError now for a policy that would fail at the first picture."""
    from qwen_vl_utils.policy import MediaPolicy

    if policy and stock:
        raise ValueError("--media-policy is for media that qwen_vl_utils loads; leave out --stock-media")
    flags = {"domains": "--allowed-media-domains", "folders": "--allowed-local-media-path"}
    if double := next((name for name in flags if name in policy), None):
        raise ValueError(f"--media-policy: {double} is said with vLLM's own {flags[double]}")
    try:
        MediaPolicy.strict(**policy)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--media-policy: {error}") from error


def _check_adapters(modules: Sequence[str]) -> None:
    """Raise ValueError for an adapter that vLLM would serve in part; ``modules``: NAME=FOLDER or JSON."""
    for module in modules:
        named = json.loads(module)["path"] if module.startswith("{") else module.partition("=")[2]
        if (Path(named) / "adapter_config.json").is_file():
            adapters.served_rank(Path(named))


def _read_config_file(flags: Sequence[Flag]) -> dict[str, Any]:
    """The flags in vLLM's --config file, names in vLLM's spelling; empty without one."""
    if not (named := given(flags, "config")):
        return {}
    import yaml

    try:
        content = yaml.safe_load(Path(named[0]).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config {named[0]}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {named[0]}: wanted is one `flag: value` a line")
    return {str(name).replace("_", "-"): value for name, value in content.items()}


def find_vllm(python: str | Path | None = None, *, missing_ok: bool = False) -> Path:
    """The `vllm` beside ``python`` (this one's, by default), else that of this checkout's .venv-vllm.

    Raises FileNotFoundError where there is none; with ``missing_ok`` a bare "vllm" comes back.
    """
    candidates = [Path(python or sys.executable).parent / "vllm"]
    if python is None:
        candidates.append(Path(__file__).resolve().parents[3] / ".venv-vllm/bin/vllm")
    for path in candidates:
        if path.is_file():
            return path
    if missing_ok:
        return Path("vllm")
    raise FileNotFoundError(
        f"vLLM is not installed: there is no {' and no '.join(map(str, candidates))}; in the repository "
        "`make serve` builds it, elsewhere: pip install 'qwen-vl-serve[vllm]'"
    )


def _server(command: tuple[str, ...], plan: Plan, configured: Mapping[str, Any]) -> Server:
    """How the server that ``command`` starts will be reached."""
    flags = read_flags(plan.arguments)

    def value(name: str) -> str | None:
        told = given(flags, name)
        return told[0] if told else str(configured[name]) if name in configured else None

    watched = not any(given(flags, name) is not None or configured.get(name) for name in UNWATCHED)
    certificate = value("ssl-certfile")
    host = value("host") or "127.0.0.1"
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    reached = f"[{reached}]" if ":" in reached else reached
    url = f"{'https' if certificate else 'http'}://{reached}:{value('port') or 8000}/v1"
    return Server(
        command,
        plan,
        base_url=url if watched else None,
        api_key=value("api-key") or os.environ.get("VLLM_API_KEY"),
        certificate=certificate,
        picture=_takes_pictures(flags),
    )


def _takes_pictures(flags: Sequence[Flag]) -> bool:
    limits = given(flags, "limit-mm-per-prompt")
    dotted = [flag.values for flag in flags if flag.tokens[0].startswith("--limit-mm-per-prompt.image")]
    limit = dotted[-1][0] if dotted and dotted[-1] else None
    if limits and limit is None:
        try:
            limit = json.loads(limits[-1]).get("image")
        except (ValueError, AttributeError):  # vLLM says what is wrong with it
            limit = None
    return given(flags, "language-model-only") is None and str(limit) != "0"


def start(server: Server, output: Any = None) -> subprocess.Popen[bytes]:
    """Start it in a process group of its own, so that signals reach it through us alone.

    Raises OSError where its port is taken: another server would be found ready in its place.
    """
    if server.base_url is not None:
        _check_port(server.base_url)
    environment = os.environ | dict(server.plan.environment)
    return subprocess.Popen(
        server.command, env=environment, stdout=output, stderr=output and subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def _check_port(base_url: str) -> None:
    host, _, port = base_url.partition("://")[2].removesuffix("/v1").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return
    raise OSError(f"{host}:{port} is taken by a server that runs already; stop it, or choose another --port")


def stop(process: subprocess.Popen[bytes], grace: float = GRACE) -> int:
    """End the server with all its processes: asked first, killed after ``grace`` seconds; its status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            kill_group(process)
    status = process.wait()
    ends = time.monotonic() + LAST
    while kill_group(process) and time.monotonic() < ends:  # an engine whose server is gone
        time.sleep(0.02)
    return status


def kill_group(process: subprocess.Popen[bytes]) -> bool:
    """Kill what is left of the server's processes; whether there was something."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


class HandOn:
    """While it is entered, Ctrl-C and SIGTERM go to ``process``; the second one kills it.

    Entered before the server is started, so that no signal finds the server without it.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._signals: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> HandOn:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._hand_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """From now on ``process`` is the one; what came before it was there reaches it now."""
        self.process = process
        if self._signals:
            process.send_signal(self._signals[0])

    def _hand_on(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)
        if self.process is None or self.process.poll() is not None:
            return
        if len(self._signals) > 1:
            kill_group(self.process)
        else:
            self.process.send_signal(number)


def run(server: Server) -> int:
    """Start the server, say when it is ready, wait for its end; its status, 1 where it never was ready."""
    with HandOn() as signals:
        process = start(server)
        signals.watch(process)
        try:
            if server.base_url is not None:
                _announce(server, server.base_url, process)
            status = process.wait()
        except NotReady as error:
            _say(str(error))
            status = process.poll() or 1
        finally:
            stop(process)
    return 128 - status if status < 0 else status


def _announce(server: Server, base_url: str, process: subprocess.Popen[bytes]) -> None:
    ready = wait_until_ready(
        base_url,
        server.api_key,
        None,
        process,
        picture=server.picture,
        certificate=server.certificate,
    )
    print(f"ready: {base_url} answers as {ready.model} after {ready.seconds:.0f} s; ask it with:")
    print(f'    qwenvl-ask {base_url} --image PICTURE "What do you see?"', flush=True)


@contextmanager
def running_server(
    model: str | Path,
    *flags: str,
    python: str | Path | None = None,
    timeout: float = 600.0,
    log: str | Path | None = None,
) -> Iterator[str]:
    """A server on a free port of this machine while the block runs; its base URL, ending in /v1.

    ``flags``: as on the command line. ``python``: the interpreter that has vLLM beside it. ``timeout``:
    seconds until it must have answered. ``log``: a file for what it prints, which else is seen only when it
    fails. Raises NotReady with the last lines, and what :func:`prepare` raises.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server, _ = prepare([str(model), "--port", str(port), *flags], vllm=find_vllm(python))
    if server.base_url is None:
        raise ValueError(f"{model}: a server with {' or '.join(UNWATCHED)} has no address to yield")
    with open(log, "w+b") if log else tempfile.TemporaryFile() as output:
        process = start(server, output)
        try:
            try:
                wait_until_ready(
                    server.base_url, server.api_key, timeout, process,
                    picture=server.picture, certificate=server.certificate,
                )  # fmt: skip
            except NotReady as error:
                output.seek(0)
                lines = output.read().decode(errors="replace").splitlines()[-TAIL:]
                raise NotReady("\n".join([str(error), *lines])) from error
            yield server.base_url
        finally:
            stop(process)


def _say(text: str) -> None:
    print(f"{COMMAND}: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``qwenvl-serve``; returns the exit status."""
    try:
        server, dry = prepare(sys.argv[1:] if argv is None else argv)
        for note in server.plan.notes:
            _say(note)
        if dry:
            print(server.shown(secrets=True))
            return 0
        print(server.shown(secrets=False), flush=True)
        return run(server)
    except (ValueError, OSError) as error:
        _say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
