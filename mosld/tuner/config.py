"""MoSLDConfig: what `peft.get_peft_model` needs to adapt a model with MoSLD."""

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType

from ..files.adapter_folder import CONFIG, DIGEST, WEIGHTS, AdapterFileError, check_weights, write_digest
from ..files.atomic import folder_beside
from ..files.errors import escape_control_chars
from ..files.json_object import read_json_object
from ..files.safe_regex import check_expression
from ..mixture.spec import FIELDS, Mixture, number
from .card import write_card
from .peft_api import (
    LAYERS_PATTERN,
    MODULES_TO_SAVE_PATTERN,
    NUM_EXPERTS_PATTERN,
    SAVED_BY_PEFT_MODEL,
    get_pattern_key,
)
from .weights import AdapterWeights

BALANCE_POOLS = ("layer", "block", "model")


@dataclass
class MoSLDConfig(PeftConfig):
    """Configuration of a MoSLD adapter (arXiv 2412.08946); the defaults are the paper's where it gives one.

    The sibling methods are `mosld.presets`; what they set are the fields from `mixing` to `router_std`.

    Saved with its weights, as PEFT does, it writes the folder's model card too (`mosld.tuner.card`) and the weights'
    checksum. Loaded from a local folder, fields that this version does not know are named in a warning and left out,
    and the weights beside it are checked before anything is built (`mosld.tuner.weights.AdapterWeights`).

    Args:
        r: Rank of the shared down-projection A and of every expert's B.
        alpha: The update is scaled by alpha / r.
        num_experts: Experts per adapted layer, E.
        top_k: Experts chosen per token, in [1, E] of every layer, for gate="top_k".
        dropout: Probability in [0, 1] of dropping an element of the shared factor in training: of A, of B with
            shared="up".
        input_dropout: The same for the layer's input before A.
        balance_coef: Weight of the load-balance loss that `MoSLDTrainer` adds.
        balance_pool: Over whose tokens that loss takes load and probability before it multiplies them: of each "layer"
            and summed over layers, of all layers of a transformer "block" and summed over blocks, or of the whole
            "model" at once. See `mosld.losses.balance_loss`.
        shared: Which factor the experts share, "down" (A) or "up" (B, the paper's "matrix B").
        num_experts_pattern: Exceptions to num_experts, from a layer name or regular expression to a number, matched
            as PEFT matches `rank_pattern`.
        mixing: The mixing matrix between A and B, of `mosld.mixture.MIXINGS`. None is the one that `shared`
            implies. "block" makes mixtures of the feed-forward blocks that target_modules names
            (`mosld.layers.feed_forward`), and plain LoRAs of linear layers.
        mixing_options: Sizes and switches of that mixing.
        router: Who routes, of `mosld.mixture.ROUTERS`.
        gate: From logits to gates: "top_k" (softmax over the K largest), "softmax" (over all), "top_p" (the fewest
            that reach the probability top_p, renormalised).
        top_p: The probability of gate="top_p".
        temperature: Logits are divided by it.
        num_tasks: Number of tasks, of router="task".
        task_dim: Size of a task's embedding, of router="task".
        up_dropout: Probability in [0, 1] of dropping an element of B in training.
        hidden_dropout: The same for A's output.
        down_std: Standard deviation of a normal start of A. None is Kaiming-uniform.
        router_std: The same for the router.
        target_modules: As in PEFT's LoraConfig. Without it, the layers that PEFT's LoRA picks for the architecture
            (q and v, as in the paper).
        exclude_modules: As in PEFT's LoraConfig.
        modules_to_save: As in PEFT's LoraConfig.
        trainable_token_indices: As in PEFT's LoraConfig: rows of the embedding that are trained beside the adapter.
        layers_to_transform: As in PEFT's LoraConfig.
        layers_pattern: As in PEFT's LoraConfig.

    Raises:
        ValueError: For a value that cannot be used, with the rule and the value, and for two that contradict each
            other.

    >>> from peft import get_peft_model
    >>> from torch import nn
    >>> from mosld import MoSLDConfig
    >>> config = MoSLDConfig(r=2, num_experts=4, target_modules=["0"])
    >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    >>> model.print_trainable_parameters()  # 2 * 6 of A, 5 * 4 * 2 of B, 4 * 6 of the router
    trainable params: 76 || all params: 111 || trainable%: 68.4685
    """

    r: int = Mixture.r
    alpha: float = Mixture.alpha
    num_experts: int = Mixture.num_experts
    top_k: int = Mixture.top_k
    dropout: float = Mixture.dropout
    input_dropout: float = Mixture.input_dropout
    balance_coef: float = 1e-3
    balance_pool: str = "layer"
    shared: str = "down"
    num_experts_pattern: dict[str, int] = field(default_factory=dict)
    mixing: str | None = None
    mixing_options: dict[str, Any] = field(default_factory=dict)
    router: str = Mixture.router
    gate: str = Mixture.gate
    top_p: float = Mixture.top_p
    temperature: float = Mixture.temperature
    num_tasks: int | None = Mixture.num_tasks
    task_dim: int | None = Mixture.task_dim
    up_dropout: float = Mixture.up_dropout
    hidden_dropout: float = Mixture.hidden_dropout
    down_std: float | None = Mixture.down_std
    router_std: float | None = Mixture.router_std
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    saved = None  # no field: the path of the weights that lay beside the file that it was read from

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["MOSLD"]  # added to the enumeration by `register`
        self._take_sequences()
        self._check_names()
        self._list_to_set("target_modules")
        self._list_to_set("exclude_modules")
        self._check_tokens()
        self._check_layers_to_transform()
        self._check_shared()
        self._check_experts()
        if not 0 <= number(self.balance_coef) < math.inf:
            raise ValueError(f"balance_coef must be at least 0, got {self.balance_coef!r}")
        if self.balance_pool not in BALANCE_POOLS:
            raise ValueError(f"balance_pool must be one of {', '.join(BALANCE_POOLS)}, got {self.balance_pool!r}")

    def _check_names(self) -> None:
        """raises ValueError for what is no name, no regular expression or no number of a layer."""
        around = {"modules_to_save": MODULES_TO_SAVE_PATTERN, "layers_pattern": LAYERS_PATTERN}
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            expression = around.get(name, "{}")
            if isinstance(value, str) and name != "modules_to_save":  # which PEFT would take letter by letter
                check_expression(name, value, expression)
            elif value is not None and not _is_list(value, str):
                raise ValueError(f"{name} must be None or names, got {value!r}")
            elif name in ("layers_pattern", "modules_to_save"):
                for pattern in value or []:
                    check_expression(name, pattern, expression)
        layers = self.layers_to_transform
        if not (layers is None or _is_list([layers], int) or _is_list(layers, int)):
            raise ValueError(f"layers_to_transform must be None or numbers of layers, got {layers!r}")

    def _check_tokens(self) -> None:
        tokens = self.trainable_token_indices
        by_layer = tokens if isinstance(tokens, dict) else {"": tokens}
        for name, own in by_layer.items():
            is_numbers = _is_list(own, int) and min(own or (), default=0) >= 0
            if not isinstance(name, str) or not (is_numbers or (own is None and tokens is None)):
                raise ValueError(
                    "trainable_token_indices must be None, numbers of tokens, or a dictionary from names of embeddings "
                    f"to such, got {tokens!r}"
                )

    def _take_sequences(self) -> None:
        """Lists of other libraries, such as OmegaConf's, are lists; their dictionaries are dictionaries."""
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes, list, set)):
                setattr(self, name, list(value))
        for name in ("num_experts_pattern", "mixing_options"):
            value = getattr(self, name)
            if isinstance(value, Mapping) and type(value) is not dict:
                setattr(self, name, dict(value))

    def _list_to_set(self, name: str) -> None:
        """PEFT computes with sets and saves lists."""
        value = getattr(self, name)
        if isinstance(value, list):
            setattr(self, name, set(value))

    def _check_layers_to_transform(self) -> None:
        is_expression = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if is_expression and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform chooses among listed target_modules; with the regular expression "
                f"{self.target_modules!r}, name the layers in it"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, which is None")

    def _check_shared(self) -> None:
        if self.shared not in ("down", "up"):
            raise ValueError(f"shared must be 'down' or 'up', got {self.shared!r}")
        if self.mixing is not None and (self.shared == "up") != (self.mixing == "reduce"):
            raise ValueError(
                f"shared={self.shared!r} contradicts mixing={self.mixing!r}: "
                "'reduce' is what a shared up-projection does"
            )
        if self.shared == "up" and self.up_dropout != 0:
            raise ValueError(
                f"up_dropout={self.up_dropout} contradicts shared='up', where `dropout` falls on elements of B"
            )

    def _check_experts(self) -> None:
        """raises ValueError where the mixture of some layer cannot be built."""
        if not isinstance(self.num_experts_pattern, dict):
            raise ValueError(f"num_experts_pattern must be a dictionary, got {self.num_experts_pattern!r}")
        self._mixture(self.num_experts)
        for pattern, experts in self.num_experts_pattern.items():
            check_expression("num_experts_pattern", pattern, NUM_EXPERTS_PATTERN)
            try:
                self._mixture(experts)
            except ValueError as error:
                raise ValueError(f"num_experts_pattern={{{pattern!r}: {experts!r}}} cannot be used: {error}") from error

    def _keep_order(self, path: Path) -> None:
        """PEFT sorts what it saves, and of two patterns that match a layer the first counts."""
        if len(self.num_experts_pattern) > 1:
            saved = {**json.loads(path.read_text()), "num_experts_pattern": self.num_experts_pattern}
            path.write_text(json.dumps(saved, indent=2))

    def experts_of(self, layer: str) -> int:
        """How many experts the layer of this name has.

        >>> from mosld import MoSLDConfig
        >>> config = MoSLDConfig(num_experts=8, num_experts_pattern={"down_proj": 4})
        >>> config.experts_of("model.layers.0.mlp.down_proj"), config.experts_of("model.layers.0.mlp.up_proj")
        (4, 8)
        """
        pattern = get_pattern_key(list(self.num_experts_pattern), layer)
        return self.num_experts_pattern.get(pattern, self.num_experts)

    def mixture_of(self, layer: str) -> Mixture:
        """The mixture of the layer of this name.

        >>> from mosld import MoSLDConfig
        >>> mixture = MoSLDConfig(r=2, num_experts_pattern={"down_proj": 4}).mixture_of("mlp.down_proj")
        >>> mixture.shapes(6, 5), mixture.parameters(6, 5)
        ({'shared_a': (2, 6), 'expert_b': (5, 8), 'router': (4, 6)}, 76)
        """
        return self._mixture(self.experts_of(layer))

    def _mixture(self, experts: int) -> Mixture:
        values = {name: getattr(self, name) for name in FIELDS}
        values["num_experts"] = experts
        if self.mixing is None:
            values["mixing"] = "reduce" if self.shared == "up" else "expand"
        if self.shared == "up":
            values |= {"dropout": 0.0, "up_dropout": self.dropout}
        return Mixture(**values)

    @classmethod
    def computing_fields(cls) -> tuple[str, ...]:
        """The fields that say what the layers compute, of which some matter in training alone.

        >>> from mosld import MoSLDConfig
        >>> set(MoSLDConfig.computing_fields()) & {"r", "shared", "target_modules", "balance_coef"} == {"r", "shared"}
        True
        """
        return (*FIELDS, "shared", "num_experts_pattern")

    @classmethod
    def unknown_fields(cls, names: Iterable[str]) -> list[str]:
        """Those of `names` that are no field of this version.

        >>> from mosld import MoSLDConfig
        >>> MoSLDConfig.unknown_fields(["r", "rank", "top_k"])
        ['rank']
        """
        return sorted(set(names).difference(own.name for own in fields(cls)))

    @classmethod
    def check_kwargs(cls, **kwargs):
        """Leaves out what this version does not know, and says so: PEFT would advise to upgrade PEFT.

        >>> import warnings
        >>> from mosld import MoSLDConfig
        >>> with warnings.catch_warnings(record=True) as messages:
        ...     warnings.simplefilter("always")
        ...     MoSLDConfig.check_kwargs(r=4, rank=8), len(messages)
        ({'r': 4}, 1)
        """
        if kwargs.get("peft_type", "MOSLD") != "MOSLD":  # PEFT makes the configuration that this name asks for
            return super().check_kwargs(**kwargs)
        unknown = cls.unknown_fields(kwargs)
        if unknown:
            names = escape_control_chars(", ".join(unknown))
            warnings.warn(
                f"{CONFIG} has fields that this version of mosld does not know and leaves out: {names}. A "
                "newer version may have saved it",
                stacklevel=2,
            )
        for name in unknown:
            del kwargs[name]
        return super().check_kwargs(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        path = Path(pretrained_model_name_or_path, subfolder or "", CONFIG)
        if path.is_file() and "peft_type" not in read_json_object(path, AdapterFileError):
            # PEFT's contract for what is no configuration of an adapter; without it the defaults would be taken.
            raise TypeError(f"{path} is no configuration of an adapter: it has no peft_type")
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (ValueError, TypeError, KeyError) as error:  # PEFT raises the last two for what is no configuration
            if not path.is_file():
                raise
            raise AdapterFileError(f"{path} cannot be used: {error}") from error
        weights = path.with_name(WEIGHTS)
        if isinstance(config, MoSLDConfig) and path.is_file():
            check_weights(path.parent, only_pickles=True)
        if isinstance(config, MoSLDConfig) and weights.is_file():
            _check_announced(AdapterWeights(weights, config.mixture_of), config)
            config.saved = weights
        return config

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        folder = Path(save_directory)
        saved_by_peft = SAVED_BY_PEFT_MODEL in kwargs
        folder.mkdir(parents=True, exist_ok=True)
        with folder_beside(folder / CONFIG) as aside:
            super().save_pretrained(str(aside), **kwargs)
            self._keep_order(aside / CONFIG)
            (aside / CONFIG).replace(folder / CONFIG)
            # Until here the old checksum refuses PEFT's new weights: with the old configuration they would be a
            # mixture that nobody has trained.
            (folder / DIGEST).unlink(missing_ok=True)
        if not saved_by_peft:
            return
        try:
            if (folder / WEIGHTS).is_file():
                write_card(folder, type(self).from_pretrained(str(folder)))
        except AdapterFileError as error:
            # The files are saved as they are, and a card is no reason to stop a training.
            warnings.warn(f"the saved adapter cannot be loaded again: {error}", stacklevel=2)
        if (folder / WEIGHTS).is_file():
            write_digest(folder)


def _check_announced(weights: AdapterWeights, config: MoSLDConfig) -> None:
    """raises AdapterFileError for tensors that are no adapter's and that the configuration does not announce.

    PEFT would write them into the base model, where disabling the adapter does not undo it. What it saves by itself are
    embeddings and heads of a vocabulary that was resized.
    """
    for name in weights.others:
        module = name.rpartition(".")[0]
        if config.trainable_token_indices is not None and "token_adapter" in name:
            continue
        if not announces(config.modules_to_save or (), module) and not _VOCABULARY.search(module):
            raise AdapterFileError(
                f"{weights.path} holds {escape_control_chars(name)}, which is no adapter's and none of "
                f"modules_to_save={config.modules_to_save}: it would be written into the base model"
            )


def announces(modules_to_save: Iterable[str], module: str) -> bool:
    """Whether a module is one of these, or inside one: as PEFT finds them, by the end of its name."""
    parts = module.split(".")
    outside = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(name.endswith(wanted) for wanted in modules_to_save for name in outside)


# How transformers' models call what has a row for each token.
_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|word_embeddings|tok_embeddings|wte|embed_in|embed_out|shared|lm_head|embeddings|decoder|"
    r"output_projection|embedding)$"
)


def _is_list(value: Any, kind: type) -> bool:
    """Whether `value` is a list, tuple or set of `kind` alone; a bool is no number."""
    if not isinstance(value, (list, tuple, set)):
        return False
    return all(isinstance(one, kind) and not isinstance(one, bool) for one in value)
