"""Train a Qwen-VL checkpoint on preferences: of two answers to a question, which is the better one (DPO).

    torchrun --nproc_per_node=2 qwenvl/train/train_dpo.py --model_name_or_path CHECKPOINT \\
        --dataset_config data.toml --dataset_use mine --output_dir output/mine \\
        --lora_enable True --learning_rate 5e-6 --beta 0.1

Everything but the loss is that of `train_qwen.py`; `preference` says what differs.
"""

from qwenvl.train.preference import PreferenceTrainer
from qwenvl.train.train_qwen import leave, main

if __name__ == "__main__":
    main(PreferenceTrainer)
    leave()
