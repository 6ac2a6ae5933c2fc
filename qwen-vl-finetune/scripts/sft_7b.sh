#!/usr/bin/env bash
# Qwen2.5-VL-7B, language model and merger, weights split over the GPUs.
# Environment and further flags as for sft.sh.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct} OUTPUT=${OUTPUT:-output/sft_7b}
exec "$scripts/sft.sh" --deepspeed "$scripts/zero3.json" --gradient_checkpointing True "$@"
