"""The model, tokenizer and adapter that a command is given, or why they cannot be loaded. Nothing in their folders is run."""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel, PeftType
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..embedded.base_model import load_base, train_base_apart
from ..files.adapter_folder import CONFIG, WEIGHTS, AdapterFileError, check_weights, read_json
from ..files.model_folder import check_model_folder
from ..files.safe_regex import check_expressions

# What is told and never followed: --model says what is loaded, and a saved prompt is not tokenized again.
NOT_FOLLOWED = ("base_model_name_or_path", "tokenizer_name_or_path")


class ModelError(ValueError):
    """A model, tokenizer or adapter that cannot be loaded."""


def load_model(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not options.model:
        with PartialState().main_process_first():
            train_base_apart(quick=options.quick)
        model, tokenizer = load_base(quick=options.quick)
        torch.nn.Module.to(model, PartialState().device)
        return model, tokenizer
    check_model_folder(Path(options.model))
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the model {options.model!r} cannot be loaded: give a folder with config.json, a tokenizer and safetensors "
            f"weights, or the hub name of a causal language model\n{error}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads, so any token serves
    tokenizer.padding_side = "right"  # with a causal model, what stands to the right of a token cannot reach it
    torch.nn.Module.to(model, PartialState().device)
    return model.requires_grad_(False), tokenizer


def load_adapter(model: PreTrainedModel, adapter: str) -> PeftModel:
    folder = Path(adapter)
    config = folder / CONFIG
    if not config.is_file():
        raise ModelError(f"{folder} is not a saved adapter: {CONFIG} is missing")
    check_weights(folder)
    check_expressions(fields := read_json(config), config)
    if (method := fields.get("peft_type")) not in [*PeftType]:
        raise ModelError(f"{config} cannot be used: its peft_type is {method!r}, which PEFT does not know")
    for name, value in fields.items():
        if value and name not in NOT_FOLLOWED and (name.endswith("_path") or name == "adapters"):
            raise ModelError(
                f"{config} cannot be used: its {name}, {value!r:.100}, would have other folders' files opened"
            )
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except AdapterFileError:
        raise
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} is cut off, altered or no safetensors file: {error}") from error
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the adapter in {folder} does not fit the model: {error}") from error
