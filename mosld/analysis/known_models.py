"""Models without weights, on the meta device: published ones by name, a folder's, the embedded one. No download."""

from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..embedded import base_model
from ..embedded.base_model import EMBEDDED

# name -> (family in transformers, model class without the family's name, sizes that differ from the family's defaults)
KNOWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-2-7b": ("Llama", "ForCausalLM", {}),
    "llama-2-13b": (
        "Llama", "ForCausalLM",
        dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    ),
    "llama-2-70b": (
        "Llama", "ForCausalLM",
        dict(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8,
        ),
    ),
    "llama-3-8b": (
        "Llama", "ForCausalLM", dict(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
    ),
    "llama-3-70b": (
        "Llama", "ForCausalLM",
        dict(
            vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8,
        ),
    ),
    "llama-3.2-1b": (
        "Llama", "ForCausalLM",
        dict(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
    ),
    "llama-3.2-3b": (
        "Llama", "ForCausalLM",
        dict(
            vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
            num_key_value_heads=8, tie_word_embeddings=True,
        ),
    ),
    "qwen2.5-0.5b": (
        "Qwen2", "ForCausalLM",
        dict(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
    ),
    "qwen2.5-1.5b": (
        "Qwen2", "ForCausalLM",
        dict(
            vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
    ),
    "qwen2.5-7b": (
        "Qwen2", "ForCausalLM",
        dict(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4,
        ),
    ),
    "qwen3-8b": (
        "Qwen3", "ForCausalLM",
        dict(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128,
        ),
    ),
    "mistral-7b": ("Mistral", "ForCausalLM", {}),
    "gemma-2b": (
        "Gemma", "ForCausalLM",
        dict(
            vocab_size=256000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
            num_key_value_heads=1, head_dim=256,
        ),
    ),
    "gpt2": ("GPT2", "LMHeadModel", {}),
    "bert-base": ("Bert", "Model", {}),
    "t5-base": (
        "T5", "ForConditionalGeneration", dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    ),
    "vit-base": ("ViT", "Model", {}),
}  # fmt: skip


def build(name: str, quick: bool = False) -> nn.Module:
    """The model of this name in bfloat16 on the meta device, which has shapes and no numbers.

    name: one of KNOWN; "embedded", that of `mosld train` (with quick, of `mosld train --quick`); or a folder with
        config.json. A model given by name is one of transformers' classes, random or trained makes no difference here.
    raises ValueError, listing what is known, for another name, and for a folder whose model transformers does not know.
    """
    with torch.device("meta"):
        if name == EMBEDDED:
            model = _embedded(quick)
        elif name in KNOWN:
            family, head, sizes = KNOWN[name]
            config = getattr(transformers, f"{family}Config")(**sizes)
            model = getattr(transformers, f"{family}{head}")(config)
        elif Path(name).is_dir():
            model = _of_folder(Path(name))
        else:
            raise ValueError(
                f"model must be one of {', '.join([*KNOWN, EMBEDDED])}, or a folder with config.json, got {name!r}: "
                "sizes are taken from configurations, and nothing is downloaded"
            )
    return model.to(torch.bfloat16)


def _embedded(quick: bool) -> nn.Module:
    settings = base_model.QUICK if quick else base_model.FULL

    class Tokens:
        """What the model's sizes need of a tokenizer, which would first have to be trained."""

        eos_token_id, pad_token_id = 0, 1

        def __len__(self) -> int:
            return settings.vocabulary

    return base_model.new_model(settings, cast(Any, Tokens()))


def _of_folder(folder: Path) -> nn.Module:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for name in config.architectures or []:
            cls = getattr(transformers, str(name), None)
            if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
                return cls(config)
        return AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no config.json of a model that transformers knows: {error}") from error
