"""What the caller gives the routers: task ids in plain calls and in generate, gates from outside; errors that help."""

import peft
import pytest
import torch

from mosld import MoSLDConfig, MoSLDLinear, presets, register_mixing, set_routing
from mosld.mixture.registry import MIXINGS
from tests.helpers.architectures import build
from tests.helpers.models import perturb, tiny_llama, token_ids

IDS, TASKS = token_ids(rows=3, length=5), torch.tensor([5, 0, 3])


def by_task(base=None, targets=("q_proj", "down_proj"), std=0.5):
    base = tiny_llama() if base is None else base
    model = peft.get_peft_model(base, presets.mtl_lora(target_modules=list(targets)))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=std)  # so that tasks differ in the tokens that they choose
    return model.eval()


def alone(model, ids, tasks, **settings):
    """What `generate` gives for each row by itself."""
    rows = []
    for row, task in zip(ids, tasks, strict=True):
        set_routing(model, task_ids=int(task))
        rows.append(model.generate(input_ids=row[None], **settings))
    return torch.cat(rows)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@torch.no_grad()
def test_generate_follows_each_rows_task_through_its_beams(settings):
    model, ids = by_task(), token_ids(rows=4, length=5)
    tasks = torch.tensor([5, 0, 3, 0])
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, **settings)
    expected = alone(model, ids, tasks, **settings)
    set_routing(model, task_ids=tasks)
    together = model.generate(input_ids=ids, **settings)
    assert torch.equal(together, expected)
    assert not torch.equal(alone(model, ids, [1, 1, 1, 1], **settings), expected)


@torch.no_grad()
def test_generate_of_an_encoder_and_a_decoder_whose_batches_differ():
    """The encoder sees the rows, the decoder their beams."""
    model = by_task(build("T5"), ("q", "v", "wo"), std=1.0)
    settings = dict(max_new_tokens=6, min_new_tokens=6, num_beams=3, do_sample=False)
    expected = alone(model, IDS, TASKS, **settings)
    set_routing(model, task_ids=TASKS)
    assert torch.equal(model.generate(input_ids=IDS, **settings), expected)
    assert not torch.equal(alone(model, IDS, [1, 1, 1], **settings), expected)


@torch.no_grad()
def test_a_sequence_routed_method_generates_without_a_cache_as_it_computes():
    """Each step without a cache sees the whole row so far, as a forward of it does; one with a cache does not."""
    model = peft.get_peft_model(
        tiny_llama(), presets.mixlora_conditional(r=2, num_experts=6, target_modules=["q_proj"])
    )
    torch.manual_seed(1)
    perturb(model)
    settings = dict(
        max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    out = model.eval().generate(input_ids=IDS[:1], use_cache=False, **settings)
    for step, logits in enumerate(out.logits):
        whole = model(out.sequences[:, : IDS.shape[1] + step]).logits[:, -1]
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)
    cached = model.generate(input_ids=IDS[:1], **settings)
    assert not torch.allclose(torch.stack(cached.logits), torch.stack(out.logits), atol=1e-3)


@torch.no_grad()
def test_given_once_it_holds_until_it_is_given_anew():
    model = by_task()
    set_routing(model, task_ids=TASKS)
    first = model(IDS).logits
    assert torch.equal(model(IDS).logits, first)
    set_routing(model, task_ids=TASKS.tolist())  # a list, too
    assert torch.equal(model(IDS).logits, first)
    set_routing(model, task_ids=torch.tensor(5))
    torch.testing.assert_close(model(IDS).logits[0], first[0], rtol=1e-4, atol=1e-5)
    set_routing(model)
    with pytest.raises(RuntimeError, match="call mosld.set_routing"):
        model(IDS)


def external(**changes):
    torch.manual_seed(1)
    layer = MoSLDLinear(4, 5, r=2, num_experts=3, dropout=0.0, router="external", **changes)
    torch.nn.init.normal_(layer.expert_b.weight)
    return layer


@torch.no_grad()
def test_rows_that_a_model_multiplied_follow_the_row_that_they_came_from():
    layer, gates = external(), torch.randn(2, 3)
    x = torch.randn(6, 4, 4)  # three neighbours for each of two rows
    set_routing(layer, gates=gates)
    y = layer(x)
    for row in range(6):
        set_routing(layer, gates=gates[row // 3 : row // 3 + 1])
        torch.testing.assert_close(y[row : row + 1], layer(x[row : row + 1]))
    tokens = torch.randn(2, 4, 3)
    set_routing(layer, gates=tokens)
    by_token = layer(x)
    for row in range(6):
        set_routing(layer, gates=tokens[row // 3][None])
        torch.testing.assert_close(by_token[row : row + 1], layer(x[row : row + 1]))


@torch.no_grad()
def test_gates_of_one_layer_are_its_own():
    model = peft.get_peft_model(
        tiny_llama(), MoSLDConfig(router="external", num_experts=2, dropout=0.0, target_modules=["q_proj"])
    )
    perturb(model)
    names = [n for n, m in model.named_modules() if hasattr(m, "mixtures")]
    shared, apart = torch.tensor([0.3, 0.9]), {names[0]: torch.tensor([0.3, 0.9]), names[1]: torch.tensor([1.0, 0.0])}
    set_routing(model, gates=shared)
    first = model.eval()(IDS).logits
    set_routing(model, gates=dict.fromkeys(names, shared))
    assert torch.equal(model(IDS).logits, first)
    set_routing(model, gates=apart)
    assert not torch.allclose(model(IDS).logits, first)
    set_routing(model, gates={names[0]: shared})
    with pytest.raises(RuntimeError, match="router='external' takes its gates from the caller: call mosld.set_routing"):
        model(IDS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixing": "sideways"}, "mixing must be one of expand, diagonal, reduce, core, .*, got 'sideways'"),
        ({"router": "oracle"}, "router must be one of token, hidden, .*, got 'oracle'"),
        ({"gate": "max"}, "gate must be one of top_k, softmax, top_p, got 'max'"),
        ({"router": "task"}, "router='task' contradicts num_tasks=None"),
        ({"mixing": "task_core"}, "mixing='task_core' contradicts num_tasks=None"),
        ({"num_tasks": 3}, "num_tasks=3 contradicts router='token' with mixing='expand'"),
        ({"task_dim": 4}, "task_dim=4 contradicts router='token'"),
        ({"router": "task", "num_tasks": 0}, "num_tasks must be an integer of at least 1, got 0"),
        ({"top_k": 9}, r"top_k must be in \[1, num_experts=8\], got 9"),
        ({"top_p": 0.0, "gate": "top_p"}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        (
            {"router": "external", "temperature": 0.5},
            "temperature=0.5 contradicts router='external', which has no logits",
        ),
        (
            {"router": "constant", "router_std": 0.1},
            "router_std=0.1 contradicts router='constant', which has no logits",
        ),
        ({"router": "none", "gate": "top_p"}, "gate='top_p' contradicts router='none', which has gates of its own"),
        (
            {"mixing": "grouped", "gate": "top_p"},
            "gate='top_p' contradicts mixing='grouped', which has gates of its own",
        ),
        ({"mixing": "dense", "router": "external"}, "router='external' contradicts mixing='dense'"),
        ({"mixing": "grouped", "r": 3, "mixing_options": {"group_size": 2}}, "r=3 contradicts group_size=2"),
        ({"mixing": "select", "r": 9}, "r=9 contradicts num_experts=8"),
        (
            {"mixing": "select", "mixing_options": {"conditional_weight": -1}},
            "conditional_weight in mixing_options must be at least 0, got -1",
        ),
        (
            {"mixing": "core", "mixing_options": {"r_up": 0}},
            "r_up in mixing_options must be an integer of at least 1, got 0",
        ),
        ({"mixing": "core", "mixing_options": {"rank": 3}}, "mixing_options of 'core' may have r_up, got rank"),
        ({"mixing_options": {"r_up": 3}}, "mixing_options of 'expand' may have none, got r_up"),
        ({"mixing": "reduce"}, "shared='down' contradicts mixing='reduce'"),
        ({"shared": "up", "mixing": "diagonal"}, "shared='up' contradicts mixing='diagonal'"),
        ({"shared": "up", "up_dropout": 0.1}, "up_dropout=0.1 contradicts shared='up'"),
        ({"input_dropout": 1.5}, r"input_dropout must be in \[0, 1\], got 1.5"),
        ({"hidden_dropout": -0.1}, r"hidden_dropout must be in \[0, 1\], got -0.1"),
        ({"down_std": -1.0}, "down_std must be None or at least 0, got -1.0"),
    ],
)  # fmt: skip
def test_contradictions_and_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MoSLDConfig(**fields)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="preset must be one of lora, mosld, .*, mixlora_conditional, got 'mosldx'"):
        presets.preset("mosldx")
    assert presets.preset("mola", r=5) == presets.mola(r=5)


def test_overriding_one_option_of_a_mixing_leaves_the_others():
    options = presets.mixlora_conditional(mixing_options={"conditional": False}).mixture_of("layer")
    assert options.option("conditional") is False and options.option("straight_through") is True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task_ids": [0.5]}, "task_ids must be integers, one or \\[batch\\], got torch.float32"),
        ({"task_ids": [[1, 2]]}, r"task_ids must be integers, one or \[batch\], got torch.int64 \[1, 2\]"),
        ({"task_ids": [True]}, "task_ids must be integers, .* got torch.bool"),
        ({"task_ids": [0, 8]}, r"task_ids must be in \[0, num_tasks=8\), got \[0, 8\]"),
        ({"task_ids": -1}, r"task_ids must be in \[0, num_tasks=8\), got \[-1\]"),
        ({"gates": {"nowhere": torch.ones(3)}}, "gates name layers that are not adapted: nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused_at_once(given, message):
    with pytest.raises(ValueError, match=message):
        set_routing(by_task(), **given)


def test_a_model_without_mixtures_cannot_be_told():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoSLD layer"):
        set_routing(tiny_llama(), task_ids=1)


def test_ids_for_another_batch_are_refused():
    model = by_task()
    for wrong in ([1, 2], [1, 2, 3, 4], []):
        set_routing(model, task_ids=torch.tensor(wrong, dtype=torch.int64))
        message = rf"task_ids must be for \[batch=3\] rows, or a number that divides it, got {len(wrong)}"
        with pytest.raises(ValueError, match=message):
            model(IDS)


def test_a_method_that_routes_by_task_says_how_to_name_the_task():
    message = (
        r"mixing='task_core' with router='task' asks for the task of every row: call mosld.set_routing\(model, "
        r"task_ids=...\) before the model; MoSLDTrainer does it with a `task_ids` column"
    )
    with pytest.raises(RuntimeError, match=message):
        by_task()(IDS)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (torch.ones(2, 4), r"gates must be \[batch, 3\] or \[batch, sequence, 3\], got \[2, 4\]"),
        (torch.ones(2, 1, 5, 3), r"gates must be \[batch, 3\] or \[batch, sequence, 3\], got \[2, 1, 5, 3\]"),
        (torch.ones(2, 4, 3), r"gates must be for tokens \[2, 5\], got \[2, 4, 3\]"),
        (torch.ones(3, 3), r"gates must be for \[batch=2\] rows, or a number that divides it, got 3"),
    ],
)
def test_gates_of_the_wrong_shape_are_refused(gates, message):
    layer = external()
    set_routing(layer, gates=gates)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(2, 5, 4))


def test_a_prior_of_the_wrong_shape_is_refused():
    layer = MoSLDLinear(4, 5, **vars(presets.mor1e(r=2, mixing_options={"r_up": 3}).mixture_of("layer")))
    set_routing(layer, prior=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"prior must be \[batch, 6\] or \[batch, sequence, 6\], got \[2, 5\]"):
        layer(torch.randn(2, 5, 4))


def test_a_mixing_is_registered_once():
    assert "expand" in MIXINGS
    with pytest.raises(ValueError, match="mixing 'expand' is registered already"):
        register_mixing("expand", down=lambda m: m.r, up=lambda m: m.r)(lambda z, gates, mixer: z)
