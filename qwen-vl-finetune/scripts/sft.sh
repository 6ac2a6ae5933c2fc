#!/usr/bin/env bash
# Fine-tune a checkpoint on one machine or several.
#
#   qwen-vl-finetune/scripts/sft.sh --num_train_epochs 2            the small model that comes along, demo data
#   MODEL=Qwen/Qwen3-VL-4B-Instruct DATASET_CONFIG=my.toml DATASETS=mine%50,other \
#       qwen-vl-finetune/scripts/sft.sh --learning_rate 1e-5
#
# Flags after the script's name go to train_qwen.py and win over those below. What the environment sets:
#   MODEL           checkpoint folder or hub name       DATASETS, DATASET_CONFIG   as --dataset_use, --dataset_config
#   OUTPUT          result folder                       NPROC_PER_NODE             processes; default: GPUs, else 1
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT         several machines; default: this one alone
set -euo pipefail

package=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
nodes=${NNODES:-1}

launcher=(torchrun "--nproc_per_node=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}")
if ((nodes > 1)); then
    launcher+=("--nnodes=$nodes" "--node_rank=${NODE_RANK:?rank of this machine, 0 to NNODES - 1}")
    launcher+=("--master_addr=${MASTER_ADDR:?address of machine 0}" "--master_port=${MASTER_PORT:-29500}")
else
    launcher+=(--standalone)
fi

flags=(
    --model_name_or_path "${MODEL:-$package/../models/qwen3-vl-nano}"
    --dataset_config "${DATASET_CONFIG:-$package/demo/datasets.toml}"
    --dataset_use "${DATASETS:-single_images}"
    --output_dir "${OUTPUT:-output/sft}"
    --tune_mm_llm True --tune_mm_mlp True --tune_mm_vision False
    --model_max_length 8192
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4
    --learning_rate 1e-5 --weight_decay 0 --warmup_ratio 0.03 --lr_scheduler_type cosine --max_grad_norm 1
    --num_train_epochs 1
    --logging_steps 1 --save_strategy steps --save_steps 500 --save_total_limit 2
    --report_to none
)
set -x
exec "${launcher[@]}" "$package/qwenvl/train/train_qwen.py" "${flags[@]}" "$@"
