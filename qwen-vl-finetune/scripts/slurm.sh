#!/usr/bin/env bash
#SBATCH --job-name=sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
# One of the other scripts on all machines of a Slurm job.  From the repository's root, on a shared file system:
#
#   SCRIPT=sft_32b.sh sbatch --nodes=4 qwen-vl-finetune/scripts/slurm.sh --num_train_epochs 2
#
# Environment and further flags as for sft.sh; SCRIPT names the script, by default sft.sh.
set -euo pipefail
# Slurm runs a copy of this file, so the others are found from where the job was submitted.
script=$SLURM_SUBMIT_DIR/qwen-vl-finetune/scripts/${SCRIPT:-sft.sh}
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}
# Jobs that share a machine must not meet at one port.
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export NNODES=$SLURM_JOB_NUM_NODES MASTER_ADDR MASTER_PORT
# shellcheck disable=SC2016  # Each machine has its own SLURM_NODEID.
srun bash -c 'NODE_RANK=$SLURM_NODEID exec "$@"' bash "$script" "$@"
