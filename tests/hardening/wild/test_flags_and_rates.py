"""Programs that walk a model's modules govern the mixtures' dropout: by the flag of each module, and by each rate."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import mosld
from mosld import MoSLDConfig, MoSLDLinear
from mosld.layers.host import all_adapters
from tests.helpers.models import perturb, tiny_llama, token_ids

RATES = {
    "mosld": dict(dropout=0.4),
    "on_z": dict(dropout=0.0, input_dropout=0.4, hidden_dropout=0.4, router="hidden", gate="softmax"),
    "on_b": dict(dropout=0.0, up_dropout=0.4, gate="softmax"),
    "block": dict(mixing="block", dropout=0.4, input_dropout=0.4, target_modules=["mlp"]),
}


def adapted(**changes) -> peft.PeftModel:
    config = MoSLDConfig(**{"r": 2, "num_experts": 3, "target_modules": ["q_proj", "down_proj"], **changes})
    model = peft.get_peft_model(tiny_llama(), config)
    perturb(model)
    return model


def drops(model: nn.Module) -> bool:
    """Whether two forwards of the same tokens differ: nothing but dropout is drawn in them."""
    with torch.no_grad():
        return not torch.equal(model(token_ids()).logits, model(token_ids()).logits)


def set_flags(model: nn.Module, mode: bool) -> None:
    for module in model.modules():
        module.training = mode


@pytest.mark.parametrize("kind", RATES)
def test_flags_set_module_by_module_turn_dropout_on_and_off(kind):
    model = adapted(**RATES[kind])
    set_flags(model, True)
    assert drops(model)
    set_flags(model, False)
    assert not drops(model)
    kept = {name: module.training for name, module in model.named_modules()}
    model.train()
    for name, module in model.named_modules():
        module.training = kept[name]
    assert not drops(model)


def test_flags_set_module_by_module_govern_a_layer_by_hand():
    layer = MoSLDLinear(6, 5, dropout=0.4, num_experts=3)
    nn.init.normal_(layer.expert_b.weight)
    x = torch.ones(4, 6)
    set_flags(layer, False)
    assert torch.equal(layer(x), layer(x))
    set_flags(layer, True)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("kind", RATES)
def test_trls_disable_dropout_turns_the_mixtures_off(kind):
    trl = pytest.importorskip("trl.trainer.utils", reason="TRL, the extra trl, is not installed")
    model = adapted(**RATES[kind]).train()
    assert drops(model)
    trl.disable_dropout_in_model(model)
    assert not drops(model)
    plain = adapted(**RATES[kind]).eval()
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, plain(token_ids()).logits)


@pytest.mark.parametrize("kind", RATES)
def test_dropouts_that_are_replaced_by_identities_drop_nothing(kind):
    """How models are made ready for export or for evaluation with other parts in training mode."""
    model = adapted(**RATES[kind]).train()
    assert drops(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(module, name, nn.Identity())
    assert not drops(model)
    assert {adapter.dropout for _, adapter in all_adapters(model)} == {0.0}


def test_a_rate_that_is_changed_is_the_rate_of_the_next_forward():
    """Whoever schedules dropout sets `p`: at 0.999 hardly an element of A is left, and so next to no update."""
    model = adapted(dropout=0.1).train()
    with torch.no_grad(), model.disable_adapter():
        frozen = model(token_ids()).logits
    with torch.no_grad():
        before = (model(token_ids()).logits - frozen).abs().mean()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 1 - 1e-9
        after = (model(token_ids()).logits - frozen).abs().mean()
    assert after == 0 < before
    assert {adapter.dropout for _, adapter in all_adapters(model)} == {1 - 1e-9}


def test_an_adapter_that_is_added_deleted_or_copied_has_its_own_dropout():
    model = adapted(dropout=0.4)
    model.add_adapter("other", MoSLDConfig(r=2, dropout=0.0, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("other")
    perturb(model)
    set_flags(model, True)
    assert not drops(model)
    model.set_adapter("default")
    assert drops(model)
    twin = copy.deepcopy(model)
    set_flags(twin, False)
    assert not drops(twin) and drops(model)
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert not any("default" in name for name, _ in model.named_modules())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*num_workers:UserWarning")
@pytest.mark.parametrize("train", [True, False])
def test_lightning_trains_with_dropout(train):
    """Its Trainer saves and restores the flags around validation, the check before the first step included. A module
    that comes in eval mode stays so, as any other does."""
    lightning = pytest.importorskip(
        "pytorch_lightning", reason="pytorch-lightning, the extra interop, is not installed"
    )
    steps: list[bool] = []
    validations: list[bool] = []

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = adapted(dropout=0.4).train(train)

        def training_step(self, batch, number):
            steps.append(drops(self.model))
            return self.model(input_ids=batch, labels=batch).loss

        def validation_step(self, batch, number):
            validations.append(drops(self.model))

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    data = torch.utils.data.DataLoader(token_ids(), batch_size=1)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found .* in eval mode at the start")
        trainer.fit(Task(), data, data)
    assert steps == [train] * 2 * len(token_ids())
    checks = min(trainer.num_sanity_val_steps, len(token_ids()))
    assert checks and validations == [False] * (checks + 2 * len(token_ids()))


def test_dropout_is_no_part_of_what_is_saved(tmp_path):
    model = adapted(dropout=0.4)
    assert not any("dropout" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model.eval()(token_ids()).logits)
    assert mosld.MoSLDConfig.from_pretrained(tmp_path).dropout == 0.4
