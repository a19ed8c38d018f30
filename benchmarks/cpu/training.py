"""A small LLaMA end to end: the time of a training step's forward and backward, and of one generated token.

Built from a configuration, so nothing is downloaded. The optimiser is left out: its cost depends on the number of
parameters alone. Every peer adapts the same linears of the same frozen weights.
"""

import argparse
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from ..peers.compare import count_trainable, describe, saved_bytes, timing_row, trainable
from ..peers.known import FROZEN, Builder, Mixture, build
from ..peers.options import add_peers, peers_of
from ..timing.files import Writer
from ..timing.machine import machine
from ..timing.names import require_known
from ..timing.options import add_budget, add_out, budget_of
from ..timing.shapes import DROPOUT
from ..timing.timers import Budget, Phases, interleaved, interleaved_phases

TARGETS = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qv": ("q_proj", "v_proj"),  # the setting of MoSLD's paper
}
PROMPT, NEW = 32, 16  # tokens


@dataclass(frozen=True)
class Size:
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    batch: int
    length: int
    mixture: Mixture


SIZES = {
    "toy": Size(32, 2, 4, 64, 64, 2, 16, Mixture(4, 4, 2, DROPOUT)),
    "small": Size(512, 4, 8, 1408, 1000, 4, 256, Mixture(8, 8, 2, DROPOUT)),
}


def base_model(size: Size) -> LlamaForCausalLM:
    """The frozen model; its weights are the same in every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, vocab_size=size.vocabulary,
        max_position_embeddings=size.length + PROMPT + NEW,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    # With this the frozen model has a backward pass, as it has under an adapter.
    model.enable_input_require_grads()
    return model


def adapted(base: LlamaForCausalLM, peer: str, targets: str, mixture: Mixture) -> LlamaForCausalLM:
    """The base model with its targeted linears replaced by the peer's; the frozen weights are shared, not copied."""
    # What deepcopy finds in its memo it takes for copied already.
    memo = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, memo)
    if peer != FROZEN:
        for path, linear in targeted_linears(model, targets):
            model.set_submodule(path, build(peer, linear, mixture))
    return model.train()


def targeted_linears(model: nn.Module, targets: str) -> list[tuple[str, nn.Linear]]:
    """Paths and modules of what `TARGETS[targets]` names; a list, so that the model may be changed meanwhile."""
    found = []
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in TARGETS[targets]:
            found.append((path, cast(nn.Linear, module)))
    return found


def step_of(model: nn.Module, tokens: Tensor) -> Phases:
    """-> the loss of the batch, and the gradients of what is trained."""
    trained = trainable(model)

    def backward(loss: Tensor) -> None:
        for parameter in trained:
            parameter.grad = None
        loss.backward()

    return lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss, backward


def generation_of(model: nn.Module, prompt: Tensor) -> Callable[[], list[int]]:
    """-> a call that generates `NEW` tokens greedily, one at a time on a key-value cache, and returns them."""

    @torch.no_grad()
    def generate() -> list[int]:
        out = model(input_ids=prompt, use_cache=True)
        chosen = []
        for _ in range(NEW):
            token = out.logits[:, -1:].argmax(-1)
            chosen.append(int(token[0, 0]))
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return chosen

    return generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks training`."""
    parser.add_argument("--size", nargs="+", default=["small"], help="of toy, small (default: small)")
    parser.add_argument("--targets", default="all", help="all seven linears of a block, or qv (default: all)")
    add_budget(parser, rounds=20, seconds=60)
    add_peers(parser)
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    """raises ValueError for a size, targets or peers that do not exist, listing those that do."""
    measure_sizes(options.size, options.targets, peers_of(options), budget_of(options), options.out)
    return 0


def measure_sizes(
    sizes: Sequence[str], targets: str, peers: Mapping[str, Builder], budget: Budget, out: Path | None = None
) -> dict:
    """A table of the training step and one of generation for each size, written to `out` after each.

    raises ValueError for a size or targets that do not exist, listing those that do.
    """
    require_known("size", sizes, SIZES)
    if targets not in TARGETS:
        raise ValueError(f"there are no targets {targets}; there are: {', '.join(TARGETS)}")
    settings = {"dropout": DROPOUT, "peers": list(peers), "prompt": PROMPT, "generated": NEW}
    writer = Writer({"verb": "training", "machine": machine(), "settings": settings, "tables": []}, out)
    for name in sizes:
        # Without this a compiled peer would be compiled for any size once a second one comes, as in `compare`.
        torch._dynamo.reset()
        size, base = SIZES[name], base_model(SIZES[name])
        tokens = torch.randint(size.vocabulary, (size.batch, size.length))
        models, failures = _models(
            tqdm(peers, desc=f"{name} {targets}: peers", leave=False), base, targets, tokens, size
        )
        parameters = sum(parameter.numel() for parameter in base.parameters())
        facts = {**vars(size), "mixture": vars(size.mixture), "parameters": parameters}
        head = {"name": name, "targets": targets, "dtype": "float32", "model": facts}
        rows = failures + training_rows(models, size, tokens, budget, f"{name} {targets}")
        print(f"\n{name} LLaMA, {targets} adapted: forward + backward of {tokens.numel()} tokens\n{text(rows, 'both')}")
        writer.add({**head, "kind": "training", "rows": rows})
        prompt = tokens[:1, : min(PROMPT, size.length)]
        rows = failures + generation_rows(models, prompt, budget, f"{name} generation")
        print(f"\n{name} LLaMA, {targets} adapted: one token with a key-value cache\n{text(rows, 'token')}")
        writer.add({**head, "kind": "generation", "rows": rows})
    return writer.result


def _models(
    peers: Iterable[str], base: LlamaForCausalLM, targets: str, tokens: Tensor, size: Size
) -> tuple[dict[str, nn.Module], list[dict]]:
    """-> the adapted models that make a training step, and a row for each peer that does not."""
    models: dict[str, nn.Module] = {}
    failures = []
    for peer in peers:
        try:
            model = adapted(base, peer, targets, size.mixture)
            forward, backward = step_of(model, tokens)
            backward(forward())
            models[peer] = model
        except Exception as failure:  # whatever a peer does wrong is a result
            failures.append({"name": peer, "failure": describe(failure)})
    return models, failures


def training_rows(
    models: Mapping[str, nn.Module], size: Size, tokens: Tensor, budget: Budget, label: str
) -> list[dict]:
    rows = []
    candidates = {name: step_of(model, tokens) for name, model in models.items()}
    times = interleaved_phases(candidates, budget, label)
    for name, by_step in times.items():
        for step, timing in by_step.items():
            row = {**timing_row(name, timing, times[FROZEN][step]), "step": step}
            if step == "both":
                forward, _ = step_of(models[name], tokens)
                row["tokens_per_s"] = 1e3 * tokens.numel() / timing.median_ms
                row["parameters"] = count_trainable(models[name])
                row["saved_bytes"] = saved_bytes(forward, models[name], tokens)
            rows.append(row)
    return rows


def generation_rows(models: Mapping[str, nn.Module], prompt: Tensor, budget: Budget, label: str) -> list[dict]:
    """Times are of one token, the prompt's share of the run included."""
    rows, runs = [], {}
    for name, model in models.items():
        try:
            runs[name] = generation_of(model.eval(), prompt)
            runs[name]()
        except Exception as failure:  # whatever a peer does wrong is a result
            rows.append({"name": name, "failure": describe(failure)})
            del runs[name]
    rounds = max(2, min(budget.rounds, 10))
    times = interleaved(runs, rounds, label)
    for name, timing in times.items():
        row = timing_row(name, timing, times[FROZEN])
        for key in ("median_ms", "low_ms", "high_ms"):
            row[key] /= NEW
        rows.append({**row, "step": "token", "tokens_per_s": 1e3 / row["median_ms"]})
    return rows


def text(rows: Sequence[dict], step: str) -> str:
    lines = [f"{'':32}{'median ms':>11}{'20 % to 80 %':>20}{'over frozen':>13}{'tokens per s':>14}{'saved MiB':>11}"]
    for row in rows:
        if "failure" in row:
            lines.append(f"{row['name']:32}{row['failure']}")
        elif row["step"] == step:
            spread = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
            saved = f"{row['saved_bytes'] / 2**20:11.1f}" if "saved_bytes" in row else f"{'-':>11}"
            numbers = f"{row['median_ms']:11.2f}{spread:>20}{row['ratio']:12.2f}x{row['tokens_per_s']:14.0f}{saved}"
            lines.append(f"{row['name']:32}{numbers}")
    return "\n".join(lines)
