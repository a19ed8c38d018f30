"""A tiny LLaMA, pre-trained on the spot on the standard library's own text and kept in a cache.

text     mosld.embedded.pretraining: docstrings, character names and questions about them, without any label
model    2 layers, hidden 128, tied embeddings, byte-level BPE of 2048: 0.7 million parameters
cache    one folder per settings, versions and sources; written beside its place and renamed into it
"""

import hashlib
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from ..training.progress import show_progress
from . import pretraining, python_text
from .pretraining import pretraining_text

EMBEDDED = "embedded"  # as a command line names this model, and these tasks
END, PAD = "<|end|>", "<|pad|>"
# What torchrun and accelerate tell a process about the others.
DISTRIBUTED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}


@dataclass(frozen=True)
class Settings:
    """What decides the base. One step reads `batch` rows of `length` tokens."""

    hidden: int = 128
    layers: int = 2
    vocabulary: int = 2048
    steps: int = 1000
    batch: int = 8
    length: int = 128
    records: int = 50_000  # questions that a name answers by itself; half as many about docstrings
    share: float = 1.0  # of the documents
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    threads: int = 2
    seed: int = 0


FULL = Settings()
QUICK = Settings(hidden=64, vocabulary=1024, steps=60, records=4_000, share=0.25)


def build_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end and a padding token, padding on the right, no token at the start."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _rows(documents: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> list[dict[str, torch.Tensor]]:
    """The documents end to end, an end token after each, cut into rows of `length`."""
    ids = []
    for document in tokenizer(documents)["input_ids"]:
        ids += [*document, tokenizer.eos_token_id]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.06,  # the default 0.02 leaves so narrow a model behind by 8 points after adaptation
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(cast(torch.nn.Embedding, model.get_input_embeddings()).weight, std=0.05)
    return model


def train_base(settings: Settings) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Text, tokenizer and model from nothing, on the CPU so that every machine trains the same base."""
    documents = pretraining_text(settings.records, settings.seed)
    documents = documents[: int(len(documents) * settings.share)]
    tokenizer = build_tokenizer(documents, settings.vocabulary)
    torch.manual_seed(settings.seed)
    model = new_model(settings, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.steps // 20,
            weight_decay=settings.weight_decay,
            adam_beta2=0.98,
            seed=settings.seed,
            use_cpu=True,
            save_strategy="no",
            logging_steps=20,
            report_to="none",
        )
        trainer = Trainer(model, arguments, train_dataset=cast(Any, _rows(documents, tokenizer, settings.length)))
        show_progress(trainer, "pre-train the base model")
        trainer.train()
    return model, tokenizer


def load_base(
    quick: bool = False, cache_dir: Path | None = None, settings: Settings | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The frozen base in eval mode and its tokenizer, from the cache or trained now (about 50 s; quick: 8 s).

    cache_dir: where bases are kept; by default $MOSLD_CACHE, else mosld in $XDG_CACHE_HOME or ~/.cache.
    settings: instead of the two sets that `quick` chooses from.
    """
    settings = settings or (QUICK if quick else FULL)
    folder = (cache_dir or _default_cache()) / f"base-{_fingerprint(settings)}"
    loaded = _read(folder)
    if loaded is None:
        with _left_as_found(settings.threads):
            _write(folder, *train_base(settings))
        loaded = _read(folder)
        assert loaded is not None, f"{folder} was written a moment ago"
    model, tokenizer = loaded
    return model.eval().requires_grad_(False), tokenizer


def train_base_apart(quick: bool = False) -> None:
    """Fill the cache, where it is empty, in a process of its own.

    Its Trainer must not see this process's place among others (torchrun), nor decide this process's device.
    """
    if (_default_cache() / f"base-{_fingerprint(QUICK if quick else FULL)}").exists():
        return
    alone = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED}
    program = f"from mosld.embedded.base_model import load_base; load_base(quick={quick})"
    subprocess.run([sys.executable, "-c", program], env=alone, check=True)


def _default_cache() -> Path:
    if chosen := os.environ.get("MOSLD_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mosld"


def _fingerprint(settings: Settings) -> str:
    """A name for everything that decides the base; the third number of a version is taken not to."""
    versions = []
    for version in (torch.__version__, transformers.__version__):
        versions.append(".".join(version.split(".")[:2]))
    parts = [asdict(settings), sys.version_info[:2], versions, unicodedata.unidata_version]
    # Any change of these sources may change the text or the training.
    for module in (python_text, pretraining, sys.modules[__name__]):
        parts.append(inspect.getsource(module))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast] | None:
    """The base kept in the folder; None where there is none, or a damaged one, which is removed."""
    if not folder.exists():
        return None
    try:
        model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return model, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a cut-off file raises anything from OSError to SafetensorError
        warnings.warn(f"the base in {folder} cannot be read and is trained again: {error}", stacklevel=3)
        shutil.rmtree(folder)
        return None


def _write(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Saves beside the folder and renames: an interrupted run leaves no half-written base."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".base-") as beside:
        saved = Path(beside) / "base"
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        try:
            saved.rename(folder)
        except OSError:
            if not folder.exists():  # another process may have been faster
                raise


@contextmanager
def _left_as_found(threads: int) -> Iterator[None]:
    """Trains on few threads, for such a small model gains nothing from many; restores them and the generators."""
    count, python_state, numpy_state = torch.get_num_threads(), random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    torch.set_num_threads(min(count, threads))
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_num_threads(count)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
