"""Fine-tune a Qwen-VL checkpoint.

    torchrun --nproc_per_node=2 qwenvl/train/train_qwen.py --model_name_or_path CHECKPOINT \\
        --dataset_config data.toml --dataset_use mine%50 --output_dir output/mine \\
        --tune_mm_llm True --tune_mm_mlp True --data_flatten True --learning_rate 1e-5

    command line -> processor, model -> frozen and trained components -> data module -> QwenVLTrainer
      -> output_dir: weights, configuration, processor, generation settings, the arguments used

Also runs as plain `python train_qwen.py ...`, one process.  Started again on an output folder that holds
checkpoints, it goes on from the last complete one.
"""

from __future__ import annotations

import logging

import transformers
from transformers import ProgressCallback, set_seed

from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.callbacks import ProgressBar
from qwenvl.train.model_loading import load_model, load_processor
from qwenvl.train.parameters import describe, set_model
from qwenvl.train.trainer import QwenVLTrainer

logger = logging.getLogger("qwenvl.train")


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> QwenVLTrainer:
    """Train and save; returns the trainer, whose `state.log_history` holds the loss curve."""
    set_seed(training_args.seed)
    processor = load_processor(model_args, data_args, training_args)
    model = load_model(model_args, data_args, training_args)
    set_model(model_args, model)
    data_module = make_supervised_data_module(
        processor,
        data_args,
        model_config=model.config,
        model_max_length=training_args.model_max_length,
        seed=training_args.seed,
    )
    trainer = QwenVLTrainer(
        model=model,
        processor=processor,
        model_args=model_args,
        data_args=data_args,
        args=training_args,
        callbacks=[ProgressBar()],
        **data_module,
    )
    trainer.remove_callback(ProgressCallback)
    for line in describe(model, trainer.components):
        logger.info(line)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    return trainer


def main() -> None:
    """The command line."""
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    first = training_args.process_index == 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("qwenvl").setLevel(logging.INFO if first else logging.WARNING)
    train(model_args, data_args, training_args)


if __name__ == "__main__":
    main()
