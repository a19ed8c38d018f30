"""Small models of many architectures, built from their configurations, each with an input and the layers to adapt."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import Tensor, nn

from tests.helpers.models import tiny_llama, token_ids

IDS = token_ids()
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
DECODER = dict(
    **SMALL, vocab_size=96, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=0
)


class Architecture(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: Any
    layers: int  # how many of them the targets name
    auto: str = "AutoModelForCausalLM"  # the class that loads it
    output: str = "logits"


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": IDS}


def _t5_tokens() -> dict[str, Tensor]:
    return {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def _qwen3() -> nn.Module:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=8))


def _gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=96, bos_token_id=0, eos_token_id=0)
    )


def _bert() -> nn.Module:
    config = tf.BertConfig(**SMALL, vocab_size=96, max_position_embeddings=64, num_labels=3)
    return tf.BertForSequenceClassification(config)


def _t5() -> nn.Module:
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96)
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=1))


def _vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3))


def _mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2))


ATTENTION = ["q_proj", "v_proj"]
ARCHITECTURES = {
    "Llama": Architecture(tiny_llama, _tokens, "all-linear", 14),
    "Qwen2": Architecture(lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER)), _tokens, ATTENTION, 4),
    "Qwen3": Architecture(_qwen3, _tokens, ATTENTION, 4),
    "Mistral": Architecture(lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER)), _tokens, "all-linear", 14),
    "Mixtral": Architecture(_mixtral, _tokens, ATTENTION, 4),
    "GPT-2": Architecture(_gpt2, _tokens, ["c_attn", "c_fc"], 4),
    "BERT": Architecture(_bert, _tokens, ["query", "value"], 4, "AutoModelForSequenceClassification"),
    "T5": Architecture(_t5, _t5_tokens, ["q", "v"], 12, "AutoModelForSeq2SeqLM"),
    "ViT": Architecture(_vit, _pixels, r".*(query|value|q_proj|v_proj)", 4, "AutoModelForImageClassification"),
}


def build(name: str) -> nn.Module:
    """The model of this name with the same weights each time, in eval mode."""
    torch.manual_seed(0)
    return ARCHITECTURES[name].build().eval()


@torch.no_grad()  # with gradients torch.matmul chooses by what requires them, so a frozen T5 differs from a trained one
def logits_of(model: nn.Module, name: str) -> Tensor:
    return model(**ARCHITECTURES[name].inputs()).logits
