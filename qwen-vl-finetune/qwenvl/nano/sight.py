"""First stage of the recipe: the vision tower learns to see before there is language.

A tower with random weights learns slowly through the language loss alone.  Here throw-away linear heads name
the shape and the colour under every visual token, on the merger's output and on each DeepStack merger's, so
that all the features the language model will read carry what it needs.  The heads are dropped afterwards.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from qwen_vl_utils.patches import PatchLayout
from qwenvl.nano.corpus import COLOUR_NAMES, SHAPES, SIZE, cell_labels, draw, make_scene
from qwenvl.train.attention import enable as enable_varlen


class Scenes(Dataset):
    """`length` scenes drawn when asked for, one seed each."""

    def __init__(self, length: int, layout: PatchLayout, *, first_seed: int):
        self.length, self.layout, self.first_seed = length, layout, first_seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scene = make_scene(self.first_seed + index, words=False)
        shapes, colours = cell_labels(scene)
        pixels, _ = self.layout.image(np.asarray(draw(scene)))
        return {
            "pixel_values": torch.from_numpy(pixels),
            "shapes": torch.from_numpy(shapes),
            "colours": torch.from_numpy(colours),
        }


class SightModel(nn.Module):
    """The tower with linear heads on the merger and on each DeepStack merger."""

    def __init__(self, visual: PreTrainedModel):
        super().__init__()
        self.visual = visual
        config: Any = visual.config
        outputs = 1 + len(config.deepstack_visual_indexes)
        width = config.out_hidden_size
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(SHAPES) + 1 + len(COLOUR_NAMES) + 1))
            for _ in range(outputs)
        )

    def forward(self, pixel_values, shapes, colours) -> dict[str, torch.Tensor]:
        """pixel_values [B, 64, 1536], shapes, colours [B, 16] -> loss, predictions [B*16, classes]."""
        side = SIZE // self.visual.config.patch_size
        grid = torch.tensor([[1, side, side]], device=pixel_values.device).repeat(len(pixel_values), 1)
        seen = self.visual(pixel_values.flatten(0, 1), grid_thw=grid, return_dict=True)
        features = [seen.pooler_output, *seen.deepstack_features]
        weights = [1.0] + [0.3] * (len(features) - 1)
        loss, named = pixel_values.new_zeros(()), []
        for feature, head, weight in zip(features, self.heads, weights, strict=True):
            shape, colour = head(feature).split((len(SHAPES) + 1, len(COLOUR_NAMES) + 1), dim=-1)
            named.append((shape, colour))
            loss = loss + weight * (
                cross_entropy(shape, shapes.flatten()) + cross_entropy(colour, colours.flatten())
            )
        return {"loss": loss, "shape": named[0][0], "colour": named[0][1]}


def _accuracy(prediction) -> dict[str, float]:
    """Share of right names among the cells that show an object."""
    result = {}
    for name, scores, truth in zip(
        ("shape", "colour"), prediction.predictions, prediction.label_ids, strict=True
    ):
        truth, scores = truth.reshape(-1), scores.reshape(-1, scores.shape[-1])
        result[f"{name}_accuracy"] = float((scores.argmax(-1) == truth)[truth > 0].mean())
    return result


def teach_sight(
    checkpoint: Path, output: Path, *, scenes: int, batch: int = 64, first_seed: int = 10_000_000
) -> Path:
    """Train the tower of `checkpoint` on `scenes` pictures and write a whole checkpoint to `output`.

    Goes on from the newest state under `output`/states.
    """
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    enable_varlen(model)
    processor = AutoProcessor.from_pretrained(checkpoint)
    layout = PatchLayout.of(processor.image_processor)
    sight = SightModel(model.model.visual)
    states = output / "states"
    arguments = TrainingArguments(
        output_dir=str(states), max_steps=scenes // batch, per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch, learning_rate=1.5e-3, lr_scheduler_type="cosine", warmup_steps=200,
        weight_decay=0.05, adam_beta2=0.98, max_grad_norm=1.0, dataloader_num_workers=1, logging_steps=50,
        eval_strategy="steps", eval_steps=500, save_steps=500, save_total_limit=1, report_to="none",
        label_names=["shapes", "colours"], use_cpu=not torch.cuda.is_available(), remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model=sight,
        args=arguments,
        train_dataset=Scenes(scenes, layout, first_seed=first_seed),
        eval_dataset=Scenes(512, layout, first_seed=0),
        compute_metrics=_accuracy,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(states)) if states.is_dir() else None)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return output
