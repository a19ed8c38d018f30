"""A merge as a model that runs, and as files: one LoRA, a mixture to train on, or a plain checkpoint."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..convert.export import export_lora
from ..files.atomic import atomic_folder
from .dense import kept, write
from .factored import FactoredMerge, mixed, unload
from .merge import Merged, merged_weights
from .read import read_task_vectors
from .vectors import MergeError, check_untied, named_tensors


@contextlib.contextmanager
def applied(base: nn.Module, merged: Merged) -> Iterator[nn.Module]:
    """Within the block `base` is the merged model, to be run or trained; at its end it is what it was before.

    Args:
        base: The model that `merged` was found on. It is changed in place.
        merged: What `merge` returned.

    Yields:
        The merged model.

    >>> import torch
    >>> from copy import deepcopy
    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from mosld.merging import MergeSettings, applied, merge, read_task_vectors
    >>> base, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    >>> lora = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    >>> lora.save_pretrained("a")
    >>> merged = merge(base, read_task_vectors(["a"]), MergeSettings("task_arithmetic", scale=1.0))
    >>> with applied(base, merged) as model:
    ...     torch.allclose(model(x), lora(x), atol=1e-5)
    True
    >>> torch.allclose(base(x), lora(x), atol=1e-5)
    False
    """
    if merged.factored:
        model = FactoredMerge(base, merged.vectors)
        try:
            model.write(merged.coefficients)
            yield model.model
        finally:
            model.unload()
        return
    with kept(base, merged.layers):
        write(base, merged.updates(base))
        yield base


def save_lora(base: nn.Module, merged: Merged, folder: str | os.PathLike, overwrite: bool = False) -> float:
    """Save a merge as one LoRA, for plain PEFT, whose rank is the sum of the adapters'.

    Args:
        base: The model that `merged` was found on. It is left as it is.
        merged: What `merge` returned.
        folder: Where the LoRA is saved.
        overwrite: Replace an earlier one in `folder`, as `export_lora` does.

    Returns:
        What the LoRA's dtype loses, |saved - merged| / |merged|, as Frobenius norms over all updates.

    Raises:
        MergeError: For a merge that did not stay factored.

    >>> import torch
    >>> from copy import deepcopy
    >>> from peft import LoraConfig, PeftModel, get_peft_model
    >>> from torch import nn
    >>> from mosld.merging import MergeSettings, merge, read_task_vectors, save_lora
    >>> base, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    >>> lora = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    >>> lora.save_pretrained("a")
    >>> merged = merge(base, read_task_vectors(["a"]), MergeSettings("task_arithmetic", scale=1.0))
    >>> save_lora(base, merged, "merged") < 1e-6
    True
    >>> torch.allclose(PeftModel.from_pretrained(base, "merged")(x), lora(x), atol=1e-5)
    True
    """
    _expect_factored(merged, "lora")
    model = FactoredMerge(base, merged.vectors)
    try:
        model.write(merged.coefficients)
        export_lora(model.model, folder, overwrite=overwrite)
    finally:
        model.unload()
    return _lost(base, merged, Path(folder))


def save_mixture(base: nn.Module, merged: Merged, folder: str | os.PathLike, rank: int | None = None) -> float:
    """Save a merge as a MoSLD with an expert a task, which starts as the merged model and can be trained from there.

    Args:
        base: The model that `merged` was found on. It is left as it is.
        merged: What `merge` returned.
        folder: Where the MoSLD is saved.
        rank: Of the A that all experts share. None keeps an A for each.

    Returns:
        What sharing A loses, |saved - merged| / |merged|, as Frobenius norms over all updates.

    Raises:
        MergeError: For a merge that did not stay factored.

    >>> from copy import deepcopy
    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from mosld import MoSLDConfig
    >>> from mosld.merging import MergeSettings, merge, read_task_vectors, save_mixture
    >>> base = nn.Sequential(nn.Linear(6, 5))
    >>> lora = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    >>> lora.save_pretrained("a")
    >>> merged = merge(base, read_task_vectors(["a", "a"]), MergeSettings("task_arithmetic"))
    >>> save_mixture(base, merged, "mixture", rank=2) < 1e-5  # both have one A: sharing it loses nothing
    True
    >>> MoSLDConfig.from_pretrained("mixture").num_experts
    2
    """
    _expect_factored(merged, "mosld")
    model = mixed(base, merged.vectors, merged.coefficients, merged.layers, rank)
    try:
        with atomic_folder(Path(folder)) as aside:
            model.save_pretrained(str(aside))
    finally:
        unload(model)
    return _lost(base, merged, Path(folder))


def save_checkpoint(
    base: PreTrainedModel, merged: Merged, folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None = None
) -> float:
    """Save the merged weights in the base's dtype.

    Args:
        base: The model that `merged` was found on. It is left as it is.
        merged: What `merge` returned.
        folder: Where the model is saved.
        tokenizer: Saved beside the model.

    Returns:
        What the base's dtype loses, |saved - merged| / |update|, as Frobenius norms over all updates.

    Raises:
        MergeError: For an adapter of a layer with a tied weight.

    >>> import torch
    >>> from copy import deepcopy
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> from mosld.merging import MergeSettings, merge, read_task_vectors, save_checkpoint
    >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes))
    >>> tuned = deepcopy(base)
    >>> with torch.no_grad():
    ...     _ = tuned.lm_head.weight.add_(1)
    >>> tuned.save_pretrained("tuned")
    >>> merged = merge(base, read_task_vectors(["tuned"]), MergeSettings("task_arithmetic", scale=0.5))
    >>> save_checkpoint(base, merged, "merged") < 1e-6
    True
    >>> added = LlamaForCausalLM.from_pretrained("merged").lm_head.weight - base.lm_head.weight
    >>> torch.allclose(added, torch.full((9, 8), 0.5))
    True
    """
    check_untied(merged.vectors, named_tensors(base))
    # The base's own weights hold the merged ones while they are saved, so that there is no second copy of the model.
    with kept(base, merged_weights(merged)):
        lost = write(base, merged.updates(base))
        save_model(base, Path(folder), tokenizer)
    return lost


def save_model(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Save a whole model, and its tokenizer beside it, in the place of what is in `folder`."""
    with atomic_folder(folder) as aside:
        model.save_pretrained(str(aside))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(aside))


def _expect_factored(merged: Merged, form: str) -> None:
    if not merged.factored:
        raise MergeError(
            f"{form} needs a merge that stays factored: adapters only, with task_arithmetic, adamerging_task or "
            f"adamerging_layer; got {merged.settings.method}. Save it as a checkpoint"
        )


@torch.no_grad()
def _lost(base: nn.Module, merged: Merged, folder: Path) -> float:
    """|saved - merged| / |merged|, of the files as they can be read again"""
    weights = named_tensors(base)
    (saved,) = read_task_vectors([folder])
    lost = size = 0.0
    for name, update in merged.updates(base):
        found = saved.delta(name, weights[name].detach().cpu())
        error = update if found is None else found - update
        lost += float(error.double().square().sum())
        size += float(update.double().square().sum())
    return (lost / size) ** 0.5 if size else 0.0
