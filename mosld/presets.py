"""Every mixture of LoRA experts that we know, as a MoSLDConfig: `presets.hydralora(target_modules=["q_proj"])`.

A preset is a function: keyword overrides in, MoSLDConfig out. Its values are the paper's or its code's where they are
known; what the sources leave open is said in the docstring. `PRESETS` has all of them by name.

Batch mates, padding and later tokens change nothing, unless the docstring says that a method routes by the whole
sequence. Methods that route by task follow each row's own task.

>>> from mosld import presets
>>> presets.hydralora(target_modules=["q_proj"], r=4).mixture_of("q_proj").shapes(6, 5)  # one A, three B's
{'shared_a': (4, 6), 'expert_b': (5, 12), 'router': (3, 6)}
"""

from collections.abc import Callable
from typing import Any

from .tuner.config import MoSLDConfig

PRESETS: dict[str, Callable[..., MoSLDConfig]] = {}


def _preset(function: Callable[..., MoSLDConfig]) -> Callable[..., MoSLDConfig]:
    PRESETS[function.__name__] = function
    return function


def preset(name: str, **overrides: Any) -> MoSLDConfig:
    """The preset of this name; raises ValueError, with the known names, for another.

    >>> from mosld import presets
    >>> presets.preset("hydralora", r=4) == presets.hydralora(r=4)
    True
    >>> presets.preset("hydra")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: preset must be one of lora, mosld, mosl, mosld_up, hydralora, ..., got 'hydra'
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name](**overrides)


def experts_by_depth(blocks: int, *experts: int) -> dict[str, int]:
    """A num_experts_pattern: equal parts of a model's blocks, first to last, have these numbers of experts.

    `experts_by_depth(32, 8, 6, 4, 2)` is MoSLD's setting of LLaMA-2-7B. For models whose blocks are called layers,
    layer, h or block, as in LLaMA, BERT, GPT-2 and T5.
    raises ValueError for more parts than blocks.

    >>> from mosld import MoSLDConfig, presets
    >>> config = MoSLDConfig(num_experts_pattern=presets.experts_by_depth(4, 6, 2))  # of 4 blocks, 2 each
    >>> [config.experts_of(f"model.layers.{block}.mlp.up_proj") for block in range(4)]
    [6, 6, 2, 2]
    """
    if not 1 <= len(experts) <= blocks:
        raise ValueError(
            f"experts must be at least 1 number and at most one for each of {blocks} blocks, got {experts}"
        )
    bounds = [part * blocks // len(experts) for part in range(len(experts) + 1)]
    return {
        # A block in a block (T5's block.3.layer.0) is not one of the model's.
        rf"(?<!\d\.)(?:layers|layer|h|block)\.(?:{'|'.join(map(str, range(*ends)))})\..*": number
        for *ends, number in zip(bounds[:-1], bounds[1:], experts, strict=True)
    }


def _config(defaults: dict[str, Any], overrides: dict[str, Any]) -> MoSLDConfig:
    """mixing_options are overridden one by one, everything else as a whole."""
    options, own = defaults.pop("mixing_options", {}), overrides.pop("mixing_options", {})
    options = {**options, **own} if isinstance(own, dict) else own  # which MoSLDConfig refuses
    return MoSLDConfig(**{**defaults, **overrides}, mixing_options=options)


@_preset
def lora(**overrides: Any) -> MoSLDConfig:
    """LoRA (arXiv 2106.09685): one expert and no router. y = W0 x + s B A x. Without dropout unless asked for.

    For LoRA's own dropout, on x, say input_dropout.

    >>> from mosld import presets
    >>> presets.lora(r=2).mixture_of("q_proj").shapes(6, 5)
    {'shared_a': (2, 6), 'expert_b': (5, 2)}
    """
    return _config(dict(num_experts=1, top_k=1, router="none", dropout=0.0, balance_coef=0.0), overrides)


@_preset
def mosld(**overrides: Any) -> MoSLDConfig:
    """MoSLD (arXiv 2412.08946, Eq. 1 to 3): a shared A with dropout on its elements, top-2 of 8 experts, r 8, alpha 16.

    The paper's 8, 6, 4, 2 experts from the first to the last quarter of 32 layers are
    `num_experts_pattern=presets.experts_by_depth(32, 8, 6, 4, 2)`; its section 5.2 calls the reverse order better.
    The weight of its balance loss is not given; 1e-3 is MoLA's.

    >>> from mosld import presets
    >>> presets.mosld(r=2, num_experts=4).mixture_of("q_proj").shapes(6, 5)
    {'shared_a': (2, 6), 'expert_b': (5, 8), 'router': (4, 6)}
    """
    return _config({}, overrides)


@_preset
def mosl(**overrides: Any) -> MoSLDConfig:
    """MoSL (arXiv 2412.08946): MoSLD without its dropout, the paper's ablation.

    >>> from mosld import presets
    >>> presets.mosl() == presets.mosld(dropout=0.0), presets.mosl() == presets.mosld()
    (True, False)
    """
    return _config(dict(dropout=0.0), overrides)


@_preset
def mosld_up(**overrides: Any) -> MoSLDConfig:
    """MoSLD, matrix B (arXiv 2412.08946): the up-projection is shared and its elements are dropped; an A per expert.

    y = W0 x + s B~ sum_k g_k A_k x. The paper says only that the method is "applied to matrix B"; share and drop B is
    our reading. Read literally, its Eq. 3 says the same.

    >>> from mosld import presets
    >>> presets.mosld_up(r=2, num_experts=4).mixture_of("q_proj").shapes(6, 5)  # an A for each expert, one B
    {'shared_a': (8, 6), 'expert_b': (5, 2), 'router': (4, 6)}
    """
    return _config(dict(shared="up"), overrides)


@_preset
def hydralora(**overrides: Any) -> MoSLDConfig:
    """HydraLoRA (arXiv 2404.19245, Eq. 2 to 4): shared A, softmax over 3 experts, dropout 0.05 on x, no balance loss.

    The paper's figures are of r 8 and 3 experts, its script's of r 4, alpha 32 and 4. Its code draws the dropout on x
    anew for every expert and multiplies A as often; here all experts see one. Its parameter counts leave the router
    out.

    >>> from mosld import presets
    >>> mixture = presets.hydralora(r=4).mixture_of("q_proj")
    >>> mixture.shapes(6, 5), mixture.gate
    ({'shared_a': (4, 6), 'expert_b': (5, 12), 'router': (3, 6)}, 'softmax')
    """
    return _config(
        dict(r=8, alpha=32, num_experts=3, gate="softmax", dropout=0.0, input_dropout=0.05, balance_coef=0.0), overrides
    )


@_preset
def mola(**overrides: Any) -> MoSLDConfig:
    """MoLA (arXiv 2402.08562): an A and a B per expert, top-2 renormalised, r 8, alpha 16, dropout 0.05 on x.

    2, 4, 6, 8 experts from the first to the last quarter of the layers in the paper: `experts_by_depth(32, 2, 4, 6,
    8)`. Its code draws the dropout for every expert anew; here all see one. Its balance loss is optional, with weight
    1e-3: a term for each adapted layer here, one for all layers of a transformer block together in its code, which is
    balance_pool="block".

    >>> from mosld import presets
    >>> config = presets.mola(r=2, num_experts_pattern=presets.experts_by_depth(32, 2, 4, 6, 8))
    >>> config.mixture_of("layers.0.q_proj").shapes(6, 5)  # an A for each expert
    {'shared_a': (4, 6), 'expert_b': (5, 4), 'router': (2, 6)}
    """
    return _config(dict(mixing="diagonal", dropout=0.0, input_dropout=0.05), overrides)


@_preset
def loramoe(**overrides: Any) -> MoSLDConfig:
    """LoRAMoE (arXiv 2312.09979): an A and a B per expert, a softmax over all 8, r 4, alpha 32, dropout 0.05 on x.

    Adapts the feed-forward layers (gate, up, down) in the paper. Its localised balance loss is
    `mosld.losses.localized_balance_loss`; the shipped script gives it no weight, and the Trainer adds it where
    auxiliary_losses say so.

    >>> from mosld import presets
    >>> mixture = presets.loramoe(num_experts=2).mixture_of("up_proj")
    >>> mixture.shapes(6, 5), mixture.gate
    ({'shared_a': (8, 6), 'expert_b': (5, 8), 'router': (2, 6)}, 'softmax')
    """
    defaults = dict(mixing="diagonal", r=4, alpha=32, gate="softmax", dropout=0.0, input_dropout=0.05, balance_coef=0.0)
    return _config(defaults, overrides)


@_preset
def moelora(**overrides: Any) -> MoSLDConfig:
    """MoELoRA (arXiv 2402.12851): MoLA's form with a contrastive loss between experts.

    We have not read the paper's body: the forward is MoLA's, r, experts and weights are guesses, and the contrastive
    loss, `mosld.losses.contrastive_loss`, is the stated best reading. The Trainer adds it where auxiliary_losses say
    so.

    >>> from mosld import presets
    >>> presets.moelora() == presets.mola()  # the loss is what differs
    True
    """
    return _config(dict(mixing="diagonal", dropout=0.0, input_dropout=0.05), overrides)


@_preset
def mixlora(**overrides: Any) -> MoSLDConfig:
    """MixLoRA (TUDB, arXiv 2404.15159): each expert is a whole SwiGLU feed-forward block with LoRAs on its three
    layers, top-2 of 8 by one router per block; plain LoRAs on q, k, v, o. r 16, alpha 32, dropout 0.05 on what goes
    into A.

    Of models with blocks of the Llama kind called `mlp`. Its router starts ~ N(0, 0.02^2). The balance loss is a term
    for each block here; in its code (MoE-PEFT) it is one of all blocks' tokens together, balance_pool="model", and
    top_k times ours: its weight of 0.001 is 2e-3 here, its README's 0.01 is 2e-2. Its code draws the dropout for every
    expert and layer anew; here gate and up of all experts see one. Its other routers are gate="top_p", which its code
    does not renormalise, and top_k=1 (Switch, here without jitter, capacity and z-loss): say mixing_options
    renormalise=False to both. Such a block does not start equal to the base model's. No LoRA equals it.

    >>> from mosld import presets
    >>> block = presets.mixlora(r=2, num_experts=4).mixture_of("mlp").shapes(6, 8)  # of hidden and intermediate size
    >>> block["gate_a"], block["gate_b"], block["router"]
    ((8, 6), (8, 8), (4, 6))
    """
    defaults = dict(
        mixing="block", r=16, alpha=32, router_std=0.02, dropout=0.0, input_dropout=0.05, balance_coef=2e-3,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "mlp"],
    )  # fmt: skip
    return _config(defaults, overrides)


@_preset
def moelora_medical(**overrides: Any) -> MoSLDConfig:
    """MOELoRA, medical (arXiv 2310.18339): 8 experts of rank 1 (in all rank 8), a softmax of an embedding of the task.

    Asks for task ids (`mosld.set_routing`) and num_tasks, 8 unless said. The paper splits a total rank of 8 and scales
    by alpha over that total: here r is one expert's rank, so alpha=2 with r=1 stands for its 16 / 8. A ~ N(0, 0.01^2).

    >>> from mosld import presets
    >>> presets.moelora_medical(num_tasks=3).mixture_of("q_proj").shapes(6, 5)
    {'shared_a': (8, 6), 'expert_b': (5, 8), 'router': (8, 64), 'tasks': (3, 64)}
    """
    defaults = dict(
        mixing="diagonal", r=1, alpha=2, router="task", task_dim=64, num_tasks=8, gate="softmax", down_std=0.01,
        dropout=0.0, input_dropout=0.05, balance_coef=0.0,
    )  # fmt: skip
    return _config(defaults, overrides)


@_preset
def malora(**overrides: Any) -> MoSLDConfig:
    """MALoRA (arXiv 2410.22782): shared A, a core P_e [r_up, r] per expert, top-2 of 8.

    y = W0 x + s sum_k g_k B_k P_k A x

    mixing_options: r_up=12, the rank of the experts' B. Taken from two re-implementations, which differ in how A and P
    start: here both Kaiming-uniform (one takes A from an SVD of stacked A's). Its rule for r_up and its loss weight are
    not known to us.

    >>> from mosld import presets
    >>> presets.malora(r=2, num_experts=4, mixing_options={"r_up": 3}).mixture_of("q_proj").shapes(6, 5)
    {'shared_a': (2, 6), 'expert_b': (5, 12), 'router': (4, 6), 'mixer': (4, 3, 2)}
    """
    return _config(dict(mixing="core", dropout=0.0, input_dropout=0.05), overrides)


@_preset
def mtl_lora(**overrides: Any) -> MoSLDConfig:
    """MTL-LoRA (arXiv 2410.09437): y = W0 x + s sum_i softmax(w_t / 0.1)_i B_i L_t A x for a row of task t.

    Asks for task ids (`mosld.set_routing`) and num_tasks, 8 unless said. 3 B's; L_t [r, r] starts as the identity.
    Adapts q, k, v, o in its script.

    >>> from mosld import presets
    >>> presets.mtl_lora(r=2, num_tasks=4).mixture_of("q_proj").shapes(6, 5)
    {'shared_a': (2, 6), 'expert_b': (5, 6), 'router': (4, 3), 'mixer': (4, 2, 2)}
    """
    defaults = dict(
        mixing="task_core", num_experts=3, router="task", num_tasks=8, gate="softmax", temperature=0.1, dropout=0.0,
        input_dropout=0.05, balance_coef=0.0,
    )  # fmt: skip
    return _config(defaults, overrides)


@_preset
def mode(**overrides: Any) -> MoSLDConfig:
    """MoDE (arXiv 2408.01505): rank-one experts: each rank of a shared A has a softmax of its own over 6 B's. r 4.

    mixing_options: group_size=1, ranks that share one softmax (the generalised MoDE); group_size=r is HydraLoRA's form.
    No alpha is given: it is r unless said, so that the update is not scaled. A ~ N(0, 0.01^2) is of the paper's
    motivating study.

    >>> from mosld import presets
    >>> presets.mode(num_experts=2).mixture_of("q_proj").shapes(6, 5)  # a softmax over 2 experts for each rank
    {'shared_a': (4, 6), 'expert_b': (5, 8), 'router': (8, 6)}
    """
    defaults = dict(
        mixing="grouped", r=4, alpha=overrides.get("r", 4), num_experts=6, gate="softmax", down_std=0.01, dropout=0.0,
        balance_coef=0.0,
    )  # fmt: skip
    return _config(defaults, overrides)


@_preset
def mor1e(**overrides: Any) -> MoSLDConfig:
    """Intuition-MoR1E, later T-REX (arXiv 2404.08985): r rows of A and r_up columns of B, every pair of them an expert.

    y = W0 x + sigma(100 b) B M(x) A x,   M = w 32 softmax(router(x)) + (1 - w) 4 rho,   w = sigma(100 v), 32 = r r_up.
    rho is the prior of a sequence's cluster, [batch, r_up, r] to `mosld.set_routing(model, prior=...)`, or its rows one
    after the other, [batch, r_up r], which is the order of the router's rows too; without it its term is left out,
    which is our choice. In T-REX's code the index of A is the slow one: with mixing_options slow_index="r" its router
    and priors are taken as they are, [batch, r, r_up] or flat. r 4, r_up 8 in mixing_options, the router starts at
    zero, alpha is r unless said, so that the update is not scaled.

    >>> from mosld import presets
    >>> presets.mor1e(r=2, mixing_options={"r_up": 3}).mixture_of("q_proj").shapes(6, 5)  # the mixer is v and b
    {'shared_a': (2, 6), 'expert_b': (5, 3), 'router': (6, 6), 'mixer': (2,)}
    """
    defaults = dict(
        mixing="dense", r=4, alpha=overrides.get("r", 4), num_experts=1, gate="softmax", router_std=0.0, dropout=0.0,
        balance_coef=0.0,
    )  # fmt: skip
    return _config(defaults, overrides)


@_preset
def mixlora_conditional(**overrides: Any) -> MoSLDConfig:
    """Conditional Mixture-of-LoRA (multimodal MixLoRA, arXiv 2402.15896): per sequence r of num_experts rows of A and,
    given these, r columns of B, paired by rank order and not weighted.

    Routes on the mean of x over the whole sequence, so later tokens change earlier ones; so does padding, and through
    it batch mates. With a cache each step of `generate` routes on its own tokens alone: say use_cache=False. The
    released selection has no gradient for its routers; mixing_options straight_through=True (ours) gives them that of a
    softmax, False is the released behaviour. conditional=False leaves out the router of B given A, conditional_weight
    is its weight. That router scores column e by sum_q softmax(a_q W_q)[e] of the selected rows a_q, as we read the
    paper, and starts within 1 / sqrt(D_in). The released one multiplies sums, (sum of a_q) (sum of W_q[e]), and starts
    within 1 / sqrt(r D_in): selector="sums", whose weight is [num_experts, r D_in], as released.

    >>> from mosld import presets
    >>> presets.mixlora_conditional(r=2, num_experts=4).mixture_of("q_proj").shapes(6, 5)
    {'shared_a': (4, 6), 'expert_b': (5, 4), 'router': (8, 6), 'mixer': (2, 6, 4)}
    """
    defaults = dict(
        mixing="select", r=4, num_experts=16, alpha=32, router="sequence", gate="softmax", dropout=0.0,
        input_dropout=0.05, balance_coef=0.0,
    )  # fmt: skip
    return _config(defaults, overrides)
