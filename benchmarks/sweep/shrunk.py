"""A model of any configuration type of transformers, small enough for a CPU and a second.

Sizes are recognised by the names of a configuration's fields. Types hold each other to relations that no rule of names
can know (a width that is a multiple of another's), so that there are three ways to shrink, from the smallest: the first
whose model can be built and run is taken.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

# Fields of which more than two give nothing to see: layers, and what is repeated in them.
_DEPTH = re.compile(
    r"^(n_layers?|layers|depth|num_blocks|.*num_(\w+_)?layers|.*_layers|.*_depth|num_res_blocks|num_stages_\w+)$"
)
_NOT_DEPTH = re.compile(r"skip|return|out_|fuse|index|extract|kv_shared|window|sharing|nextn|dense|feat")
_VOCABULARY = re.compile(r"^(.*_)?vocab_size(_per_layer_input)?$|^vocab_size_.*$")
_TOKEN = re.compile(r"^(.*_)?token_(id|index)$")
_EXPERTS = re.compile(r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)$")
_CHOSEN = re.compile(r"^(num_experts_per_tok|moe_k|moe_topk|num_experts_per_token|top_k_experts|num_selected_experts)$")
_WIDTH = re.compile(
    r"^((\w+_)?hidden_size|d_model|n_embd|(\w+_)?embed_dim|dim|(\w+_)?hidden_dim|embedding_size|projection_dim"
    r"|out_hidden_size|word_embed_proj_dim|emb_dim|(\w+_)?intermediate_size|(\w+_)?ffn_dim|d_ff|mlp_dim|ffn_hidden_size"
    r"|lru_width|decoder_ffn_dim|(\w+_)?ffn_size)$"
)
_FEW = {"num_channels": 3, "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128}
TOKENS = 128  # in every vocabulary
FIRST_SPECIAL = 100  # token ids from here on are those of images, audio and the like


def types() -> list[str]:
    """The name of every configuration type that the installed transformers knows, in alphabetical order."""
    return sorted(transformers.CONFIG_MAPPING.keys())


def configurations(name: str) -> Iterator[tuple[str, PreTrainedConfig]]:
    """How it was shrunk, and the configuration, from the smallest to the largest."""
    for how, width in (("narrow", 8), ("half", 2), ("shallow", 1)):
        try:
            default = AutoConfig.for_model(name)
            yield how, type(default)(**_overrides(default, width, _special_ids()))
        except Exception:  # a relation of this type is broken by this way to shrink
            continue


def _special_ids() -> Iterator[int]:
    yield from range(FIRST_SPECIAL, TOKENS)


def _overrides(config: PreTrainedConfig, width: int, special: Iterator[int]) -> dict[str, Any]:
    """The fields that differ from the defaults; those of configurations inside as dictionaries of their own."""
    changed: dict[str, Any] = {}
    for field, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            inner = _overrides(value, width, special)
            changed[field] = {**inner, "model_type": value.model_type}
        elif isinstance(value, bool) or field.startswith("_"):
            continue
        elif isinstance(value, int):
            small = _smaller(field, value, width, special)
            if small != value:
                changed[field] = small
    return changed


def _smaller(field: str, value: int, width: int, special: Iterator[int]) -> int:
    if _VOCABULARY.match(field) and value > TOKENS:
        return TOKENS
    if _TOKEN.match(field) and value >= FIRST_SPECIAL:
        return next(special, TOKENS - 1)
    if _EXPERTS.match(field):
        return min(value, 8)
    if _CHOSEN.match(field):
        return min(value, 2)
    if _DEPTH.match(field) and not _NOT_DEPTH.search(field):
        return min(value, 2)
    if field in _FEW:
        return min(value, _FEW[field])
    if width > 1 and _WIDTH.match(field) and value % width == 0 and value // width >= 32:
        return value // width
    # Attention's heads shrink with the width, so that the size of a head, where it is not a field, stays whole.
    if width > 1 and re.match(r"^(\w+_)?(num_attention_heads|n_heads?|attention_heads|num_heads)$", field):
        return max(1, value // width) if value % width == 0 else value
    if width > 1 and re.match(r"^(\w+_)?num_key_value_heads$", field):
        return max(1, value // width) if value % width == 0 else 1
    return value


# What a model of the type is taken as: the first of these that has the type. A head gives something to train towards.
HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "MULTIMODAL_LM", "MASKED_LM", "CTC",
    "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "TIME_SERIES_PREDICTION", "PRETRAINING",
)  # fmt: skip


def model_classes(config: PreTrainedConfig) -> list[type[nn.Module]]:
    """The classes to try for a configuration, those with a head first."""
    found: list[type[nn.Module]] = []
    for table in [f"MODEL_FOR_{head}_MAPPING" for head in HEADS] + ["MODEL_MAPPING"]:
        mapping = getattr(modeling_auto, table)
        if type(config) in mapping:
            own = mapping[type(config)]
            found += list(own) if isinstance(own, (tuple, list)) else [own]
    return found


def build(model_class: type[Any], config: PreTrainedConfig) -> nn.Module:
    """The model in float32 with the same random weights every time, in eval mode."""
    torch.manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config) if not hasattr(model_class, "_from_config") else model_class._from_config(config)
    return model.float().eval()


def parameters(model_class: type[Any], config: PreTrainedConfig) -> int:
    """How many a model would have, without building it."""
    with torch.device("meta"):
        model = model_class(config)
    return sum(parameter.numel() for parameter in model.parameters())
