"""Layers that are adapted and never called, routers and fused experts: left out, refused by name, or told of."""

import re
import warnings

import peft
import pytest
import torch
import transformers as tf
from torch import nn

from mosld import MoSLDConfig, balance_loss
from mosld.layers.host import all_adapters
from tests.helpers.models import checkpoint_layers, tiny_llama, token_ids

MIXTURE = dict(r=2, num_experts=3, dropout=0.0)
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=96)


def adapted(base, targets="all-linear", **more) -> peft.PeftModel:
    return peft.get_peft_model(base, MoSLDConfig(**MIXTURE, target_modules=targets, **more))


def names(model) -> set[str]:
    return {name for name, _ in all_adapters(model)}


def mamba():
    return tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4))


def falcon_mamba():
    sizes = dict(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4)
    return tf.FalconMambaForCausalLM(tf.FalconMambaConfig(**sizes))


def wavlm():
    config = tf.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=32,
        conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 4), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
    )  # fmt: skip
    return tf.WavLMForCTC(config)


def mobilebert():
    sizes = dict(hidden_size=32, embedding_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = tf.MobileBertConfig(**sizes, true_hidden_size=32, intra_bottleneck_size=32, vocab_size=96)
    return tf.MobileBertForMaskedLM(config)


def siglip():
    config = tf.SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    return tf.SiglipVisionModel(config)


READ_NOT_CALLED = {
    "mamba": (mamba, ["dt_proj"], "MambaMixer"),
    "wavlm": (wavlm, ["q_proj", "out_proj"], "WavLMAttention"),
    "mobilebert": (mobilebert, ["predictions.dense"], "MobileBertLMPredictionHead"),
    "siglip": (siglip, ["head.attention.out_proj"], "nn.MultiheadAttention"),
}


@pytest.mark.parametrize("name", READ_NOT_CALLED)
def test_a_layer_whose_weight_is_read_and_never_called_is_refused_by_name(name):
    build, targets, owner = READ_NOT_CALLED[name]
    words = rf"{targets[0]} cannot be adapted: {owner} reads its weight and never calls it.*exclude_modules"
    with pytest.raises(ValueError, match=words):
        adapted(build(), targets)


@pytest.mark.parametrize("name", READ_NOT_CALLED)
def test_all_linear_leaves_it_out(name):
    build, targets, _ = READ_NOT_CALLED[name]
    model = adapted(build())
    assert names(model) and not any(own.endswith(target) for own in names(model) for target in targets)


def llama4():
    config = tf.Llama4TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        intermediate_size_mlp=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.Llama4ForCausalLM(config)


def phimoe():
    config = tf.PhimoeConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2
    )
    return tf.PhimoeForCausalLM(config)


@pytest.mark.filterwarnings("ignore:.*are fused experts")
@pytest.mark.parametrize(("build", "router"), [(llama4, "router"), (phimoe, "router")])
def test_routers_that_return_several_tensors_are_left_out_and_refused(build, router):
    torch.manual_seed(0)
    base = build().eval()
    with torch.no_grad():
        frozen = base(token_ids()).logits
        model = adapted(base)
        assert torch.equal(model(token_ids()).logits, frozen)
    assert names(model) and not any(name.endswith(router) for name in names(model))
    with pytest.raises(ValueError, match=rf"{router} cannot be adapted: a \w+Router does not return what a linear"):
        adapted(build(), [router])


class Grouped(nn.Linear):
    """As DeepSeek-V4's: the input is cut into groups, each with its own rows of the weight."""

    def forward(self, x):
        return super().forward(x).view(*x.shape[:-1], 2, -1).sum(-2)


class WithGroups(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.grouped = nn.Linear(4, 6), Grouped(6, 8)

    def forward(self, x):
        return self.grouped(self.up(x))


def test_a_linear_layer_of_another_output_is_left_out_and_refused():
    assert names(adapted(WithGroups())) == {"base_model.model.up"}
    with pytest.raises(ValueError, match="grouped cannot be adapted: a Grouped does not return"):
        adapted(WithGroups(), ["grouped"])


class Branches(nn.Module):
    """A tower that runs where there are images, and a layer that nobody calls, by a name that is looked up."""

    def __init__(self):
        super().__init__()
        self.text = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.vision = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.lost = nn.Linear(6, 6)

    def forward(self, x, images=None):
        for layer in self.text:
            x = layer(x)
        for layer in self.vision if images is not None else ():
            x = x + layer(images)
        return x


def run(model, *inputs) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(*inputs).sum().backward()
    return [str(w.message) for w in told if "did not run" in str(w.message)]


def test_what_did_not_run_is_told_once_by_name():
    model = adapted(Branches()).train()
    x = torch.randn(2, 6)
    with torch.no_grad():
        assert not run_quietly(model, x)
    model.eval()
    assert not run(model, x)
    model.train()
    (words,) = run(model, x)
    assert re.match(
        r"4 of 6 adapted layers did not run in the first training forward: vision\.\* \(3 layers\), lost\. "
        r".*exclude_modules",
        words,
    )
    assert not run(model, x)


def run_quietly(model, x) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(x)
    return [str(w.message) for w in told]


def test_a_layer_that_is_called_on_quantised_bases_alone_is_told_of():
    model = adapted(falcon_mamba(), ["in_proj", "dt_proj"]).train()
    with pytest.warns(UserWarning, match=r"2 of 4 adapted layers did not run .*: backbone\.layers\.\*\.mixer\.dt_proj"):
        model(input_ids=token_ids(), labels=token_ids())


def test_what_runs_is_not_told_of():
    model = adapted(Branches(), exclude_modules=["lost"]).train()
    assert not run(model, torch.randn(2, 6), torch.randn(2, 6))


@pytest.mark.parametrize("kind", [True, False])
def test_checkpointed_layers_count_as_run(kind):
    base = tiny_llama().train()
    checkpoint_layers(base, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a name of transformers
        model = adapted(base, ["q_proj"])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = model(input_ids=token_ids(), labels=token_ids(), use_cache=False)
        (out.loss + balance_loss(model)).backward()
    assert not [w for w in told if "did not run" in str(w.message)]


def mixtral():
    config = tf.MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64
    )
    return tf.MixtralForCausalLM(config)


def qwen_moe():
    config = tf.Qwen2MoeConfig(
        **SIZES, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
        shared_expert_intermediate_size=16, decoder_sparse_step=1,
    )  # fmt: skip
    return tf.Qwen2MoeForCausalLM(config)


@pytest.mark.parametrize(("build", "targets"), [(qwen_moe, "all-linear"), (qwen_moe, ["gate_proj", "q_proj"])])
def test_the_share_of_fused_experts_is_told_in_one_line(build, targets):
    base = build()
    fused = sum(p.numel() for name, p in base.named_parameters() if ".experts." in name)
    share = fused / sum(p.numel() for p in base.parameters())
    words = rf"^{share:.0%} of the model's weights are fused experts \(model\.layers\.0\.mlp\.experts and 1 more\)"
    with pytest.warns(UserWarning, match=words):
        adapted(base, targets)


@pytest.mark.parametrize("build", [mixtral, qwen_moe])
def test_who_adapts_attention_alone_is_not_told(build):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted(build(), ["q_proj", "v_proj"])
    assert not [w for w in told if "fused experts" in str(w.message)]


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.mosld_projection, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.other(self.mosld_projection(x))


def test_a_layer_whose_name_is_that_of_an_adapters_weights():
    """It would be saved and not found again in the file."""
    with pytest.raises(ValueError, match="mosld_projection cannot be adapted: names that begin with 'mosld_'"):
        adapted(Named(), ["mosld_projection"])
    assert names(adapted(Named())) == {"base_model.model.other"}
