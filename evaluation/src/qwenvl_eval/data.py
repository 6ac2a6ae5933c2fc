"""Questions from the TSV files that OpenCompass publishes, read one row at a time.

    folder, file or hub id -> locate_tsv -> Table -> Rows -> a task's sample -> Dataset

A row's pictures stand in it as base64. They go into the messages as data URLs, byte for byte as published.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from qwenvl_eval.task import Dataset, Sample

FIELD_LIMIT = 1 << 28
"""Characters of one cell, which may be a list of pictures."""

REFERENCE = 64
"""Characters up to which a cell of the column `image` is another row's index and not a picture."""

_MENTION = re.compile(r"<image ?([1-9][0-9]?)>")
_QUOTED = r"'[^'\\\n]*+(?:\\.[^'\\\n]*+)*+'|\"[^\"\\\n]*+(?:\\.[^\"\\\n]*+)*+\""
_LIST = re.compile(rf"\s*\[\s*(?:(?:{_QUOTED})\s*(?:,\s*(?:{_QUOTED})\s*)*+,?\s*)?\]\s*")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U000[0-9a-fA-F]{5}|U0010[0-9a-fA-F]{4}|.)")
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", "\\": "\\", "'": "'", '"': '"'}
_KINDS = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "gif": re.compile(rb"GIF8[79]a"),
    "webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "bmp": re.compile(rb"BM"),
    "tiff": re.compile(rb"II\*\0|MM\0\*"),
}


class _Place(NamedTuple):
    """Where a row is: its number, counted from 1 below the header, and the offset of its first byte."""

    number: int
    offset: int


@dataclass(frozen=True)
class Row:
    """One row: ``number`` counts from 1 below the header, ``cells`` are column -> text as the file has it."""

    path: Path
    number: int
    cells: Mapping[str, str]

    def text(self, column: str) -> str:
        """The cell without white space around it; "" where it is empty, says ``nan`` or has no such column.

        Only these two are empty: an option "None" or "NA" is an option.
        """
        cell = self.cells.get(column, "").strip()
        return "" if cell.lower() == "nan" else cell

    def need(self, column: str) -> str:
        """The same of a cell that must not be empty; raises ValueError naming it."""
        text = self.text(column)
        if not text:
            raise self.error(column, "is empty; fetch the file again")
        return text

    def options(self) -> dict[str, str]:
        """Letter -> text of the options: the columns A, B, ... that are not empty."""
        return {letter: text for letter in ascii_uppercase if (text := self.text(letter))}

    def error(self, column: str, problem: str) -> ValueError:
        """The error to raise about a cell."""
        return ValueError(f"{self.path}: row {self.number}, column {column!r}: {problem}")


class Table:
    """A TSV file with a header; iterating gives the rows that ``keep`` wants, in the file's order.

    Only the place of each row is kept in memory. Raises ValueError naming the file for a column that is
    missing, and naming the row for one that cannot be read.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], keep: Callable[[Row], bool] = lambda row: True
    ) -> None:
        self.path = path
        self._places: list[_Place] = []
        self._by_index: dict[str, _Place] = {}
        with _Records(path) as records:
            self.columns = records.header()
            missing = [column for column in columns if column not in self.columns]
            if missing:
                raise ValueError(
                    f"{path}: no column {', '.join(map(repr, missing))}; found {', '.join(self.columns)}; "
                    "give the file as OpenCompass publishes it"
                )
            for place, cells in records:
                row = self._row(place, cells)
                index = row.need("index") if "index" in self.columns else str(place.number)
                if index in self._by_index:
                    other = self._by_index[index].number
                    raise row.error("index", f"is {index!r} as in row {other}; each index must stand once")
                self._by_index[index] = place
                if keep(row):
                    self._places.append(place)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Row]:
        with _Records(self.path) as records:
            for place in self._places:
                yield self._row(place, records.at(place))

    def pictures(self, row: Row) -> list[str]:
        """The row's pictures, as data URLs, or as paths where the file names them in ``image_path`` instead.

        The column ``image`` holds base64, a list of such texts, or the index of the row that holds them.
        Raises ValueError naming the cell for base64 and pictures that cannot be read, and for files that are
        not there.
        """
        cell = row.text("image")
        if not cell:
            return self._files(row)
        if len(cell) <= REFERENCE and text_list(cell) is None:
            row = self._referred(row, cell)
            cell = row.text("image")
        pictures = [cell] if (listed := text_list(cell)) is None else listed
        if not pictures:
            raise row.error("image", "the list of pictures is empty; fetch the file again")
        return [_data_url(row, picture) for picture in pictures]

    def _files(self, row: Row) -> list[str]:
        names = row.need("image_path" if "image_path" in self.columns else "image")
        paths = [self.path.parent / name for name in text_list(names) or [names]]
        for path in paths:
            if not path.is_file():
                raise row.error("image_path", f"{path}: no such file; put the pictures there")
        return [str(path) for path in paths]

    def _referred(self, row: Row, index: str) -> Row:
        place = self._by_index.get(index)
        if place is None:
            raise row.error("image", f"{index!r} is neither base64 of a picture nor the index of a row")
        with _Records(self.path) as records:
            found = self._row(place, records.at(place))
        if len(found.text("image")) <= REFERENCE:
            raise row.error("image", f"refers to row {place.number}, which holds no picture itself")
        return found

    def _row(self, place: _Place, cells: list[str]) -> Row:
        if len(cells) != len(self.columns):
            raise ValueError(
                f"{self.path}: row {place.number} has {len(cells)} cells under {len(self.columns)} columns; "
                "fetch the file again"
            )
        return Row(self.path, place.number, dict(zip(self.columns, cells, strict=True)))


class _Records:
    """The records of a TSV file with their places; a quoted cell may hold tabs and line ends."""

    def __init__(self, path: Path) -> None:
        csv.field_size_limit(max(csv.field_size_limit(), FIELD_LIMIT))
        self._path = path
        self._file = path.open("rb")
        self._consumed = 0
        self._number = 0

    def __enter__(self) -> _Records:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def header(self) -> list[str]:
        """The names of the columns; to be called first."""
        names = next(self._reader(), [""])
        return [names[0].removeprefix("\ufeff"), *names[1:]]

    def __iter__(self) -> Iterator[tuple[_Place, list[str]]]:
        """Those from here on; blank lines are none."""
        start = self._consumed
        for cells in self._reader():
            if cells:
                self._number += 1
                yield _Place(self._number, start), cells
            start = self._consumed

    def at(self, place: _Place) -> list[str]:
        """The cells of one row; none where the file was cut since."""
        self._file.seek(place.offset)
        self._number = place.number - 1
        return next(self._reader(), [])

    def _reader(self) -> Iterator[list[str]]:
        try:
            yield from csv.reader(self._lines(), delimiter="\t", strict=True)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self._path}: row {self._number + 1} cannot be read: {error}; fetch the file again"
            ) from error

    def _lines(self) -> Iterator[str]:
        for line in self._file:
            self._consumed += len(line)
            yield line.decode()


def locate_tsv(data: Path, name: str) -> Path:
    """The file NAME.tsv that ``data`` means: itself a file, a folder that holds one, or a hub's data set.

    A hub's name has one slash and is no path here, such as ``opencompass/MMMU``. Raises ValueError naming
    what was looked for.
    """
    path = data if data.is_file() else data / f"{name}.tsv"
    if path.is_file():
        return path
    if not data.exists() and not data.is_absolute() and len(data.parts) == 2 and data.parts[0] != "..":
        return _from_hub(data.as_posix(), f"{name}.tsv")
    raise ValueError(
        f"{path}: no such file; download {name}.tsv as OpenCompass publishes it and give its folder"
    )


def _from_hub(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{repository}: no such folder here, and the hub gave no {name} of that name "
            f"({str(error).strip().splitlines()[0]}); give a folder that holds {name}"
        ) from error


def dataset_of(table: Table, sample: Callable[[Row], Sample], limit: int = 0) -> Dataset:
    """The table's rows as a task's samples, the first ``limit`` of them; 0 takes all.

    Each is made once here, so that a bad row is told before the first question is asked. Raises ValueError
    for an id that stands twice and for a table without rows.
    """

    def walk() -> Iterator[Sample]:
        for number, row in enumerate(table, 1):
            yield sample(row)
            if number == limit:
                break

    ids: dict[str, None] = {}
    files: dict[Path, None] = {table.path: None}
    for one in walk():
        if one.id in ids:
            raise ValueError(f"{table.path}: two rows have the id {one.id!r}; each id must stand once")
        ids[one.id] = None
        files.update((Path(path), None) for path in _paths(one))
    if not ids:
        raise ValueError(f"{table.path}: no questions in it; fetch the file again")
    return Dataset(tuple(files), len(ids), walk)


def _paths(sample: Sample) -> Iterator[str]:
    for message in sample.messages:
        for item in message["content"]:
            if item["type"] == "image" and not item["image"].startswith("data:"):
                yield item["image"]


def text_list(cell: str) -> list[str] | None:
    """The texts of a list as Python or JSON writes it, ``['a', "b's"]``; None for anything else.

    Nothing is evaluated: lists in lists, numbers and names are no lists of texts.
    """
    if not _LIST.fullmatch(cell):
        return None
    texts = [_unescape(quoted[1:-1]) for quoted in re.findall(_QUOTED, cell)]
    try:
        return [text.encode("utf-16", "surrogatepass").decode("utf-16") for text in texts]
    except UnicodeDecodeError:  # half of a pair of surrogates
        return None


def _unescape(text: str) -> str:
    return _ESCAPE.sub(_escaped, text) if "\\" in text else text


def _escaped(found: re.Match[str]) -> str:
    code = found[1]
    return chr(int(code[1:], 16)) if len(code) > 1 else _ESCAPED.get(code, found[0])


def _data_url(row: Row, text: str) -> str:
    from PIL import Image

    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.error("image", f"no base64 ({error}): {text[:20]!r}; fetch the file again") from error
    kind = next((name for name, start in _KINDS.items() if start.match(content)), None)
    if kind is None:
        raise row.error("image", f"no picture, which is one of {', '.join(_KINDS)}; fetch the file again")
    try:
        Image.open(BytesIO(content)).close()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise row.error("image", f"a {kind} that cannot be read: {error}; fetch the file again") from error
    return f"data:image/{kind};base64,{text}"


def interleave(text: str, pictures: Sequence[str], **limits: int) -> list[dict[str, Any]]:
    """A message's content: pictures at their first ``<image n>`` or ``<imagen>``, the others before the text.

    A mention that comes again, or of a picture that is not there, stays as text. ``limits`` are
    ``min_pixels`` and ``max_pixels`` of every picture; one that is 0 is left to the checkpoint.
    """
    given = {name: value for name, value in limits.items() if value}
    items = [{"type": "image", "image": picture, **given} for picture in pictures]
    content: list[dict[str, Any]] = []
    placed: set[int] = set()
    end = 0
    for mention in _MENTION.finditer(text):
        number = int(mention[1]) - 1
        if number < len(items) and number not in placed:
            content += [*_text_items(text[end : mention.start()]), items[number]]
            placed.add(number)
            end = mention.end()
    content += _text_items(text[end:])
    return [item for number, item in enumerate(items) if number not in placed] + content


def fingerprint(pictures: Sequence[str]) -> str:
    """The same text for the same pictures: the cluster of the questions about them."""
    return hashlib.sha256("\n".join(pictures).encode()).hexdigest()[:16]


def mentioned(text: str) -> int:
    """The highest n of ``<image n>`` in the text; 0 for none."""
    return max((int(number) for number in _MENTION.findall(text)), default=0)


def _text_items(text: str) -> Iterable[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def question_text(question: str, options: Mapping[str, str], instruction: str, hint: str = "") -> str:
    """Hint, question, one line ``A. ...`` for each option, and what to answer with."""
    lines = [f"Hint: {hint}"] if hint else []
    lines.append(f"Question: {question}")
    if options:
        lines += ["Options:", *(f"{letter}. {text}" for letter, text in options.items())]
    return "\n".join([*lines, instruction])
