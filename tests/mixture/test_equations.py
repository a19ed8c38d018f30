"""Every method, layer by layer, against loops written from its paper: values and the gradient of every parameter."""

import pytest
import torch
from torch.nn import functional as F

from mosld import MoSLDConfig, MoSLDLinear, presets, set_routing
from mosld_kernels import keep_mask
from mosld_kernels.bits import draw_bits, unpacked
from mosld_kernels.staged import UP_STREAM
from tests.mixture import naive

BATCH, TOKENS, D_IN, D_OUT = 3, 4, 7, 5
TASKS = torch.tensor([2, 0, 2])
MEDICAL = dict(r=1, num_experts=4, num_tasks=3, task_dim=6)
MTL = dict(r=3, num_experts=2, num_tasks=3)
SELECT = dict(r=2, num_experts=5, alpha=3)


def config(**fields):
    return lambda **more: MoSLDConfig(**{"dropout": 0.0, "r": 3, "num_experts": 4, **fields, **more})


# name -> the naive function, the preset or configuration, its fields
CASES = {
    "lora": (naive.lora, presets.lora, dict(r=3, alpha=5)),
    "mosld": (naive.mosld, presets.mosld, dict(r=3, alpha=5, num_experts=5)),
    "mosld, all chosen": (naive.mosld, presets.mosld, dict(r=1, num_experts=3, top_k=3)),
    "mosld, temperature": (naive.mosld_at_temperature, presets.mosld, dict(r=3, num_experts=5, temperature=0.5)),
    "mosl": (naive.mosl, presets.mosl, dict(r=3, num_experts=5, top_k=3)),
    "mosl, one chosen": (naive.mosl, presets.mosl, dict(r=3, num_experts=5, top_k=1)),
    "mosld_up": (naive.mosld_up, presets.mosld_up, dict(r=3, alpha=5, num_experts=4)),
    "hydralora": (naive.hydralora, presets.hydralora, dict(r=3)),
    "mola": (naive.mola, presets.mola, dict(r=3, num_experts=5)),
    "loramoe": (naive.loramoe, presets.loramoe, dict(r=3, num_experts=5)),
    "moelora": (naive.moelora, presets.moelora, dict(r=2, num_experts=3)),
    "moelora_medical": (naive.moelora_medical, presets.moelora_medical, MEDICAL),
    "malora": (naive.malora, presets.malora, dict(r=3, num_experts=4, mixing_options={"r_up": 5})),
    "mtl_lora": (naive.mtl_lora, presets.mtl_lora, MTL),
    "mode": (naive.mode, presets.mode, dict(r=3, alpha=5, num_experts=4)),
    "mode, groups of two": (naive.mode, presets.mode, dict(r=6, num_experts=3, mixing_options={"group_size": 2})),
    "mode, one group": (naive.mode, presets.mode, dict(r=3, num_experts=4, mixing_options={"group_size": 3})),
    "mor1e": (naive.mor1e, presets.mor1e, dict(r=3, mixing_options={"r_up": 2})),
    "mor1e, prior": (naive.mor1e, presets.mor1e, dict(r=3, mixing_options={"r_up": 2})),
    "mor1e, prior by token": (naive.mor1e, presets.mor1e, dict(r=2, alpha=3, mixing_options={"r_up": 3})),
    "mor1e, r slow": (naive.mor1e, presets.mor1e, dict(r=3, mixing_options={"r_up": 2, "slow_index": "r"})),
    "mor1e, r slow, prior": (naive.mor1e, presets.mor1e, dict(r=3, mixing_options={"r_up": 2, "slow_index": "r"})),
    "mixlora_conditional": (naive.mixlora_conditional, presets.mixlora_conditional, SELECT),
    "mixlora_conditional, weighted": (
        naive.mixlora_conditional, presets.mixlora_conditional,
        SELECT | dict(mixing_options={"conditional_weight": 2.5}),
    ),
    "mixlora_conditional, hard": (
        naive.mixlora_conditional, presets.mixlora_conditional,
        SELECT | dict(mixing_options={"straight_through": False}),
    ),
    "mixlora_conditional, apart": (
        naive.mixlora_conditional, presets.mixlora_conditional, SELECT | dict(mixing_options={"conditional": False}),
    ),
    "mixlora_conditional, sums": (
        naive.mixlora_conditional, presets.mixlora_conditional, SELECT | dict(mixing_options={"selector": "sums"}),
    ),
    "top_p": (naive.top_p_routed, config(gate="top_p", top_p=0.6), {}),
    "hidden": (naive.routed_on_hidden, config(router="hidden", temperature=0.5), {}),
    "sequence": (naive.routed_on_the_mean, config(router="sequence", mixing="diagonal"), {}),
    "constant": (naive.constant, config(router="constant", mixing="diagonal"), {}),
    "external": (naive.external, config(router="external", mixing="diagonal"), {}),
    "external by token": (naive.external, config(router="external", mixing="diagonal"), {}),
    "external, reduced": (naive.external_reduced, config(router="external", shared="up"), {}),
    "task cores": (naive.routed_cores_of_tasks, config(mixing="task_core", num_tasks=3), {}),
}  # fmt: skip
SITES = ("dropout", "up_dropout", "input_dropout", "hidden_dropout")
NO_GRADIENT = {  # the released selection gives its routers none
    "mixlora_conditional, hard": {"router.weight", "mixer.weight"},
}


def config_of(name, rates):
    _, preset, fields = CASES[name]
    return preset(**fields, **rates)


def layer_of(name, rates):
    m = config_of(name, rates).mixture_of("layer")
    torch.manual_seed(1)
    layer = MoSLDLinear(D_IN, D_OUT, dtype=torch.float64, **vars(m))
    for parameter in layer.adapter.parameters():
        parameter.data.normal_()
    if layer.adapter.mixer is not None and m.mixing == "dense":
        layer.adapter.mixer.weight.data.copy_(torch.tensor([0.004, -0.007]))  # the sigmoid of a hundred times
    return layer.train()


def given_of(name, layer):
    generator = torch.Generator().manual_seed(2)
    n = layer.adapter.mixture.kind.gates(layer.adapter.mixture)
    token = (TOKENS,) if "by token" in name else ()
    values = torch.randn(BATCH, *token, n, dtype=torch.float64, generator=generator)
    if "prior" in name:
        return {"prior": values}
    if "external" in name:
        return {"gates": values.requires_grad_()}
    return {"task_ids": TASKS} if layer.adapter.mixture.wants_tasks else {}


def masks_of(config, layer, x, torch_seed):
    """What the elements of A, B, x and z are multiplied by: drawn again as the layer draws them, at these rates."""
    a = layer.adapter
    of_a, of_b = (0.0, config.dropout) if config.shared == "up" else (config.dropout, config.up_dropout)
    torch.manual_seed(torch_seed)
    masks = {}
    if of_a or of_b:
        seed = torch.randint(2**62, (1,))
        masks["A"] = keep_mask(seed, a.shared_a.weight.shape, of_a).double() / (1 - of_a)
        keep = keep_mask(seed, a.expert_b.weight.shape, of_b, stream_id=UP_STREAM)
        masks["B"] = keep.double() / (1 - of_b)
    if config.input_dropout:
        flat = x.flatten(0, -2)
        keep = unpacked(draw_bits(flat, config.input_dropout), flat.shape).view(x.shape)
        masks["x"] = keep.double() / (1 - config.input_dropout)
    if config.hidden_dropout:
        ones = torch.ones(*x.shape[:-1], len(a.shared_a.weight), dtype=torch.float64)
        masks["z"] = F.dropout(ones, config.hidden_dropout)
    return masks


def loops(name, layer, x, masks, given):
    """The layer's output [batch, tokens, D_OUT], token by token."""
    function, _, fields = CASES[name]
    a, m = layer.adapter, layer.adapter.mixture
    weight = {
        part: None if getattr(a, part) is None else getattr(a, part).weight for part in ("router", "tasks", "mixer")
    }
    dropped = x * masks["x"] if "x" in masks else x
    out = []
    for b in range(len(x)):
        for i in range(x.shape[1]):
            of_token = {key: v[b] if v.dim() == 2 else v[b, i] for key, v in given.items() if key in ("gates", "prior")}
            token = naive.Token(
                x=x[b, i], dropped=dropped[b, i], row=x[b],
                A=a.shared_a.weight * masks.get("A", 1), undropped_a=a.shared_a.weight,
                B=a.expert_b.weight * masks.get("B", 1),
                hidden=masks["z"][b, i] if "z" in masks else x.new_ones(len(a.shared_a.weight)),
                r=m.r, s=m.alpha / m.r, E=m.num_experts, k=m.top_k, task=int(TASKS[b]),
                options={**m.kind.options, **m.mixing_options, "top_p": m.top_p}, **weight, **of_token,
            )  # fmt: skip
            out.append(layer.weight @ x[b, i] + layer.bias + function(token))
    return torch.stack(out).view(*x.shape[:-1], -1)


def rates_of(name, which):
    _, preset, fields = CASES[name]
    if which == "none":
        return dict.fromkeys(SITES, 0.0)
    if which == "preset":
        return {}
    rates = dict(zip(SITES, (0.2, 0.3, 0.1, 0.25), strict=True))
    if preset(**fields).shared == "up":
        rates["up_dropout"] = 0.0  # `dropout` is on B there
    return rates


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("which", ["none", "preset", "everywhere"])
def test_values_and_gradients_are_those_of_the_loops(name, which):
    rates = rates_of(name, which)
    config, layer = config_of(name, rates), layer_of(name, rates)
    results = []
    for way in ("ours", "loops"):
        x = torch.randn(
            BATCH, TOKENS, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        ).requires_grad_()
        given = given_of(name, layer)
        masks = masks_of(config, layer, x, 5)
        if way == "ours":
            set_routing(layer, **given)
            torch.manual_seed(5)
            y = layer(x)
        else:
            y = loops(name, layer, x, masks, given)
        dout = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        trained = {"x": x, **dict(layer.adapter.named_parameters())}
        if "gates" in given:
            trained["gates"] = given["gates"]
        grads = torch.autograd.grad(y, list(trained.values()), dout, allow_unused=True)
        results.append({"y": y, **{f"d{key}": grad for key, grad in zip(trained, grads, strict=True)}})
    ours, truth = results
    without = {f"d{key}" for key in NO_GRADIENT.get(name, ())}
    assert {key for key, value in truth.items() if value is None} == without
    for key, value in truth.items():
        if key in without:
            assert ours[key] is None, key
        else:
            torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
            # The gate of the only chosen expert is 1 whatever the router says.
            assert value.abs().max() > 1e-6 or (key == "drouter.weight" and layer.adapter.top_k == 1), (
                f"{key} shows nothing"
            )


@pytest.mark.parametrize("name", CASES)
def test_eval_mode_drops_nothing(name):
    layer = layer_of(name, rates_of(name, "everywhere"))
    x = torch.randn(BATCH, TOKENS, D_IN, dtype=torch.float64)
    given = given_of(name, layer)
    set_routing(layer, **given)
    trained = layer(x)
    y = layer.eval()(x)
    assert not torch.allclose(trained, y)
    torch.testing.assert_close(y, loops(name, layer, x, {}, given), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 2, 3), (0, 3), (2, 0)], ids=str)
def test_any_leading_shape(name, leading):
    """A vector is a row of one token, [T, D_in] are rows of one token or one sequence, more sizes are rows in front."""
    layer = layer_of(name, rates_of(name, "none")).eval()
    x = torch.randn(*leading, D_IN, dtype=torch.float64)
    given = {key: value[:1] for key, value in given_of(name, layer).items()}
    if "by token" in name:
        given = {key: value[:, :1] for key, value in given.items()}
        given = {key: value.expand(*leading, -1) if len(leading) > 1 else value[0] for key, value in given.items()}
    set_routing(layer, **given)
    y = layer(x)
    assert y.shape == (*leading, D_OUT)
    rows = x.view(1, 1, D_IN) if not leading else x
    if len(leading) == 1:  # a sequence where the method routes by one, else any tokens
        rows = x[None]
    rows = rows.reshape(-1, rows.shape[-2], D_IN) if rows.numel() else rows
    ids = TASKS[:1]
    for b, row in enumerate(rows if rows.numel() else []):
        own = {key: value.reshape(-1, value.shape[-1])[:1] for key, value in given.items() if key != "task_ids"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.mixture.test_equations.TASKS", ids)
            expected = loops(name, layer, row[None], {}, own)[0]
        torch.testing.assert_close(y.reshape(-1, len(row), D_OUT)[b], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if "by token" not in name])
def test_no_token_gives_gradients_of_zero_and_not_of_nan(name):
    layer = layer_of(name, rates_of(name, "everywhere"))
    set_routing(layer, **{key: value[:1] for key, value in given_of(name, layer).items()})
    layer(torch.zeros(2, 0, D_IN, dtype=torch.float64)).sum().backward()
    for key, parameter in layer.adapter.named_parameters():
        assert parameter.grad is None or (parameter.grad == 0).all(), key
