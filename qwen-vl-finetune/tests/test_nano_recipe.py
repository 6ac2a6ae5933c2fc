"""The recipe of models/qwen3-vl-nano, all stages, on a handful of scenes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwen_vl_utils.patches import PatchLayout
from qwenvl.nano import recipe
from qwenvl.nano.corpus import CELL, SIZE, cell_labels, draw, make_scene
from qwenvl.nano.sight import Scenes

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "qwen3-vl-nano"


def test_the_recipe_runs_to_a_checkpoint_and_does_no_stage_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "SIGHT_SCENES", 128)
    monkeypatch.setattr(recipe, "LANGUAGE_SCENES", 64)
    checkpoint = recipe.make_nano(tmp_path)
    assert {path.name for path in checkpoint.iterdir()} >= set(recipe.CHECKPOINT_FILES)
    stages = [
        AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        for name in ("start", "sight", "language")
    ]
    tower = [stage.model.visual.blocks[0].attn.qkv.weight for stage in stages]
    words = [stage.get_input_embeddings().weight for stage in stages]
    assert (
        not torch.equal(tower[0], tower[1])
        and torch.equal(words[0], words[1])
        and not torch.equal(words[1], words[2])
    )
    monkeypatch.setattr(recipe, "teach_sight", pytest.fail)
    monkeypatch.setattr(recipe, "teach_language", pytest.fail)
    assert recipe.make_nano(tmp_path) == checkpoint


def test_a_cells_label_belongs_to_the_patches_of_its_token(checkpoints):
    layout = PatchLayout.of(AutoProcessor.from_pretrained(checkpoints["qwen3_vl"]).image_processor)
    scene = make_scene(7, words=False)
    sample = Scenes(1, layout, first_seed=7)[0]
    pixels = np.asarray(draw(scene), np.float32) / 127.5 - 1
    side = SIZE // CELL
    tokens = sample["pixel_values"].reshape(side * side, 4, 3, 2, CELL // 2, CELL // 2)
    for cell in range(side * side):
        top, left = CELL * (cell // side), CELL * (cell % side)
        corner = pixels[top : top + CELL // 2, left : left + CELL // 2].transpose(2, 0, 1)
        assert np.allclose(tokens[cell, 0, :, 0], corner, atol=1e-6)
    shapes, colours = cell_labels(scene)
    assert np.array_equal(sample["shapes"], shapes) and np.array_equal(sample["colours"], colours)


def test_the_shipped_checkpoint_is_small_and_loads():
    assert (SHIPPED / "model.safetensors").stat().st_size <= 24_000_000
    assert AutoModelForImageTextToText.from_pretrained(SHIPPED).config.model_type == "qwen3_vl"
    AutoProcessor.from_pretrained(SHIPPED)
