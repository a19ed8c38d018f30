"""Random configurations of every preset and every field, and values that a field cannot have."""

from typing import Any

from hypothesis import strategies as st

from mosld import MoSLDConfig
from mosld.mixture.registry import MIXINGS
from mosld.presets import PRESETS, preset

RATES = st.sampled_from((0.0, 0.05, 0.25, 0.5, 1.0)) | st.floats(0, 1)
POSITIVE = st.sampled_from((0.1, 1, 8.0, 16, 31.5)) | st.floats(1e-3, 1e3)
STDS = st.none() | st.just(0.0) | st.floats(0, 10)
NAMES = st.lists(
    st.sampled_from(("q_proj", "v_proj", "down_proj", "model.layers.0.mlp.up_proj")), min_size=1, unique=True
)
PATTERNS = ("q_proj", r"layers\.1\..*", r"(?<!\d\.)layers\.(?:0|2)\..*", "model.layers.0.mlp.down_proj")
TASKS = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
LAYERS = ("", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.12.self_attn.q_proj")


@st.composite
def fields_of(draw, name: str) -> dict[str, Any]:
    """Fields that the preset of this name can have, each of them there or not."""
    base = PRESETS[name]()
    mixture = base.mixture_of("")
    experts = base.num_experts if mixture.kind.block is None and base.router == "none" else draw(st.integers(1, 9))
    own = {
        "r": draw(st.integers(1, 9)),
        "alpha": draw(POSITIVE),
        "num_experts": experts,
        "top_k": draw(st.integers(1, experts)),
        "dropout": draw(RATES),
        "input_dropout": draw(RATES),
        "balance_coef": draw(st.sampled_from((0, 1e-3)) | st.floats(0, 1)),
        "balance_pool": draw(st.sampled_from(("layer", "block", "model"))),
        "down_std": draw(STDS),
        "task_type": draw(st.none() | st.sampled_from(TASKS)),
        "base_model_name_or_path": draw(st.none() | st.text(max_size=20)),
        "revision": draw(st.none() | st.just("main")),
        "modules_to_save": draw(st.none() | st.just(["lm_head"])),
        "trainable_token_indices": draw(st.none() | st.just([3, 5]) | st.just({"embed_tokens": [0]})),
        "exclude_modules": draw(st.none() | NAMES | st.just(r".*\.3\..*")),
    }
    if experts > 1:
        pattern = draw(st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 9), max_size=3))
        own["num_experts_pattern"] = pattern
        own["top_k"] = min([own["top_k"], *pattern.values()])
    if mixture.has_logits:
        own["temperature"], own["router_std"] = draw(POSITIVE), draw(STDS)
        if mixture.kind.gate is None:
            own["gate"], own["top_p"] = draw(st.sampled_from(("top_k", "softmax", "top_p"))), draw(st.floats(0.01, 1))
    if mixture.kind.block is None:
        own["hidden_dropout"] = draw(RATES)
        if base.shared == "down":
            own["up_dropout"] = draw(RATES)
        if base.mixing is None and base.router == "token":
            own["router"] = draw(st.sampled_from(("token", "hidden", "sequence")))
    if mixture.wants_tasks:
        own["num_tasks"] = draw(st.integers(1, 9))
    if base.task_dim is not None:
        own["task_dim"] = draw(st.none() | st.integers(1, 9))
    own["target_modules"] = draw(st.none() | NAMES | st.sampled_from(("all-linear", r".*\.(q|v)_proj")))
    if not isinstance(own["target_modules"], str):
        own["layers_to_transform"] = draw(st.none() | st.integers(0, 3) | st.lists(st.integers(0, 3), min_size=1))
        if own["layers_to_transform"] is not None:
            own["layers_pattern"] = draw(st.none() | st.sampled_from(("layers", "h")) | st.just(["layers", "h"]))
    kept = {field: value for field, value in own.items() if draw(st.booleans())}
    kept |= {field: own[field] for field in _together(kept) if field in own}
    if options := draw(_options(mixture.mixing, kept.get("r", base.r))):
        kept["mixing_options"] = options
    if mixture.mixing == "select":  # r of the pool are selected
        kept |= {"num_experts": 9, "num_experts_pattern": {}, "r": min(kept.get("r", base.r), 9)}
    return kept


def _together(kept: dict[str, Any]) -> set[str]:
    """What must come along so that the rest does not contradict the preset's own values."""
    more: set[str] = set()
    if {"num_experts", "num_experts_pattern", "top_k", "gate", "router"} & kept.keys():
        more |= {"num_experts", "num_experts_pattern", "top_k"}
    if {"layers_to_transform", "layers_pattern", "target_modules"} & kept.keys():
        more |= {"layers_to_transform", "layers_pattern", "target_modules"}
    return more


def _options(mixing: str, r: int) -> st.SearchStrategy[dict[str, Any]]:
    known: dict[str, st.SearchStrategy] = {
        "r_up": st.integers(1, 9),
        "group_size": st.sampled_from([size for size in range(1, r + 1) if r % size == 0]),
        "conditional": st.booleans(),
        "conditional_weight": st.floats(0, 10),
        "straight_through": st.booleans(),
        "renormalise": st.booleans(),
        "selector": st.sampled_from(("product", "sums")),
        "slow_index": st.sampled_from(("r_up", "r")),
    }
    return st.fixed_dictionaries({}, optional={name: known[name] for name in MIXINGS[mixing].options})


@st.composite
def configurations(draw) -> tuple[str, dict[str, Any], MoSLDConfig]:
    """A preset's name, fields beside it, and the configuration that the two make."""
    name = draw(st.sampled_from(sorted(PRESETS)))
    fields = draw(fields_of(name))
    return name, fields, preset(name, **fields)


NO_NUMBER = ("8", None, [8], {}, True, float("nan"), "nan", 1j)
HUGE = 10**400  # JSON has it, and no float
NO_COUNT = (*NO_NUMBER, 0, -1, 2.0, 1e300, float("inf"))
NO_RATE = (*NO_NUMBER, -0.1, 1.01, HUGE, -HUGE, float("inf"))
NO_POSITIVE = (*NO_NUMBER, 0, -3, float("inf"), HUGE, -HUGE)
NO_SIZE = tuple(value for value in (*NO_NUMBER, -1e-9, float("inf"), HUGE) if value is not None)
NO_CHOICE = ("sideways", "", 0, ["token"], {"token": 1}, 2.5)
NO_NAMES = (5, 2.5, True, {"q_proj": 1}, [1], ["q_proj", None], [["q_proj"]], "(", ["q_proj", 0])
NO_PATTERN = (
    [],
    None,
    "q_proj",
    3,
    {"(": 2},
    {"q_proj": 0},
    {"q_proj": "2"},
    {"q_proj": None},
    {"q_proj": 1.0},
    {3: 2},
)

# Field -> values that it cannot have in any configuration.
WRONG: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("r", "num_experts", "top_k"), NO_COUNT),
    **dict.fromkeys(("num_tasks", "task_dim"), tuple(value for value in NO_COUNT if value is not None)),
    **dict.fromkeys(("dropout", "up_dropout", "input_dropout", "hidden_dropout"), NO_RATE),
    **dict.fromkeys(("alpha", "temperature"), NO_POSITIVE),
    **dict.fromkeys(("down_std", "router_std"), NO_SIZE),
    "balance_coef": (None, *NO_SIZE),
    "top_p": (0, *NO_RATE),
    "shared": (None, *NO_CHOICE),
    "mixing": NO_CHOICE,
    **dict.fromkeys(("router", "gate", "balance_pool"), (None, *NO_CHOICE)),
    "mixing_options": (None, [], "r_up", 3, {"r_upp": 3}, {3: 4}),
    "num_experts_pattern": NO_PATTERN,
    **dict.fromkeys(("target_modules", "exclude_modules"), NO_NAMES),
    "trainable_token_indices": (5, True, "lm_head", [1.5], [-1], [True], {"embed": None}, {3: [1]}, {"embed": ["a"]}),
    "modules_to_save": ("lm_head", *(value for value in NO_NAMES if value != "(")),
    "layers_to_transform": (True, 1.5, "0", [0, "1"], [None], {"0": 1}, [True]),
    "layers_pattern": (5, True, {"layers": 1}, [0], "(", ["layers", "("]),
}
