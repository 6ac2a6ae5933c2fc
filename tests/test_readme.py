"""Every command and every Python example in a README runs as written, in a fresh copy of the repository."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAKE = re.compile(r"^(?:\w+=\S+ )?make (\w+).*\n", re.MULTILINE)


def tracked(pattern: str = ".") -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def examples() -> list:
    """(README, language, code): a bash block each, the Python blocks of a README as one program."""
    found = []
    for name in tracked("*README.md"):
        blocks = BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))
        found += [(name, "bash", code) for language, code in blocks if language == "bash"]
        if program := "\n".join(code for language, code in blocks if language == "python"):
            found.append((name, "python", program))
    return [pytest.param(*example, id=f"{example[0]}-{number}") for number, example in enumerate(found)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository as a newcomer has it, with this environment; the commands build on each other."""
    folder = tmp_path_factory.mktemp("copy")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for environment in (".venv", ".venv-vllm"):
        (folder / environment).symlink_to(ROOT / environment)
    return folder


@pytest.mark.parametrize(("readme", "language", "code"), examples())
def test_an_example_runs_as_written(readme, language, code, copy):
    if targets := MAKE.findall(code):
        # They install, or run these very tests; test_quickstart and CI run them for real.
        subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
        code = MAKE.sub("", code)
    shell = [".venv/bin/python", "-c"] if language == "python" else ["bash", "-euo", "pipefail", "-c"]
    environment = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [*shell, code], cwd=copy, env=environment, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, f"{readme}:\n{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_the_readmes_have_examples():
    assert len(examples()) >= 8
