"""Merge a LoRA adapter into its base: a checkpoint that transformers and vLLM load by itself.

    python qwen-vl-finetune/tools/merge_adapter.py --adapter output/mine/checkpoint-500 --output_dir merged

Works on the CPU, in fp32, which takes four bytes of memory a weight; writes the base's own dtype.  A training
merges its last adapter by itself; this is for its checkpoints, and for a base that has moved.
"""

from __future__ import annotations

import argparse
import sys

from qwenvl.train import adapters


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--adapter", required=True, help="Folder with adapter_config.json.")
    parser.add_argument("--model_name_or_path", help="The base; default: the one that the adapter names.")
    parser.add_argument("--output_dir", required=True, help="Where the merged checkpoint goes.")
    flags = parser.parse_args()
    try:
        adapters.merge(flags.adapter, flags.output_dir, flags.model_name_or_path)
    except ValueError as error:
        sys.exit(f"merge_adapter: {error}")
    print(f"{flags.output_dir}: merged")


if __name__ == "__main__":
    main()
