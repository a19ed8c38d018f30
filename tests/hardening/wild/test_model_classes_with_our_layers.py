"""A model class of one's own that builds MoSLDLinear layers, loaded by from_pretrained: what the checkpoint has not
starts as in a fresh layer, whatever lies in the memory that it is made of."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mosld import MoSLDLinear
from mosld.layers.host import all_adapters
from tests.helpers.models import perturb, tiny_llama, token_ids


class RoutedLlama(LlamaForCausalLM):
    """As people write it: the plain model with some of its layers replaced where it is built."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            for name in ("q_proj", "v_proj"):
                old = getattr(layer.self_attn, name)
                new = MoSLDLinear(old.in_features, old.out_features, bias=False, r=2, num_experts=3, dropout=0.0)
                setattr(layer.self_attn, name, new)


class Wrapper(PreTrainedModel):
    """A model inside a model, with a layer of its own."""

    config_class = LlamaConfig
    base_model_prefix = "inner"

    def __init__(self, config):
        super().__init__(config)
        self.inner = RoutedLlama(config)
        self.head = MoSLDLinear(config.vocab_size, 5, r=2, num_experts=3)
        self.post_init()

    def forward(self, ids):
        return self.head(self.inner(ids).logits)


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch):
    """Memory as it is found, at its worst: what nobody fills shows as NaN."""
    empty_like = torch.empty_like

    def found(tensor, *args, **kwargs):
        made = empty_like(tensor, *args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() and not made.is_meta else made

    monkeypatch.setattr(torch, "empty_like", found)


def assert_fresh(model: nn.Module, dtype=torch.float32) -> None:
    """B is zero, A and the router have the spread of their distribution: uniform within 1/sqrt(in_features)."""
    adapters = list(all_adapters(model))
    assert adapters
    for name, adapter in adapters:
        assert not adapter.expert_b.weight.any(), name
        for part in ("shared_a", "router"):
            weight = getattr(adapter, part).weight
            bound = 1 / math.sqrt(weight.shape[1])
            assert weight.dtype == dtype and weight.requires_grad
            assert 0.5 * bound < weight.float().abs().max() <= bound * (1 + 2**-8), (name, part)


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}],
    ids=str,
)
@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_loaded_from_a_plain_checkpoint_the_mixtures_are_fresh(tmp_path, options, max_shard_size):
    tiny_llama().save_pretrained(tmp_path, max_shard_size=max_shard_size)
    plain = LlamaForCausalLM.from_pretrained(tmp_path, **options)
    model = RoutedLlama.from_pretrained(tmp_path, **options)
    assert_fresh(model, options.get("dtype", torch.float32))
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, plain(token_ids()).logits)


def test_a_checkpoint_with_mixtures_keeps_them_and_fills_what_it_lacks(tmp_path):
    torch.manual_seed(1)
    model = RoutedLlama(tiny_llama().config)
    for _, adapter in all_adapters(model):
        perturb(adapter)
    state = model.state_dict()
    lost = "model.layers.1.self_attn.q_proj.adapter.router.weight"
    del state[lost]
    model.save_pretrained(tmp_path, state_dict=state)
    again = RoutedLlama.from_pretrained(tmp_path)
    for name, tensor in again.state_dict().items():
        if name != lost:
            assert torch.equal(tensor, model.state_dict()[name]), name
    router = again.get_parameter(lost)
    assert 0 < router.abs().max() <= 1 / math.sqrt(32)


def test_nested_classes(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    # The class around does not say that it can do with other attention than the eager one.
    plain = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    model = Wrapper.from_pretrained(tmp_path)
    assert len(list(all_adapters(model))) == 5
    for _, adapter in all_adapters(model):
        assert not adapter.expert_b.weight.any() and adapter.shared_a.weight.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(model.inner(token_ids()).logits, plain(token_ids()).logits)


def test_training_moves_what_was_started(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = RoutedLlama.from_pretrained(tmp_path).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".adapter." in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, old in before.items():
        assert not torch.equal(old, model.get_parameter(name)), name


def on_the_meta_device() -> RoutedLlama:
    config = tiny_llama().config
    with torch.device("meta"):
        return RoutedLlama(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["to_empty", "assign"])
def test_loaded_by_hand_from_a_plain_checkpoint_the_mixtures_are_fresh(way, dtype):
    """Large models are made on the meta device by those, too, who load the checkpoint themselves."""
    plain = tiny_llama().to(dtype)
    model = on_the_meta_device().to(dtype)
    if way == "to_empty":
        model = model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict(), assign=way == "assign")
    model.model.rotary_emb.inv_freq = plain.model.rotary_emb.inv_freq  # a buffer that no checkpoint has
    assert_fresh(model, dtype)
    assert not model.model.layers[0].self_attn.q_proj.weight.requires_grad
    with torch.no_grad():
        assert torch.equal(model.eval()(token_ids()).logits, plain(token_ids()).logits)


@pytest.mark.parametrize("way", ["to_empty", "assign"])
def test_loaded_by_hand_a_checkpoint_with_mixtures_keeps_them_and_a_plain_one_after_it_too(way):
    trained = RoutedLlama(tiny_llama().config)
    for _, adapter in all_adapters(trained):
        perturb(adapter)
    model = on_the_meta_device()
    if way == "to_empty":
        model = model.to_empty(device="cpu")
    model.load_state_dict(trained.state_dict(), assign=way == "assign")
    model.load_state_dict(tiny_llama(seed=1).state_dict())
    for name, tensor in model.state_dict().items():
        if ".adapter." in name:
            assert torch.equal(tensor, trained.state_dict()[name]), name


def test_a_layer_of_the_meta_device_starts_as_one_with_memory():
    """The same draws from the generator: reproducible runs do not depend on how a layer got its memory."""
    torch.manual_seed(3)
    layer = MoSLDLinear(6, 5, r=2, num_experts=3, device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    layer.adapter.reset_parameters()
    again = {name: p.clone() for name, p in layer.adapter.state_dict().items()}
    torch.manual_seed(3)
    layer = MoSLDLinear(6, 5, r=2, num_experts=3, device="meta").to_empty(device="cpu")
    for name, value in layer.adapter.state_dict().items():
        assert torch.equal(value, again[name]), name
