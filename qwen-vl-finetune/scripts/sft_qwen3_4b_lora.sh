#!/usr/bin/env bash
# Qwen3-VL-4B, LoRA adapters on the language model alone, so that vLLM can serve them beside their base.
# Environment and further flags as for sft.sh.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MODEL=${MODEL:-Qwen/Qwen3-VL-4B-Instruct} OUTPUT=${OUTPUT:-output/sft_qwen3_4b_lora}
exec "$scripts/sft.sh" --lora_enable True --tune_mm_mlp False --learning_rate 1e-4 --gradient_checkpointing True "$@"
