"""From a mixture to a plain LoRA, in PEFT's own files.

    with fixed gates c:   s B M(c) A;   for MoSLD  s sum_e c_e B_e A = s B' A,   B' = sum_e c_e B_e   [D_out, R]

A is shared, so MoSLD's sum has rank R: an ordinary LoRA of the same r and alpha, exactly. Other mixtures have the
smaller of A's rows and B's columns for a rank, with M multiplied into the other.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files.adapter_folder import CONFIG, PEFT_PREFIX, WEIGHTS
from ..files.atomic import atomic_folder
from ..layers.linear import MoSLDLinear
from ..tuner.config import MoSLDConfig
from ..tuner.layer import MoSLDPeftLinear
from .adapted_layers import Layers, adapted_layers, check_one_lora, origin_of
from .fixed_gates import Gates, LayerGates, fix_gates
from .lora_tensors import alpha_of, is_conv1d, lora_factors

REPORT = "export.json"
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

    The LoRA has the mixture's r, alpha and dtype; B is summed in float64 and rounded once. Where gates are the same for
    all tokens anyway (router "none" or "constant") the LoRA is exact.

    Args:
        model: A PeftModel or any model with MoSLD layers of one r and one alpha, placed by PEFT or by hand. Left
            unchanged.
        output_dir: Gets adapter_config.json, adapter_model.safetensors and export.json, all at once or not at all.
        gates: "uniform" (1 / E each); E weights, for every layer; layer name -> E weights; or an iterable of
            calibration batches (the model's arguments as a dict, input_ids and attention_mask say), which gives each
            layer the mean of its gates over the real tokens. Weights are finite numbers and need not sum to one.
        adapter_name: Which of PEFT's adapters; needed when several are active.
        per_expert: Also one LoRA an expert, in output_dir/expert_0 and so on. Layers without that expert are left out.
        overwrite: Replace an earlier export in output_dir. Anything else there is never replaced.
        task: Which task's LoRA, for methods that route by task; with that task's own gates, exactly.

    Returns:
        Layer name (in the base model) -> LayerGates: the gates and, from batches, what is lost by fixing them.

    Raises:
        ValueError: Before anything is written, for a value that breaks these rules, and for an adapter with
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
    origin = origin_of(model, layers)
    check_one_lora(layers, origin)
    if per_expert and not all(adapter.mixture.kind.per_expert for _, adapter in layers.values()):
        raise ValueError("per_expert needs a gate for each expert, which this mixing has not")
    fixed = fix_gates(model, layers, gates, task)
    # Checked again before it takes its place: calibration may have taken long.
    with atomic_folder(folder, lambda: check_output(folder, overwrite)) as aside:
        weights = {name: torch.tensor(layer.gates, dtype=torch.float64) for name, layer in fixed.items()}
        _save(aside, base, layers, weights, origin, task)
        if per_expert:
            for expert in range(max(map(len, weights.values()))):
                alone = _one_expert(weights, expert)
                _save(aside / EXPERT.format(expert), base, layers, alone, origin, task)
        report = {"layers": {name: asdict(layer) for name, layer in fixed.items()}}
        (aside / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return fixed


def _one_expert(gates: dict[str, Tensor], expert: int) -> dict[str, Tensor]:
    """Gates that are one for `expert` and zero for the others, of the layers that have it."""
    alone = {}
    for name, gate in gates.items():
        if expert < len(gate):
            alone[name] = nn.functional.one_hot(torch.tensor(expert), len(gate)).double()
    return alone


def check_output(folder: Path, overwrite: bool = False) -> None:
    """raises ValueError when `folder` cannot take an export."""
    if not folder.exists():
        return
    found = os.listdir(folder) if folder.is_dir() else None
    if found == []:
        return
    if found is None or REPORT not in found or not all(map(OWN.fullmatch, found)):
        raise ValueError(f"{folder} holds something else than an export: choose another output folder")
    if not overwrite:
        raise ValueError(f"{folder} holds an export: choose another output folder, or overwrite it")


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
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, gate in gates.items():
        down, up = lora_factors(layers[name][1], gate, task)
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = down
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = up
        ranks[name] = len(down)
    # PEFT's files have one rank, here that of most layers, and list the layers of another one with their own alpha.
    most = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=alpha_of(scale, most),  # pyright: ignore[reportArgumentType]  PEFT divides it
        rank_pattern=others,
        alpha_pattern={name: alpha_of(scale, rank) for name, rank in others.items()},
        lora_dropout=0.0,
        target_modules=target_modules(base, gates),
        fan_in_fan_out=all(is_conv1d(layers[name][0]) for name in gates),
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
    others = _names_without_mosld(base) - names
    for listed in ({name.rpartition(".")[2] for name in names}, names):
        ends = tuple(f".{part}" for part in listed)
        if not any(name in listed or name.endswith(ends) for name in others):
            return sorted(listed)
    return "|".join(map(re.escape, sorted(names)))  # a path that is the end of another


def _names_without_mosld(base: nn.Module) -> set[str]:
    """The modules that the model has where MoSLD is not: without what lies inside an adapted layer."""
    names, inside = set(), ()
    for name, module in base.named_modules():  # a layer comes before what lies in it
        if not name.startswith(inside):
            names.add(name)
        if isinstance(module, (MoSLDPeftLinear, MoSLDLinear)):
            inside += (f"{name}.",)
    return names
