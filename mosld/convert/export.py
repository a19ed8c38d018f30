"""From a mixture to a plain LoRA, in PEFT's own files.

    with fixed gates c:   s B M(c) A;   for MoSLD  s sum_e c_e B_e A = s B' A,   B' = sum_e c_e B_e   [D_out, R]

A is shared, so MoSLD's sum has rank R: an ordinary LoRA of the same r and alpha, exactly. Other mixtures have the smaller
of A's rows and B's columns for a rank, with M multiplied into the other.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files.atomic import atomic_folder
from ..layers.linear import MoSLDLinear
from ..tuner.config import MoSLDConfig
from ..tuner.layer import MoSLDPeftBlock, MoSLDPeftLayer, MoSLDPeftLinear
from .fixed_gates import PREFIX, Gates, LayerGates, Layers, fix_gates
from .lora_tensors import _alpha, _folded, _is_conv1d

CONFIG, WEIGHTS, REPORT = "adapter_config.json", "adapter_model.safetensors", "export.json"
EXPERT = "expert_{}"  # the folder of one expert's LoRA
OWN = re.compile(rf"{re.escape(CONFIG)}|{re.escape(WEIGHTS)}|{re.escape(REPORT)}|expert_\d+")


def export_lora(
    model: nn.Module,
    output_dir: str | os.PathLike,
    gates: Gates = "uniform",
    adapter_name: str | None = None,
    per_expert: bool = False,
    overwrite: bool = False,
    task: int | None = None,
) -> dict[str, LayerGates]:
    """Write the mixtures of `model`, with gates that no longer depend on the token, as a LoRA that plain PEFT loads.

    model: a PeftModel or any model with MoSLD layers of one r and one alpha, placed by PEFT or by hand; left unchanged. Of
        any mixture: where gates are the same for all tokens anyway (router "none" or "constant") the LoRA is exact.
    output_dir: gets adapter_config.json, adapter_model.safetensors and export.json, all at once or not at all.
    gates: "uniform" (1 / E each); E weights, for every layer; layer name -> E weights; or an iterable of calibration
        batches (the model's arguments as a dict, input_ids and attention_mask say), which gives each layer the mean of
        its gates over the real tokens. Weights are finite numbers and need not sum to one.
    adapter_name: which of PEFT's adapters; needed when several are active.
    per_expert: also one LoRA an expert, in output_dir/expert_0 and so on; layers without that expert are left out.
    overwrite: replace an earlier export in output_dir. Anything else there is never replaced.
    task: which task's LoRA, for methods that route by task; with that task's own gates, exactly.

    Returns layer name (in the base model) -> LayerGates: the gates and, from batches, what is lost by fixing them.
    The LoRA has the mixture's r, alpha and dtype; B is summed in float64 and rounded once.
    raises ValueError, before anything is written, for a value that breaks these rules, and for an adapter with
    modules_to_save, which a LoRA for serving cannot hold.

    >>> import torch
    >>> from peft import PeftModel
    >>> from torch import nn
    >>> from mosld import MoSLDLinear, export_lora
    >>> linear, x = nn.Linear(6, 5), torch.randn(7, 6)
    >>> model = nn.Sequential(MoSLDLinear.from_linear(linear, r=2, num_experts=4)).eval()
    >>> lost = export_lora(model, "served", gates=[{"input": x}])
    >>> lost["0"].tokens, lost["0"].update_error  # nothing is lost while B is zero
    (7, 0.0)
    >>> torch.equal(PeftModel.from_pretrained(nn.Sequential(linear), "served")(x), model(x))
    True
    """
    folder = Path(output_dir).resolve()
    check_output(folder, overwrite)
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = adapted_layers(base, adapter_name)
    origin = _peft_config(model, layers)
    check_one_lora(layers, origin)
    if per_expert and not all(a.mixture.kind.per_expert for _, a in layers.values()):
        raise ValueError("per_expert needs a gate for each expert, which this mixing has not")
    fixed = fix_gates(model, layers, gates, task)
    # Checked again before it takes its place: calibration may have taken long.
    with atomic_folder(folder, lambda: check_output(folder, overwrite)) as aside:
        mean = {name: torch.tensor(layer.gates, dtype=torch.float64) for name, layer in fixed.items()}
        _save(aside, base, layers, mean, origin, task)
        for expert in range(max(len(gate) for gate in mean.values()) if per_expert else 0):
            alone = {name: nn.functional.one_hot(torch.tensor(expert), len(gate)).double()
                     for name, gate in mean.items() if expert < len(gate)}  # fmt: skip
            _save(aside / EXPERT.format(expert), base, layers, alone, origin, task)
        report = {"layers": {name: asdict(layer) for name, layer in fixed.items()}}
        (aside / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return fixed


def adapted_layers(base: nn.Module, adapter_name: str | None = None) -> Layers:
    """Layer name in `base` -> the layer and its mixture, of one adapter.

    raises ValueError when there is none, for an adapter with mixtures of feed-forward blocks, when adapter_name is unknown, or
    is needed to choose among active adapters.
    """
    by_hand = {name: module for name, module in base.named_modules() if isinstance(module, MoSLDLinear)}
    by_peft = {name: module for name, module in base.named_modules() if isinstance(module, MoSLDPeftLinear)}
    blocks = {name: module for name, module in base.named_modules() if isinstance(module, MoSLDPeftBlock)}
    if "" in by_hand or (by_hand and (by_peft or blocks)):
        raise ValueError("a LoRA needs layers inside a model, all adapted by hand or all through PEFT")
    if by_hand:
        if adapter_name is not None:
            raise ValueError(f"layers adapted by hand have no adapter name, got {adapter_name!r}")
        return {name: (layer, layer.adapter) for name, layer in by_hand.items()}
    if not by_peft and not blocks:
        raise ValueError(f"{type(base).__name__} has no MoSLD layer")
    chosen = _chosen([*by_peft.values(), *blocks.values()], adapter_name)
    if own := [name for name, block in blocks.items() if chosen in block.mixtures]:
        raise ValueError(
            f"no LoRA equals a mixture of feed-forward blocks, such as the one on {own[0]}: there is a nonlinearity "
            "between its layers, so not even with fixed gates"
        )
    return {name: (layer, layer.mixtures[chosen]) for name, layer in by_peft.items() if chosen in layer.mixtures}


def _chosen(layers: Iterable[MoSLDPeftLayer], adapter_name: str | None) -> str:
    layers = list(layers)
    known = sorted({name for layer in layers for name in layer.mixtures})
    if adapter_name is None:
        active = sorted({name for layer in layers for name in layer.active_adapters if name in layer.mixtures})
        if len(active) != 1:
            raise ValueError(f"adapter_name must be one of {known}, since the active adapters are {active}")
        return active[0]
    if adapter_name not in known:
        raise ValueError(f"adapter_name must be one of {known}, got {adapter_name!r}")
    return adapter_name


def check_one_lora(layers: Layers, origin: MoSLDConfig | None) -> None:
    """raises ValueError for mixtures that one LoRA cannot hold."""
    sizes = sorted({(adapter.r, adapter.alpha) for _, adapter in layers.values()})
    if len(sizes) > 1:
        raise ValueError(f"the layers of one LoRA must have one r and one alpha, got (r, alpha) in {sizes}")
    if origin is not None and origin.modules_to_save:
        raise ValueError(
            f"modules_to_save must be empty, got {sorted(origin.modules_to_save)}: a LoRA for serving holds no whole modules"
        )


def check_output(folder: Path, overwrite: bool = False) -> None:
    """raises ValueError when `folder` cannot take an export."""
    if not folder.exists():
        return
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    if found == []:
        return
    if found is None or REPORT not in found or not all(OWN.fullmatch(name) for name in found):
        raise ValueError(f"{folder} holds something else than an export: choose another output folder")
    if not overwrite:
        raise ValueError(f"{folder} holds an export: choose another output folder, or overwrite it")


def _peft_config(model: nn.Module, layers: Layers) -> MoSLDConfig | None:
    """The configuration that placed `layers`, where PEFT did."""
    layer, adapter = next(iter(layers.values()))
    if not isinstance(layer, MoSLDPeftLinear):
        return None
    name = next(name for name, mixture in layer.mixtures.items() if mixture is adapter)
    return (getattr(model, "peft_config", None) or {}).get(name)


def _save(
    folder: Path,
    base: nn.Module,
    layers: Layers,
    gates: dict[str, Tensor],
    origin: MoSLDConfig | None,
    task: int | None,
) -> None:
    """The LoRA of the layers in `gates` as PEFT's two files."""
    folder.mkdir(exist_ok=True)
    scale = next(iter(layers.values()))[1].scale
    tensors, ranks = {}, {}
    for name, gate in gates.items():
        down, up = _folded(layers[name][1], gate, task)
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = down, up
        ranks[name] = len(down)
    most = max(ranks.values(), key=list(ranks.values()).count)  # of most layers; the others are listed
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=_alpha(scale, most),  # pyright: ignore[reportArgumentType]  PEFT divides it
        rank_pattern=others,
        alpha_pattern={name: _alpha(scale, rank) for name, rank in others.items()},
        lora_dropout=0.0,
        target_modules=target_modules(base, gates),
        fan_in_fan_out=all(_is_conv1d(layers[name][0]) for name in gates),
        task_type=origin and origin.task_type,
        base_model_name_or_path=origin and origin.base_model_name_or_path,
        inference_mode=True,
    )
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same export gives the same bytes
    config.save_pretrained(str(folder))
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})


def target_modules(base: nn.Module, names: Iterable[str]) -> list[str] | str:
    """What makes PEFT adapt the layers `names` and no other: their last parts, their paths, or an expression."""
    names = set(names)
    layers = [name for name, module in base.named_modules() if isinstance(module, (MoSLDPeftLinear, MoSLDLinear))]
    inside = tuple(f"{name}." for name in layers)  # not there without MoSLD
    others = [name for name, _ in base.named_modules() if name not in names and not name.startswith(inside)]
    for listed in ({name.rpartition(".")[2] for name in names}, names):
        ends = tuple(f".{part}" for part in listed)
        if not any(name in listed or name.endswith(ends) for name in others):
            return sorted(listed)
    return "|".join(re.escape(name) for name in sorted(names))  # a path that is the end of another
