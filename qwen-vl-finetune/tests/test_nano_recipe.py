"""The recipe of models/qwen3-vl-nano, all stages, on a handful of scenes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwen_vl_utils.patches import PatchLayout
from qwenvl.nano import recipe
from qwenvl.nano.sight import Scenes, SightModel, teach_sight

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


def test_sight_lessons_lower_the_loss_on_new_scenes(checkpoints, tmp_path):
    processor = AutoProcessor.from_pretrained(checkpoints["qwen3_vl"])
    held_out = Scenes(64, PatchLayout.of(processor.image_processor), first_seed=5)
    batch = {key: torch.stack([scene[key] for scene in held_out]) for key in held_out[0]}

    def best_loss(folder: Path) -> float:
        """The loss with heads fitted to frozen features, so that only what the tower shows is compared."""
        torch.manual_seed(0)
        sight = SightModel(AutoModelForImageTextToText.from_pretrained(folder).model.visual)
        optimizer = torch.optim.Adam(sight.heads.parameters(), 0.02)
        for _ in range(20):
            optimizer.zero_grad()
            sight(**batch)["loss"].backward()
            optimizer.step()
        return sight(**batch)["loss"].item()

    taught = teach_sight(checkpoints["qwen3_vl"], tmp_path / "taught", scenes=64 * 12)
    assert best_loss(taught) < best_loss(checkpoints["qwen3_vl"]) - 0.1


def test_the_shipped_checkpoint_is_small_and_loads():
    assert (SHIPPED / "model.safetensors").stat().st_size <= 24_000_000
    assert AutoModelForImageTextToText.from_pretrained(SHIPPED).config.model_type == "qwen3_vl"
    AutoProcessor.from_pretrained(SHIPPED)
