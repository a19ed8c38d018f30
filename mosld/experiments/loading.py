"""The model, tokenizer and adapter of a command, or why they cannot be loaded. Nothing in their folders is run."""

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
from ..mixture.spec import Mixture
from ..tuner.config import MoSLDConfig
from .inputs import RunInputs

# Paths that are never followed: --model says what is loaded, and a saved prompt is not tokenized again.
NOT_FOLLOWED = ("base_model_name_or_path", "tokenizer_name_or_path")


class ModelError(ValueError):
    """A model, tokenizer or adapter that cannot be loaded."""


def load_model(inputs: RunInputs) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model, on this process's device, and its tokenizer, padding on the right."""
    if inputs.model:
        model, tokenizer = _load_own(inputs.model)
    else:
        with PartialState().main_process_first():
            train_base_apart(quick=inputs.quick)
        model, tokenizer = load_base(quick=inputs.quick)
    torch.nn.Module.to(model, PartialState().device)
    return model.requires_grad_(False), tokenizer


def _load_own(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_model_folder(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the model {name!r} cannot be loaded: give a folder with config.json, a tokenizer and "
            f"safetensors weights, or the hub name of a causal language model\n{error}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads, so any token serves
    tokenizer.padding_side = "right"  # with a causal model, what stands to the right of a token cannot reach it
    return model, tokenizer


def load_adapter(model: PreTrainedModel, adapter: str) -> PeftModel:
    folder = Path(adapter)
    _check_adapter_config(folder)
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except AdapterFileError:
        raise
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} is cut off, altered or no safetensors file: {error}") from error
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the adapter in {folder} does not fit the model: {error}") from error


def _check_adapter_config(folder: Path) -> None:
    """raises ModelError or AdapterFileError for a configuration that PEFT cannot use, or that reads other folders."""
    config = folder / CONFIG
    if not config.is_file():
        raise ModelError(f"{folder} is not a saved adapter: {CONFIG} is missing")
    check_weights(folder)
    fields = read_json(config)
    check_expressions(fields, config)
    method = fields.get("peft_type")
    if method not in [*PeftType]:
        raise ModelError(f"{config} cannot be used: its peft_type is {method!r}, which PEFT does not know")
    for name, value in fields.items():
        names_a_folder = name.endswith("_path") or name == "adapters"
        if value and names_a_folder and name not in NOT_FOLLOWED:
            raise ModelError(
                f"{config} cannot be used: its {name}, {value!r:.100}, would have other folders' files opened"
            )


def mixture_of(model: PeftModel) -> Mixture | None:
    """That of the adapter's layers; None of another method's."""
    config = model.peft_config["default"]
    return config.mixture_of("") if isinstance(config, MoSLDConfig) else None
