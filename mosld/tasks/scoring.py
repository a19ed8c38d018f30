"""Scoring without generation: the log-likelihood of each choice after the prompt, as lm-evaluation-harness counts it.

accuracy        the choice with the greatest sum of log-probabilities is the right one
accuracy_norm   the same with every sum divided by the choice's length in characters
"""

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from .encode import Encoded, Encoder
from .examples import Example, Task


@dataclass(frozen=True)
class Score:
    """How well a model answers the test examples of a task.

    For free text `accuracy` is the share of answers that greedy decoding reproduces; accuracy_norm, chance and majority
    are None.

    Args:
        accuracy: Share of right answers, in [0, 1].
        accuracy_norm: The same with sums divided by the choices' lengths.
        n: Number of examples.
        chance: What guessing at random would reach.
        majority: What the choice would reach that most often was the right answer in training. None without training
            examples.
        right: Which items `accuracy` counts, one character an item, "1" or "0".
    """

    accuracy: float
    accuracy_norm: float | None
    n: int
    chance: float | None
    majority: float | None
    right: str = field(default="", repr=False)

    def summary(self) -> dict[str, Any]:
        """All but `right`, as results.json has it."""
        fields = asdict(self)
        del fields["right"]
        return fields


def score_tasks(
    model: nn.Module, encoder: Encoder, tasks: Sequence[Task], batch_size: int = 64,
    on_batch: Callable[[Task, Tensor], None] | None = None, label: str = "score",
    on_task: Callable[[Task], None] | None = None,
) -> dict[str, Score]:  # fmt: skip
    """Score the test examples of every task.

    Args:
        model: A causal language model. It is in eval mode while it is scored.
        encoder: Encodes prompts and choices.
        tasks: Those without test examples are left out.
        batch_size: Prompts with one choice each in a forward.
        on_batch: Called after every forward with the task and the attention mask [rows, tokens].
        label: Of the progress bar.
        on_task: Called before each task.

    Returns:
        The name of a task -> its Score.

    Raises:
        TaskFileError: For an answer that does not fit the encoder's max_length.
        ValueError: For a batch_size below 1.
    """
    total = 0
    for task in tasks:
        total += sum(len(candidates(example)) for example in task.test)
    scores = {}
    with tqdm(total=total, desc=label, unit="choice", leave=False, disable=None) as progress:
        for task in tasks:
            if not task.test:
                continue
            if on_task is not None:
                on_task(task)

            def after(mask: Tensor, task: Task = task) -> None:
                progress.update(len(mask))
                if on_batch is not None:
                    on_batch(task, mask)

            results = log_likelihoods(model, _pairs(encoder, task), encoder.pad, batch_size, after)
            scores[task.name] = _score(task, results)
    return scores


def candidates(example: Example) -> tuple[str, ...]:
    """The texts whose likelihood is computed: the choices, or the one answer in free text."""
    return example.choices or (example.completion,)


def _pairs(encoder: Encoder, task: Task) -> list[Encoded]:
    """Every candidate of every test example, in order."""
    pairs = []
    for example in task.test:
        pairs += [encoder.pair(example.prompt, text) for text in candidates(example)]
    return pairs


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, pairs: Sequence[Encoded], pad_token_id: int, batch_size: int = 64,
    after: Callable[[Tensor], None] | None = None,
) -> list[tuple[float, bool]]:  # fmt: skip
    """Score encoded answers after their prompts.

    Rows are padded on the right and masked, so that a pair's result does not depend on its batch.

    Args:
        model: A causal language model. It is in eval mode during this call.
        pairs: Prompts with an answer each.
        pad_token_id: Fills rows up.
        batch_size: Pairs in a forward.
        after: Called after every forward with the attention mask [rows, tokens].

    Returns:
        For each pair the sum of log p(answer token | what precedes it), and whether greedy decoding gives the answer.

    Raises:
        ValueError: For a batch_size below 1.
        FloatingPointError: Where the model's logits are NaN, of which no answer can be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    # By length, so that little of a batch is padding; the longest first, so that memory is short at once or never.
    order = sorted(range(len(pairs)), key=lambda i: -pairs[i].length)
    was_training = model.training
    model.eval()
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [pairs[i] for i in chosen]
        input_ids, mask = _pad(rows, pad_token_id, next(model.parameters()).device)
        # The position that predicts the first answer token of any row.
        first = min(len(row.prompt) for row in rows) - 1
        log_probs = _logits(model, input_ids, mask, first).float().log_softmax(-1)
        for i, row, row_log_probs in zip(chosen, rows, log_probs, strict=True):
            begin = len(row.prompt) - 1 - first
            own = row_log_probs[begin : begin + len(row.answer)]
            if bool(own.isnan().any()):
                raise FloatingPointError(
                    "the model's logits are no numbers: its weights or the adapter's have diverged, and a score of "
                    "them would mean nothing"
                )
            answer = torch.tensor(row.answer, device=own.device)
            total = own.gather(1, answer.unsqueeze(1)).sum()
            results[i] = (float(total), bool((own.argmax(-1) == answer).all()))
        if after is not None:
            after(mask)
    model.train(was_training)
    return results


def _pad(rows: Sequence[Encoded], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> input_ids and attention_mask, both [rows, longest row]"""
    width = max(row.length for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : row.length] = torch.tensor(row.prompt + row.answer)
        mask[i, : row.length] = 1
    return input_ids.to(device), mask.to(device)


def _logits(model: nn.Module, input_ids: Tensor, mask: Tensor, first: int) -> Tensor:
    """-> logits [rows, tokens - first, vocabulary]: a large vocabulary is projected only where it is read."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        keep = torch.arange(first, input_ids.shape[1], device=input_ids.device)
        return model(input_ids=input_ids, attention_mask=mask, logits_to_keep=keep).logits
    return model(input_ids=input_ids, attention_mask=mask).logits[:, first:]


def _score(task: Task, results: list[tuple[float, bool]]) -> Score:
    """results: one entry per candidate of every test example, in order."""
    entries = iter(results)
    seen = Counter(example.completion for example in task.train)
    right, choosing = "", 0
    right_norm = guessed = chance = 0.0
    for example in task.test:
        of_example = list(itertools.islice(entries, len(candidates(example))))
        if example.answer is None:
            _, reproduced = of_example[0]
            right += "1" if reproduced else "0"
            continue
        choosing += 1
        sums = [total for total, _ in of_example]
        norms = [total / len(text) for total, text in zip(sums, example.choices, strict=True)]
        counts = [seen[text] for text in example.choices]
        right += "1" if _argmax(sums) == example.answer else "0"
        right_norm += _argmax(norms) == example.answer
        guessed += _argmax(counts) == example.answer
        chance += 1 / len(example.choices)
    n = len(task.test)
    accuracy = right.count("1") / n
    if not choosing:
        return Score(accuracy, None, n, None, None, right)
    majority = guessed / n if task.train else None
    return Score(accuracy, right_norm / n, n, chance / n, majority, right)


def _argmax(values: Sequence[float]) -> int:
    """The first of the greatest."""
    return values.index(max(values))
