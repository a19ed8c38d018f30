"""MoSLDTrainer: transformers' Trainer with the load-balance loss in the training loss, and the routers in its logs."""

import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..files.adapter_folder import PEFT_PREFIX
from ..layers.host import announce, is_announced, running_adapters
from ..layers.routing import forget_routing
from ..layers.stats import RouterStats, RouterUse, no_choice
from .balance import balance_loss
from .checkpoints import WholeCheckpointsMixin, check_adapters, last_whole_checkpoint
from .finite import StopsWhereNotFinite
from .task_ids import TaskColumnMixin

BY_HAND_COEF = 1e-3  # the default of MoSLDConfig, for layers without one
ROUTER_LOGS = ("summary", "layers", "off")
AuxiliaryLoss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


class MoSLDTrainerMixin(WholeCheckpointsMixin, TaskColumnMixin):
    """Adds `balance_coef * balance_loss(model)` to the training loss of any Trainer subclass; put it first.

    The evaluation loss stays the task's own. Padding, which `attention_mask` in the batch marks, is left out. The
    gradient is that of the mean over micro-batches and processes, whatever the number of either, and over forwards
    where a micro-batch takes several; those without gradients do not count.

    A `task_ids` column of the data goes to `mosld.set_routing`; see TaskColumnMixin.

    A gradient that is not finite ends the training before its step, with `mosld.training.finite.NotFiniteError`.

    Training resumed from a checkpoint goes on only from one whose adapters are as they were saved;
    `train(resume_from_checkpoint=True)` takes the newest that is whole, passing over one that was cut off.

    router_logs adds to every training log (each that has a `loss`) figures of the routers, over all tokens that this
    process trained on since the log before. Other logs get none, nor does any where no mixture ran.

        router/entropy        mean over layers of the entropy of the router's distribution, in nats; log(E) at most
        router/max_load       the largest share of the chosen places that any expert of any layer got; 1 / E is even
        router/dead_experts   experts that no token chose, added up over layers
        balance_loss          mean over the forwards of the loss before its weight; only where balance_coef is not 0

    Args:
        balance_coef: The weight. None takes it from the active adapter's MoSLDConfig, or 1e-3 where layers were
            adapted by hand, and 0 for methods whose tokens do not choose among experts. 0 leaves the loss alone.
            Whose tokens the loss takes together is the MoSLDConfig's `balance_pool`.
        router_logs: "summary" for the figures above; "layers" for these, and the first three of every layer under
            router/<layer>/; "off" for none.
        auxiliary_losses: name -> (weight, function) of further losses of a forward, added like the balance loss.
            function(model, batch) returns a scalar of the forward that the model just had, as those in `mosld.losses`
            do. Say {"contrast": (0.1, lambda model, batch: contrastive_loss(model, batch["attention_mask"]))}. Their
            means over the forwards, before the weight, are in the training logs under their names.
        auxiliary_columns: Columns of the data that these functions read and the model does not take, such as the kind
            of each row's task: numbers or tensors that the data collator puts together. The model never sees them.

    Raises:
        ValueError: For another value of router_logs, under nn.DataParallel, and for a balance_coef given here to a
            method that has no load to balance. `train` raises it where resume_from_checkpoint=True finds no checkpoint.
        AdapterFileError: In `train`, a ValueError too, for a checkpoint whose weights were altered.

    >>> from mosld import MoSLDTrainerMixin
    >>> from transformers import Seq2SeqTrainer
    >>> class MoSLDSeq2SeqTrainer(MoSLDTrainerMixin, Seq2SeqTrainer):
    ...     pass
    >>> MoSLDSeq2SeqTrainer(model=None, router_logs="all")
    Traceback (most recent call last):
    ValueError: router_logs must be one of summary, layers, off, got 'all'
    """

    _told_unmasked = False
    _announced: nn.Module | None = None  # `model_init` makes another model for every trial

    def __init__(
        self,
        *args,
        balance_coef: float | None = None,
        router_logs: str = "summary",
        auxiliary_losses: Mapping[str, tuple[float, AuxiliaryLoss]] | None = None,
        auxiliary_columns: Collection[str] = (),
        **kwargs,
    ):
        if router_logs not in ROUTER_LOGS:
            raise ValueError(f"router_logs must be one of {', '.join(ROUTER_LOGS)}, got {router_logs!r}")
        self.auxiliary_losses = dict(auxiliary_losses or {})
        taken = self.auxiliary_losses.keys() & {"balance_loss", "loss"}
        if taken:
            raise ValueError(f"auxiliary_losses must have names of their own, got {', '.join(sorted(taken))}")
        self.auxiliary_columns = frozenset(auxiliary_columns)
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"MoSLD does not run under nn.DataParallel, which Trainer chooses for {self.args.n_gpu} GPUs in one "
                "process: start one process per GPU with torchrun, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        self.add_callback(StopsWhereNotFinite(self))
        self._given_coef = balance_coef
        if self.balance_coef:  # what cannot be used is told before the training
            _balance_pool(cast(nn.Module, self.model))
        self.router_logs = router_logs
        self._routing = _Routing()

    @property
    def balance_coef(self) -> float:
        """The weight of the balance loss now: of the model that is trained now, and its active adapter.

        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> from mosld import MoSLDTrainer
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes))
        >>> MoSLDTrainer(model, TrainingArguments("run", use_cpu=True, report_to="none")).balance_coef
        0.001
        """
        model = cast(nn.Module, self.model)
        if model is not self._announced and model is not None:
            self._announced = model
            if not is_announced(model):  # layers placed by hand
                announce(model)
        return _balance_coef(model, self._given_coef)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As the Trainer's, but it resumes only from a checkpoint whose adapters are as they were saved.

        Args:
            resume_from_checkpoint: A checkpoint, or True for the newest whole one in output_dir.

        Raises:
            AdapterFileError: For altered weights.
            ValueError: Where True finds no checkpoint.

        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> from mosld import MoSLDTrainer
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes))
        >>> trainer = MoSLDTrainer(model, TrainingArguments("run", use_cpu=True, report_to="none"))
        >>> trainer.train(resume_from_checkpoint=True)
        Traceback (most recent call last):
        ValueError: output_dir must hold a whole checkpoint to go on from, got run
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(Path(cast(str, self.args.output_dir)))
            if resume_from_checkpoint is None:
                raise ValueError(f"output_dir must hold a whole checkpoint to go on from, got {self.args.output_dir}")
        elif resume_from_checkpoint:
            check_adapters(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        arguments: dict[str, Any] = dict(return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not model.training:
            return super().compute_loss(model, self._for_the_model(inputs), **arguments)
        forget_routing(model)  # a PEFT model does, one adapted by hand or by transformers' add_adapter does not
        forwards: list[dict[str, tuple[float, Tensor]]] = []

        def after_forward(*_) -> None:
            # Some trainers run the model again without gradients, for metrics or for outputs that are asked for.
            if torch.is_grad_enabled():
                forwards.append(self._losses_of_forward(model, inputs))

        hook = model.register_forward_hook(after_forward)
        try:
            result: Any = super().compute_loss(model, self._for_the_model(inputs), **arguments)
        finally:
            hook.remove()
        if not forwards:  # the trainer ran parts of the model without calling the whole
            forwards.append(self._losses_of_forward(model, inputs))
        loss, outputs = result if return_outputs else (result, None)
        for name, (weight, _) in forwards[0].items():
            own = torch.stack([losses[name][1] for losses in forwards]).mean()
            loss = loss + (weight * own).to(loss.device) / self._undivided_steps(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _losses_of_forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, tuple[float, Tensor]]:
        """Name -> (weight, loss of the last forward), of those with a weight; counted for the logs with its routing."""
        losses: dict[str, tuple[float, Tensor]] = {}
        mask = self._mask(model, inputs)
        if coef := self.balance_coef:
            pool = _balance_pool(cast(nn.Module, self.model))
            losses["balance_loss"] = coef, balance_loss(model, mask, pool=pool)
            self._tell_unmasked(model)
        for name, (weight, function) in self.auxiliary_losses.items():
            if weight:
                losses[name] = weight, function(model, inputs)
        if self.router_logs != "off":
            self._routing.add(model, mask, losses)
        return losses

    @staticmethod
    def _mask(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        """The batch's mask where the forward noted none, as compiled ones do not.

        Otherwise None, for those that it was called with: some trainers' batches have none, or not the model's.
        """
        noted = any(adapter.last_forward is not None for _, adapter in running_adapters(model))
        mask = inputs.get("attention_mask")
        return None if noted or not isinstance(mask, Tensor) else mask

    def _tell_unmasked(self, model: nn.Module) -> None:
        """Once, in the first forward: padding that no mask marks counts as tokens."""
        if self._told_unmasked:
            return
        self._told_unmasked = True
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        for _, adapter in running_adapters(model):
            ids = None if adapter.last_forward is None else adapter.last_forward.ids
            if ids is not None and pad is not None and bool((ids == pad).any()):
                warnings.warn(
                    f"the batch has padding (token {pad}) and no attention_mask: it counts as tokens in the balance "
                    "loss and in the routers' figures",
                    stacklevel=2,
                )
            return

    def _for_the_model(self, inputs: Any) -> Any:
        """The batch without the columns that only the auxiliary losses read."""
        if not self.auxiliary_columns:
            return inputs
        return {name: value for name, value in inputs.items() if name not in self.auxiliary_columns}

    def prediction_step(self, model, inputs, *args, **kwargs):
        return super().prediction_step(model, self._for_the_model(inputs), *args, **kwargs)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = [*columns, *sorted(self.auxiliary_columns - set(columns))]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # the Trainer's own training log; evaluations and the last summary have other keys
            logs.update(self._routing.take(per_layer=self.router_logs == "layers"))
        super().log(logs, start_time)

    def _undivided_steps(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """By how much the penalty must be divided here so that accumulation leaves its weight alone.

        A loss that is normalised over the whole accumulated batch is summed over micro-batches without a further
        division, which would count the penalty once for each of them; other losses the Trainer itself divides.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # the attribute is younger than transformers 5.0
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1


class _Routing:
    """What the routers did since the last log. Nothing waits for the device before `take`."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.use = RouterUse()
        self.forwards = 0
        self.losses: dict[str, Tensor] = {}  # sums over the forwards, before the weights

    def add(self, model: nn.Module, mask: Tensor | None, losses: Mapping[str, tuple[float, Tensor]]) -> None:
        """Count the last forward; where there is nothing to count, training goes on without."""
        if all(adapter.router_logits is None for _, adapter in running_adapters(model)):
            return
        try:
            self.use.update("", model, mask)
        except ValueError:  # a mask that tells nothing; the balance loss, where it is on, raises before
            return
        self.forwards += 1
        for name, (_, loss) in losses.items():
            total = self.losses.get(name)
            self.losses[name] = loss.detach() if total is None else total + loss.detach()

    def take(self, per_layer: bool) -> dict[str, float]:
        """The log entries, and begin anew."""
        layers = self.use.stats().get("", {})
        logs = _entries("router", list(layers.values())) if layers else {}
        for name, loss in self.losses.items():
            logs[name] = loss.item() / self.forwards
        if per_layer:
            for name, stats in layers.items():
                logs |= _entries(f"router/{name.removeprefix(PEFT_PREFIX)}", [stats])
        self.clear()
        return logs


def _entries(prefix: str, layers: list[RouterStats]) -> dict[str, float]:
    entropy, max_load, dead = 0.0, 0.0, 0
    for stats in layers:
        entropy += stats.entropy
        max_load = max(max_load, stats.load.max().item())
        dead += len(stats.dead)
    return {
        f"{prefix}/entropy": entropy / len(layers),
        f"{prefix}/max_load": max_load,
        f"{prefix}/dead_experts": dead,
    }


class MoSLDTrainer(MoSLDTrainerMixin, Trainer):
    """transformers' Trainer for models adapted with MoSLD; see MoSLDTrainerMixin for what it adds.

    Args:
        args: As the Trainer's, by place and by name.
        balance_coef: Weight of the balance loss; None takes the active adapter's.
        router_logs: "summary", "layers" or "off".
        auxiliary_losses: Further losses, name -> (weight, function).
        auxiliary_columns: Columns of the data that only these functions read.

    Raises:
        ValueError: As MoSLDTrainerMixin.

    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> from mosld import MoSLDConfig, MoSLDTrainer
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes))
    >>> model = get_peft_model(model, MoSLDConfig(r=2, num_experts=4, target_modules=["q_proj"]))
    >>> arguments = TrainingArguments("run", max_steps=2, logging_steps=1, use_cpu=True, report_to="none")
    >>> data = [{"input_ids": [3, 1, 4, 1, 5], "labels": [3, 1, 4, 1, 5]}]
    >>> trainer = MoSLDTrainer(model, arguments, train_dataset=data)
    >>> _ = trainer.train()  # doctest: +ELLIPSIS
    {'loss': ...
    >>> [name for name in trainer.state.log_history[0] if "router" in name or "balance" in name]
    ['router/entropy', 'router/max_load', 'router/dead_experts', 'balance_loss']
    """


def _balance_coef(model: nn.Module, given: float | None) -> float:
    adapters = [adapter for _, adapter in running_adapters(model)]
    if adapters and not any(adapter.mixture.tokens_choose for adapter in adapters):
        if given:
            raise ValueError(f"balance_coef={given} has {no_choice(adapters[0])}")
        return 0.0
    return _configured_balance_coef(model) if given is None else given


def _configured_balance_coef(model: nn.Module) -> float:
    if not getattr(model, "peft_config", None):
        return BY_HAND_COEF
    coefs = {getattr(config, "balance_coef", 0.0) for config in _active_configs(model)}
    if len(coefs) > 1:
        raise ValueError(f"the active adapters have different balance_coef {sorted(coefs)}: pass balance_coef")
    return coefs.pop() if coefs else 0.0  # no adapter is active


def _balance_pool(model: nn.Module) -> str:
    """That of the active adapters; "layer" where none says."""
    pools = {config.balance_pool for config in _active_configs(model) if hasattr(config, "balance_pool")}
    if len(pools) > 1:
        raise ValueError(
            f"the active adapters have different balance_pool {sorted(pools)}: pass balance_coef=0 and their "
            "balance_loss(model, pool=...) in auxiliary_losses"
        )
    return pools.pop() if pools else "layer"


def _active_configs(model: nn.Module) -> list[Any]:
    configs = getattr(model, "peft_config", None)
    if not configs:
        return []
    active: Any = getattr(model, "active_adapters", None)  # a method in transformers, a property in PEFT
    names = list(cast(Any, active() if callable(active) else active or configs))
    return [configs[name] for name in names if name in configs]
