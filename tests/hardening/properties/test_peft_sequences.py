"""PEFT's operations in any order, on several adapters of any methods, against a plain account of what must hold.

The account is, for each adapter, its configuration and a copy of its tensors. What an adapter computes is compared
twice: bit for bit with a fresh model that gets the copy, and with loops over tokens from the method's paper
(tests/mixture/naive.py).
"""

import copy
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from mosld import MoSLDConfig, export_lora, set_routing
from mosld.mixture.registry import MIXINGS
from mosld.presets import PRESETS, preset
from mosld.tuner.layer import MoSLDPeftLayer
from tests.hardening.properties.profile import TIMES
from tests.helpers.models import tiny_llama, token_ids
from tests.mixture import naive

SMALL = dict(hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, vocab_size=32)
with torch.random.fork_rng():
    BASE = tiny_llama(**SMALL).double()
IDS, TASKS = token_ids(2, 3, vocabulary=32), torch.tensor([1, 0])
NAMES = ("default", "b", "third-one", "a")
CLOSE = dict(rtol=1e-9, atol=1e-9)
BLOCK = "mixlora"  # of feed-forward blocks: naive.py has linear layers alone
UNIFORM = {"expand", "diagonal", "reduce"}  # mixings whose sum with fixed gates is written here


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


OF_BASE = logits_of(BASE)


@dataclass(frozen=True)
class Adapter:
    preset: str
    config: MoSLDConfig
    tensors: dict[str, Tensor]  # "model.layers.0.self_attn.q_proj.mosld_shared_a" -> its value

    @cached_property
    def alone(self) -> Tensor:
        """What a fresh model computes that has this adapter and no other."""
        model = get_peft_model(copy.deepcopy(BASE), copy.deepcopy(self.config), "only")
        put(model, "only", self.tensors)
        return logits_of(routed(model))

    @cached_property
    def by_loops(self) -> Tensor:
        return by_loops(self)

    def layers(self) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            layer, _, part = key.partition(".mosld_")
            found.setdefault(layer, {})[part] = tensor
        return found


@st.composite
def configurations(draw) -> tuple[str, MoSLDConfig]:
    name = draw(st.sampled_from(sorted(PRESETS)))
    fields: dict[str, Any] = {"r": draw(st.integers(1, 3)), "dropout": draw(st.sampled_from((0.0, 0.5)))}
    if name == BLOCK:
        fields["target_modules"] = draw(st.sampled_from((["mlp"], ["q_proj", "mlp"])))
    else:
        attention = st.sampled_from(("q_proj", "v_proj", "o_proj"))
        fields["target_modules"] = sorted(draw(st.sets(attention, min_size=1)))
        fields["layers_to_transform"] = draw(st.sampled_from((None, [0], [1])))
    base = PRESETS[name]()
    if name not in ("lora", "mor1e"):
        fields["num_experts"] = draw(st.integers(3 if base.mixing == "select" else 1, 3))
        fields["top_k"] = draw(st.integers(1, fields["num_experts"]))
    if base.num_tasks:
        fields["num_tasks"] = 2
    return name, preset(name, **fields)


def tensors_in(model: PeftModel, name: str) -> dict[str, Tensor]:
    end = f".{name}.weight"
    state = {key.removeprefix("base_model.model."): value for key, value in model.state_dict().items()}
    return {
        key.removesuffix(end): value.clone() for key, value in state.items() if ".mosld_" in key and key.endswith(end)
    }


def base_in(model: PeftModel) -> dict[str, Tensor]:
    state = {key.removeprefix("base_model.model."): value for key, value in model.state_dict().items()}
    return {key.replace(".base_layer", ""): value for key, value in state.items() if ".mosld_" not in key}


def put(model: PeftModel, name: str, tensors: dict[str, Tensor]) -> None:
    for key, parameter in model.named_parameters():
        if key.endswith(f".{name}.weight"):
            parameter.data.copy_(tensors[key.removeprefix("base_model.model.").removesuffix(f".{name}.weight")])


def routed(model: nn.Module) -> nn.Module:
    if any(isinstance(module, MoSLDPeftLayer) and module.mixtures for module in model.modules()):
        set_routing(model, task_ids=TASKS)
    return model


@contextmanager
def updates(model: nn.Module, of_layer):
    """The model with `of_layer` (its name, x [batch, tokens, D_in]) added to what its layers give."""
    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: out + of_layer(name, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    yield model
    for handle in handles:
        handle.remove()


def by_loops(adapter: Adapter) -> Tensor:
    """The method's equation, token by token, in every layer that has tensors."""
    m, layers, equation = adapter.config.mixture_of(""), adapter.layers(), getattr(naive, adapter.preset)

    def update(name: str, x: Tensor) -> Tensor | float:
        if name not in layers:
            return 0.0
        own = layers[name]
        A, B, mixer = own["shared_a"], own["expert_b"], own.get("mixer")
        rows = []
        for row, task in zip(x, TASKS.tolist(), strict=True):
            for token in row:
                t = naive.Token(
                    x=token, dropped=token, row=row, A=A, undropped_a=A, B=B, router=own.get("router"),
                    tasks=own.get("tasks"), mixer=mixer, hidden=torch.ones(len(A), dtype=A.dtype),
                    r=m.r, s=m.alpha / m.r, E=m.num_experts, k=m.top_k, task=task,
                    options={**MIXINGS[m.mixing].options, **m.mixing_options},
                )  # fmt: skip
                rows.append(equation(t))
        return torch.stack(rows).view(*x.shape[:-1], -1)

    with updates(BASE, update) as model:
        return logits_of(model)


def with_uniform_gates(adapter: Adapter) -> Tensor:
    """s sum_e B_e A_e x / E, written out; of LoRA s B A x"""
    m, layers = adapter.config.mixture_of(""), adapter.layers()
    gate = 1.0 if m.router == "none" else 1 / m.num_experts

    def update(name: str, x: Tensor) -> Tensor | float:
        if name not in layers:
            return 0.0
        own, total = layers[name], 0.0
        for e in range(m.num_experts):
            places = slice(e * m.r, (e + 1) * m.r)
            a = own["shared_a"] if m.mixing == "expand" else own["shared_a"][places]
            b = own["expert_b"] if m.mixing == "reduce" else own["expert_b"][:, places]
            total = total + gate * m.alpha / m.r * (x @ a.T @ b.T)
        return total

    with updates(BASE, update) as model:
        return logits_of(model)


class PeftSequences(RuleBasedStateMachine):
    saves = Bundle("saves")

    def __init__(self):
        super().__init__()
        self.adapters: dict[str, Adapter] = {}
        self.active = ""
        self.model: Any = None
        self.folder = Path(tempfile.mkdtemp())
        self.number = 0

    def teardown(self):
        shutil.rmtree(self.folder)

    def free(self) -> list[str]:
        return [name for name in NAMES if name not in self.adapters]

    @rule(drawn=configurations(), seed=st.integers(0, 99), place=st.integers(0, 3), trained=st.booleans())
    def add(self, drawn, seed, place, trained):
        if not self.free():
            return
        (kind, config), name = drawn, self.free()[place % len(self.free())]
        torch.manual_seed(seed)
        if self.model is None:
            self.model, self.active = get_peft_model(copy.deepcopy(BASE), copy.deepcopy(config), name), name
        else:
            self.model.add_adapter(name, copy.deepcopy(config))
        begun = Adapter(kind, config, tensors_in(self.model, name))
        assert begun.tensors and torch.equal(begun.alone, OF_BASE)
        if trained:
            put(self.model, name, {key: 0.3 * torch.randn_like(value) for key, value in begun.tensors.items()})
        self.adapters[name] = Adapter(kind, config, tensors_in(self.model, name))

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def activate(self, data):
        self.active = data.draw(st.sampled_from(sorted(self.adapters)))
        self.model.set_adapter(self.active)

    @precondition(lambda self: self.adapters)
    @rule()
    def disable(self):
        with self.model.disable_adapter():
            assert torch.equal(logits_of(self.model), OF_BASE)

    @precondition(lambda self: self.adapters)
    @rule(seed=st.integers(0, 99))
    def train(self, seed):
        self.model.set_adapter(self.active)  # of a loaded adapter PEFT trains nothing before
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        assert {
            name.removeprefix("base_model.model.").removesuffix(f".{self.active}.weight") for name in trained
        } == set(self.adapters[self.active].tensors)
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD([p for p in self.model.parameters()], lr=0.5)
        routed(self.model).train()(IDS, labels=IDS).loss.backward()
        ups = [p for name, p in self.model.named_parameters() if p.requires_grad and f"_b.{self.active}." in name]
        # B moves first, from zero too. Where attention is saturated its gradient may be too small to move it.
        assert any(p.grad is not None and p.grad.any() for p in ups)
        optimizer.step()
        optimizer.zero_grad()
        before, now = self.adapters[self.active], tensors_in(self.model, self.active)
        assert all(tensor.isfinite().all() for tensor in now.values())
        self.adapters[self.active] = Adapter(before.preset, before.config, now)

    @precondition(lambda self: self.adapters)
    @rule(target=saves, data=st.data())
    def save(self, data):
        name, self.number = data.draw(st.sampled_from(sorted(self.adapters))), self.number + 1
        folder = self.folder / f"save_{self.number}"
        self.model.save_pretrained(str(folder), selected_adapters=[name])
        return folder if name == "default" else folder / name, self.adapters[name]

    @precondition(lambda self: self.adapters)
    @rule(saved=saves, place=st.integers(0, 3))
    def load(self, saved, place):
        if not self.free():
            return
        name = self.free()[place % len(self.free())]
        self.model.load_adapter(str(saved[0]), name)
        self.adapters[name] = saved[1]

    @rule(saved=saves)
    def load_into_a_fresh_model(self, saved):
        model = PeftModel.from_pretrained(copy.deepcopy(BASE), str(saved[0]))
        assert torch.equal(logits_of(routed(model)), saved[1].alone)

    @precondition(lambda self: len(self.adapters) > 1)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        if name == self.active:
            self.active = next(other for other in self.adapters if other != name)
            self.model.set_adapter(self.active)
        self.model.delete_adapter(name)
        del self.adapters[name]

    @precondition(lambda self: self.adapters)
    @rule(how=st.sampled_from(("merge_adapter", "unmerge_adapter", "merge_and_unload")))
    def merge(self, how):
        with pytest.raises(ValueError, match="a MoSLD mixture (cannot be merged|is never merged)"):
            getattr(self.model, how)()

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def export(self, data):
        name, self.number = data.draw(st.sampled_from(sorted(self.adapters))), self.number + 1
        adapter, folder = self.adapters[name], self.folder / f"lora_{self.number}"
        m = adapter.config.mixture_of("")
        task = 1 if m.wants_tasks else None
        if m.mixing in ("dense", "select") or adapter.preset == BLOCK:
            no = (
                "no LoRA equals a mixture of feed-forward blocks" if adapter.preset == BLOCK else "has no uniform gates"
            )
            with pytest.raises(ValueError, match=no):
                export_lora(self.model, folder, adapter_name=name, task=task)
            assert not folder.exists()
            return
        export_lora(self.model, folder, adapter_name=name, task=task)
        lora = logits_of(PeftModel.from_pretrained(copy.deepcopy(BASE), str(folder)))
        if m.mixing in UNIFORM and task is None:
            torch.testing.assert_close(lora, with_uniform_gates(adapter), **CLOSE)

    @invariant()
    def all_is_as_it_must_be(self):
        if self.model is None:
            return
        assert list(self.model.peft_config) == list(self.adapters) and self.model.active_adapters == [self.active]
        base, now = BASE.state_dict(), base_in(self.model)
        assert now.keys() == base.keys() and all(torch.equal(now[name], tensor) for name, tensor in base.items())
        for name, adapter in self.adapters.items():
            own = tensors_in(self.model, name)
            assert own.keys() == adapter.tensors.keys()
            assert all(torch.equal(own[key], tensor) for key, tensor in adapter.tensors.items()), name
        ends = tuple(f".{name}.weight" for name in self.adapters)
        assert all(key.endswith(ends) for key in self.model.state_dict() if ".mosld_" in key)
        assert all(
            key.endswith(f".{self.active}.weight") for key, p in self.model.named_parameters() if p.requires_grad
        )

    @invariant()
    def the_active_adapter_computes_what_its_tensors_say(self):
        if self.model is None:
            return
        adapter, logits = self.adapters[self.active], logits_of(routed(self.model))
        assert torch.equal(logits, adapter.alone)
        if adapter.preset != BLOCK:
            torch.testing.assert_close(logits, adapter.by_loops, **CLOSE)


PeftSequences.TestCase.settings = settings(
    settings.get_profile("same"), max_examples=12 * TIMES, stateful_step_count=12
)
TestPeftSequences = PeftSequences.TestCase
