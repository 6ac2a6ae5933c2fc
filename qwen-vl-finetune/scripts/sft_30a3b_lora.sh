#!/usr/bin/env bash
# Qwen3-VL-30B-A3B (MoE), LoRA adapters on the language model; the routers stay as they are.
# Environment and further flags as for sft.sh.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MODEL=${MODEL:-Qwen/Qwen3-VL-30B-A3B-Instruct} OUTPUT=${OUTPUT:-output/sft_30a3b_lora}
exec "$scripts/sft.sh" --lora_enable True --learning_rate 1e-4 --gradient_checkpointing True "$@"
