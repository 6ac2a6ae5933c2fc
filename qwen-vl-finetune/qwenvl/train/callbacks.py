"""What happens beside the training steps: the progress bar."""

from __future__ import annotations

import sys

from tqdm import tqdm
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """One bar over all steps with the last logged loss and tokens per second, drawn by the first process."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
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
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.4f}, {logs['tokens_per_second']:,.0f} tokens/s", refresh=False
            )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
