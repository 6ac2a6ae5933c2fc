"""First stage of the recipe: the vision tower learns to see before there is language.

A tower with random weights learns slowly through the language loss alone.  Here throw-away linear heads say,
on the merger's output and on each DeepStack merger's, what is under each patch of every visual token: which
thing, its colour, where in the picture its edges are, whether its middle is here, which characters and words.
All the features that the language model will read then carry what it needs, in the terms it will answer in;
the heads are dropped afterwards.

    things or written lines -> picture + Labels -> tower -> mergers -> heads -> loss
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
)
from transformers.trainer_utils import get_last_checkpoint

from qwen_vl_utils.patches import PatchLayout
from qwenvl.nano.skills import assets, canvas, screens, text, things
from qwenvl.nano.skills.canvas import SHAPES, Item, Placed
from qwenvl.train.argument import TrainingArguments
from qwenvl.train.attention import enable as enable_varlen
from qwenvl.train.model_loading import PatchProjection
from qwenvl.train.muon import MuonAndAdamW
from qwenvl.train.parameters import is_layer_matrix
from qwenvl.train.train_qwen import leave

EDGES = 32
SIZE = 128  # pixels of a picture's side: 4 x 4 visual tokens of 2 x 2 patches
PATCH = 16
TOKEN = 2 * PATCH
STEP = 4  # pixels between two columns of characters, and between two places of an edge
COLOURS = ("", *canvas.PLAIN_COLOURS)
CHARACTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:-/'&$%#!?()+="


@lru_cache(maxsize=1)
def classes() -> dict[str, int]:
    """What a patch can show: nothing, a shape, a named pictogram, or another one by its kind."""
    names = ("", *SHAPES, *assets.NAMED, *(f"some {kind}" for kind in assets.KINDS))
    return {name: place for place, name in enumerate(names)}


@lru_cache(maxsize=1)
def known_words() -> dict[str, int]:
    """The words that skills write, in lower case; 0 is for none of them."""
    shops = (word for shop in text.SHOPS for word in shop.split())
    words = {
        word.lower()
        for word in (*text.words(), *screens.LABELS, *text.GOODS, *text.PEOPLE, *text.CITIES, *shops)
    }
    return {word: place for place, word in enumerate(sorted(words), 1)}


@lru_cache(maxsize=1)
def _other_pictograms() -> dict[str, str]:
    """The classes of pictograms that training may show and that have no name here."""
    return {name: f"some {kind}" for kind, names in assets.kinds()["train"].items() for name in names}


def _class_of(item: Item) -> str:
    return item.shape if item.shape in classes() else _other_pictograms()[item.shape]


@dataclass
class Labels:
    """What is where in a picture of SIZE x SIZE pixels.

    ``thing``, ``colour``: class of each patch [8, 8], 0 for none.
    ``edge``: where its left, upper, right and lower edge lie, in steps of 4 pixels [8, 8, 4], -100 for none.
    ``middle``: whether the middle of a thing is in the patch [8, 8].
    ``character``: of each column of 4 pixels in each row of patches [8, 32], 0 for none.
    ``word``: of each token's column in each row of patches [8, 4], 0 for none.
    """

    thing: np.ndarray = field(default_factory=lambda: np.zeros((8, 8), np.int64))
    colour: np.ndarray = field(default_factory=lambda: np.zeros((8, 8), np.int64))
    edge: np.ndarray = field(default_factory=lambda: np.full((8, 8, 4), -100, np.int64))
    middle: np.ndarray = field(default_factory=lambda: np.zeros((8, 8), np.float32))
    character: np.ndarray = field(default_factory=lambda: np.zeros((8, 32), np.int64))
    word: np.ndarray = field(default_factory=lambda: np.zeros((8, 4), np.int64))

    def add_things(self, placed: list[Placed]) -> None:
        """Each patch shows the thing whose box, a little smaller, covers it most, if by an eighth or more."""
        if not placed:
            return
        boxes = np.array([one.box for one in placed], np.float32)
        inner = boxes + np.multiply(np.tile(boxes[:, 2:] - boxes[:, :2], 2), (0.08, 0.08, -0.08, -0.08))
        starts = np.arange(8, dtype=np.float32) * PATCH
        wide = np.minimum(starts + PATCH, inner[:, 2:3]) - np.maximum(starts, inner[:, 0:1])
        high = np.minimum(starts + PATCH, inner[:, 3:4]) - np.maximum(starts, inner[:, 1:2])
        cover = wide.clip(0)[:, None, :] * high.clip(0)[:, :, None]
        owner, shown = cover.argmax(0), cover.max(0) >= PATCH * PATCH / 8
        things = np.array([classes()[_class_of(one.item)] for one in placed])
        colours = np.array([COLOURS.index(one.item.colour) for one in placed])
        self.thing, self.colour = things[owner] * shown, colours[owner] * shown
        edges = (boxes / STEP).clip(0, EDGES - 1).astype(np.int64)
        self.edge = np.where(shown[:, :, None], edges[owner], -100)
        for box in boxes:
            self.middle[int((box[1] + box[3]) // 2) // PATCH, int((box[0] + box[2]) // 2) // PATCH] = 1

    def add_line(self, line: str, ink: canvas.Box, font) -> None:
        """A written line whose ink is in ``ink``: its characters in the rows of patches that it crosses."""
        rows = [row for row in range(8) if ink[1] - 2 <= row * PATCH + 8 <= ink[3] + 2]
        rows = rows or [min(7, max(0, (ink[1] + ink[3]) // 2 // PATCH))]
        last = float(ink[0])
        spans: list[tuple[str, float, float]] = []
        for character in line:
            first, last = last, last + text.advance(font, character)
            columns = range(max(0, math.ceil((first - 2) / STEP)), min(32, math.ceil((last - 2) / STEP)))
            for row in rows:
                self.character[row, columns.start : columns.stop] = max(0, CHARACTERS.find(character))
            spans.append((character, first, last))
        self._add_words(spans, rows)

    def _add_words(self, spans: list[tuple[str, float, float]], rows: list[int]) -> None:
        """Each token's column has the word that covers most of it."""
        most = [0.0] * 4
        for blank, letters in groupby(spans, key=lambda span: span[0] == " "):
            word = list(letters)
            known = 0 if blank else known_words().get("".join(span[0] for span in word).lower(), 0)
            for column in range(4):
                start = max(word[0][1], TOKEN * column)
                cover = min(word[-1][2], TOKEN * (column + 1)) - start
                if known and cover > max(most[column], 4):
                    most[column] = cover
                    self.word[rows, column] = known


def _things(random: Random) -> tuple[Image.Image, Labels]:
    number = random.choice((1, 1, 2, 3, 4, 5, 6, 8, 10))
    radius = {1: (12, 56), 2: (10, 30), 3: (10, 28)}.get(number, (8, 20))
    share = random.choice((0.0, 0.5, 1.0))  # of pictograms
    items = [
        _pictogram(random) if random.random() < share else things.any_shape(random) for _ in range(number)
    ]
    picture = canvas.ground(random, (SIZE, SIZE), [item.rgb for item in items if item.colour])
    labels = Labels()
    labels.add_things(canvas.scatter(random, picture, items, radius))
    return picture, labels


def _pictogram(random: Random) -> Item:
    if random.random() < 0.75:
        return Item(random.choice(assets.NAMED))
    kinds = assets.kinds()["train"]
    return Item(random.choice(kinds[random.choice(tuple(kinds))]))


def _written(random: Random) -> tuple[Image.Image, Labels]:
    """One to three words, each large, or up to six lines."""
    picture, labels = canvas.ground(random, (SIZE, SIZE)), Labels()
    pen, ink = ImageDraw.Draw(picture), canvas.ink(random, picture)
    large = random.random() < 0.6
    y, font = random.randint(1, 14), assets.any_font(random, "train", random.randint(11, 16))
    while y < SIZE - 14:
        if large:
            line = text.cased(random, _word(random))
            font = text.fitting(random, "train", line, 120, (14, 34))
        else:
            line = " ".join(_word(random) for _ in range(3))
            while sum(text.advance(font, one) for one in line) > 122 and " " in line:
                line = line.rsplit(" ", 1)[0]
        left, top, right, bottom = font.getbbox(line)
        if y + bottom - top > SIZE or right - left > SIZE - 2:
            break
        spot = random.randint(1, max(1, round(SIZE - 2 - (right - left)))), y
        box = text.write(pen, spot, line, font, ink)
        labels.add_line(line, box, font)
        y = box[3] + (random.randint(4, 40) if large else random.randint(5, 10))
    return picture, labels


def _word(random: Random) -> str:
    way = random.random()
    if way < 0.7:
        return random.choice(text.words())
    if way < 0.8:  # letters that no word explains
        return "".join(random.choice(CHARACTERS[1:27]) for _ in range(random.randint(3, 8)))
    return random.choice(
        (f"{random.randint(0, 9999)}", f"{random.randint(0, 99)}.{random.randint(0, 99):02}",
         f"{random.randint(2020, 2029)}-{random.randint(1, 12):02}-{random.randint(1, 28):02}",
         random.choice(text.PEOPLE), random.choice(text.CITIES), random.choice(text.SHOPS).split()[0])
    )  # fmt: skip


def lesson(seed: int) -> tuple[Image.Image, Labels]:
    """A picture and what is where in it, the same for the same seed."""
    random = Random(f"sight/{seed}")
    return _things(random) if random.random() < 0.6 else _written(random)


class Lessons(Dataset):
    """`length` lessons drawn when asked for, one seed each."""

    def __init__(self, length: int, layout: PatchLayout, *, first_seed: int):
        self.length, self.layout, self.first_seed = length, layout, first_seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture, labels = lesson(self.first_seed + index)
        pixels, _ = self.layout.image(np.asarray(picture), scaled=False)
        row = {name: torch.from_numpy(_by_token(value)) for name, value in vars(labels).items()}
        return row | {"pixel_values": torch.from_numpy(pixels)}


def _by_token(labels: np.ndarray) -> np.ndarray:
    """[8, n * 8, ...] of rows of patches -> [16, ...]: what belongs to each visual token together."""
    columns, *rest = labels.shape[1:]
    cut = labels.reshape(4, 2, 4, columns // 4, *rest).swapaxes(1, 2)
    return np.ascontiguousarray(cut.reshape(16, columns // 2, *rest))


@dataclass
class SightArguments:
    """The folders of the first stage; more flags are the Trainer's own."""

    checkpoint: str = field(metadata={"help": "a whole checkpoint, its tower to be taught"})
    taught: str = field(metadata={"help": "where the whole checkpoint with the taught tower goes"})


def _head(width: int, size: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))


class SightModel(nn.Module):
    """The tower with linear heads on the merger and on each DeepStack merger."""

    def __init__(self, visual: PreTrainedModel, layout: PatchLayout):
        super().__init__()
        self.visual, self.layout = visual, layout
        config: Any = visual.config
        outputs = 1 + len(config.deepstack_visual_indexes)
        width = config.out_hidden_size
        # Of each of a token's 4 patches thing, colour, 4 edges, middle; of its 2 x 8 columns the character.
        self.parts = (4 * len(classes()), 4 * len(COLOURS), 4 * 4 * EDGES, 4)
        self.written = (16 * len(CHARACTERS), 2 * (len(known_words()) + 1))
        self.things, self.lines = (
            nn.ModuleList(_head(width, sum(sizes)) for _ in range(outputs))
            for sizes in (self.parts, self.written)
        )

    def forward(self, pixel_values, thing, colour, edge, middle, character, word) -> dict[str, torch.Tensor]:
        """pixel_values uint8 [B, 64, 1536], `Labels` by token [B, 16, ...] -> loss, right [1, 2, 5]."""
        side = SIZE // self.visual.config.patch_size
        grid = torch.tensor([[1, side, side]], device=pixel_values.device).repeat(len(pixel_values), 1)
        pixels = self.layout.scale(pixel_values.flatten(0, 1))
        seen = self.visual(pixels, grid_thw=grid, return_dict=True)
        # Pictures of things teach things, written ones characters: what is not there costs no time.
        things, lines = (values.flatten(1).any(1) for values in (thing, character))
        loss, said = pixels.new_zeros(()), []
        features = [seen.pooler_output, *seen.deepstack_features]
        for place, (feature, *heads) in enumerate(zip(features, self.things, self.lines, strict=True)):
            feature = feature.unflatten(0, (len(thing), -1))
            names, colours, edges, middles = heads[0](feature[things]).float().split(self.parts, dim=-1)
            characters, words = heads[1](feature[lines]).float().split(self.written, dim=-1)
            pairs = [
                (names, thing[things]), (colours, colour[things]), (edges, edge[things]),
                (characters, character[lines]), (words, _positive(word[lines])),
            ]  # fmt: skip
            parts = sum((_named(*pair) for pair in pairs), loss.new_zeros(()))
            parts = parts + binary_cross_entropy_with_logits(middles, middle[things])
            loss = loss + (0.3 if place else 1.0) * parts
            said = said or [_right(scores.detach(), truth) for scores, truth in pairs]
        return {"loss": loss, "right": torch.stack(said, -1).float()[None]}


def _named(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of scores [..., places * classes] for the truth [..., places]."""
    return cross_entropy(scores.reshape(truth.numel(), -1), truth.flatten())


def _positive(truth: torch.Tensor) -> torch.Tensor:
    """The truth where there is something; what is not there is not taught."""
    return torch.where(truth > 0, truth, -100)


def _right(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """[right ones, all] where there is something to name."""
    truth = truth.flatten()
    right = scores.reshape(len(truth), -1).argmax(-1) == truth
    return torch.stack([(right & (truth > 0)).sum(), (truth > 0).sum()])


def _shares(prediction) -> dict[str, float]:
    """Share of right names among the patches or columns that show one."""
    right, total = np.asarray(prediction.predictions).reshape(-1, 2, 5).sum(0)
    return dict(zip(("thing", "colour", "edge", "character", "word"), (right / total).tolist(), strict=True))


def _optimizer(sight: SightModel, arguments: TrainingArguments) -> MuonAndAdamW:
    """Matrices of the tower by Muon, at three times the rate of all else."""
    named = dict(sight.visual.named_parameters())
    matrices = [named.pop(name) for name in tuple(named) if is_layer_matrix(name, named[name])]
    rate, decay = arguments.learning_rate, arguments.weight_decay
    groups = [
        {"params": matrices, "muon": True, "lr": 3 * rate, "weight_decay": decay},
        {
            "params": [*named.values(), *sight.things.parameters(), *sight.lines.parameters()],
            "lr": rate,
            "weight_decay": decay,
        },
    ]
    return MuonAndAdamW(groups, betas=(arguments.adam_beta1, arguments.adam_beta2))


def teach_sight(
    arguments: TrainingArguments, checkpoint: Path, output: Path, *, first_seed: int = 10_000_000
) -> None:
    """Train the tower of `checkpoint` for the steps of the arguments; `output` becomes a whole checkpoint.

    Goes on from the newest state in the arguments' output folder.
    """
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    enable_varlen(model)
    processor = AutoProcessor.from_pretrained(checkpoint)
    layout = PatchLayout.of(processor.image_processor)
    patches: Any = model.model.visual.patch_embed
    convolution, patches.proj = patches.proj, PatchProjection(patches.proj)
    sight = SightModel(model.model.visual, layout)
    lessons = arguments.max_steps * arguments.train_batch_size * arguments.world_size
    trainer = Trainer(
        model=sight,
        args=arguments,
        train_dataset=Lessons(lessons, layout, first_seed=first_seed),
        eval_dataset=Lessons(512, layout, first_seed=0),
        compute_metrics=_shares,
        optimizers=(_optimizer(sight, arguments), None),
    )
    states = str(arguments.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(states) if Path(states).is_dir() else None)
    patches.proj = convolution
    if trainer.is_world_process_zero():
        model.save_pretrained(output)
        processor.save_pretrained(output)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    parser = HfArgumentParser(cast(Any, (SightArguments, TrainingArguments)))
    folders, training = parser.parse_args_into_dataclasses()
    teach_sight(training, Path(folders.checkpoint), Path(folders.taught))
    leave()
