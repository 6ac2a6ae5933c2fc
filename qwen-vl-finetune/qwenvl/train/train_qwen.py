"""Fine-tune a Qwen-VL checkpoint.

    torchrun --nproc_per_node=2 qwenvl/train/train_qwen.py --model_name_or_path CHECKPOINT \\
        --dataset_config data.toml --dataset_use mine%50 --output_dir output/mine \\
        --tune_mm_llm True --tune_mm_mlp True --learning_rate 1e-5

    command line -> processor, model -> frozen and trained components -> data module -> QwenVLTrainer
      -> output_dir: weights, configuration, processor, generation settings, the arguments used

Also runs as plain `python train_qwen.py ...`, one process.  Started again on an output folder that holds
checkpoints, it goes on from the last complete one.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, cast

import transformers
from transformers import ProgressCallback, set_seed

from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.train import attention, evaluation, speed
from qwenvl.train.adapters import add_adapters
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.callbacks import ProgressBar
from qwenvl.train.checkpoints import checkpoint_to_resume
from qwenvl.train.model_loading import load_config, load_model, load_processor, stored_dtype
from qwenvl.train.parameters import describe, set_model
from qwenvl.train.trainer import QwenVLTrainer

logger = logging.getLogger("qwenvl.train")


def build_trainer(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    kind: type[QwenVLTrainer] = QwenVLTrainer,
) -> QwenVLTrainer:
    """Everything before the first step; data are checked before the model is loaded.

    Raises ValueError, with the file or flag and the remedy, for what cannot be trained.
    """
    if data_args.streaming and training_args.max_steps < 1:
        raise ValueError("--streaming True reads rows without end; give --max_steps")
    set_seed(training_args.seed)
    config = load_config(model_args, training_args)
    dtype = stored_dtype(config)
    processor = load_processor(model_args, data_args, training_args)
    data_module = make_supervised_data_module(
        processor,
        data_args,
        model_config=config,
        model_max_length=training_args.model_max_length,
        seed=training_args.seed,
        pairs=kind.pairs,
    )
    evaluation.check(training_args, data_module["eval_dataset"], kind.measured)
    model = load_model(config, model_args, data_args, training_args)
    if training_args.lora_enable:
        model = add_adapters(model_args, training_args, model)
    else:
        set_model(model_args, model)
    trainer = kind(
        model=model,
        processor=processor,
        stored_dtype=dtype,
        model_args=model_args,
        data_args=data_args,
        args=training_args,
        callbacks=[ProgressBar()],
        **data_module,
    )
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
    for line in describe(model, trainer.components):
        logger.info(line)
    half = training_args.bf16 or training_args.fp16
    how = attention.describe(trainer.vl_config, training_args.device.type, half=half)
    logger.info(speed.describe(training_args, data_args, how))
    return trainer


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    kind: type[QwenVLTrainer] = QwenVLTrainer,
) -> QwenVLTrainer:
    """Train and save; returns the trainer, whose `state.log_history` holds the loss curve."""
    checkpoint = checkpoint_to_resume(str(training_args.output_dir), training_args.resume_from_checkpoint)
    trainer = build_trainer(model_args, data_args, training_args, kind)
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_final()
    return trainer


def main(kind: type[QwenVLTrainer] = QwenVLTrainer) -> None:
    """The command line of a kind of training."""
    # Where a library aborts the process, the log says what was running.
    faulthandler.enable()
    parser = transformers.HfArgumentParser(cast(Any, kind.arguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if training_args.process_index == 0:
        logging.getLogger("qwenvl").setLevel(logging.INFO)
    try:
        trainer = train(model_args, data_args, training_args, kind)
    except ValueError as error:
        # One message, not one traceback a process.
        logger.debug("traceback", exc_info=True)
        message = f"{kind.program}: {error}"
        _leave_for_torchrun(message)
        sys.exit(message if training_args.local_process_index == 0 else 1)
    trainer.accelerator.end_training()


def leave() -> NoReturn:
    """End the process with success: exit handlers run, the interpreter is not taken down.

    Taking it down ends threads that wait for its lock, such as the process group's that lets go of a last
    tensor, inside C++ that answers with an abort: "terminate called without an active exception".
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _leave_for_torchrun(message: str) -> None:
    """Put the message where torchrun looks for the cause: its own long report then ends with it."""
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": cause}), encoding="utf-8")


if __name__ == "__main__":
    main()
    leave()
