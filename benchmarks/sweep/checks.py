"""What is checked of one type: the base, a LoRA for comparison, and the mixture."""

import copy
import re
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mosld import MoSLDConfig

from .inputs import candidates
from .shrunk import build, configurations, model_classes, parameters

MOST_PARAMETERS = 250_000_000
STEPS = 4  # some models skip layers at random
LEARNING_RATE = 0.01
LEAST = 1e-12


class Running(NamedTuple):
    """A base model that runs, and what it runs on."""

    model: nn.Module
    inputs: dict[str, Any]
    how: str
    class_name: str


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor of a model's output, in order, through dictionaries and tuples."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_of(value)


def logits(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """What the model gives, without gradients; the same draws each time in models that draw."""
    torch.manual_seed(3)
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors_of(model(**inputs))]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Bit for bit; NaN equals NaN, as models with masked tokens give some."""
    if len(one) != len(other):
        return False
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape or not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
            return False
    return True


def running(name: str) -> tuple[Running | None, str]:
    """The smallest model of a type that runs, or None and the last error on the way."""
    error = "no configuration could be made"
    for how, config in configurations(name):
        classes = model_classes(config)
        if not classes:
            return None, "no model class of the automatic ones has it"
        for model_class in classes:
            try:
                if parameters(model_class, config) > MOST_PARAMETERS:
                    error = f"{model_class.__name__}: more than {MOST_PARAMETERS:,} parameters"
                    continue
                model = build(model_class, config)
            except Exception as problem:
                error = _first_line(problem)
                continue
            # As it lies under an adapter: some products are done otherwise where a weight asks for a gradient.
            model.requires_grad_(False)
            inputs, error = _runs_on(model, config)
            if inputs is not None:
                return Running(model, inputs, how, model_class.__name__), ""
    return None, error


def _runs_on(model: nn.Module, config: PreTrainedConfig) -> tuple[dict[str, Any] | None, str]:
    error = "no input is known for its forward"
    for inputs in candidates(model, config):
        try:
            found = logits(model, inputs)
        except Exception as problem:
            error = _first_line(problem)
            continue
        if found and all(bool(torch.isfinite(tensor).any()) for tensor in found if tensor.numel()):
            return inputs, ""
        error = "no floating-point output, or one that is not finite"
    return None, error


def _first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:160]}"


class Watched:
    """Which modules ran since it was made, and to whose output a gradient came back for an input that says anything."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.ran: set[str] = set()
        self.asked: set[str] = set()
        self._handles = []
        for name, module in modules.items():
            self._handles.append(module.register_forward_hook(self._mark(name)))

    def _mark(self, name: str):
        def arrived(grad: Tensor) -> None:
            if grad.any():
                self.asked.add(name)

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.ran.add(name)
            # Of an input of next to nothing, which untrained models give, gradients are squares of it: zero.
            says = any(isinstance(value, Tensor) and bool((value.abs() > LEAST).any()) for value in inputs)
            if says and isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(arrived)

        return hook

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that PEFT put an adapter on."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found[name] = module
    return found


def train(model: nn.Module, inputs: dict[str, Any]) -> dict[str, bool]:
    """Trained tensor -> whether a few steps moved it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for step in range(STEPS):
        torch.manual_seed(4 + step)
        terms = []
        for tensor in tensors_of(model(**inputs)):
            if tensor.requires_grad and tensor.numel():
                # Random weights: outputs that are normalised have the same sum of squares whatever is trained.
                known = torch.nan_to_num(tensor.float(), 0.0, 0.0, 0.0)
                terms.append((known * torch.randn_like(known)).mean())
        torch.stack(terms).sum().backward()
        for parameter in trained.values():
            _move(parameter)
    return {name: not torch.equal(before[name], parameter) for name, parameter in trained.items()}


def try_method(base: Running, config: peft.PeftConfig) -> dict[str, Any]:
    """One method on a copy of the base: what held and what did not, or the first error."""
    result: dict[str, Any] = {}
    stage = "adapt"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            frozen = logits(base.model, base.inputs)
            result["base_equal"] = equal(frozen, logits(copy.deepcopy(base.model), base.inputs))
            model = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
            layers = adapted(model)
            result["adapted"] = len(layers)
            stage = "eval"
            watched = Watched(layers)
            result["fresh_equal"] = equal(frozen, logits(model, base.inputs))
            stage = "train"
            _begin(model)
            _train_mode(model)
            try:
                moved = train(model, base.inputs)
            except Exception:
                # Some bases train only with labels or on larger batches: then in eval mode, as the base's own fault.
                if _trains(base):
                    raise
                model.eval()
                moved = train(model, base.inputs)
            model.eval()
            watched.end()
            idle = sorted(set(layers) - watched.ran)
            result["idle"] = idle
            result["idle_unsaid"] = _unsaid(idle, caught)
            still, unasked = [], 0
            for name, has_moved in moved.items():
                layer = _layer_of(name, layers)
                if has_moved or layer in idle:
                    continue
                if layer in watched.asked:
                    still.append(name)
                else:  # the base lets no gradient of this loss come that far, whatever stands there
                    unasked += 1
            result["still"], result["unasked"] = still, unasked
            stage = "save"
            after = logits(model, base.inputs)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval()
            result["reloaded_equal"] = equal(after, logits(loaded, base.inputs))
        except Exception as problem:
            result["error"] = f"{stage}: {_first_line(problem)}"
    return result


@torch.no_grad()
def _begin(model: nn.Module) -> None:
    """Small random values where an adapter starts at zero: equal experts leave a router without a gradient."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(std=0.02)


def _train_mode(model: nn.Module) -> None:
    """Training mode, but for what changes the base without a gradient: running means are no part of an adapter."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _trains(base: Running) -> bool:
    """Whether the base itself, unfrozen, gives a loss in training mode with these inputs."""
    model = copy.deepcopy(base.model).requires_grad_(True)
    _train_mode(model)
    try:
        torch.stack([tensor.float().mean() for tensor in tensors_of(model(**base.inputs))]).sum().backward()
    except Exception:
        return False
    return True


@torch.no_grad()
def _move(parameter: nn.Parameter) -> None:
    """A step along the gradient, as large as LEARNING_RATE at its largest element, however small the gradient is."""
    grad, parameter.grad = parameter.grad, None
    largest = 0.0 if grad is None else grad.abs().max()
    if grad is not None and largest > 0:
        parameter.sub_(grad / largest, alpha=LEARNING_RATE)


def _layer_of(parameter: str, layers: dict[str, nn.Module]) -> str:
    return next((layer for layer in layers if parameter.startswith(f"{layer}.")), parameter)


def _unsaid(idle: list[str], caught: list[warnings.WarningMessage]) -> list[str]:
    """Layers that never ran and that no warning names."""
    said = " ".join(str(warning.message) for warning in caught)
    unsaid = []
    for name in idle:
        # As mosld's warning names it: numbers stand for all layers of one kind.
        if re.sub(r"\d+", "*", name.removeprefix("base_model.model.")) not in said:
            unsaid.append(name)
    return unsaid


def passes(result: dict[str, Any]) -> bool:
    """Whether everything held that the sweep checks of a method."""
    if "error" in result:
        return False
    return result["fresh_equal"] and result["reloaded_equal"] and not result["still"] and not result["idle_unsaid"]


def check(name: str) -> dict[str, Any]:
    """One row of the sweep: "type", and "not_built" or what both methods did on the base."""
    torch.set_num_threads(1)
    base, error = running(name)
    if base is None:
        return {"type": name, "not_built": error}
    count = sum(parameter.numel() for parameter in base.model.parameters())
    row = {"type": name, "class": base.class_name, "shrunk": base.how, "parameters": count}
    row["inputs"] = sorted(base.inputs)
    row["lora"] = try_method(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    row["mosld"] = try_method(base, MoSLDConfig(r=2, num_experts=3, top_k=2, target_modules="all-linear"))
    return row
