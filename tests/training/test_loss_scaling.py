"""float16 autocast with torch's gradient scaler: the balance loss is scaled and unscaled with the task's.

It is neither lost nor counted by the scale, whatever is accumulated or recomputed; a step that the scaler skips leaves
nothing behind. The gradient scaler is torch's own, on the CPU. Errors are taken from the same gradients in float64
without autocast, and may be 1.5 times those of float16 without scaler and checkpoints (tests/helpers/accuracy.py).
"""

import contextlib
import warnings

import peft
import pytest
import torch
from torch.amp import GradScaler
from transformers import TrainingArguments

from mosld import MoSLDConfig, MoSLDTrainer, balance_loss
from mosld.layers.host import running_adapters
from mosld_kernels.gating import top_k_mask
from tests.helpers.accuracy import assert_no_less_accurate, error
from tests.helpers.models import perturb, tiny_llama, token_ids

IDS, COEF = token_ids(rows=8, length=6), 0.5
SCALE = 2.0**12
KINDS = ("mosld_shared_a", "mosld_expert_b", "mosld_router")


def adapted(checkpointing="off", device="cpu"):
    config = MoSLDConfig(
        r=2, num_experts=4, dropout=0.0, balance_coef=COEF, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    model = peft.get_peft_model(tiny_llama(attn_implementation="eager"), config)  # the same bits twice on GPUs, too
    torch.manual_seed(6)
    perturb(model)
    if checkpointing != "off":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers' own rename
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model.train().to(device)


def half_precision(model):
    return torch.autocast(model.device.type, torch.float16)


def backward(model, accumulation=1, scaler=None, task=1.0, coef=COEF, autocast=True, ids=IDS):
    """The gradients of one step in `model`, those of accumulated micro-batches, multiplied by the scaler's scale."""
    for part in ids.to(model.device).chunk(accumulation):
        with half_precision(model) if autocast else contextlib.nullcontext():
            loss = task * model(input_ids=part, labels=part, use_cache=False).loss + coef * balance_loss(model)
        loss = loss / accumulation
        (loss if scaler is None else scaler.scale(loss)).backward()


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def gradients(model):
    """All of A's, B's and the routers' gradients, each in one vector."""
    return {
        kind: torch.cat([p.grad.flatten() for name, p in model.named_parameters() if kind in name]) for kind in KINDS
    }


def truth(accumulation, device="cpu", **options):
    model = adapted(device=device).double()
    backward(model, accumulation, autocast=False, **options)
    return gradients(model)


def scaled(accumulation, checkpointing, scale=SCALE, device="cpu", **options):
    """As an optimiser sees them: after `unscale_`."""
    model, scaler = adapted(checkpointing, device), GradScaler(device, init_scale=scale)
    backward(model, accumulation, scaler, **options)
    scaler.unscale_(optimizer_of(model))
    return gradients(model)


def plain(accumulation, device="cpu", **options):
    model = adapted(device=device)
    backward(model, accumulation, **options)
    return gradients(model)


@pytest.fixture(scope="module", autouse=True)
def same_experts():
    assert_same_experts("cpu")


def assert_same_experts(device):
    """Rounding decides no choice here, so errors are those of arithmetic."""
    chosen = []
    for model, cast in ((adapted(device=device).double(), False), (adapted(device=device), True)):
        with torch.no_grad(), half_precision(model) if cast else contextlib.nullcontext():
            model(input_ids=IDS.to(device))
        chosen.append([top_k_mask(a.router_logits, a.top_k) for _, a in running_adapters(model)])
    assert all(torch.equal(half, exact) for exact, half in zip(*chosen, strict=True))


def everywhere(test):
    kinds = pytest.mark.parametrize("checkpointing", ["off", "non-reentrant", "reentrant"])
    return pytest.mark.parametrize("accumulation", [1, 4])(kinds(test))


@everywhere
def test_gradients_are_those_of_the_whole_loss_and_the_balance_loss_is_a_good_part(accumulation, checkpointing):
    whole_loss(accumulation, checkpointing, "cpu")


def whole_loss(accumulation, checkpointing, device):
    exact, half = truth(accumulation, device), plain(accumulation, device)
    for kind, ours in scaled(accumulation, checkpointing, device=device).items():
        assert_no_less_accurate(ours, half[kind], exact[kind], kind)
    without = truth(accumulation, device, coef=0.0)["mosld_router"]
    assert error(without, exact["mosld_router"]) > 0.3 > 100 * error(half["mosld_router"], exact["mosld_router"])


@everywhere
def test_a_balance_loss_too_small_for_float16_survives(accumulation, checkpointing):
    """Alone, and weighted so that its gradients for the logits are below float16's least number."""
    weak = 1e-6
    exact = {kind: grad * weak for kind, grad in truth(accumulation, task=0.0, coef=1.0).items()}
    half = {kind: grad * weak for kind, grad in plain(accumulation, task=0.0, coef=1.0).items()}
    ours = scaled(accumulation, checkpointing, scale=2.0**20, task=0.0, coef=weak)["mosld_router"]
    assert_no_less_accurate(ours, half["mosld_router"], exact["mosld_router"], "router")
    lost = plain(accumulation, task=0.0, coef=weak)["mosld_router"]
    assert error(lost, exact["mosld_router"]) > 0.3  # what the scaler is for


@everywhere
def test_a_step_with_an_infinite_gradient_is_skipped_and_leaves_nothing_behind(accumulation, checkpointing):
    skipped_steps(accumulation, checkpointing, "cpu")


def skipped_steps(accumulation, checkpointing, device):
    model, scaler = adapted(checkpointing, device), GradScaler(device, init_scale=2.0**24)
    optimizer = optimizer_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    finite, skipped = False, 0
    while not finite:
        scale = scaler.get_scale()
        backward(model, accumulation, scaler)
        scaler.unscale_(optimizer)
        assert all(adapter.deferred_grads is None for _, adapter in running_adapters(model))
        last = gradients(model)
        finite = all(grad.isfinite().all() for grad in last.values())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if not finite:
            skipped += 1
            assert scaler.get_scale() == scale / 2 > 1
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert skipped > 3
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)
    for kind, grad in scaled(accumulation, checkpointing, scale, device).items():
        assert torch.equal(grad, last[kind]), kind


def by_trainer(tmp_path, monkeypatch, accumulation, checkpointing, scale):
    """The adapter's change in one step of SGD at lr 1 with the sign turned: the gradients of MoSLDTrainer.

    accelerate has float16 for GPUs alone, so what it would set up there is set up here.
    """
    model = adapted()
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    more = {
        f"{name}_checkpointing": True,
        f"{name}_checkpointing_kwargs": {"use_reentrant": checkpointing == "reentrant"},
    }
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8 // accumulation, learning_rate=1.0,
        gradient_accumulation_steps=accumulation, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        **(more if checkpointing != "off" else {}),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = MoSLDTrainer(model=model, args=arguments, train_dataset=rows)
    monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, GradScaler("cpu", init_scale=scale)
    trainer.train()
    assert trainer.optimizer.scaler is trainer.accelerator.scaler
    for name, parameter in model.named_parameters():
        parameter.grad = before[name] - parameter.detach()
    return gradients(model)


@everywhere
def test_the_trainer_under_the_scaler(tmp_path, monkeypatch, accumulation, checkpointing):
    order = IDS[
        torch.randperm(8, generator=torch.Generator().manual_seed(42))
    ]  # in which Trainer's sampler visits them
    ours = by_trainer(tmp_path, monkeypatch, accumulation, checkpointing, SCALE)
    exact, half = (function(accumulation, ids=order) for function in (truth, plain))
    for kind in KINDS:
        assert_no_less_accurate(ours[kind], half[kind], exact[kind], kind)
        assert error(ours[kind], exact[kind]) > 1e-4  # it was float16
