"""Run the notebooks, check what they assert, and show them.

    python cookbooks/gallery.py [NAME ...] [--full] [--model MODEL] [--output output/cookbooks]
    python cookbooks/gallery.py --tidy        write every notebook in the one form that is committed

*.ipynb, no outputs --execute--> outputs, or what failed --nbconvert--> NAME.html, index.html

Each notebook has a kernel of its own, in `cookbooks/`. The pages load nothing from anywhere. Exit status 1
where a notebook failed; the others are run all the same.
"""

import argparse
import html
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

COOKBOOKS = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


@dataclass(frozen=True)
class Executed:
    """A notebook with its outputs; `error` is what stopped it, "" where nothing did."""

    name: str
    notebook: nbformat.NotebookNode
    seconds: float
    error: str

    @property
    def title(self) -> str:
        first = self.notebook.cells[0].source.splitlines()
        return first[0].lstrip("# ") if first else self.name

    @property
    def pictures(self) -> list[str]:
        """The PNG files among its outputs, in base64."""
        outputs = [output for cell in self.notebook.cells for output in cell.get("outputs", [])]
        return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def canonical(notebook: Mapping[str, Any]) -> str:
    """The text of a notebook as it is committed: no outputs, no counts, one order of keys."""
    cells = []
    for cell in notebook["cells"]:
        source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        kept = {"cell_type": cell["cell_type"], "id": cell["id"], "metadata": {}}
        code = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        cells.append({**kept, **code, "source": source.strip("\n").splitlines(keepends=True)})
    whole = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def execute(path: Path, *, environment: Mapping[str, str] | None = None, timeout: float = 900) -> Executed:
    """Run a notebook in `cookbooks/`; `timeout` seconds a cell, `environment` on top of this process's."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(COOKBOOKS)}},
        extra_arguments=["--log-level=ERROR"],
    )
    started, error = time.monotonic(), ""
    try:
        client.execute(env={**os.environ, **(environment or {})})
    except CellExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}{_failed_line(failure.traceback)}"
    return Executed(path.stem, notebook, time.monotonic() - started, error)


def _failed_line(traceback: str) -> str:
    """The line of the notebook that raised, which an assertion's message does not have."""
    lines = re.findall(r"^-+> *\d+ (.*)$", re.sub(r"\x1b\[[\d;]*m", "", traceback), re.MULTILINE)
    return f" [{lines[0].strip()}]" if lines else ""


def page(executed: Executed) -> str:
    """The notebook as one HTML file that loads nothing."""
    exporter = HTMLExporter(template_name="classic", embed_images=True)
    for address in ("mathjax_url", "require_js_url", "jquery_url", "mermaid_js_url"):
        setattr(exporter, address, "")
    text, _ = exporter.from_notebook_node(executed.notebook)
    return text


STYLE = """body{font:16px sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}
a{border:1px solid #ccc;border-radius:.5rem;padding:1rem;color:inherit;text-decoration:none}
img{width:100%;height:10rem;object-fit:contain}.failed{border-color:#c00}small{color:#666}"""


def index(done: Sequence[Executed], model: str) -> str:
    """The gallery's front page."""
    cards = []
    for one in done:
        picture = f'<img alt="" src="data:image/png;base64,{one.pictures[0]}">' if one.pictures else ""
        state = html.escape(one.error) or "passed"
        cards.append(
            f'<a class="{"failed" if one.error else "passed"}" href="{one.name}.html">{picture}'
            f"<h2>{html.escape(one.title)}</h2><small>{state}, {one.seconds:.0f} s</small></a>"
        )
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Cookbooks</title><style>{STYLE}</style>'
    )
    passed = sum(not one.error for one in done)
    said = f"<p>{passed} of {len(done)} notebooks passed, with {html.escape(model)}.</p>"
    return f"{head}<h1>Cookbooks</h1>{said}<main>{''.join(cards)}</main></html>\n"


def notebooks(names: Sequence[str]) -> list[Path]:
    """The notebooks of these names, all without names; ValueError for a name there is not."""
    found = {path.stem: path for path in sorted(COOKBOOKS.glob("*.ipynb"))}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"{unknown[0]} is no notebook of {COOKBOOKS}; there are {', '.join(found)}")
    return [found[name] for name in names or found]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks and show them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of notebooks; without it all")
    parser.add_argument("--full", action="store_true", help="more questions and episodes, longer training")
    parser.add_argument("--model", default="", help="a folder or an address, as utils/model.py says")
    parser.add_argument("--output", type=Path, default=COOKBOOKS.parent / "output" / "cookbooks")
    parser.add_argument("--tidy", action="store_true", help="only write the notebooks in their one form")
    options = parser.parse_args(arguments)
    paths = notebooks(options.names)
    if options.tidy:
        for path in paths:
            path.write_text(canonical(json.loads(path.read_text())))
        return 0
    model = (
        options.model if "://" in options.model or not options.model else str(Path(options.model).resolve())
    )
    environment = {"MODEL": model, "COOKBOOKS": "full" if options.full else ""}
    options.output.mkdir(parents=True, exist_ok=True)
    done = []
    for path in paths:
        done.append(execute(path, environment=environment))
        (options.output / f"{path.stem}.html").write_text(page(done[-1]))
        print(f"{path.stem}: {done[-1].error or 'passed'}, {done[-1].seconds:.0f} s", flush=True)
    (options.output / "index.html").write_text(index(done, options.model or "models/qwen3-vl-nano"))
    print(f"gallery: {options.output / 'index.html'}")
    return int(any(one.error for one in done))


if __name__ == "__main__":
    sys.exit(main())
