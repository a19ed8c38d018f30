"""Scoring without generation: the log-likelihood of each choice after the prompt, as lm-evaluation-harness counts it.

accuracy        the choice with the greatest sum of log-probabilities is the right one
accuracy_norm   the same with every sum divided by the choice's length in characters
"""

import inspect
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
    """accuracy, accuracy_norm in [0, 1] over n examples; chance and majority: what guessing would reach.

    majority picks, of the offered choices, the one that most often was the right answer in training; None without
    training examples.
    right: which items `accuracy` counts, one character an item, "1" or "0".
    For free text accuracy is the share of answers that greedy decoding reproduces; the other fields are None.
    """

    accuracy: float
    accuracy_norm: float | None
    n: int
    chance: float | None
    majority: float | None
    right: str = field(default="", repr=False)

    def summary(self) -> dict[str, Any]:
        """All but `right`, as results.json has it."""
        return {name: value for name, value in asdict(self).items() if name != "right"}


def score_tasks(
    model: nn.Module, encoder: Encoder, tasks: Sequence[Task], batch_size: int = 64,
    on_batch: Callable[[Task, Tensor], None] | None = None, label: str = "score",
    on_task: Callable[[Task], None] | None = None,
) -> dict[str, Score]:  # fmt: skip
    """Task name -> Score of its test examples; tasks without test examples are left out.

    on_batch: called after every forward with the task and the attention mask [rows, tokens]. on_task: before each task.
    """
    tested = [task for task in tasks if task.test]
    total = sum(len(candidates(example)) for task in tested for example in task.test)
    scores = {}
    with tqdm(total=total, desc=label, unit="choice", leave=False) as progress:
        for task in tested:
            if on_task is not None:
                on_task(task)
            pairs = [encoder.pair(e.prompt, text) for e in task.test for text in candidates(e)]

            def after(mask: Tensor, task: Task = task) -> None:
                progress.update(len(mask))
                if on_batch is not None:
                    on_batch(task, mask)

            results = log_likelihoods(model, pairs, encoder.pad, batch_size, after)
            scores[task.name] = _score(task, results)
    return scores


def candidates(example: Example) -> tuple[str, ...]:
    return example.choices or (example.completion,)


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, pairs: Sequence[Encoded], pad_token_id: int, batch_size: int = 64,
    after: Callable[[Tensor], None] | None = None,
) -> list[tuple[float, bool]]:  # fmt: skip
    """For each pair: the sum of log p(answer token | what precedes it), and whether greedy decoding gives the answer.

    Rows are padded on the right and masked, so that a pair's result does not depend on its batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    was_training = model.training
    model.eval()
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].prompt) - len(pairs[i].answer))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [pairs[i] for i in chosen]
        input_ids, mask = _pad(rows, pad_token_id, next(model.parameters()).device)
        first = min(len(row.prompt) for row in rows) - 1  # the position that predicts the first answer token
        log_probs = _logits(model, input_ids, mask, first).float().log_softmax(-1)
        for i, row, row_log_probs in zip(chosen, rows, log_probs, strict=True):
            begin = len(row.prompt) - 1 - first
            own = row_log_probs[begin : begin + len(row.answer)]
            answer = torch.tensor(row.answer, device=own.device)
            total = own.gather(1, answer.unsqueeze(1)).sum()
            results[i] = (float(total), bool((own.argmax(-1) == answer).all()))
        if after is not None:
            after(mask)
    model.train(was_training)
    return results


def _pad(rows: Sequence[Encoded], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> input_ids and attention_mask, both [rows, longest row]"""
    width = max(len(row.prompt) + len(row.answer) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        length = len(row.prompt) + len(row.answer)
        input_ids[i, :length] = torch.tensor(row.prompt + row.answer)
        mask[i, :length] = 1
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
    right: list[bool] = []
    right_norm = guessed = chance = 0.0
    for example in task.test:
        own = [next(entries) for _ in candidates(example)]
        if example.answer is None:
            right.append(own[0][1])
            continue
        sums = [total for total, _ in own]
        norms = [total / len(text) for total, text in zip(sums, example.choices, strict=True)]
        counts = [seen[text] for text in example.choices]
        right.append(sums.index(max(sums)) == example.answer)
        right_norm += norms.index(max(norms)) == example.answer
        guessed += counts.index(max(counts)) == example.answer
        chance += 1 / len(example.choices)
    n, items = len(task.test), "".join("01"[hit] for hit in right)
    if all(example.answer is None for example in task.test):
        return Score(sum(right) / n, None, n, None, None, items)
    majority = guessed / n if task.train else None
    return Score(sum(right) / n, right_norm / n, n, chance / n, majority, items)
