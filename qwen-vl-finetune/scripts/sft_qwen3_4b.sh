#!/usr/bin/env bash
# Qwen3-VL-4B, language model and merger.
# Environment and further flags as for sft.sh.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MODEL=${MODEL:-Qwen/Qwen3-VL-4B-Instruct} OUTPUT=${OUTPUT:-output/sft_qwen3_4b}
exec "$scripts/sft.sh" --deepspeed "$scripts/zero2.json" --gradient_checkpointing True "$@"
