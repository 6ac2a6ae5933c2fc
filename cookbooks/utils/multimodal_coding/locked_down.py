"""A Python program that nobody has read, run where it can do no harm.

code --stdin--> unshare: no network, no other processes, a root of its own --> python, limits --tar--> Outcome

The program sees Python with its packages, read-only, and an empty folder, in memory, where it starts. Linux
namespaces do it (locked_down.sh); where the system forbids them, nothing is run. They share the kernel: for
code by somebody who wants to break out, take a virtual machine.
"""

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_suffix(".sh")
MOST_OUTPUT = 1 << 16
"""Characters kept of what a program prints."""

KILLED = 128
"""A shell's status from which on a signal ended a program."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit status, None where it was stopped; the files it wrote, by name."""

    status: int | None
    files: Mapping[str, bytes]
    stdout: str
    stderr: str

    @property
    def ended_well(self) -> bool:
        return self.status == 0


def run_program(code: str, *, seconds: int = 20, memory: int = 1 << 30) -> Outcome:
    """Run Python code for at most `seconds`, of the clock and of computing, in `memory` bytes.

    What the program does wrong is in the Outcome. Raises OSError where the system has no namespaces for it.
    """
    if shutil.which("unshare") is None:
        raise FileNotFoundError("unshare is missing: programs are locked down on Linux only (util-linux)")
    namespaces = "--user --map-root-user --mount --net --pid --fork --ipc --uts --kill-child".split()
    with tempfile.TemporaryDirectory(prefix="locked-down-") as root:
        command = ["unshare", *namespaces, "bash", str(SCRIPT), root, str(memory), str(seconds)]
        command += [str(Path(sys.prefix).resolve() / "bin" / "python"), *_folders()]
        try:
            done = subprocess.run(command, input=code.encode(), capture_output=True, timeout=seconds + 5)
        except subprocess.TimeoutExpired:
            return Outcome(None, {}, "", f"stopped after {seconds} s")
    if not done.stdout:
        said = done.stderr.decode(errors="replace").strip()
        raise OSError(
            f"the program was not run, this system forbids the namespaces that lock it down ({said}); "
            "as root: sysctl kernel.apparmor_restrict_unprivileged_userns=0 user.max_user_namespaces=10000"
        )
    return _outcome(done.stdout)


def _folders() -> list[str]:
    """What is seen of the system: its libraries, and Python's."""
    python = {str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix)}
    system = [folder for folder in ("/usr", "/bin", "/lib", "/lib64") if Path(folder).exists()]
    return [*system, *sorted(folder for folder in python if not folder.startswith("/usr"))]


def _outcome(archive: bytes) -> Outcome:
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isreg() and (file := tar.extractfile(member)):
                found[member.name] = file.read()
    files = {name.removeprefix("files/"): data for name, data in found.items() if name.startswith("files/")}
    stdout, stderr = (
        found.get(f"out/{name}", b"").decode(errors="replace")[:MOST_OUTPUT] for name in ("stdout", "stderr")
    )
    status = found.get("out/status", b"").decode().strip()
    return Outcome(int(status) if status and int(status) < KILLED else None, files, stdout, stderr)
