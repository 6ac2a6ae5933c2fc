"""What happens beside the training steps: the progress bar, and the clock of --max_minutes."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class ProgressBar(TrainerCallback):
    """One bar over all steps with the last logged loss and tokens per second, drawn by the first process."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            # A log file gets a line every half minute, a terminal a moving bar.
            interval = 0.1 if sys.stderr.isatty() else 30
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step",
                mininterval=interval, maxinterval=interval, dynamic_ncols=True,
            )  # fmt: skip

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.bar is not None and logs is not None and "loss" in logs:
            speed = f"{logs['tokens_per_second']:,.0f} tokens/s"
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}, {speed}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Clock(TrainerCallback, ExportableState):
    """Seconds of training, those before a resume included, and the end of training at --max_minutes.

    `agreed` is the first process's time at the start of the step, which every process acts on, so that all
    stop at the same step.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self.limit = None if max_minutes is None else 60 * max_minutes
        self.before = 0.0
        self.agreed = 0.0
        self._start: float | None = None

    @property
    def seconds(self) -> float:
        """This process's own time, in seconds."""
        return self.before + (time.perf_counter() - self._start if self._start is not None else 0.0)

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"args": {"seconds": self.seconds}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        kept: Any = state.stateful_callbacks  # name -> what state() gave, as JSON has it after a resume
        self.before = self.agreed = kept["Clock"]["args"]["seconds"] if "Clock" in kept else 0.0
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.limit is not None and self.agreed >= self.limit:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
            control.should_log = True
