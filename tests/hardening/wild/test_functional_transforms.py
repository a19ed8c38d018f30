"""torch.func's transforms, per-sample gradients, and export to ONNX: through plain operators, with the same numbers."""

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import mosld
from mosld import MoSLDConfig, MoSLDLinear
from tests.helpers.models import perturb, tiny_llama, token_ids

KINDS = {
    "fused": dict(),
    "an_a_each": dict(mixing="diagonal"),
    "staged": dict(router="hidden", gate="softmax"),
    "task": dict(router="task", num_tasks=3),
}


def layer(kind: str, **changes) -> MoSLDLinear:
    torch.manual_seed(0)
    made = MoSLDLinear(6, 5, **{"r": 2, "num_experts": 3, "dropout": 0.0, **KINDS[kind], **changes}).double()
    perturb(made)
    if kind == "task":
        mosld.set_routing(made, task_ids=1)
    return made


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def loss(parameters, module, x):
    return functional_call(module, parameters, (x,)).square().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_functional_call_is_backwards(kind):
    module, x = layer(kind), torch.randn(4, 6, dtype=torch.float64)
    found = grad(loss)(trained(module), module, x)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_each_sample(kind):
    module, x = layer(kind), torch.randn(4, 3, 6, dtype=torch.float64)
    found = vmap(grad(loss), in_dims=(None, None, 0))(trained(module), module, x)
    for row, sample in enumerate(x):
        module.zero_grad()
        module(sample).square().sum().backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(found[name][row], parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_derivative_in_one_direction(kind):
    module, x = layer(kind), torch.randn(4, 6, dtype=torch.float64)
    direction, step = torch.randn_like(x), 1e-6
    out, slope = jvp(module, (x,), (direction,))
    with torch.no_grad():
        torch.testing.assert_close(out, module(x), rtol=1e-12, atol=1e-12)
        numeric = (module(x + step * direction) - module(x - step * direction)) / (2 * step)
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["fused", "an_a_each", "staged"])
def test_dropout_in_a_transform_drops_what_it_does_outside(kind):
    module, x = layer(kind, dropout=0.5), torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(3)
    found = grad(loss)(trained(module), module, x)
    torch.manual_seed(3)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_masks_of_each_sample_differ_where_randomness_may():
    module = layer("fused", dropout=0.5)
    x = torch.ones(6, 1, 6, dtype=torch.float64)
    out = vmap(module, randomness="different")(x)
    assert len({tuple(row.flatten().tolist()) for row in out}) > 1
    assert torch.equal(*vmap(module, randomness="same")(x)[:2])


def test_a_whole_model_gives_gradients_of_each_row():
    config = MoSLDConfig(r=2, num_experts=3, dropout=0.0, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(tiny_llama(attn_implementation="eager"), config).double().eval()
    perturb(model)
    ids = token_ids()

    def of_row(parameters, row):
        return (
            functional_call(model, parameters, (), {"input_ids": row[None], "use_cache": False}).logits.square().mean()
        )

    found = vmap(grad(of_row), in_dims=(None, 0))(trained(model), ids)
    for row in range(len(ids)):
        model.zero_grad()
        model(input_ids=ids[row : row + 1]).logits.square().mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(found[name][row], parameter.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore")  # of the exporter's own
@pytest.mark.parametrize("kind", ["fused", "an_a_each", "staged"])
def test_export_to_onnx_in_plain_operators(kind, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx, of the extra interop, is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, of the extra interop, is not installed")
    module = layer(kind).float().eval()
    x = torch.randn(4, 6)
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    program.save(tmp_path / "layer.onnx")
    graph = onnx.load(tmp_path / "layer.onnx").graph
    assert {node.domain for node in graph.node} <= {"", "pkg.onnxscript.torch_lib", "pkg.onnxscript.torch_lib.common"}
    from onnx.reference import ReferenceEvaluator

    (out,) = ReferenceEvaluator(onnx.load(tmp_path / "layer.onnx")).run(None, {graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out.copy()), module(x).detach(), rtol=1e-4, atol=1e-5)
