"""The container scripts against a stub of `docker`, and the files of docker/ against their checkers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_vl_serve.proxy import ProxySettings, add_key, make_certificate, program, running_nginx

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
SCRIPT = DOCKER / "run_web_demo.sh"
TEMPLATE = ROOT / "qwen-vl-serve/deploy/nginx/default.conf.template"
BIN = Path(sys.executable).parent

# Answers as the engine would and writes down what it was asked: one argument a line, a blank line between.
STUB = r"""#!/bin/bash
printf '%s\n' "$@" '' >>"$STUB_FOLDER/calls"
case "$1 $2" in
"version "*) [ ! -e "$STUB_FOLDER/no-engine" ] ;;
"image inspect") [ ! -e "$STUB_FOLDER/no-image" ] ;;
"container inspect") [ -e "$STUB_FOLDER/container" ] ;;
"rm --force") rm "$STUB_FOLDER/container" ;;
"run --detach") ;;
*) exit 9 ;;
esac
"""


class Machine:
    """A PATH with the stub, and the calls it saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.put("docker", STUB)
        self.put("nvidia-smi", "#!/bin/sh\nexit 1\n")
        self.checkpoint = folder / "my checkpoint"
        self.checkpoint.mkdir()
        for name in ["config.json", "model.safetensors"]:
            (self.checkpoint / name).write_text("{}")

    def put(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def state(self, name: str) -> None:
        (self.folder / name).touch()

    def run(self, *arguments: object, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "STUB_FOLDER": str(self.folder)}
        command = ["bash", str(script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [call.splitlines() for call in path.read_text().split("\n\n")[:-1]] if path.exists() else []

    def started(self) -> list[str]:
        (call,) = [call for call in self.calls() if call[0] == "run"]
        return call


@pytest.fixture
def machine(tmp_path):
    tmp_path.chmod(0o755)
    return Machine(tmp_path)


def command_line(checkpoint, *, name="qwenvl-web-demo", publish="127.0.0.1:8881", image="", gpus=(), demo=()):
    return [
        *["run", "--detach", "--name", name, "--restart", "on-failure:3", *gpus, "--shm-size", "8g"],
        *["--read-only", "--tmpfs", "/tmp:exec,mode=1777"],
        *["--tmpfs", "/home/qwenvl:exec,uid=10001,gid=10001"],
        *["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "4096"],
        *["--env", "HF_HUB_OFFLINE=1"],
        *["--mount", f"type=bind,source={checkpoint},target=/checkpoint,readonly"],
        *["--publish", f"{publish}:7860", image or "qwenvl:qwen3vl-cu128"],
        *["python3", "/opt/qwenvl/web_demo_mm.py", "--checkpoint-path", "/checkpoint"],
        *["--server-name", "0.0.0.0", "--server-port", "7860", *demo],
    ]


def test_the_demo_starts_on_this_machine_only_with_the_checkpoint_read_only(machine):
    done = machine.run("-c", machine.checkpoint)
    assert done.returncode == 0, done.stderr
    assert machine.started() == command_line(machine.checkpoint)
    assert "http://127.0.0.1:8881" in done.stdout and "docker logs --follow qwenvl-web-demo" in done.stdout
    assert "no GPU found" in done.stderr and "asks for no password" not in done.stderr


@pytest.mark.parametrize("script", ["run_web_demo.sh", "docker_web_demo.sh"])
@pytest.mark.parametrize(
    "names",
    [
        ("-c", "-p", "-i", "-n"),
        ("--checkpoint", "--port", "--image", "--name"),
        ("--checkpoint", "--port", "--image-tag", "--container-name"),
    ],
)
def test_every_option_has_its_place_in_the_command(machine, script, names):
    # More than a pipe holds: a reader that stops at the first GPU would hide them all.
    machine.put("nvidia-smi", "#!/bin/bash\necho GPU 0: NVIDIA H100; seq 20000\n")
    checkpoint, port, image, name = names
    done = machine.run(
        *[checkpoint, machine.checkpoint, port, 9000, "--host", "0.0.0.0", image, "mine:1", name, "demo-2"],
        *["--", "--backend", "hf"],
        script=DOCKER / script,
    )
    assert done.returncode == 0, done.stderr
    expected = {"name": "demo-2", "publish": "0.0.0.0:9000", "image": "mine:1", "gpus": ("--gpus", "all")}
    assert machine.started() == command_line(machine.checkpoint, **expected, demo=("--backend", "hf"))
    assert "asks for no password" in done.stderr and "no GPU" not in done.stderr
    assert not [call for call in machine.calls() if call[:2] == ["image", "inspect"]]  # docker fetches it


def test_a_relative_path_and_the_small_model_of_the_repository_will_do(machine):
    done = machine.run("-c", os.path.relpath(ROOT / "models/qwen3-vl-nano"))
    assert done.returncode == 0, done.stderr
    assert machine.started() == command_line(ROOT / "models/qwen3-vl-nano")


@pytest.mark.parametrize(
    "change, arguments, words",
    [
        ("", [], "-c CHECKPOINT is missing"),
        ("", ["-c"], "-c needs a value"),
        ("", ["-c", "{checkpoint}", "--port", ""], "--port needs a value"),
        ("", ["-c", "/no/such/folder"], "/no/such/folder: no such folder"),
        ("rm config.json", ["-c", "{checkpoint}"], "no config.json in it"),
        (
            "chmod 600 model.safetensors",
            ["-c", "{checkpoint}"],
            "model.safetensors: the container's user can't",
        ),
        ("chmod 750 .", ["-c", "{checkpoint}"], "chmod -R o+rX"),
        ("ln -s /etc/hostname vocab.json", ["-c", "{checkpoint}"], "vocab.json is a link out of the folder"),
        ("", ["-c", "{checkpoint}", "--port", "http"], "--port: a number from 1 to 65535, not http"),
        ("", ["-c", "{checkpoint}", "--port", "65536"], "--port: a number from 1 to 65535, not 65536"),
        ("", ["-c", "{checkpoint}", "--port", "08"], "--port: a number from 1 to 65535, not 08"),
        ("", ["-c", "{checkpoint}", "--gpu"], "unknown option --gpu"),
        ("touch ../no-engine", ["-c", "{checkpoint}"], "the docker engine does not answer"),
        ("touch ../no-image", ["-c", "{checkpoint}"], "docker build -f docker/Dockerfile-qwen3vl-cu128"),
        ("touch ../container", ["-c", "{checkpoint}"], "a container qwenvl-web-demo is there already"),
    ],
)
def test_what_cannot_work_is_said_and_nothing_starts(machine, change, arguments, words):
    subprocess.run(["bash", "-c", change], cwd=machine.checkpoint, check=True)
    done = machine.run(*[argument.format(checkpoint=machine.checkpoint) for argument in arguments])
    assert done.returncode == 1 and words in done.stderr
    assert not [call for call in machine.calls() if call[0] in ("run", "rm")]


def test_a_path_that_docker_would_misread_is_refused(machine):
    odd = machine.folder / "a,readonly=false"
    machine.checkpoint.rename(odd)
    done = machine.run("-c", odd)
    assert done.returncode == 1 and "rename it" in done.stderr


def test_an_old_container_goes_when_told_to(machine):
    machine.state("container")
    done = machine.run("-c", machine.checkpoint, "--replace")
    assert done.returncode == 0, done.stderr
    assert ["rm", "--force", "qwenvl-web-demo"] in machine.calls() and machine.started()


def test_help_names_every_option(machine):
    done = machine.run("--help")
    options = set(re.findall(r"(?<=[ |])--?[a-z][a-z-]*(?=[ )|])", SCRIPT.read_text().partition("while")[2]))
    options &= set(re.findall(r"--?[a-z-]+", SCRIPT.read_text().partition("case $1")[2].partition("esac")[0]))
    assert done.returncode == 0 and len(options) > 8
    assert not [option for option in options - {"-h", "--help"} if option not in done.stdout]


def test_the_scripts_never_touch_the_dockers_socket():
    for path in DOCKER.iterdir():
        assert path.is_dir() or "docker.sock" not in path.read_text()


SCRIPTS = sorted([*DOCKER.glob("*.sh"), *(ROOT / ".ci").iterdir()])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_strict_and_clean(path):
    assert "\nset -euo pipefail\n" in path.read_text() and os.access(path, os.X_OK)
    done = subprocess.run([program("shellcheck", "shellcheck"), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_is_clean():
    done = subprocess.run(
        [BIN / "hadolint", "--failure-threshold", "info", DOCKER / "Dockerfile-qwen3vl-cu128"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_what_is_there_and_sent():
    """Each COPY's source is in the repository and let through by the ignore file."""
    text = (DOCKER / "Dockerfile-qwen3vl-cu128").read_text()
    let_through = (DOCKER / "Dockerfile-qwen3vl-cu128.dockerignore").read_text().split()
    sources = [word for line in re.findall(r"^COPY (.*)", text, re.M) for word in line.split()[:-1]]
    assert {"qwen-vl-utils", "qwen-vl-serve", "web_demo_mm.py", "requirements_web_demo.txt"} <= set(sources)
    for source in sources:
        assert f"!{source}" in let_through
        assert (ROOT / source).exists()
    assert re.search(r"^ARG VLLM_IMAGE=vllm/vllm-openai:v0\.32\.0$", text, re.M)
    user = text.rindex("USER 10001:10001")
    assert "RUN" not in text[user:]


# ---- compose


@pytest.fixture(scope="module")
def compose(tmp_path_factory):
    """The file as docker compose understands it."""
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    environment = {"PATH": os.environ["PATH"], "CHECKPOINT": str(checkpoint), "VLLM_API_KEY": "inner-key"}
    command = [BIN / "docker-compose", "-f", DOCKER / "compose.yaml", "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("missing", ["CHECKPOINT", "VLLM_API_KEY"])
def test_compose_says_what_it_needs_to_be_told(missing):
    environment = {"PATH": os.environ["PATH"], "CHECKPOINT": "/c", "VLLM_API_KEY": "k"} | {missing: ""}
    command = [BIN / "docker-compose", "-f", DOCKER / "compose.yaml", "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and f"put {missing}=" in done.stderr and "docker/.env" in done.stderr


def test_compose_publishes_nginx_only_and_on_this_machine(compose):
    published = {name: service.get("ports") for name, service in compose["services"].items()}
    (port,) = published.pop("nginx")
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "8443", 8443)
    assert set(published) == {"vllm", "prometheus", "grafana"} and not any(published.values())
    assert compose["networks"]["inside"]["internal"] is True
    outside = {name for name, service in compose["services"].items() if "outside" in service["networks"]}
    assert outside == {"nginx"}


def test_compose_gives_no_container_more_than_it_needs(compose):
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"] and not service.get("privileged")
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service.get("network_mode") is None and service.get("pid") is None
        assert name == "grafana" or service["read_only"] is True
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.]*|qwenvl:qwen3vl-cu128", service["image"])
        for volume in service["volumes"]:
            assert volume["type"] == "volume" or volume["read_only"] is True
            inside = Path(volume["source"]).is_relative_to(ROOT) and name != "vllm"
            assert not inside or Path(volume["source"]).exists()


def test_compose_reserves_the_gpus_for_vllm(compose):
    (device,) = compose["services"]["vllm"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", -1, ["gpu"])
    address = compose["services"]["vllm"]["networks"]["inside"]["ipv4_address"]
    assert f"server {address}:8000;" == compose["services"]["nginx"]["environment"]["QWENVL_SERVERS"]


def test_the_command_of_compose_is_one_that_qwenvl_serve_takes(compose):
    command = compose["services"]["vllm"]["command"]
    command[command.index("/checkpoint")] = str(ROOT / "models/qwen3-vl-nano")
    done = subprocess.run([BIN / command[0], *command[1:], "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--host 0.0.0.0" in done.stdout.replace("=", " ")


def test_nginx_starts_with_what_compose_tells_it(compose, tmp_path):
    """The environment fills every place of the template, and the real nginx takes the result."""
    environment = compose["services"]["nginx"]["environment"]
    given = {name: value for name, value in environment.items() if name.startswith("QWENVL_")}
    assert environment["NGINX_ENVSUBST_FILTER"] == "^QWENVL_"
    secrets = {secret["target"] for secret in compose["services"]["nginx"]["secrets"]}
    for name in ["QWENVL_KEYS", "QWENVL_CERTIFICATE", "QWENVL_CERTIFICATE_KEY"]:
        assert given[name] in secrets
    add_key(tmp_path / "keys.conf", "alice")
    certificate, certificate_key = make_certificate(tmp_path)
    values = {name.removeprefix("QWENVL_").lower(): value for name, value in given.items()}
    here = {
        "keys": str(tmp_path / "keys.conf"),
        "certificate": str(certificate),
        "certificate_key": str(certificate_key),
        "access_log": str(tmp_path / "access.log"),
        "listen": "127.0.0.1:18643",
    }
    settings = ProxySettings(**(values | here))
    assert settings.server_authorization == "Bearer inner-key"
    assert set(settings.environment()) == set(given)
    with running_nginx(TEMPLATE, settings, tmp_path):
        pass
