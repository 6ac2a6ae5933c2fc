"""The nginx in front of a vLLM server: its configuration from the template, and API keys.

    python -m qwen_vl_serve.proxy add-key keys.conf alice
    python -m qwen_vl_serve.proxy render qwen-vl-serve/deploy/nginx/default.conf.template \\
        --server 127.0.0.1:8000 --keys /etc/nginx/qwenvl/keys.conf \\
        --certificate /etc/nginx/qwenvl/tls.crt --certificate-key /etc/nginx/qwenvl/tls.key \\
        --output /etc/nginx/conf.d/qwenvl.conf

The official nginx image needs no `render`: it fills in the same template from the environment variables named
in `ProxySettings`.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

PREFIX = "QWENVL_"
KEY_PREFIX = "sk-qwenvl-"
CLIENT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
# How nginx reads a line of the keys file; its own comparison ignores case, so keys have one case only.
KEY_LINE = re.compile(r'"Bearer ([a-z0-9_-]{32,200})" ([a-z0-9][a-z0-9_-]{0,62});')


def setting(pattern: str, help: str, default: str | None = None):
    """One field: what its value must look like, and what it says."""
    metadata = {"pattern": re.compile(pattern), "help": help}
    return field(metadata=metadata) if default is None else field(metadata=metadata, default=default)


PATH = r"/[\w./+-]+"
ADDRESS = r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):\d{1,5}"


@dataclass(frozen=True)
class ProxySettings:
    """What the template leaves open. A field `rate` fills ${QWENVL_RATE}.

    Raises ValueError for a value that nginx could read as anything but a value.
    """

    servers: str = setting(
        rf"(?:server {ADDRESS}(?: [a-z_]+(?:=\w+)?)*;\s*)+",
        "nginx's `server host:port;`, one for each vLLM server",
    )
    keys: str = setting(PATH, "file of API keys, lines as add-key writes them")
    certificate: str = setting(PATH, "TLS certificate, PEM")
    certificate_key: str = setting(PATH, "its private key, PEM")
    listen: str = setting(rf"\d{{1,5}}|{ADDRESS}", "port, or address:port, for clients", "8443")
    max_body: str = setting(
        r"[1-9]\d*[km]", "largest request; pictures travel in it as base64, 4/3 of the file", "40m"
    )
    rate: str = setting(r"[1-9]\d*r/[sm]", "requests a second (or minute: 30r/m) for each key", "10r/s")
    burst: str = setting(r"[1-9]\d*", "requests a key may be ahead of that", "40")
    connections: str = setting(r"[1-9]\d*", "requests of a key at a time", "64")
    timeout: str = setting(r"[1-9]\d*[sm]", "longest silence of a vLLM server", "600s")
    access_log: str = setting(PATH, "where the log goes", "/var/log/nginx/access.log")
    server_authorization: str = setting(
        r"|Bearer [\w.~+/=-]+", "the vLLM servers' own key as `Bearer KEY`, empty for none", ""
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not each.metadata["pattern"].fullmatch(value):
                # Never the value of the one that is a secret.
                found = "" if each.name == "server_authorization" else f", found {value!r}"
                raise ValueError(
                    f"{each.name}: expected {each.metadata['help']} "
                    f"(as {each.metadata['pattern'].pattern!r}){found}"
                )

    def environment(self) -> dict[str, str]:
        """What the official nginx image is to be given."""
        return {PREFIX + each.name.upper(): getattr(self, each.name) for each in fields(self)}


def render(template: str, settings: ProxySettings) -> str:
    """The template with every ${QWENVL_...} filled in. nginx's own $variables stay.

    Raises ValueError when the template asks for what the settings don't have.
    """
    values = settings.environment()

    def fill(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"the template has ${{{match[1]}}}; known are {', '.join(values)}")
        return values[match[1]]

    return re.sub(rf"\$\{{({PREFIX}\w*)\}}", fill, template)


def read_keys(path: Path) -> dict[str, str]:
    """Key -> client. Raises ValueError with the line that nginx would misread."""
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = KEY_LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f'{path}:{number}: expected "Bearer KEY" CLIENT; as add-key writes it')
        key, client = match.groups()
        if key in found:
            raise ValueError(f"{path}:{number}: the key of {found[key]} again, for {client}: remove one line")
        found[key] = client
    return found


def add_key(path: Path, client: str) -> str:
    """A new key for the client, written to the file (made for its owner and group only) and returned."""
    if not CLIENT.fullmatch(client):
        raise ValueError(f"client: lower-case letters, digits, - and _ (63 at most), found {client!r}")
    if path.exists():
        read_keys(path)
    key = KEY_PREFIX + secrets.token_hex(32)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640), "a") as file:
        file.write(f'"Bearer {key}" {client};\n')
    return key


def write_private(path: Path, text: str) -> None:
    """For its owner and group only, since it may hold the servers' key; whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640), "w") as file:
        file.write(text)
    part.replace(path)


MAIN_CONFIGURATION = """\
daemon off;
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/error.log notice;
events {{ worker_connections 2048; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/qwenvl.conf;
}}
"""


def program(name: str, package: str) -> str:
    """Where it is. Raises FileNotFoundError with what to install."""
    # Debian keeps nginx out of an ordinary user's PATH.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(f"{name} is not installed; on Debian: sudo apt-get install {package}")
    return found


def make_certificate(folder: Path, *, name: str = "localhost") -> tuple[Path, Path]:
    """A self-signed certificate for `name` and 127.0.0.1, and its key: for trying out, not for strangers."""
    certificate, key = folder / "tls.crt", folder / "tls.key"
    command = [program("openssl", "openssl"), "req", "-x509", "-nodes", "-days", "30", "-newkey", "ec"]
    command += ["-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", f"/CN={name}"]
    command += ["-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"]
    command += ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@contextmanager
def running_nginx(template: Path, settings: ProxySettings, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An nginx of one's own with the template, all its files in `folder`; needs no root.

    `settings.listen` must be a free 127.0.0.1:PORT. Raises RuntimeError with nginx's own words when it
    does not start.
    """
    write_private(folder / "qwenvl.conf", render(template.read_text(), settings))
    (folder / "nginx.conf").write_text(MAIN_CONFIGURATION.format(folder=folder))
    command = [program("nginx", "nginx"), "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with open(folder / "stderr.log", "wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, start_new_session=True)
    try:
        wait_for_port(process, settings.listen, folder)
        yield process
    finally:
        process.terminate()
        process.wait(timeout=20)


def wait_for_port(process: subprocess.Popen[bytes], listen: str, folder: Path) -> None:
    host, _, port = listen.rpartition(":")
    end = time.monotonic() + 20
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"nginx does not listen on {listen}:\n{(folder / 'stderr.log').read_text()}")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m qwen_vl_serve.proxy", description="nginx in front of a vLLM server"
    )
    commands = main.add_subparsers(dest="command", required=True)
    keys = commands.add_parser("add-key", help="make an API key, append it to the file, print it")
    keys.add_argument("keys", type=Path)
    keys.add_argument("client", help="the name that the log and the limits use")
    fill = commands.add_parser("render", help="fill in the template")
    fill.add_argument("template", type=Path)
    fill.add_argument("--output", type=Path, help="where to write (default: standard output)")
    fill.add_argument("--server", action="append", required=True, help="host:port of a vLLM server; repeat")
    fill.add_argument("--server-key-file", type=Path, help="file with the vLLM servers' --api-key")
    for each in fields(ProxySettings):
        if each.name not in {"servers", "server_authorization"}:
            has_default = isinstance(each.default, str)
            fill.add_argument(
                "--" + each.name.replace("_", "-"),
                required=not has_default,
                default=each.default if has_default else None,
                help=each.metadata["help"] + (" (default: %(default)s)" if has_default else ""),
            )
    return main


def settings_of(arguments: argparse.Namespace) -> ProxySettings:
    values = {each.name: getattr(arguments, each.name, "") for each in fields(ProxySettings)}
    values["servers"] = " ".join(f"server {address};" for address in arguments.server)
    if arguments.server_key_file is not None:
        values["server_authorization"] = "Bearer " + arguments.server_key_file.read_text().strip()
    return ProxySettings(**values)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "add-key":
            print(add_key(arguments.keys, arguments.client))
            return 0
        text = render(arguments.template.read_text(), settings_of(arguments))
        if not read_keys(Path(arguments.keys)):
            raise ValueError(f"{arguments.keys} holds no key: add one with add-key")
        if arguments.output is None:
            print(text, end="")
        else:
            write_private(arguments.output, text)
    except (OSError, ValueError) as error:
        print(f"{parser().prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
