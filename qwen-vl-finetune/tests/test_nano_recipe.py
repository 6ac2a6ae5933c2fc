"""The recipe of models/qwen3-vl-nano, all stages, on a handful of scenes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwen_vl_utils.patches import PatchLayout
from qwenvl.nano import recipe, sight

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "qwen3-vl-nano"


def test_the_recipe_runs_to_a_checkpoint_and_does_no_stage_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "SIGHT_STEPS", 2)
    monkeypatch.setattr(recipe, "ROWS", 128)  # two steps: the first has rate 0
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


def test_labels_say_what_is_in_the_patches_of_each_token(checkpoints):
    layout = PatchLayout.of(AutoProcessor.from_pretrained(checkpoints["qwen3_vl"]).image_processor)
    seen = {"things": 0, "lines": 0}
    for seed in range(40):
        picture, labels = sight.lesson(seed)
        row = sight.Lessons(1, layout, first_seed=seed)[0]
        pixels = np.asarray(picture)
        tokens = row["pixel_values"].numpy().reshape(16, 4, 3, 2, 16, 16)
        for token, patch in ((0, 0), (5, 3), (14, 1)):
            y, x = 2 * (token // 4) + patch // 2, 2 * (token % 4) + patch % 2
            corner = pixels[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].transpose(2, 0, 1)
            assert np.array_equal(tokens[token, patch, :, 0], corner)
            assert row["thing"][token, patch] == labels.thing[y, x]
            columns = row["character"][token].reshape(2, 8)[patch // 2, 4 * (patch % 2) : 4 * (patch % 2) + 4]
            assert columns.tolist() == labels.character[y, 4 * x : 4 * x + 4].tolist()
        seen["things"] += bool(labels.thing.any())
        seen["lines"] += bool(labels.character.any())
        assert not (labels.thing.any() and labels.character.any())
        for y, x in np.argwhere(labels.thing > 0):
            x1, y1, x2, y2 = 4 * labels.edge[y, x]
            assert 0 <= x1 <= x2 < 128 and 0 <= y1 <= y2 < 128
            assert x1 < 16 * x + 16 and x2 + 4 > 16 * x and y1 < 16 * y + 16 and y2 + 4 > 16 * y
        words = {place: word for word, place in sight.known_words().items()}
        for y, x in np.argwhere(labels.word > 0):
            written = {sight.CHARACTERS[one].lower() for one in labels.character[y, 8 * x : 8 * x + 8]}
            assert written & set(words[labels.word[y, x]])
        for row_, column in np.argwhere(labels.character > 0):
            patch = pixels[16 * row_ : 16 * row_ + 16, max(0, 4 * column - 8) : 4 * column + 12].astype(int)
            assert patch.max() - patch.min() > 20, (seed, row_, column)  # something is written there
    assert min(seen.values()) > 8


def test_the_shipped_checkpoint_is_small_and_loads():
    assert (SHIPPED / "model.safetensors").stat().st_size <= 24_000_000
    assert AutoModelForImageTextToText.from_pretrained(SHIPPED).config.model_type == "qwen3_vl"
    AutoProcessor.from_pretrained(SHIPPED)
