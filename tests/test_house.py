"""What crosses the packages: declared dependencies, tested versions, quiet imports, wheels, set-up, links."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gallery import canonical

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {  # import name -> its folder
    "qwen_vl_utils": ROOT / "qwen-vl-utils/src/qwen_vl_utils",
    "qwen_vl_serve": ROOT / "qwen-vl-serve/src/qwen_vl_serve",
    "qwenvl_eval": ROOT / "evaluation/src/qwenvl_eval",
    "qwenvl": ROOT / "qwen-vl-finetune/qwenvl",
}
PROJECTS = {name: ROOT / folder.relative_to(ROOT).parts[0] for name, folder in PACKAGES.items()}
OWN = {"qwen-vl-utils", "qwen-vl-serve", "qwenvl-eval", "qwen-vl-finetune"}
# Want a GPU and an environment of their own, so the tested set on a laptop leaves them out.
UNTESTED = {"vllm", "flash-attn"}
IMPORT_NAMES = {"pyyaml": "yaml", "pillow": "PIL", "flash-attn": "flash_attn", "easy-vqa": "easy_vqa"}


def project(name: str) -> dict:
    return tomllib.loads((PROJECTS[name] / "pyproject.toml").read_text())["project"]


def requirements(name: str) -> list[Requirement]:
    """All that the package asks for, extras included."""
    table = project(name)
    extras = table.get("optional-dependencies", {})
    return [Requirement(line) for line in sum(extras.values(), table["dependencies"])]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


@cache
def own_files(pattern: str) -> list[Path]:
    """The repository's files of this pattern; neither environments nor what runs wrote."""
    found = []
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in {"node_modules", "output"} and name[0] != "."]
        found += [Path(folder, name) for name in names if fnmatch(name, pattern)]
    return sorted(found)


# ---- versions and dependencies


@pytest.mark.parametrize("name", PACKAGES)
def test_every_dependency_has_a_tested_version(name):
    pins = constraints()
    asked = [r for r in requirements(name) if r.name not in OWN | UNTESTED]
    assert asked
    missing = [str(r) for r in asked if canonicalize_name(r.name) not in pins]
    assert not missing, "not in constraints.txt (make constraints): " + ", ".join(missing)
    outside = [str(r) for r in asked if not r.specifier.contains(pins[canonicalize_name(r.name)])]
    assert not outside, "constraints.txt pins another version: " + ", ".join(outside)


def test_every_development_tool_has_a_tested_version():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    missing = {canonicalize_name(Requirement(line).name) for line in tools} - constraints().keys()
    assert not missing


def test_constraints_are_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    odd = [line for line in lines[2:] if not re.fullmatch(r"[\w.-]+==[\w.+!]+( ; [^:/@]+)?", line)]
    assert not odd
    assert not OWN & constraints().keys()


@cache
def imported(path: Path) -> frozenset[str]:
    """Top-level names that a file imports, lazily or not; `if TYPE_CHECKING` counts too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return frozenset(name.partition(".")[0] for name in names)


@pytest.mark.parametrize("name", PACKAGES)
def test_imports_are_declared_and_declared_are_imported(name):
    declared = {IMPORT_NAMES.get(r.name, r.name.replace("-", "_")) for r in requirements(name)}
    used = set().union(*(imported(path) for path in PACKAGES[name].rglob("*.py")))
    demos = set().union(*(imported(path) for path in (PROJECTS[name] / "demo").rglob("*.py")))
    outside = used - sys.stdlib_module_names - {name}
    file = f"{PROJECTS[name].name}/pyproject.toml"
    assert not outside - declared, f"add to {file}"
    assert not declared - outside - demos - NOT_IMPORTED[name], f"drop from {file}"
    assert not NOT_IMPORTED[name] & outside, "NOT_IMPORTED is out of date"


# Wanted by the model library (quantised weights, the Trainer), by a command, or by web_demo_mm.py.
NOT_IMPORTED = {
    "qwen_vl_utils": set(),
    "qwen_vl_serve": {"gradio"},
    "qwenvl_eval": {"antlr4_python3_runtime"},  # latex2sympy2_extended works with this one release
    "qwenvl": {"bitsandbytes", "tensorboard"},
}


# ---- imports

QUIET = """
import os, sys
environment, path, hooks = dict(os.environ), list(sys.path), list(sys.meta_path)
import {name}
assert dict(os.environ) == environment, "changed the environment"
assert sys.path == path, "changed sys.path"
{more}
"""


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, "") for name in PACKAGES),
        ("qwenvl_eval.scoring", "assert not {'torch', 'transformers', 'numpy.random'} & sys.modules.keys()"),
    ],
)
def test_import_has_no_side_effects(name, more, tmp_path):
    code = QUIET.format(name=name, more=more)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---- wheels


@pytest.mark.parametrize("name", PACKAGES)
def test_wheel_carries_every_file_of_the_package(name, tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=PROJECTS[name], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {entry for entry in archive.namelist() if ".dist-info/" not in entry}
    folder = PACKAGES[name]
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert packed == {str(path.relative_to(folder.parent)) for path in files}


# ---- what one types


@pytest.mark.parametrize(
    "target", ["setup", "quickstart", "cookbooks", "test", "check", "constraints", "clean"]
)
def test_make_knows_the_target(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" not in done.stdout
    assert target in subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout.split()


# What the stand-in for Python does, given `-c CODE`.
VERSION = 'case "$2" in *%d.%d*) echo 3.11;; esac'
NO_CODEC = 'case "$2" in *torchcodec*) exit 1;; esac'
NO_PIP = 'case "$2" in *ensurepip*) exit 1;; esac'


class Machine:
    """A copy of what `.ci/setup` reads, and a PATH on which only the named programs exist."""

    def __init__(self, folder: Path):
        self.root = folder / "repository"
        self.bin = folder / "bin"
        self.log = folder / "log"
        self.bin.mkdir(parents=True)
        for path in [".ci/setup", "constraints.txt", "pyproject.toml"]:
            self.write(path, (ROOT / path).read_text())
        for tool in ["bash", "cat", "cksum", "dirname", "ls", "mkdir", "rm", "cp", "chmod"]:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.program("id", "echo 1000")
        self.program("python3.11", VERSION)
        self.program("uv", f'echo "uv $*" >>{self.log}; [ "$1" != venv ] || {self.fake_venv()}')
        self.log.touch()

    @staticmethod
    def fake_venv() -> str:
        return 'eval "mkdir -p .venv/bin && cp ../bin/python3.11 .venv/bin/python"'

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def program(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.bin / name).chmod(0o755)

    def without(self, *names: str) -> "Machine":
        for name in names:
            (self.bin / name).unlink()
        return self

    def setup(self, **environment: str) -> tuple[int, str, list[str]]:
        """Exit status, what it said, and the commands it ran."""
        self.log.write_text("")
        done = subprocess.run(
            ["bash", ".ci/setup"],
            cwd=self.root,
            env={"PATH": str(self.bin), **environment},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr, self.log.read_text().splitlines()


@pytest.fixture
def machine(tmp_path) -> Machine:
    machine = Machine(tmp_path)
    for folder in PROJECTS.values():
        machine.write(f"{folder.name}/pyproject.toml", (folder / "pyproject.toml").read_text())
    return machine


def test_setup_installs_all_packages_with_the_constraints(machine):
    status, said, ran = machine.setup()
    assert status == 0, said
    install = ran[-1]
    assert all(f"-e ./{folder.name}" in install for folder in PROJECTS.values())
    assert "--constraints constraints.txt" in install
    assert "--torch-backend" not in install


def test_setup_runs_again_only_when_something_changed(machine):
    assert machine.setup()[2]
    assert machine.setup() == (0, "", [])
    machine.write("constraints.txt", "torch==2.14.0\n")
    assert machine.setup()[2]
    machine.write("evaluation/pyproject.toml", "")
    assert machine.setup()[2]
    assert machine.setup() == (0, "", [])


def test_setup_after_a_failed_install_tries_again(machine):
    machine.program("uv", f'[ "$1" != venv ] || {machine.fake_venv()}; [ "$1" != pip ]')
    assert machine.setup()[0] != 0
    assert machine.setup()[0] != 0


def test_setup_passes_the_torch_backend_on_and_remembers_it(machine):
    machine.setup()
    ran = machine.setup(TORCH_BACKEND="cpu")[2]
    assert any("venv" in line for line in ran), "builds must not be mixed in one environment"
    assert "--torch-backend cpu" in ran[-1]
    assert machine.setup() == (0, "", [])
    machine.write("constraints.txt", "")
    assert "--torch-backend cpu" in machine.setup()[2][-1]


def test_setup_leaves_torchcodec_out_where_it_does_not_load(machine):
    machine.program("python3.11", f"{NO_CODEC}; {VERSION}")
    status, said, ran = machine.setup()
    assert status == 0
    assert "sudo apt-get install ffmpeg libpython3.11" in said
    assert ran[-1].startswith("uv pip uninstall") and ran[-1].endswith(" torchcodec")
    assert machine.setup() == (0, "", [])


def test_setup_as_root_on_debian_installs_what_is_missing(machine):
    machine.program("id", "echo 0")
    machine.program("python3.11", f"[ -e {machine.root}/codec ] || {{ {NO_CODEC}; }}; {VERSION}")
    machine.program("apt-get", f'echo "apt-get $*" >>{machine.log}; : >{machine.root}/codec')
    status, said, ran = machine.setup()
    assert status == 0, said
    assert ran[-1].startswith("apt-get install") and ran[-1].endswith(" ffmpeg libpython3.11")
    assert "does not load" not in said


@pytest.mark.parametrize("old", [True, False], ids=["older", "none"])
def test_setup_without_a_python_names_the_package(machine, old):
    machine.program("python3.11", "exit 1") if old else machine.without("python3.11")
    status, said, ran = machine.setup()
    assert status != 0
    assert "no Python 3.11 or newer" in said
    assert "sudo apt-get install python3 python3-venv" in said
    assert not ran


def test_setup_without_uv_fetches_it_with_pip(machine):
    venv = "mkdir -p .venv/bin; cp ../bin/python3.11 .venv/bin/python; cp ../bin/python3.11 .venv/bin/uv"
    machine.program("python3.11", f'echo "python $*" >>{machine.log}; [ "$2" != venv ] || eval "{venv}"')
    status, said, ran = machine.without("uv").setup()
    assert status == 0, said
    assert "python -m pip install --quiet uv" in ran


def test_setup_without_uv_and_ensurepip_names_the_package(machine):
    machine.program("python3.11", f"{NO_PIP}; {VERSION}")
    status, said, _ = machine.without("uv").setup()
    assert status != 0
    assert "sudo apt-get install python3.11-venv" in said


# ---- what one reads

LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown page's headings get."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_resolve():
    pages = own_files("*.md")
    assert ROOT / "CONTRIBUTING.md" in pages
    broken = []
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for link in filter(None, (a or b for a, b in LINK.findall(text))):
            file, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            target = (page.parent / file) if file else page
            if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def test_notebooks_carry_no_outputs():
    stored = [
        f"{path.relative_to(ROOT)}, cell {number}"
        for path in own_files("*.ipynb")
        for number, cell in enumerate(json.loads(path.read_text())["cells"])
        if cell.get("outputs") or cell.get("execution_count")
    ]
    assert not stored, "clear the outputs"


def test_notebooks_are_in_the_one_form_that_keeps_diffs_readable():
    other = [
        path for path in own_files("*.ipynb") if canonical(json.loads(path.read_text())) != path.read_text()
    ]
    assert not other, "python cookbooks/gallery.py --tidy"


def test_tests_folders_have_no_init_and_names_are_unique():
    """With importlib import mode an `__init__.py` hides tests, and equal names are hard to tell apart."""
    tests = own_files("test_*.py")
    assert not [path for path in own_files("__init__.py") if "tests" in path.parts]
    assert len({path.name for path in tests}) == len(tests)
    paths = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]
    outside = [path for path in tests if not any(path.is_relative_to(ROOT / folder) for folder in paths)]
    assert not outside, "not among pytest's testpaths, so never run"


def test_layers_hold():
    """The contracts in pyproject.toml: who may import whom."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
