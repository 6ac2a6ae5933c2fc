#!/usr/bin/env bash
# Qwen3-VL-30B-A3B (MoE), language model with experts and routers, and merger; weights split over the GPUs.
# The log says how evenly the experts are used; --router_aux_loss_coef weighs the loss that balances them.
# Environment and further flags as for sft.sh.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MODEL=${MODEL:-Qwen/Qwen3-VL-30B-A3B-Instruct} OUTPUT=${OUTPUT:-output/sft_30a3b}
exec "$scripts/sft.sh" --deepspeed "$scripts/zero3.json" --gradient_checkpointing True "$@"
