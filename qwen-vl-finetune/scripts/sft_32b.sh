#!/usr/bin/env bash
# Qwen2.5-VL-32B, language model and merger, weights split over the GPUs, optimiser in the machine's memory.
# Environment and further flags as for sft.sh.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MODEL=${MODEL:-Qwen/Qwen2.5-VL-32B-Instruct} OUTPUT=${OUTPUT:-output/sft_32b}
exec "$scripts/sft.sh" --deepspeed "$scripts/zero3_offload.json" --gradient_checkpointing True \
    --per_device_train_batch_size 1 "$@"
