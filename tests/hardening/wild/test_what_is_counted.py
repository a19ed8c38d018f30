"""What balance loss, logs and statistics count: all calls of a layer in one forward, and real tokens alone, as the
forward that ran was told them."""

import warnings

import peft
import pytest
import torch
import transformers as tf
from torch.utils.checkpoint import checkpoint

from mosld import MoSLDConfig, MoSLDLinear, MoSLDTrainer, balance_loss, router_stats
from mosld.layers.forwards import this_thread
from mosld.layers.host import all_adapters
from mosld.layers.masks import reduced
from tests.helpers.models import perturb, tiny_llama, token_ids

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=96)
MIXTURE = dict(r=2, num_experts=3, top_k=1, dropout=0.0)


def adapted(base, targets) -> peft.PeftModel:
    model = peft.get_peft_model(base, MoSLDConfig(**MIXTURE, target_modules=targets))
    perturb(model)
    return model


def by_loops(tokens: torch.Tensor, router: torch.Tensor) -> float:
    """tokens [T, D_in] -> E sum_e f_e P_e in float64, token by token; K = 1."""
    router = router.detach()
    experts = len(router)
    load, probability = torch.zeros(experts).double(), torch.zeros(experts).double()
    for token in tokens.double():
        logits = router.double() @ token
        load[logits.argmax()] += 1
        probability += logits.softmax(0)
    return float(experts * (load * probability).sum() / len(tokens) ** 2)


class Inputs:
    """What a layer was called with, call by call."""

    def __init__(self, layer):
        self.calls: list[torch.Tensor] = []
        layer.register_forward_pre_hook(lambda module, args: self.calls.append(args[0].detach()))


def albert() -> tf.AlbertForMaskedLM:
    config = tf.AlbertConfig(**SIZES, embedding_size=16, num_hidden_groups=1, max_position_embeddings=32)
    torch.manual_seed(0)
    return tf.AlbertForMaskedLM(config).eval()


def test_a_layer_that_is_shared_by_all_depths_counts_with_every_call():
    model = adapted(albert(), ["query"])
    ((name, adapter),) = all_adapters(model)
    inputs = Inputs(model.get_submodule(name))
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    model(input_ids=token_ids(), attention_mask=mask)
    assert len(inputs.calls) == 3
    (stats,) = router_stats(model).values()
    assert stats.tokens == 3 * int(mask.sum())
    tokens = torch.cat([call[mask.bool()] for call in inputs.calls])
    assert balance_loss(model).item() == pytest.approx(by_loops(tokens, adapter.router.weight), rel=1e-5)


def test_a_feed_forward_in_chunks_counts_every_chunk():
    config = tf.BertConfig(**SIZES, max_position_embeddings=32, chunk_size_feed_forward=2)
    torch.manual_seed(0)
    model = adapted(tf.BertForMaskedLM(config).eval(), ["intermediate.dense"])
    name, adapter = next(iter(all_adapters(model)))
    inputs = Inputs(model.get_submodule(name))
    ids = token_ids(length=8)
    model(input_ids=ids)
    assert len(inputs.calls) == 4
    assert {stats.tokens for stats in router_stats(model).values()} == {ids.numel()}
    expected = 0.0
    for own, adapter in all_adapters(model):
        expected += by_loops(torch.cat(inputs_of(model, own, ids)).flatten(0, 1), adapter.router.weight)
    assert balance_loss(model).item() == pytest.approx(expected, rel=1e-5)


def inputs_of(model, name, ids):
    inputs = Inputs(model.get_submodule(name))
    model(input_ids=ids)
    return inputs.calls


class Twice(torch.nn.Module):
    """One layer, run twice inside one checkpoint or none."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.shared = torch.nn.Linear(6, 6)

    def forward(self, x):
        if self.kind is None:
            return self._both(x)
        return checkpoint(self._both, x, use_reentrant=self.kind)

    def _both(self, x):
        return self.shared(self.shared(x).sin())


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "not reentrant"])
def test_a_layer_twice_in_one_checkpoint_gets_the_gradient_of_both_calls(kind):
    results = []
    for own_kind in (None, kind):
        torch.manual_seed(0)
        model = adapted(Twice(own_kind), ["shared"]).double().train()
        x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
        out = model(x)
        (out.square().sum() + balance_loss(model)).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad})
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-9, atol=1e-12, msg=name)


def test_forwards_do_not_pile_up():
    """Each forward begins anew, generation's too, and a layer by hand keeps its last call alone."""
    model = adapted(tiny_llama(), ["q_proj"])
    for _ in range(3):
        model(input_ids=token_ids())
    assert all(not adapter.earlier for _, adapter in all_adapters(model))
    model.generate(input_ids=token_ids(), max_new_tokens=4, do_sample=False)
    assert all(not adapter.earlier for _, adapter in all_adapters(model))
    layer = MoSLDLinear(4, 4)
    for _ in range(3):
        layer(torch.randn(2, 4))
    assert not layer.adapter.earlier


# ---- whose mask it is


def t5() -> tf.T5ForConditionalGeneration:
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96)
    torch.manual_seed(0)
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=1)).eval()


def bart() -> tf.BartForConditionalGeneration:
    sizes = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    config = tf.BartConfig(**sizes, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=96, max_position_embeddings=32)
    torch.manual_seed(0)
    return tf.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("build", [t5, bart])
@pytest.mark.parametrize("length", [7, 5], ids=["one-length", "two-lengths"])
@pytest.mark.parametrize("told", ["mask", "labels"])
def test_encoder_and_decoder_have_masks_of_their_own(build, length, told):
    targets = ["q", "k", "o"] if build is t5 else ["q_proj", "k_proj", "out_proj"]
    model = adapted(build(), targets)
    encoder, decoder = torch.ones(3, 7, dtype=torch.int64), torch.ones(3, length, dtype=torch.int64)
    encoder[0, 3:] = 0
    decoder[2, 2:] = 0
    if told == "mask":
        more = {"decoder_input_ids": token_ids(length=length), "decoder_attention_mask": decoder}
    else:
        more = {"labels": token_ids(length=length).masked_fill(decoder == 0, -100)}
    model(input_ids=token_ids(), attention_mask=encoder, **more)
    real = {"encoder": int(encoder.sum()), "decoder": int(decoder.sum())}
    for name, stats in router_stats(model).items():
        crossed = any(part in name for part in ("EncDecAttention.k", "encoder_attn.k_proj"))
        side = "encoder" if ".encoder." in name or crossed else "decoder"
        assert stats.tokens == real[side], name


def test_a_mask_that_is_given_to_the_loss_goes_before_the_forwards():
    model = adapted(tiny_llama(), ["q_proj"])
    given = torch.ones(3, 7, dtype=torch.int64)
    given[0, 1:] = 0
    model(input_ids=token_ids(), attention_mask=torch.ones(3, 7, dtype=torch.int64))
    assert {s.tokens for s in router_stats(model).values()} == {21}
    assert {s.tokens for s in router_stats(model, given).values()} == {15}


def causal(mask: torch.Tensor, dtype) -> torch.Tensor:
    """[rows, tokens] -> [rows, 1, tokens, tokens], a causal mask with padding as models write it: rows in which nothing
    is allowed allow everything."""
    rows, tokens = mask.shape
    allowed = torch.tril(torch.ones(tokens, tokens, dtype=torch.bool)) & mask.bool()[:, None, None, :]
    allowed |= ~allowed.any(-1, keepdim=True)
    if dtype == torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("side", ["left", "right", "none", "left-but-one"])
def test_masks_of_what_may_be_attended_to(dtype, side):
    mask = torch.ones(3, 7, dtype=torch.int64)
    if side == "left":
        mask[1, :3] = 0
    if side == "right":
        mask[1, 4:] = 0
    if side == "left-but-one":
        mask[1, :6] = 0
    assert torch.equal(reduced(causal(mask, dtype)).long(), mask)
    assert torch.equal(reduced({"sliding_attention": None, "full_attention": causal(mask, dtype)}).long(), mask)
    both = mask.bool()[:, None, None, :].expand(3, 1, 7, 7)  # nothing causal: an encoder's
    assert torch.equal(reduced(both).long(), mask)


def train(model, batch, **options):
    arguments = tf.TrainingArguments(
        "runs", max_steps=1, per_device_train_batch_size=3, use_cpu=True, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = MoSLDTrainer(
        model=model,
        args=arguments,
        train_dataset=[{"row": i} for i in range(3)],
        data_collator=lambda rows: dict(batch),
        **options,
    )
    trainer.train()
    return trainer.state.log_history[0]


def test_training_with_a_mask_of_four_dimensions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, 5:] = 0
    logs = []
    for own in (mask, causal(mask, torch.float32)):
        model = adapted(tiny_llama(), ["q_proj"])
        torch.manual_seed(1)
        perturb(model)
        logs.append(train(model, {"input_ids": token_ids(), "labels": token_ids(), "attention_mask": own}))
    assert logs[1]["balance_loss"] == pytest.approx(logs[0]["balance_loss"], rel=1e-4)


def test_a_mask_that_says_nothing_is_an_error_with_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = adapted(tiny_llama(), ["q_proj"])
    strange = torch.zeros(1, 1, 7, 9)[..., :7, :7].expand(1, 1, 7, 7)[0]  # three dimensions

    def forward(self, *args, attention_mask=None, **kwargs):
        return original(*args, **kwargs)

    base = model.get_base_model()
    original = base.forward
    monkeypatch.setattr(type(base), "forward", forward)
    batch = {"input_ids": token_ids(), "labels": token_ids(), "attention_mask": strange}
    with pytest.raises(ValueError, match=r"attention_mask \(\[1, 7, 7\]\).*\[batch, sequence\].*balance_coef=0"):
        train(model, batch)
    logs = train(model, batch, balance_coef=0)
    assert "balance_loss" not in logs and logs["loss"] > 0


def test_padding_without_a_mask_is_told_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = token_ids()
    ids[0, 4:] = 1  # the padding token of the tiny model
    with pytest.warns(UserWarning, match=r"padding \(token 1\) and no attention_mask") as told:
        train(adapted(tiny_llama(), ["q_proj"]), {"input_ids": ids, "labels": ids})
    assert sum("no attention_mask" in str(w.message) for w in told) == 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(adapted(tiny_llama(), ["q_proj"]), {"input_ids": token_ids(), "labels": token_ids()})
    assert not any("no attention_mask" in str(w.message) for w in told)


def test_raw_audio_is_counted_in_the_frames_that_are_left_of_it():
    config = tf.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=32,
        conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 4), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, mask_time_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = adapted(tf.Wav2Vec2ForCTC(config).eval(), ["q_proj"])
    audio, mask = torch.randn(2, 400), torch.ones(2, 400, dtype=torch.int64)
    mask[1, 200:] = 0
    model(input_values=audio, attention_mask=mask)
    lengths = [400, 200]
    for kernel, stride in ((8, 4), (4, 2)):
        lengths = [(length - kernel) // stride + 1 for length in lengths]
    assert {stats.tokens for stats in router_stats(model).values()} == {sum(lengths)}


def test_stacks_end_with_their_forward():
    """Nothing of a forward is left in the thread when it has ended, by an error too."""
    model = adapted(t5(), ["q"])
    model(input_ids=token_ids(), labels=token_ids())
    assert this_thread.forward is None
    with pytest.raises(Exception, match="."):
        model(input_ids=token_ids() + 1000, labels=token_ids())
    assert this_thread.forward is None


def test_a_base_that_is_given_back_has_no_hooks_left():
    base = t5()
    model = adapted(base, ["q"])
    assert base._forward_pre_hooks and base.encoder._forward_pre_hooks
    assert model.unload() is base
    for module in base.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
