"""docs/methods.md, from the presets, their docstrings and counts on their real modules: `python -m tests.methods_page` writes it."""

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from mosld.analysis.cost import count, sizes_by_role
from mosld.mixture.registry import MIXINGS
from mosld.mixture.routers import ROUTERS
from mosld.mixture.spec import GATES, Mixture
from mosld.presets import PRESETS
from mosld.tuner.config import MoSLDConfig

PAGE = Path(__file__).parent.parent / "docs/methods.md"
MODEL = "llama-2-7b"


class Form(NamedTuple):
    matrix: str
    formula: str
    a: str
    b: str


# What a mixing is in symbols; one that is not here is told by its docstring alone.
FORMS = {
    "expand": Form("g ⊗ I_r", "h[e, i] = g_e z_i", "shared", "one an expert"),
    "diagonal": Form("diag(g ⊗ 1_r)", "h[e, i] = g_e z[e, i]", "one an expert", "one an expert"),
    "reduce": Form("gᵀ ⊗ I_r", "h[i] = Σ_e g_e z[e, i]", "one an expert", "shared"),
    "core": Form("rows g_e P_e", "h[e, :] = g_e P_e z", "shared", "one an expert"),
    "task_core": Form("rows g_e Λ_t", "h[e, :] = g_e Λ_t z", "shared", "one an expert"),
    "grouped": Form("g[group of j, i] at (i, j)", "h[i, j] = g[group of j, i] z_j", "shared", "one an expert"),
    "dense": Form("G(x), r_up × r", "h = G z", "r rows, shared by all pairs", "r_up columns, shared by all pairs"),
    "select": Form(
        "P_B(x)ᵀ P_A(x), zeros and ones", "h[b_q] = z[a_q], q = 1 to r", "a pool of rows", "a pool of columns"
    ),
    "block": Form(
        "not one: E whole feed-forward blocks",
        "y = Σ_e g_e W2_e (act(W1_e x) ∘ W3_e x)",
        "one an expert",
        "one an expert",
    ),
}
OWN_GATES = {
    "grouped": "softmax in each group",
    "dense": "softmax over all pairs, and prior",
    "select": "the r largest, 0 or 1",
}
GATE_TEXTS = {
    "top_k": "softmax over the `top_k` largest logits (equals softmax, then top-k, then renormalise)",
    "softmax": "softmax over all",
    "top_p": "the fewest experts whose probabilities reach `top_p`, renormalised",
}
SITES = {
    "dropout": 'elements of the shared factor: of A, of B with `shared="up"`; one mask for all tokens',
    "up_dropout": "elements of B",
    "input_dropout": "the layer's input before A, one mask for all experts; the router reads x undropped",
    "hidden_dropout": "z, A's output",
}


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


def page() -> str:
    parts = [HEAD, _operator(), TELLING, _presets(), _counts(), _costs(), _one_by_one()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


HEAD = f"""
# Methods

Written by `python -m tests.methods_page` from the presets, their docstrings and counts on their real modules; a test says when
it is behind. `mosld inspect --model {MODEL}` prints the counts for any model and setting.
"""


def _operator() -> str:
    configs = {name: PRESETS[name]() for name in PRESETS}
    return "\n".join(
        [
            "## One operator: down, mix, up",
            "",
            "Every mixture of LoRA experts here is a frozen linear layer with two trained products beside it and a small matrix",
            "M(x) between them, another for each token:",
            "",
            "```",
            "z = x Aᵀ          down   every row of every A, once",
            "h = M(x) z        mix    a few numbers a token; M is never written out",
            "y = W0 x + s B h  up     every column of every B, once; s = alpha / r",
            "```",
            "",
            "No expert is looped over, and a method is a choice in each of four places: the mixing matrix, who routes, how logits",
            "become gates, and where dropout falls. They are fields of `MoSLDConfig`, and combine freely where they do not contradict",
            "each other; a preset is one combination. Logits, gates and M are computed in float32 at least. MoSLD's own structure",
            '(`mixing="expand"` or `"diagonal"`, routed by token, dropout on A alone) runs in the fused operator, every other in the',
            "three stages above, whose two products have their backward in closed form.",
            "",
            "**Mixing matrices**, `mixing=`; `r` rows an expert, `g` the gates. [A new one](new_mixture.md) is a function and a line.",
            "",
            *_table(
                ("`mixing`", "M(x)", "h = M(x) z", "A", "B", "`mixing_options`", "presets"),
                (
                    (
                        f"`{name}`", *FORMS.get(name, Form("", "", "", "")),
                        ", ".join(f"{option}={value}" for option, value in kind.options.items()),
                        _users(configs, lambda m, name=name: m.mixing == name),
                    )
                    for name, kind in MIXINGS.items()
                ),
            ),
            "",
            "**Routers**, `router=`.",
            "",
            *_table(
                ("`router`", "the logits or gates are", "presets"),
                ((f"`{n}`", r.description, _users(configs, lambda m, n=n: m.router == n)) for n, r in ROUTERS.items()),
            ),
            "",
            "**Gates**, `gate=`, in float32; logits are divided by `temperature` first. `grouped`, `dense` and `select` make their own.",
            "",
            *_table(
                ("`gate`", "gates are", "presets"),
                (
                    (f"`{n}`", GATE_TEXTS.get(n, ""), _users(configs, lambda m, n=n: m.gate == n and m.has_logits and not m.kind.gate))
                    for n in GATES
                ),
            ),
            "",
            "**Dropout**, all scaled by 1 / (1 - p), all off in eval.",
            "",
            *_table(
                ("field", "falls on", "presets"),
                (
                    (f"`{site}`", text, ", ".join(f"`{n}`" for n, c in configs.items() if getattr(c, site)))
                    for site, text in SITES.items()
                ),
            ),
        ]
    )  # fmt: skip


TELLING = """
## What a method cannot see in its input

Task ids, gates and priors are given to the model before a forward and stay until they are given anew:

```python
import mosld

mosld.set_routing(model, task_ids=task_ids)  # integers [batch], or one for all rows: router="task", mixing="task_core"
mosld.set_routing(model, gates=gates)  # [batch, E] or [batch, sequence, E]: router="external"; also layer name -> gates
mosld.set_routing(model, prior=prior)  # [batch, r r_up] or [batch, sequence, r r_up]: mixing="dense"
mosld.set_routing(model)  # takes all of them back
```

`MoSLDTrainer` gives the ids of a `task_ids` column of the data by itself. Gates and priors carry gradients to where they come
from. A method that asks for ids or gates and was given none raises and says so; without a prior its term is left out.
"""


def _presets() -> str:
    rows = []
    for name, make in PRESETS.items():
        config = make()
        m = config.mixture_of("any")
        form = FORMS.get(m.mixing)
        rows.append(
            (
                f"[`{name}`](#{name})", _reference(make), _shared(form), form.matrix if form else f"`{m.mixing}`",
                _router(m), _gate(m), _dropout(config), _loss(make, config),
                f"{config.r}, {config.alpha:g}, {config.num_experts}",
            )
        )  # fmt: skip
    heads = (
        "preset", "reference", "shared", "M(x)", "router", "gates", "dropout", "auxiliary loss", "r, alpha, experts",
    )  # fmt: skip
    return "\n".join(
        [
            "## Presets",
            "",
            "`presets.hydralora(r=4, target_modules=[...])` is a `MoSLDConfig`: keyword overrides in, the paper's or its code's values",
            "elsewhere. What the sources leave open is under [One by one](#one-by-one).",
            "",
            *_table(heads, rows),
        ]
    )


def _reference(make: Callable) -> str:
    ids = re.findall(r"arXiv (\d{4}\.\d{5})", make.__doc__ or "")
    return f"[{ids[0]}](https://arxiv.org/abs/{ids[0]})" if ids else ""


def _shared(form: Form | None) -> str:
    if form is None:
        return "see below"
    shared = [factor for factor, text in (("A", form.a), ("B", form.b)) if text != "one an expert"]
    return " and ".join(shared) or "none"


def _router(m: Mixture) -> str:
    if m.num_experts == 1 and m.router == "none":
        return "none"
    return f"{m.router}, embedded in {m.task_dim}" if m.task_dim else m.router


def _gate(m: Mixture) -> str:
    if not m.has_logits:
        return "all one" if m.router == "none" else "given"
    if m.kind.gate is not None:
        return OWN_GATES.get(m.mixing, "its own")
    text = {"top_k": f"softmax over the top {m.top_k}", "softmax": "softmax over all", "top_p": f"top p {m.top_p:g}"}[
        m.gate
    ]
    return text if m.temperature == 1 else f"{text}, temperature {m.temperature:g}"


def _dropout(config: MoSLDConfig) -> str:
    places = {
        "dropout": "elements of B" if config.shared == "up" else "elements of A",
        "up_dropout": "elements of B",
        "input_dropout": "x",
        "hidden_dropout": "z",
    }
    found = [f"{getattr(config, site):g} on {place}" for site, place in places.items() if getattr(config, site)]
    return ", ".join(found) or "none"


def _loss(make: Callable, config: MoSLDConfig) -> str:
    found = [f"load balance, {config.balance_coef:g}"] if config.balance_coef else []
    found += [f"`mosld.losses.{name}`" for name in re.findall(r"mosld\.losses\.(\w+)", make.__doc__ or "")]
    return ", ".join(found) or "none"


def _counts() -> str:
    rows, trained = [], {}
    for setting in settings():
        method = counted(setting)
        trained[setting.name] = method
        rows.append(
            (
                setting.name, f"`{setting.config}`", "its own" if setting.targets is None else setting.targets.replace("_proj", "").replace(",", ", "),
                f"{method['trained']:,}", f"{100 * method['share']:.3f}", shown(setting.arithmetic), setting.paper,
            )
        )  # fmt: skip
    mosld = trained["MoSLD, its 8, 6, 4, 2 experts"]
    base = count(MODEL, ["lora"])["parameters"]
    hydra = trained["HydraLoRA, r 8, 3 experts"]
    alone = hydra["parts"]["shared_a"] + hydra["parts"]["expert_b"]
    one_a = mosld["trained"] - 32 * 8 * 4096
    whole = trained["MoSLD, 5 experts on average, all linear layers"]["trained"]
    whole_mola = trained["MoLA, 5 experts on average, all linear layers"]["trained"]
    return "\n".join(
        [
            f"## Trained parameters on {MODEL}",
            "",
            f"Counted as what requires a gradient in the real modules, of {base:,} parameters of the base. q, v: 64 layers 4096 → 4096; all",
            "linear layers: also k, o, and gate and up 4096 → 11008, down 11008 → 4096. Where the paper's figure is empty, it gives none",
            "for this model that we know of.",
            "",
            *_table(
                ("setting", "`--config`", "layers", "trained", "% of base", "arithmetic", "the paper's figure"), rows
            ),
            "",
            "- **MoSLD's Table 5 is 100 times too large**, in every row that we can check: the digits are those above, with the point two",
            f"  places to the right. {mosld['trained']:,} parameters are {100 * mosld['share']:.3f} % of the base, not 20.6 %. That all three counts agree to the last",
            "  digit printed also says what the text leaves open: a router without bias and an A of its own for every adapted layer. With one",
            f"  A for q and v together it would be {mosld['trained']:,} - 32·8·4096 = {one_a:,}. Its forward parameters, printed as 6.572B,",
            f"  are {base:,} + {mosld['trained']:,} = {base + mosld['trained']:,}; and the 128 matrices A that it says sharing saves,",
            "  32·(5 - 1), are 64·(5 - 1) = 256 with q and v.",
            f"- **HydraLoRA's figures leave the routers out**: {alone:,} / ({base:,} + {alone:,}) = {100 * alone / (base + alone):.3f} %,",
            f"  and the routers are another {hydra['parts']['router']:,}.",
            f"- Sharing A saves more where layers are wide in: on all linear layers MoSLD trains {whole / 1e6:.1f}M, MoLA {whole_mola / 1e6:.1f}M.",
        ]
    )  # fmt: skip


def shown(arithmetic: str) -> str:
    return re.sub(r"\s*\*\s*(?=\()", " ", arithmetic).replace("*", "·")


def _costs() -> str:
    rows, methods = [], count(MODEL)["methods"]
    less = any(method["saved_bytes"] < 0 for method in methods)
    for method in methods:
        rows.append(
            (
                f"`{method['config']}`", str(method["layers"]), f"{method['trained']:,}",
                *(f"{size:,}" for size in sizes_by_role(method["parts"])),
                f"{100 * method['multiplications']:.2f}", f"{method['saved_bytes'] / method['layers']:,.0f}",
            )
        )  # fmt: skip
    return "\n".join(
        [
            "## Cost of the presets as they stand",
            "",
            f"On {MODEL}, q and v unless the preset says otherwise. Multiplied: multiplications of the adapters' matrix products over those of the",
            "frozen layers that they adapt, forward, per token, in percent. Saved: bytes that autograd keeps for backward per token and layer,",
            "beyond what the frozen layer keeps, with torch products in bfloat16. Both are taken from a run of the real layer on the meta device; neither",
            "is a time. What falls once a sequence or once a task is left out. Dropout on x keeps one bit an element, which is most of",
            "what is saved where there is one."
            + less
            * "\nLess than nothing is saved where a method computes again in backward what the frozen layers would keep.",
            "",
            *_table(
                ("preset", "layers", "trained", "A", "B", "router", "mixer", "multiplied, %", "saved, bytes"), rows
            ),
        ]
    )


def _one_by_one() -> str:
    lines = [
        "## One by one",
        "",
        "The presets' docstrings: what each computes, where its values come from, and what is uncertain.",
    ]
    defaults = MoSLDConfig()
    for name, make in PRESETS.items():
        config = make()
        own = {f.name: getattr(config, f.name) for f in fields(MoSLDConfig)}
        told = [f"{n}={sorted(v) if isinstance(v, set) else v!r}" for n, v in own.items() if v != getattr(defaults, n)]
        lines += [
            "",
            f"### {name}",
            "",
            "```text",
            inspect.cleandoc(make.__doc__ or "").partition("\n\n>>> ")[0],
            "```",
            "",
        ]
        lines.append(f"Set: `{', '.join(told)}`." if told else "Set: nothing, it is `MoSLDConfig`'s defaults.")
    return "\n".join(lines)


def _users(configs: dict[str, MoSLDConfig], chosen: Callable[[Mixture], object]) -> str:
    return ", ".join(f"`{name}`" for name, config in configs.items() if chosen(config.mixture_of("any")))


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    heads = list(heads)
    return [
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
