"""Scores of a model with or without an adapter, and which experts the adapter uses for which task."""

from ..layers.stats import RouterStats, RouterUse
from ..tasks.scoring import Score, score_tasks
from .inputs import RunInputs, chosen_tasks, task_encoder
from .loading import load_adapter, load_model, mixture_of
from .methods import task_setter, use_recorder


def evaluate(inputs: RunInputs, adapter: str | None) -> dict[str, Score]:
    """Task name -> score, of the model with the adapter saved in this folder, or alone."""
    tasks = chosen_tasks(inputs, only_test=True)
    model, tokenizer = load_model(inputs)
    encoder = task_encoder(inputs, model, tokenizer, tasks)
    # A base alone routes by nothing, an adapter perhaps by task.
    on_task = None
    if adapter:
        model = load_adapter(model, adapter)
        on_task = task_setter(model, tasks, mixture_of(model))
    return score_tasks(model, encoder, tasks, inputs.eval_batch_size, on_task=on_task)


def expert_use(inputs: RunInputs, adapter: str) -> tuple[dict[str, dict[str, RouterStats]], dict[str, Score]]:
    """task -> layer -> its routing of the test items, and task -> score."""
    tasks = chosen_tasks(inputs, only_test=True)
    base, tokenizer = load_model(inputs)
    encoder = task_encoder(inputs, base, tokenizer, tasks)
    model = load_adapter(base, adapter)
    mixture = mixture_of(model)
    use = RouterUse()
    on_batch = use_recorder(use, model, mixture)
    on_task = task_setter(model, tasks, mixture)
    scores = score_tasks(model, encoder, tasks, inputs.eval_batch_size, on_batch, on_task=on_task)
    return use.stats(), scores
