"""tools/process_bbox.py: one scene in four formats gives each family the same places, in its own words."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from qwen_vl_utils import grounding, processor_inputs
from qwenvl.nano import FAMILIES

FOLDER = Path(__file__).resolve().parents[1]
TOOL = FOLDER / "tools/process_bbox.py"
WIDTH, HEIGHT = 300, 200
BOXES = {"cat": (30, 20, 150, 100), "red car": (60, 50, 300, 200)}


@pytest.fixture(scope="module")
def tool():
    spec = spec_from_file_location("process_bbox", TOOL)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def scene(tmp_path) -> Path:
    """A picture, and its two boxes in each of the formats."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(pictures / "a.png")
    coco = {
        "images": [{"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "red car"}],
        "annotations": [
            {"image_id": 7, "category_id": number, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
            for number, (x1, y1, x2, y2) in zip((1, 5), BOXES.values(), strict=True)
        ],
    }
    coco["annotations"].append({"image_id": 7, "category_id": 1, "bbox": [0, 0, 300, 200], "iscrowd": 1})
    (tmp_path / "coco").write_text(json.dumps(coco))
    plain = [{"bbox": box, "label": label} for label, box in BOXES.items()]
    (tmp_path / "json").write_text(json.dumps([{"image": "a.png", "boxes": plain}]))
    objects = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2) in BOXES.items()
    )
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc/a.xml").write_text(
        f"<annotation><filename>a.png</filename><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        f"{objects}</annotation>"
    )
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo/classes.txt").write_text("cat\nred car\n")
    (tmp_path / "yolo/a.txt").write_text(
        "".join(
            f"{number} {(x1 + x2) / 2 / WIDTH:.6f} {(y1 + y2) / 2 / HEIGHT:.6f} "
            f"{(x2 - x1) / WIDTH:.6f} {(y2 - y1) / HEIGHT:.6f}\n"
            for number, (x1, y1, x2, y2) in enumerate(BOXES.values())
        )
    )
    return tmp_path


def convert(tool, scene: Path, form: str, checkpoint: Path, *more: str) -> list[dict]:
    output = scene / "out" / "rows.json"
    flags = ["--format", form, "--annotations", scene / form, "--image_folder", scene / "pictures"]
    flags += ["--model_name_or_path", checkpoint, "--output", output, *more]
    tool.main([*map(str, flags)])
    return json.loads(output.read_text())


ANSWERS = {
    "relative": '```json\n[\n\t{"bbox_2d": [100, 100, 500, 500], "label": "cat"},\n'
    '\t{"bbox_2d": [200, 250, 1000, 1000], "label": "red car"}\n]\n```',
    "qwen2_vl": "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,100),(500,500)<|box_end|>"
    "<|object_ref_start|>red car<|object_ref_end|><|box_start|>(200,250),(1000,1000)<|box_end|>",
    # 300 x 200 becomes 308 x 196 in units of 28.
    "qwen2_5_vl": '```json\n[\n\t{"bbox_2d": [31, 20, 154, 98], "label": "cat"},\n'
    '\t{"bbox_2d": [62, 49, 308, 196], "label": "red car"}\n]\n```',
}


@pytest.mark.parametrize("form", ["coco", "voc", "yolo", "json"])
def test_formats_and_families(form, family, tool, scene, checkpoints):
    [row] = convert(tool, scene, form, checkpoints[family])
    question, answer = row["conversations"]
    assert answer == {"from": "gpt", "value": ANSWERS.get(family, ANSWERS["relative"])}
    assert question["from"] == "human"
    assert question["value"].startswith("<image>\n")
    assert "cat, red car" in question["value"]
    assert row["image"] == "a.png"


@pytest.mark.parametrize("max_pixels", [28 * 28 * 20, 28 * 28 * 576])
def test_places_lie_in_the_picture_that_the_model_sees(max_pixels, tool, scene, checkpoints):
    """Against the grid that training makes of the picture under the same pixel limit."""
    checkpoint = checkpoints["qwen2_5_vl"]
    [row] = convert(tool, scene, "coco", checkpoint, "--max_pixels", str(max_pixels))
    processor = AutoProcessor.from_pretrained(checkpoint)
    item = {"type": "image", "image": str(scene / "pictures/a.png"), "max_pixels": max_pixels}
    item["min_pixels"] = 28 * 28 * 16
    content = [item, {"type": "text", "text": "?"}]
    inputs = processor_inputs(processor, [[{"role": "user", "content": content}]], add_generation_prompt=True)
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    for box in grounding.parse_boxes(row["conversations"][1]["value"]).items:
        x1, y1, x2, y2 = BOXES[box.label]
        wide, high = 14 * columns / WIDTH, 14 * rows / HEIGHT
        assert box.xyxy == pytest.approx((x1 * wide, y1 * high, x2 * wide, y2 * high), abs=0.5)


@pytest.mark.parametrize("checkpoint_family", FAMILIES)
def test_previews_show_the_boxes_at_their_place(checkpoint_family, tool, scene, checkpoints):
    preview = scene / "preview"
    convert(tool, scene, "json", checkpoints[checkpoint_family], "--preview", str(preview))
    drawn = np.asarray(Image.open(preview / "a.png.png").convert("L")) < 250
    assert drawn.shape == (HEIGHT, WIDTH)
    assert drawn[60:90, 28:33].any(1).all()  # the left edge of the cat
    assert drawn[190:, 100:290].any(0).all()  # the lower edge of the car
    assert not drawn[130:190, 5:50].any()


BAD = {
    "outside": ([250, 10, 310, 50], "reaches out of it"),
    "empty": ([10, 10, 10, 50], "is empty"),
    "swapped": ([50, 10, 10, 50], "swapped"),
    "not numbers": ([1, 2, 3], "not four numbers"),
    "not finite": ([1, 2, 3, float("nan")], "not finite"),
    "too thin for 1000 steps": ([10.06, 10, 10.14, 50], "empty in whole numbers"),
}


def with_box(scene: Path, box: list, label: str = "dog") -> None:
    rows = json.loads((scene / "json").read_text())
    rows[0]["boxes"].append({"bbox": box, "label": label})
    (scene / "json").write_text(json.dumps(rows))


@pytest.mark.parametrize("name", BAD)
def test_bad_boxes_are_refused_with_file_and_entry(name, tool, scene, checkpoints):
    box, told = BAD[name]
    with_box(scene, box)
    with pytest.raises(SystemExit, match=rf"json: row 0, box 2.*{told}"):
        convert(tool, scene, "json", checkpoints["qwen3_vl"])
    assert not (scene / "out/rows.json").exists()


def counted(capsys) -> set[str]:
    return set(capsys.readouterr().out.split(" -> ")[0].split(", "))


def test_bad_boxes_are_left_out_or_cut_on_request(tool, scene, checkpoints, capsys):
    for name in ("outside", "empty", "swapped"):
        with_box(scene, BAD[name][0])
    [row] = convert(tool, scene, "json", checkpoints["qwen3_vl"], "--bad_boxes", "skip")
    assert "dog" not in row["conversations"][1]["value"]
    assert {"1 rows", "2 boxes", "3 boxes left out"} <= counted(capsys)
    [row] = convert(tool, scene, "json", checkpoints["qwen3_vl"], "--bad_boxes", "clip")
    assert '{"bbox_2d": [833, 50, 1000, 250], "label": "dog"}' in row["conversations"][1]["value"]
    assert {"1 rows", "3 boxes", "2 boxes left out"} <= counted(capsys)


def test_what_does_not_fit_together_is_refused(tool, scene, checkpoints):
    def refused(form: str, told: str) -> None:
        with pytest.raises(SystemExit, match=told):
            convert(tool, scene, form, checkpoints["qwen3_vl"])

    coco = json.loads((scene / "coco").read_text())
    coco["images"][0]["width"] = 400
    (scene / "coco").write_text(json.dumps(coco))
    refused("coco", r"images\[0\]: says \(height, width\) \(200, 400\)")
    del coco["annotations"][0]["bbox"]
    (scene / "coco").write_text(json.dumps(coco))
    refused("coco", r"annotations\[0\]: needs image_id, category_id, bbox")
    (scene / "yolo/a.txt").write_text("0 0.5 0.5 0.2 0.2\n9 0.5 0.5 0.2 0.2\n")
    refused("yolo", "a.txt: line 2: class 9 is not in classes.txt")
    (scene / "voc/b.xml").write_text("<annotation>")
    refused("voc", r"b\.xml: not valid XML")
    with_box(scene, [1, 1, 20, 20], "<|im_end|>")
    refused("json", "'<|im_end|>' is no label".replace("|", r"\|"))
    (scene / "json").write_text(json.dumps([{"image": "nowhere.png", "boxes": []}]))
    refused("json", r"row 0: no picture .*nowhere\.png")


def test_rows_train_by_the_public_commands(scene, checkpoints):
    """Of Qwen2-VL, whose answers hold special tokens."""
    rows, checkpoint = scene / "rows.json", checkpoints["qwen2_vl"]
    flags = ["--format", "coco", "--annotations", scene / "coco", "--image_folder", scene / "pictures"]
    flags += ["--model_name_or_path", checkpoint, "--output", rows]
    done = subprocess.run(
        [sys.executable, TOOL, *map(str, flags)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (scene / "data.toml").write_text('[boxes]\nannotation_path = "rows.json"\ndata_path = "pictures"\n')
    flags = ["--model_name_or_path", checkpoint, "--dataset_config", scene / "data.toml"]
    flags += ["--dataset_use", "boxes", "--output_dir", scene / "trained", "--tune_mm_llm", "True"]
    flags += ["--max_steps", "1", "--report_to", "none", "--save_strategy", "no"]
    command = [sys.executable, FOLDER / "qwenvl/train/train_qwen.py", *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_notebook_runs(tool, scene, checkpoints, tmp_path, monkeypatch):
    """Its cells in order, with the paths of its first code cell replaced."""
    notebook = json.loads((FOLDER / "tools/process_bbox.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {
        "FORMAT": "coco",
        "ANNOTATIONS": str(scene / "coco"),
        "IMAGE_FOLDER": str(scene / "pictures"),
        "CHECKPOINT": str(checkpoints["qwen2_5_vl"]),
        "OUTPUT": str(tmp_path / "rows.json"),
    }
    lines = [f"{name} = {value!r}" for name, value in names.items()]
    assert {line.split(" = ")[0] for line in cells[0].splitlines()} == names.keys()
    monkeypatch.syspath_prepend(FOLDER / "tools")
    exec("\n".join(["display = print", *lines, *cells[1:]]), {})
    [row] = json.loads((tmp_path / "rows.json").read_text())
    assert row["conversations"][1]["value"] == ANSWERS["qwen2_5_vl"]
