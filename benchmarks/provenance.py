"""Where a benchmark's numbers come from, as it stands at the head of every result file."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def provenance(*packages: str, **versions: str) -> dict[str, Any]:
    """Date, commit, hardware and versions: of `packages` as they are installed, of others as given."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    installed = {name: version(name) for name in packages}
    return {
        "date": datetime.date.today().isoformat(),
        "commit": {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))},
        "hardware": {"cpu": cpus[0].partition(":")[2].strip() if cpus else platform.processor(),
                     "cores": len(os.sched_getaffinity(0)), "load_at_start": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()} | installed | versions,
    }  # fmt: skip
