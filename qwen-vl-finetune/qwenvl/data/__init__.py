"""The registry: which data sets exist, and how much of each is used.

A data set is a name with two paths. Add yours to `data_dict`, or leave this package alone and name it in a
TOML file that `--dataset_config` reads (paths in it are relative to the file):

    [receipts]
    annotation_path = "receipts/train.jsonl"   # JSON (a list of rows), JSONL (a row per line) or parquet
    data_path = "receipts/images"              # what the rows' media paths are relative to

    [charts]
    annotation_path = "hub:owner/charts"       # or a folder: a dataset of Hugging Face's datasets
    split = "train"                            # where it has several

`--dataset_use receipts%50,other` then takes half of the rows of `receipts` and all of `other`. With a
`weight = 3` in every set in use, an epoch has as many samples as without, in shares that follow the weights.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

__all__ = ["HUB_PREFIX", "data_dict", "data_list", "load_dataset_config", "parse_sampling_rate"]

data_dict: dict[str, dict[str, Any]] = {}

_RATE = re.compile(r"%(\d+)$")
HUB_PREFIX = "hub:"  # annotation_path = "hub:OWNER/NAME[/CONFIG][@SPLIT]"
_PATHS = ("annotation_path", "data_path")


def parse_sampling_rate(dataset_name: str) -> float:
    """The share of rows that a name asks for: "name%50" -> 0.5, "name" -> 1.0, "name%200" -> 2.0 (twice)."""
    match = _RATE.search(dataset_name)
    return int(match.group(1)) / 100.0 if match else 1.0


def data_list(
    dataset_names: list[str], dataset_config: str | Path | None = None, *, flag: str = "--dataset_use"
) -> list[dict]:
    """Look names up in `data_dict` and in the TOML file `dataset_config`. flag: where the names come from.

    Returns one `{"dataset_name", "annotation_path", "data_path", "sampling_rate", "split"?, "weight"?}` per
    name, in order; empty names are passed over. Raises ValueError for a name nobody knows, one that both
    places define, `%0`, and a weight beside a set without one.
    """
    known = dict(data_dict)
    if dataset_config is not None:
        added = load_dataset_config(dataset_config)
        if twice := sorted(known.keys() & added.keys()):
            raise ValueError(f"{dataset_config}: [{twice[0]}] is in data_dict already; rename the table")
        known |= added
    entries = [_entry(name, known, flag) for name in map(str.strip, dataset_names) if name]
    bare = [entry["dataset_name"] for entry in entries if "weight" not in entry]
    if 0 < len(bare) < len(entries):
        raise ValueError(f"data set {bare[0]!r} has no weight, but others in {flag} have; give all or none")
    return entries


def _entry(dataset_name: str, known: dict[str, dict[str, Any]], flag: str) -> dict:
    name, rate = _RATE.sub("", dataset_name), parse_sampling_rate(dataset_name)
    if name not in known:
        names = ", ".join(sorted(known)) or "none: name a TOML file with --dataset_config"
        raise ValueError(f"unknown data set {dataset_name!r} in {flag}; known: {names}")
    if rate == 0:
        raise ValueError(f"data set {dataset_name!r} in {flag} takes no rows; leave it out")
    weight = known[name].get("weight", 1)
    if type(weight) not in (int, float) or not 0 < weight < float("inf"):
        raise ValueError(f"data set {name!r}: weight = {weight!r}: give a number above 0")
    return {"dataset_name": name, "data_path": "", **known[name], "sampling_rate": rate}


def load_dataset_config(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a TOML file of data sets into the form of `data_dict`, its relative paths made absolute.

    `data_path` defaults to the TOML file's own folder. Raises ValueError naming the file and the table.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--dataset_config {path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--dataset_config {path}: not valid TOML: {error}") from error
    return {name: _table(path, name, table) for name, table in tables.items()}


def _table(path: Path, name: str, table: object) -> dict[str, Any]:
    where = f"{path}: [{name}]"
    if not isinstance(table, dict) or "annotation_path" not in table:
        raise ValueError(f'{where}: needs annotation_path = "FILE.json" or "FILE.jsonl"')
    for key, value in table.items():
        if key != "weight" and (key not in (*_PATHS, "split") or not isinstance(value, str)):
            raise ValueError(
                f"{where}: {key} = {value!r}: only annotation_path, data_path, split, as strings, and weight"
            )
    if _RATE.search(name):
        raise ValueError(f"{where}: a name must not end in %N; write the share in --dataset_use")
    folder = path.resolve().parent
    paths = {key: str(folder / table.get(key, "")) for key in _PATHS}
    if table["annotation_path"].startswith(HUB_PREFIX):
        paths["annotation_path"] = table["annotation_path"]
    return paths | {key: table[key] for key in ("split", "weight") if key in table}
