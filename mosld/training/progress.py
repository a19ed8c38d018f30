"""One progress bar for a training run, with the loss beside it instead of a line for every logged loss."""

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer


class Progress(ProgressCallback):
    def __init__(self, label: str):
        super().__init__()
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            # Not where output is no terminal: a file would get a line for every change.
            self.training_bar = tqdm(total=state.max_steps, desc=self.label, unit="step", leave=False, disable=None)
        self.current_step = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if state.is_world_process_zero and self.training_bar is not None and loss is not None:
            self.training_bar.set_postfix(loss=f"{float(loss):.3f}")


def show_progress(trainer: Trainer, label: str) -> None:
    """Replace the Trainer's own progress output by one bar called `label`."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress(label))
