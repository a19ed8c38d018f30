"""One progress bar for a training run, with the loss beside it instead of a line for every logged loss."""

import sys

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer


class Progress(ProgressCallback):
    def __init__(self, label: str):
        super().__init__()
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            # Not where output is no terminal: a file would get a line for every change. It gets ten in all.
            self.training_bar = tqdm(total=state.max_steps, desc=self.label, unit="step", leave=False, disable=None)
        self.current_step = self.next_line = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if state.is_world_process_zero and self.training_bar is not None and loss is not None:
            self.training_bar.set_postfix(loss=f"{float(loss):.3f}")
            if self.training_bar.disable and state.global_step >= self.next_line:
                text = f"{self.label}: step {state.global_step} of {state.max_steps}, loss={float(loss):.3f}"
                print(text, file=sys.stderr, flush=True)
                self.next_line = state.global_step + max(1, state.max_steps // 10)


def show_progress(trainer: Trainer, label: str) -> None:
    """Replace the Trainer's own progress output by one bar called `label`."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress(label))
