"""Tiny models built from their configurations, for tests that need a whole model."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    config = dict(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def token_ids(rows: int = 3, length: int = 7, seed: int = 0, vocabulary: int = 96) -> torch.Tensor:
    return torch.randint(2, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def perturb(model: torch.nn.Module) -> None:
    """Trained-looking adapters: every trainable parameter gets random values."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)


def checkpoint_layers(base, use_reentrant: bool) -> None:
    """Activation checkpointing of every layer of a transformers model, by the name that its version has for it."""
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    base.enable_input_require_grads()
