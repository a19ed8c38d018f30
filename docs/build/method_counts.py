"""What the page of methods counts: trained parameters beside the papers' figures, and the cost of each preset."""

import functools
import re
from typing import NamedTuple

from docs.build.markdown import table, wrapped
from mosld.analysis.cost import count, sizes_by_role
from mosld.presets import PRESETS

MODEL = "llama-2-7b"


class Setting(NamedTuple):
    """A count that a paper gives, or that tells methods apart. arithmetic: Python, must equal the count."""

    name: str
    config: str
    targets: str | None
    arithmetic: str
    paper: str = ""


QV, QKVO, FFN = "q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj", "gate_proj,up_proj,down_proj"
ALL_IN, ALL_OUT = "(6*4096 + 11008)", "(5*4096 + 2*11008)"  # of a block's seven linear layers together
FFN_IN, FFN_OUT = "(2*4096 + 11008)", "(4096 + 2*11008)"
SETTINGS = [
    Setting("LoRA, r 8", "lora", QV, "64 * (8*4096 + 8*4096)", "0.419B in MoSLD's Table 5: 100 times too large"),
    Setting(
        "MoSLD, its 8, 6, 4, 2 experts", "mosld:num_experts=8/6/4/2", QV, "64 * (8*4096 + 5*8*4096 + 5*4096)",
        "1.389B, 20.6 % of full tuning in its Table 5: 100 times too large",
    ),
    Setting("MoSLD, 8 experts", "mosld", QV, "64 * (8*4096 + 8*8*4096 + 8*4096)"),
    Setting(
        "MoLA, its 2, 4, 6, 8 experts", "mola:num_experts=2/4/6/8", QV, "64 * (5*8*(4096 + 4096) + 5*4096)",
        "2.228B in MoSLD's Table 5: 100 times too large",
    ),
    Setting("MoLA, 8 experts", "mola", QV, "64 * (8*8*(4096 + 4096) + 8*4096)"),
    Setting(
        "HydraLoRA, r 8, 3 experts", "hydralora:r=8,num_experts=3", QV, "64 * (8*4096 + 3*8*4096 + 3*4096)",
        "0.124 %: without the router",
    ),
    Setting(
        "HydraLoRA, r 8, 10 experts", "hydralora:r=8,num_experts=10", QV, "64 * (8*4096 + 10*8*4096 + 10*4096)",
        "0.341 %: without the router",
    ),
    Setting(
        "HydraLoRA, its script", "hydralora:r=4,num_experts=4", FFN,
        f"32 * (4*{FFN_IN} + 4*4*{FFN_OUT} + 4*{FFN_IN})",
    ),
    Setting("MoDE, r 4, 6 experts", "mode:r=4,num_experts=6", QV, "64 * (4*4096 + 6*4*4096 + 6*4*4096)"),
    Setting(
        "MALoRA, 8 experts, r 8, r_up 12", "malora:r=8,r_up=12,num_experts=8", QV,
        "64 * (8*4096 + 8*(12*8 + 12*4096) + 8*4096)",
    ),
    Setting(
        "MTL-LoRA, its script: r 8, 3 B's, 8 tasks", "mtl_lora:r=8,num_experts=3,num_tasks=8", QKVO,
        "128 * (8*4096 + 8*8*8 + 3*8*4096 + 8*3)",
    ),
    Setting(
        "MoR1E / T-REX, 4 × 8", "mor1e:r=4,r_up=8", "all-linear",
        f"32 * (4*{ALL_IN} + 8*{ALL_OUT} + 32*{ALL_IN} + 7*2)", "not known to us; most of it is the router",
    ),
    Setting(
        "LoRAMoE, 8 experts, r 4", "loramoe:r=4,num_experts=8", FFN,
        f"32 * (8*4*({FFN_IN} + {FFN_OUT}) + 8*{FFN_IN})",
    ),
    Setting(
        "MoSLD, 5 experts on average, all linear layers", "mosld:num_experts=8/6/4/2", "all-linear",
        f"32 * (8*{ALL_IN} + 5*8*{ALL_OUT} + 5*{ALL_IN})",
    ),
    Setting(
        "MoLA, 5 experts on average, all linear layers", "mola:num_experts=2/4/6/8", "all-linear",
        f"32 * (5*8*({ALL_IN} + {ALL_OUT}) + 5*{ALL_IN})",
    ),
    Setting(
        "MixLoRA (TUDB), 8 experts, r 16", "mixlora", None,
        "32 * (8*16*3*(4096 + 11008) + 8*4096 + 4*16*(4096 + 4096))", "2.9 % of base and adapter: agrees",
    ),
]  # fmt: skip


def settings() -> list[Setting]:
    """Those whose preset there is."""
    return [setting for setting in SETTINGS if setting.config.partition(":")[0] in PRESETS]


@functools.cache
def counted(setting: Setting) -> dict:
    return count(MODEL, [setting.config], setting.targets)["methods"][0]


def shown(arithmetic: str) -> str:
    """Python's arithmetic as one writes it: 64 (8·4096 + 8·4096)."""
    without_stars = re.sub(r"\s*\*\s*(?=\()", " ", arithmetic)
    return without_stars.replace("*", "·")


def trained_parameters() -> str:
    own = settings()
    rows = [_counted_row(setting) for setting in own]
    head = ("setting", "`--config`", "layers", "trained", "% of base", "arithmetic", "the paper's figure")
    base = count(MODEL, ["lora"])["parameters"]
    intro = f"""Counted as what requires a gradient in the real modules, of {base:,} parameters of the base. q, v: 64
        layers 4096 → 4096; all linear layers: also k, o, and gate and up 4096 → 11008, down 11008 → 4096. Where the
        paper's figure is empty, it gives none for this model that we know of."""
    lines = [f"## Trained parameters on {MODEL}", "", *wrapped(intro), "", *table(head, rows), "", *_remarks(base)]
    return "\n".join(lines)


def _counted_row(setting: Setting) -> tuple[str, ...]:
    method = counted(setting)
    layers = "its own"
    if setting.targets is not None:
        layers = setting.targets.replace("_proj", "").replace(",", ", ")
    trained, share = f"{method['trained']:,}", f"{100 * method['share']:.3f}"
    return setting.name, f"`{setting.config}`", layers, trained, share, shown(setting.arithmetic), setting.paper


def _remarks(base: int) -> list[str]:
    by_name = {setting.name: counted(setting) for setting in settings()}
    mosld = by_name["MoSLD, its 8, 6, 4, 2 experts"]
    trained, percent = mosld["trained"], 100 * mosld["share"]
    with_one_a = trained - 32 * 8 * 4096
    hydra = by_name["HydraLoRA, r 8, 3 experts"]["parts"]
    alone = hydra["shared_a"] + hydra["expert_b"]
    whole_mosld = by_name["MoSLD, 5 experts on average, all linear layers"]["trained"] / 1e6
    whole_mola = by_name["MoLA, 5 experts on average, all linear layers"]["trained"] / 1e6
    table_5 = f"""- **MoSLD's Table 5 is 100 times too large**, in every row that we can check: the digits are those
        above, with the point two places to the right. {trained:,} parameters are {percent:.3f} % of the base, not 20.6
        %. That all three counts agree to the last digit printed also says what the text leaves open: a router without
        bias and an A of its own for every adapted layer. With one A for q and v together it would be {trained:,} -
        32·8·4096 = {with_one_a:,}. Its forward parameters, printed as 6.572B, are {base:,} + {trained:,} =
        {base + trained:,}; and the 128 matrices A that it says sharing saves, 32·(5 - 1), are 64·(5 - 1) = 256 with q
        and v."""
    routers = f"""- **HydraLoRA's figures leave the routers out**: {alone:,} / ({base:,} + {alone:,}) =
        {100 * alone / (base + alone):.3f} %, and the routers are another {hydra["router"]:,}."""
    sharing = f"""- Sharing A saves more where layers are wide in: on all linear layers MoSLD trains {whole_mosld:.1f}M,
        MoLA {whole_mola:.1f}M."""
    return [*wrapped(table_5), *wrapped(routers), *wrapped(sharing)]


def costs() -> str:
    methods = count(MODEL)["methods"]
    rows = [_cost_row(method) for method in methods]
    head = ("preset", "layers", "trained", "A", "B", "router", "mixer", "multiplied, %", "saved, bytes")
    intro = f"""On {MODEL}, q and v unless the preset says otherwise. Multiplied: multiplications of the adapters'
        matrix products over those of the frozen layers that they adapt, forward, per token, in percent. Saved: bytes
        that autograd keeps for backward per token and layer, beyond what the frozen layer keeps, with torch products in
        bfloat16. Both are taken from a run of the real layer on the meta device; neither is a time. What falls once a
        sequence or once a task is left out. Dropout on x keeps one bit an element, which is most of what is saved where
        there is one."""
    if any(row["saved_bytes"] < 0 for row in methods):
        intro += """
        Less than nothing is saved where a method computes again in backward what the frozen layers would keep."""
    lines = ["## Cost of the presets as they stand", "", *wrapped(intro), "", *table(head, rows)]
    return "\n".join(lines)


def _cost_row(method: dict) -> list[str]:
    sizes = [f"{size:,}" for size in sizes_by_role(method["parts"])]
    multiplied, saved = 100 * method["multiplications"], method["saved_bytes"] / method["layers"]
    start = [f"`{method['config']}`", str(method["layers"]), f"{method['trained']:,}"]
    return [*start, *sizes, f"{multiplied:.2f}", f"{saved:,.0f}"]
