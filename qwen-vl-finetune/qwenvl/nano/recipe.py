"""How models/qwen3-vl-nano was made, from random weights, in one resumable command:

    .venv/bin/python -m qwenvl.nano.recipe output/nano

    random weights -> sight (tower with throw-away heads) -> language (torchrun train_qwen.py) -> checkpoint
"""

import argparse
from pathlib import Path

from qwenvl.nano.architecture import write_checkpoint
from qwenvl.nano.sight import teach_sight

FAMILY = "qwen3_vl"
SIGHT_SCENES = 220_000


def make_nano(folder: Path) -> Path:
    """Run every stage that is not finished yet; returns the trained checkpoint's folder."""
    start, sight = folder / "start", folder / "sight"
    if not (start / "config.json").is_file():
        write_checkpoint(FAMILY, start)
    if not (sight / "config.json").is_file():
        teach_sight(start, sight, scenes=SIGHT_SCENES)
    return sight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where stages and their states are kept")
    print(make_nano(parser.parse_args().folder))


if __name__ == "__main__":
    main()
