"""Hugging Face datasets: a folder on disk, or an id of the hub.

    FOLDER                             written by `save_to_disk`, or parquet, JSON, ... files
    hub:OWNER/NAME[/CONFIG][@SPLIT]    downloaded once into the cache of `datasets`
      -> open_dataset -> ArrowRows     memory-mapped: a row is read when it is asked for

Pictures stay the bytes that the table holds until their row is trained on.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from qwenvl.data import HUB_PREFIX

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w.-]+))?")


@dataclass(frozen=True, eq=False)
class ArrowRows:
    """The rows of a dataset. table: it, giving Arrow tables."""

    path: Path
    table: Any

    def __len__(self) -> int:
        return len(self.table)

    def where(self, index: int) -> str:
        """How messages name a row."""
        return f"{self.path}: row {index} (counted from 0)"

    def row(self, index: int) -> object:
        """Read one row. Raises ValueError, naming dataset and row, where it cannot be read."""
        try:
            return table_row(self.table[int(index)])
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.where(index)}: {error}; write the dataset anew") from error


def open_dataset(path: str, split: str | None) -> ArrowRows:
    """Open a folder or `hub:` id. split: which one of several; may also stand behind the `@` of an id.

    Raises ValueError, naming the dataset, where there is none, or several splits and none is named;
    ModuleNotFoundError where `datasets` is not installed.
    """
    try:
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs Hugging Face's datasets: uv pip install -e 'qwen-vl-finetune[datasets]'"
        ) from error
    try:
        found, split = _from_hub(path, split) if path.startswith(HUB_PREFIX) else (_from_folder(path), split)
    except ConnectionError as error:
        raise ValueError(
            f"{path}: {error}; go online (unset HF_HUB_OFFLINE) to download it once, or name a folder that "
            "save_to_disk wrote"
        ) from error
    except (OSError, ValueError, pa.ArrowException, DatasetsError) as error:
        raise ValueError(f"{path}: {error}; correct annotation_path") from error
    return ArrowRows(Path(path), _one_split(path, found, split).with_format("arrow"))


def _from_folder(path: str) -> Dataset | DatasetDict:
    import datasets

    if any((Path(path) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return datasets.load_from_disk(path)
    return datasets.load_dataset(str(Path(path).resolve()))


def _from_hub(path: str, split: str | None) -> tuple[Dataset | DatasetDict, str | None]:
    import datasets

    match = _ID.fullmatch(path.removeprefix(HUB_PREFIX))
    if match is None:
        raise ValueError("the form is hub:OWNER/NAME[/CONFIG][@SPLIT]")
    name, config, behind = match.groups()
    if behind and split:
        raise ValueError(f"both @{behind} and split = {split!r}; keep one of them")
    builder = datasets.load_dataset_builder(name, config)
    builder.download_and_prepare()
    logger.info("%s: revision %s", path, builder.hash)
    return builder.as_dataset(), behind or split


def _one_split(path: str, found: Dataset | DatasetDict, split: str | None) -> Dataset:
    if not isinstance(found, dict):
        if split is not None:
            raise ValueError(f"{path}: split = {split!r}, but it has no splits; take it out")
        return found
    names = ", ".join(map(repr, found))
    if split is None and len(found) > 1:
        raise ValueError(f"{path} has the splits {names}; add split = NAME beside annotation_path")
    if split is not None and split not in found:
        raise ValueError(f"{path}: split {split!r} is not there; it has {names}")
    return found[split] if split is not None else next(iter(found.values()))


def table_row(table: pa.Table) -> dict[str, Any]:
    """The one row of a table: media as they are stored, JSON columns parsed."""
    (row,) = table.to_pylist()
    return {field.name: _parsed(row[field.name], field.type) for field in table.schema}


def _parsed(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _parsed(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_parsed(each, kind.value_type) for each in value]
    return value
