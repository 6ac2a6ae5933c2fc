"""Boxes of a detection data set become conversations in the answer format of a checkpoint's family.

    python qwen-vl-finetune/tools/process_bbox.py --format coco --annotations instances.json \\
        --image_folder pictures --model_name_or_path CHECKPOINT --output train.json --preview preview

annotations --read_*--> Picture(image, boxes in its own pixels) --checked--> place of the model --> rows

| family                 | places                                 | answer                               |
|---|---|---|
| Qwen3-VL, Qwen3-VL-MoE | 0 to 1000                              | JSON: bbox_2d, label                 |
| Qwen2.5-VL             | pixels of the picture as it is resized | JSON: bbox_2d, label                 |
| Qwen2-VL               | 0 to 1000                              | <|object_ref_start|>, <|box_start|>  |

The family is the `model_type` in the checkpoint's config.json.  Pixels of Qwen2.5-VL depend on --min_pixels
and --max_pixels: train with the same.  Previews are drawn from the finished answers, read back.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image, ImageOps
from transformers import ProcessorMixin

from qwen_vl_utils import MediaError, grounding, measure_media
from qwen_vl_utils.grounding import Box
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.model_loading import load_config, load_processor

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".JPG", ".JPEG", ".PNG")
PREVIEWS = 8
QUESTION = "Locate every instance of: {labels}. Report bbox coordinates in JSON format."
QUESTION_2 = "Detect the bounding boxes of: {labels}."
COCO_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
FORBIDDEN = ("<|", "<image>", "<video>")


@dataclass(frozen=True)
class RawBox:
    """Corners as the file says them, in pixels of the picture (shares of it with `unit`)."""

    where: str
    corners: tuple[float, float, float, float]
    label: str
    unit: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture's path below the image folder, its boxes, and (height, width) where the file says it."""

    where: str
    image: str
    boxes: list[RawBox] = field(default_factory=list)
    size: tuple[int, int] | None = None


# ---- the formats


def read_coco(path: Path) -> Iterator[Picture]:
    """COCO's instances file; crowds (iscrowd 1) mark regions, not objects, and are passed over."""
    data = _json(path)
    if not isinstance(data, dict) or not {"images", "annotations", "categories"} <= data.keys():
        raise ValueError(f"{path}: COCO has images, annotations and categories; not so here")
    for part, keys in COCO_KEYS.items():
        for number, entry in enumerate(data[part]):
            _need(f"{path}: {part}[{number}]", entry, *keys)
    names = {entry["id"]: entry["name"] for entry in data["categories"]}
    boxes: dict[Any, list[RawBox]] = {entry["id"]: [] for entry in data["images"]}
    for number, entry in enumerate(data["annotations"]):
        where = f"{path}: annotations[{number}]"
        if entry.get("iscrowd"):
            continue
        if entry["image_id"] not in boxes or entry["category_id"] not in names:
            raise ValueError(f"{where}: image_id {entry['image_id']} or category_id is not in the file")
        x, y, width, height = _numbers(where, entry["bbox"])
        corners = (x, y, x + width, y + height)
        boxes[entry["image_id"]].append(RawBox(where, corners, names[entry["category_id"]]))
    for number, entry in enumerate(data["images"]):
        where = f"{path}: images[{number}]"
        yield Picture(where, entry["file_name"], boxes[entry["id"]], (entry["height"], entry["width"]))


def read_voc(path: Path) -> Iterator[Picture]:
    """A folder of Pascal VOC XML files. VOC counts pixels from 1 and includes the last one."""
    for file in _files(path, ".xml"):
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{file}: not valid XML: {error}") from error
        boxes = []
        for number, thing in enumerate(root.iter("object")):
            where = f"{file}: object {number}"
            values = [thing.findtext(f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax")]
            left, top, right, bottom = _numbers(where, values)
            boxes.append(RawBox(where, (left - 1, top - 1, right, bottom), thing.findtext("name") or ""))
        height, width = (root.findtext(f"size/{name}") for name in ("height", "width"))
        size = (int(height), int(width)) if height and width else None
        yield Picture(str(file), root.findtext("filename") or "", boxes, size)


def read_yolo(path: Path, image_folder: Path) -> Iterator[Picture]:
    """A folder of label files, beside which `classes.txt` names the classes, one a line.

    A label file belongs to the picture of its name.
    """
    classes = path / "classes.txt"
    if not classes.is_file():
        raise ValueError(f"{classes}: no such file; write the names of the classes into it, one a line")
    names = classes.read_text(encoding="utf-8").split("\n")
    pictures = {file.stem: file.name for file in sorted(image_folder.iterdir()) if file.suffix in PICTURES}
    for file in _files(path, ".txt"):
        if file == classes:
            continue
        if file.stem not in pictures:
            raise ValueError(f"{file}: no picture of this name in {image_folder}")
        boxes = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                boxes.append(_yolo_box(f"{file}: line {number}", line.split(), names))
        yield Picture(str(file), pictures[file.stem], boxes)


def _yolo_box(where: str, values: list[str], names: list[str]) -> RawBox:
    index, *place = values
    if not index.isdecimal() or int(index) >= len(names) or not names[int(index)]:
        raise ValueError(f"{where}: class {index} is not in classes.txt")
    x, y, width, height = _numbers(where, place)
    corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return RawBox(where, corners, names[int(index)].strip(), unit=True)


def read_json(path: Path) -> Iterator[Picture]:
    """A list of `{"image": "a.png", "boxes": [{"bbox": [x1, y1, x2, y2], "label": "cat"}]}` in pixels."""
    rows = _json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds no list of pictures")
    for number, row in enumerate(rows):
        where = f"{path}: row {number}"
        _need(where, row, "image", "boxes")
        boxes = []
        for index, box in enumerate(row["boxes"]):
            here = f"{where}, box {index}"
            _need(here, box, "bbox", "label")
            boxes.append(RawBox(here, _numbers(here, box["bbox"]), box["label"]))
        yield Picture(where, row["image"], boxes)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--annotations {path}: {error}") from error


def _files(path: Path, suffix: str) -> list[Path]:
    found = sorted(path.glob(f"*{suffix}"))
    if not found:
        raise ValueError(f"--annotations {path}: no folder with {suffix} files")
    return found


def _need(where: str, entry: Any, *keys: str) -> None:
    if not isinstance(entry, dict) or not set(keys) <= entry.keys():
        raise ValueError(f"{where}: needs {', '.join(keys)}")


def _numbers(where: str, values: Any) -> tuple[float, float, float, float]:
    """Four finite numbers, or ValueError."""
    try:
        a, b, c, d = (float(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {values} is not four numbers of a box") from None
    if not all(map(math.isfinite, (a, b, c, d))):
        raise ValueError(f"{where}: {values} holds a number that is not finite")
    return a, b, c, d


# ---- a box's way into an answer


def checked(raw: RawBox, height: int, width: int, *, clip: bool) -> Box:
    """The box in pixels of its picture.  Raises ValueError, with file and entry, for what is no box in it."""
    x1, y1, x2, y2 = raw.corners
    if raw.unit:
        x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
    said = f"{raw.where}: box [{x1:g}, {y1:g}, {x2:g}, {y2:g}] in a picture {width} wide and {height} high"
    if not raw.label or not isinstance(raw.label, str) or any(mark in raw.label for mark in FORBIDDEN):
        raise ValueError(f"{raw.where}: {raw.label!r} is no label: a name without {', '.join(FORBIDDEN)}")
    if x1 > x2 or y1 > y2:
        raise ValueError(f"{said} has its corners swapped; it should be x1, y1, x2, y2")
    box = Box(x1=x1, y1=y1, x2=x2, y2=y2, label=raw.label)
    if clip:
        box = grounding.clipped(box, height=height, width=width)
    # YOLO files round shares to some six digits.
    elif min(x1, y1) < -0.01 or x2 > width + 0.01 or y2 > height + 0.01:
        raise ValueError(f"{said} reaches out of it; --bad_boxes clip cuts boxes at the edge")
    if box.x1 == box.x2 or box.y1 == box.y2:
        raise ValueError(f"{said} is empty; --bad_boxes skip leaves such boxes out")
    return grounding.clipped(box, height=height, width=width)


def answer_of(boxes: list[Box], model_type: str) -> str:
    """What a model of this family answers; `boxes` in its own coordinates, whole numbers."""
    if model_type == "qwen2_vl":
        return "".join(
            f"<|object_ref_start|>{box.label}<|object_ref_end|>"
            f"<|box_start|>({box.x1},{box.y1}),({box.x2},{box.y2})<|box_end|>"
            for box in boxes
        )
    lines = [json.dumps({"bbox_2d": box.xyxy, "label": box.label}, ensure_ascii=False) for box in boxes]
    return "```json\n[\n\t" + ",\n\t".join(lines) + "\n]\n```"


@dataclass
class Converter:
    """Pictures with boxes to rows, for one checkpoint and its pixel limits."""

    model_type: str
    processor: ProcessorMixin
    image_folder: Path
    question: str
    bad_boxes: str = "fail"
    counts: Counter[str] = field(default_factory=Counter)

    def row(self, picture: Picture) -> dict[str, Any] | None:
        """A row of the conversation format; None for a picture without boxes, which is counted."""
        natural, seen = self.sizes(picture)
        boxes = [box for raw in picture.boxes if (box := self._place(raw, natural, seen)) is not None]
        if not boxes:
            self.counts["pictures without boxes left out"] += 1
            return None
        self.counts["boxes"] += len(boxes)
        labels = ", ".join(dict.fromkeys(box.label for box in boxes))
        question = "<image>\n" + self.question.replace("{labels}", labels)
        turns = [{"from": "human", "value": question}]
        turns.append({"from": "gpt", "value": answer_of(boxes, self.model_type)})
        return {"image": picture.image, "conversations": turns}

    def sizes(self, picture: Picture) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of the picture's file and as the model sees it."""
        path = self.image_folder / picture.image
        if not picture.image or not path.is_file():
            raise ValueError(f"{picture.where}: no picture {path}; --image_folder holds them")
        item = {"type": "image", "image": str(path)}
        try:
            [size] = measure_media([{"role": "user", "content": [item]}], self.processor)
        except MediaError as error:
            raise ValueError(f"{picture.where}: {error}") from error
        if picture.size is not None and picture.size != tuple(size.natural):
            raise ValueError(
                f"{picture.where}: says (height, width) {picture.size}, the file has {tuple(size.natural)}; "
                "boxes would be misplaced (was it resized, or turned by its EXIF orientation?)"
            )
        return size.natural, (size.height, size.width)

    def _place(self, raw: RawBox, natural: tuple[int, int], seen: tuple[int, int]) -> Box | None:
        height, width = natural
        try:
            box = checked(raw, height, width, clip=self.bad_boxes == "clip")
            if grounding.coordinates_of(self.model_type) == "resized":
                box = grounding.rescale(box, from_size=natural, to_size=seen)
            else:
                box = grounding.to_relative(box, height=height, width=width)
            box = grounding.rounded(box)
            if box.x1 == box.x2 or box.y1 == box.y2:
                raise ValueError(
                    f"{raw.where}: empty in whole numbers; --bad_boxes skip leaves such boxes out"
                )
        except ValueError:
            if self.bad_boxes == "fail":
                raise
            self.counts["boxes left out"] += 1
            return None
        return box

    def preview(self, row: dict[str, Any], picture: Picture, folder: Path) -> Path:
        """The picture with the answer's boxes drawn on it, read back from the answer."""
        natural, seen = self.sizes(picture)
        places = grounding.parse_boxes(row["conversations"][1]["value"])
        drawn = [
            grounding.to_original(
                box,
                coordinates=grounding.coordinates_of(self.model_type),
                height=natural[0],
                width=natural[1],
                resized=seen,
            )
            for box in places.items
        ]
        target = folder / f"{picture.image.replace('/', '_')}.png"
        with Image.open(self.image_folder / picture.image) as image:
            grounding.draw_places(ImageOps.exif_transpose(image), drawn).save(target)
        return target


# ---- the command


def converter(
    checkpoint: str,
    image_folder: Path,
    *,
    question: str | None = None,
    bad_boxes: str = "fail",
    min_pixels: int = DataArguments.min_pixels,
    max_pixels: int = DataArguments.max_pixels,
) -> Converter:
    """A Converter with the processor that training uses for these limits."""
    model, settings = ModelArguments(model_name_or_path=checkpoint), TrainingArguments(report_to="none")
    model_type = load_config(model, settings).model_type
    processor = load_processor(model, DataArguments(min_pixels=min_pixels, max_pixels=max_pixels), settings)
    if question is None:
        question = QUESTION_2 if model_type == "qwen2_vl" else QUESTION
    return Converter(model_type, processor, image_folder, question, bad_boxes)


def read(form: str, annotations: Path, image_folder: Path) -> Iterator[Picture]:
    """The pictures of an annotation file or folder in one of the four formats."""
    if form == "yolo":
        return read_yolo(annotations, image_folder)
    return {"coco": read_coco, "voc": read_voc, "json": read_json}[form](annotations)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Boxes become conversations that train a Qwen-VL model.")
    add = parser.add_argument
    add("--format", choices=("coco", "voc", "yolo", "json"), required=True)
    add("--annotations", type=Path, required=True, help="COCO, JSON: a file. VOC, YOLO: a folder.")
    add("--image_folder", type=Path, required=True, help="Where the pictures lie; the data_path of training.")
    add("--model_name_or_path", required=True, help="Its config.json says which answer format.")
    add("--output", type=Path, required=True, help="JSON file of rows.")
    add("--min_pixels", type=int, default=DataArguments.min_pixels, help="As in training.")
    add("--max_pixels", type=int, default=DataArguments.max_pixels, help="As in training.")
    add("--question", help="What is asked; {labels} becomes the labels in the picture.")
    add("--bad_boxes", choices=("fail", "skip", "clip"), default="fail",
        help="Boxes outside the picture, empty, swapped: stop, leave out, or cut at the edge.")  # fmt: skip
    add("--preview", type=Path, help=f"Folder for the first {PREVIEWS} pictures with their answers drawn.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    options = parse_arguments(argv)
    try:
        counts = run(options)
    except ValueError as error:
        sys.exit(f"process_bbox: {error}")
    print(", ".join(f"{count} {what}" for what, count in counts.items()), "->", options.output)


def run(options: argparse.Namespace) -> Counter[str]:
    """Read, convert and write; returns what was counted."""
    convert = converter(
        options.model_name_or_path,
        options.image_folder,
        question=options.question,
        bad_boxes=options.bad_boxes,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
    )
    pairs = [
        (row, picture)
        for picture in read(options.format, options.annotations, options.image_folder)
        if (row := convert.row(picture)) is not None
    ]
    if not pairs:
        raise ValueError(f"--annotations {options.annotations}: no box that can be used")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(row, ensure_ascii=False) for row, _ in pairs]
    options.output.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
    if options.preview is not None:
        options.preview.mkdir(parents=True, exist_ok=True)
        for row, picture in pairs[:PREVIEWS]:
            convert.preview(row, picture, options.preview)
    return Counter(rows=len(rows)) + convert.counts


if __name__ == "__main__":
    main()
