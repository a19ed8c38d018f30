"""docs/reference/methods.md, from the presets, their docstrings and counts on their real modules.

`python -m docs.build.methods` writes it.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from docs.build.markdown import table, wrapped
from docs.build.method_counts import MODEL, costs, trained_parameters
from mosld.mixture.registry import MIXINGS
from mosld.mixture.routers import ROUTERS
from mosld.mixture.spec import GATES, Mixture
from mosld.presets import PRESETS
from mosld.tuner.config import MoSLDConfig

PAGE = Path(__file__).parent.parent / "reference/methods.md"


class Form(NamedTuple):
    matrix: str
    formula: str
    a: str
    b: str


# What a mixing is in symbols; one that is not here has its docstring alone.
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
    "top_p": "the fewest experts whose probabilities reach `top_p`, renormalised; of `block` with renormalise=False "
    "those that exceed it, as they are",
}
SITES = {
    "dropout": 'elements of the shared factor: of A, of B with `shared="up"`; one mask for all tokens',
    "up_dropout": "elements of B",
    "input_dropout": "the layer's input before A, one mask for all experts (of `block`'s down layer one each); the "
    "router reads x undropped",
    "hidden_dropout": "z, A's output",
}


HEAD = f"""
# Methods

After this page you can choose a method for your model by its formula, its router and what it costs.

Written by `python -m docs.build.methods` from the presets, their docstrings and counts on their real modules; a test
says when it is behind. `mosld inspect --model {MODEL}` prints the counts for any model and setting.
"""

OPERATOR = """
## One operator: down, mix, up

Every mixture of LoRA experts here is a frozen linear layer with two trained products beside it and a small matrix
M(x) between them, another for each token:

```
z = x Aᵀ          down   every row of every A, once
h = M(x) z        mix    a few numbers a token; M is never written out
y = W0 x + s B h  up     every column of every B, once; s = alpha / r
```

No expert is looped over, and a method is a choice in each of four places: the mixing matrix, who routes, how logits
become gates, and where dropout falls. They are fields of `MoSLDConfig`, and combine freely where they do not contradict
each other; a preset is one combination. Logits, gates and M are computed in float32 at least. MoSLD's own structure
(`mixing="expand"` or `"diagonal"`, routed by token, dropout on A alone) runs in the fused operator, every other in the
three stages above, whose two products have their backward in closed form.
"""

MIXING = """
**Mixing matrices**, `mixing=`; `r` rows an expert, `g` the gates.
[A new one](../tutorials/new_mixing.md) is a function and a line.
"""

GATE = """
**Gates**, `gate=`, in float32; logits are divided by `temperature` first.
`grouped`, `dense` and `select` make their own.
"""

ROUTING = """
## What a method cannot see in its input

Task ids, gates and priors are given to the model before a forward and stay until they are given anew:

```python
import mosld

mosld.set_routing(model, task_ids=task_ids)  # integers [batch], or one for all rows: router="task", mixing="task_core"
mosld.set_routing(model, gates=gates)  # [batch, E] or [batch, sequence, E]: router="external"; also layer name -> gates
mosld.set_routing(model, prior=prior)  # [batch, r_up, r] or [batch, sequence, r_up, r]: mixing="dense"
mosld.set_routing(model)  # takes all of them back
```

`MoSLDTrainer` gives the ids of a `task_ids` column of the data by itself. Gates and priors carry gradients to where
they come from. A method that asks for ids or gates and was given none raises and says so; without a prior its term is
left out. A prior may also be flat, [batch, r_up r], the rows of its matrix one after the other; as a matrix it is
checked, and one of [batch, r, r_up] raises. With mixing_options slow_index="r", T-REX's order, it is the other way
round. Where r equals r_up no shape tells the two apart.
"""

PRESET = """
## Presets

`presets.hydralora(r=4, target_modules=[...])` is a `MoSLDConfig`: keyword overrides in, the paper's or its code's
values elsewhere. What the sources leave open is under [One by one](#one-by-one).
"""


# preset, what it does by default, what its authors' code does, and what to say for that
AUTHORS = (
    (
        "mixlora",
        "balance loss: a term for each block, added up",
        "MoE-PEFT: one term, of all blocks' tokens together, so about as many times smaller as there are blocks; "
        "its weight of 0.001 is of a load that adds up to top_k = 2",
        '`balance_pool="model"` (the weight 2e-3 is that)',
    ),
    (
        "mixlora",
        '`gate="top_p"` renormalises the fewest gates that reach p',
        "MoE-PEFT: the fewest that exceed p, as they are; with a loss of their own, and a temperature that divides "
        "probabilities, both of which are not here",
        '`gate="top_p", mixing_options={"renormalise": False}`',
    ),
    (
        "mola",
        "balance loss: a term for each adapted layer, added up",
        "a term for each transformer block, of all its layers' tokens together; padding counts",
        '`balance_pool="block"`; `balance_loss` with a mask of ones counts padding',
    ),
    (
        "mixlora_conditional",
        "router of B given A: Σ_q softmax(a_q W_q), starts within 1/√D_in",
        "Σ_q softmax((Σ_d a_q[d]) (Σ_f W_q[f])), without a projection; starts within 1/√(r D_in)",
        '`mixing_options={"selector": "sums"}`',
    ),
    (
        "mixlora_conditional",
        "routers get the gradient of a softmax",
        "no gradient",
        '`mixing_options={"straight_through": False}`',
    ),
    (
        "mor1e",
        "pairs in the order [r_up, r], row by row, of the router and of a flat prior",
        "T-REX: in the order [r, r_up]",
        '`mixing_options={"slow_index": "r"}`',
    ),
    (
        "hydralora, mola, mixlora",
        "all experts see one dropout mask on x",
        "another mask for each expert, and A multiplied as often",
        "none",
    ),
)
AUTHORS_INTRO = """
## Where the authors' code differs

What the presets compute is compared with loops over the published equations, in float64, values and gradients. Where
the released code computes something else than we do by default, this is how to have it; these options are compared
with loops over the code's behaviour (`tests/hardening/wild/test_methods_as_their_authors_code_does.py`). Merging
methods have [such a table](../tutorials/merging.md#where-the-authors-code-differs-from-their-papers) of their own.
"""


def _authors() -> str:
    rows = []
    for names, ours, theirs, option in AUTHORS:
        presets = ", ".join(f"`{name}`" for name in names.split(", "))
        rows.append((presets, ours, theirs, option))
    head = ("preset", "here, by default", "the authors' code", "how to have that")
    return "\n".join([AUTHORS_INTRO.strip(), "", *table(head, rows)])


def page() -> str:
    presets = [PRESET, _presets(), _authors()]
    parts = [HEAD, *_operator(), ROUTING, *presets, trained_parameters(), costs(), _one_by_one()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _operator() -> list[str]:
    dropout = "**Dropout**, all scaled by 1 / (1 - p), all off in eval."
    return [OPERATOR, MIXING, _mixings(), "**Routers**, `router=`.", _routers(), GATE, _gates(), dropout, _dropouts()]


def _mixings() -> str:
    rows = []
    for name, kind in MIXINGS.items():
        options = [f"{option}={value}" for option, value in kind.options.items()]
        form = FORMS.get(name, Form("", "", "", ""))
        rows.append((f"`{name}`", *form, ", ".join(options), _users("mixing", name)))
    head = ("`mixing`", "M(x)", "h = M(x) z", "A", "B", "`mixing_options`", "presets")
    return "\n".join(table(head, rows))


def _routers() -> str:
    rows = []
    for name, router in ROUTERS.items():
        rows.append((f"`{name}`", router.description, _users("router", name)))
    return "\n".join(table(("`router`", "the logits or gates are", "presets"), rows))


def _gates() -> str:
    rows = []
    for name in GATES:
        rows.append((f"`{name}`", GATE_TEXTS.get(name, ""), _users("gate", name)))
    return "\n".join(table(("`gate`", "gates are", "presets"), rows))


def _users(field: str, value: str) -> str:
    """The presets whose mixture has this value there; in `gate`, those that use it at all."""
    found = []
    for name, make in PRESETS.items():
        mixture = make().mixture_of("any")
        unused = field == "gate" and not (mixture.has_logits and not mixture.kind.gate)
        if getattr(mixture, field) == value and not unused:
            found.append(f"`{name}`")
    return ", ".join(found)


def _dropouts() -> str:
    configs = {name: make() for name, make in PRESETS.items()}
    rows = []
    for site, text in SITES.items():
        users = [f"`{name}`" for name, config in configs.items() if getattr(config, site)]
        rows.append((f"`{site}`", text, ", ".join(users)))
    return "\n".join(table(("field", "falls on", "presets"), rows))


def _presets() -> str:
    rows = []
    for name, make in PRESETS.items():
        config = make()
        mixture = config.mixture_of("any")
        form = FORMS.get(mixture.mixing)
        matrix = form.matrix if form else f"`{mixture.mixing}`"
        numbers = f"{config.r}, {config.alpha:g}, {config.num_experts}"
        structure = (_shared(form), matrix, _router(mixture), _gate(mixture))
        training = (_dropout(config), _loss(make, config), numbers)
        rows.append((f"[`{name}`](#{name})", _reference(make), *structure, *training))
    names = ("preset", "reference", "shared", "M(x)", "router", "gates", "dropout", "auxiliary loss")
    papers = sorted({_reference(make) for make in PRESETS.values()} - {""})
    addresses = [f"{paper}: https://arxiv.org/abs/{paper.strip('[]')}" for paper in papers]
    return "\n".join([*table((*names, "r, alpha, experts"), rows), "", *addresses])


def _reference(make: Callable) -> str:
    """The first paper that its docstring names, as a link whose address stands below the table."""
    ids = re.findall(r"arXiv (\d{4}\.\d{5})", make.__doc__ or "")
    return f"[{ids[0]}]" if ids else ""


def _shared(form: Form | None) -> str:
    if form is None:
        return "see below"
    shared = [factor for factor, text in (("A", form.a), ("B", form.b)) if text != "one an expert"]
    return " and ".join(shared) or "none"


def _router(mixture: Mixture) -> str:
    if mixture.num_experts == 1 and mixture.router == "none":
        return "none"
    return f"{mixture.router}, embedded in {mixture.task_dim}" if mixture.task_dim else mixture.router


def _gate(mixture: Mixture) -> str:
    if not mixture.has_logits:
        return "all one" if mixture.router == "none" else "given"
    if mixture.kind.gate is not None:
        return OWN_GATES.get(mixture.mixing, "its own")
    texts = {
        "top_k": f"softmax over the top {mixture.top_k}",
        "softmax": "softmax over all",
        "top_p": f"top p {mixture.top_p:g}",
    }
    text = texts[mixture.gate]
    return text if mixture.temperature == 1 else f"{text}, temperature {mixture.temperature:g}"


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
    for name in re.findall(r"mosld\.losses\.(\w+)", make.__doc__ or ""):
        found.append(f"`mosld.losses.{name}` where the Trainer is given it")
    return ", ".join(found) or "none"


def _one_by_one() -> str:
    intro = "The presets' docstrings: what each computes, where its values come from, and what is uncertain."
    lines = ["## One by one", "", intro]
    for name, make in PRESETS.items():
        text = inspect.cleandoc(make.__doc__ or "").partition("\n\n>>> ")[0]
        lines += ["", f"### {name}", "", "```text", text, "```", "", *_set_fields(make())]
    return "\n".join(lines)


def _set_fields(config: MoSLDConfig) -> list[str]:
    """What a preset says that the defaults do not."""
    defaults = MoSLDConfig()
    changed = []
    for field in fields(MoSLDConfig):
        value = getattr(config, field.name)
        if value != getattr(defaults, field.name):
            shown_value = sorted(value) if isinstance(value, set) else repr(value)
            changed.append(f"{field.name}={shown_value}")
    return wrapped(f"Set: `{', '.join(changed)}`." if changed else "Set: nothing, it is `MoSLDConfig`'s defaults.")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
