"""Ids by row go with the rows of the batch that the model was called with; where a layer's rows cannot be told, it
refuses by its name instead of routing by somebody else's task."""

import threading

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import mosld
from mosld import MoSLDConfig
from mosld.layers.host import all_adapters
from tests.helpers.models import perturb, tiny_llama, token_ids

TASKS = dict(r=2, num_experts=3, dropout=0.0, router="task", num_tasks=3)


def adapted(base, targets, **changes) -> peft.PeftModel:
    model = peft.get_peft_model(base, MoSLDConfig(**{**TASKS, **changes}, target_modules=targets))
    perturb(model)
    return model


def one_by_one(model, ids, tasks) -> torch.Tensor:
    """Each row alone, with its own task."""
    rows = []
    for row, task in zip(ids, tasks, strict=True):
        with mosld.routing(model, task_ids=task), torch.no_grad():
            rows.append(model(input_ids=row[None]).logits[0])
    return torch.stack(rows)


def test_chosen_and_rejected_halves_are_refused_with_ids_for_one_half():
    """Preference batches are all chosen rows and then all rejected ones: no row's copy is its neighbour."""
    model = adapted(tiny_llama(), ["q_proj"]).train()
    both = torch.cat([token_ids(seed=0), token_ids(seed=1)])
    mosld.set_routing(model, task_ids=[0, 1, 2])
    with pytest.raises(
        ValueError, match="task_ids must be for each of the 6 rows that the model was called with, got 3"
    ):
        model(input_ids=both)
    mosld.set_routing(model, task_ids=[0, 1, 2, 0, 1, 2])
    out = model.eval()(input_ids=both).logits
    torch.testing.assert_close(out, one_by_one(model, both, [0, 1, 2, 0, 1, 2]))


def test_beams_are_neighbours():
    model = adapted(tiny_llama(), ["q_proj", "down_proj"])
    ids = token_ids()
    mosld.set_routing(model, task_ids=[2, 0, 1])
    together = model.generate(input_ids=ids, num_beams=3, max_new_tokens=4, do_sample=False)
    for row, task in enumerate([2, 0, 1]):
        mosld.set_routing(model, task_ids=task)
        alone = model.generate(input_ids=ids[row : row + 1], num_beams=3, max_new_tokens=4, do_sample=False)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


class Flattened(nn.Module):
    """Tokens as rows, as mixture-of-experts blocks see them."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, inputs_embeds):
        rows, length, _ = inputs_embeds.shape
        return self.inner(inputs_embeds.flatten(0, 1)).view(rows, length, -1)


def test_tokens_that_a_model_flattens_into_rows_are_told_apart():
    model = adapted(Flattened(), ["inner"])
    x = torch.randn(3, 4, 6)
    mosld.set_routing(model, task_ids=[2, 0, 1])
    together = model(inputs_embeds=x)
    for row, task in enumerate([2, 0, 1]):
        mosld.set_routing(model, task_ids=task)
        torch.testing.assert_close(model(inputs_embeds=x[row : row + 1])[0], together[row])


class Images(nn.Module):
    """A tower that sees all images of the batch, however many a row has."""

    def __init__(self):
        super().__init__()
        self.tower, self.text = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, input_ids, pixel_values):
        seen = self.tower(pixel_values)
        return self.text(torch.nn.functional.one_hot(input_ids, 6).float() + seen.mean())


@pytest.mark.parametrize("images", [4, 6])
def test_several_images_a_row_are_refused_by_the_layers_name(images):
    """Four images of two rows may be two and two, or one and three."""
    model = adapted(Images(), ["tower", "text"])
    mosld.set_routing(model, task_ids=[0, 1])
    ids = torch.zeros(2, 3, dtype=torch.int64)
    words = rf"task_ids cannot be told for .*tower: it sees \[{images}, 5\] tokens of 2 rows"
    with pytest.raises(ValueError, match=words):
        model(input_ids=ids, pixel_values=torch.randn(images, 5, 6))
    assert model(input_ids=ids, pixel_values=torch.randn(2, 5, 6)).shape == (2, 3, 6)


def switch() -> tf.SwitchTransformersForConditionalGeneration:
    config = tf.SwitchTransformersConfig(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_heads=4, vocab_size=96, num_experts=3, decoder_start_token_id=0,
        pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.SwitchTransformersForConditionalGeneration(config).eval()


def test_experts_that_get_gathered_tokens_are_always_refused():
    """Whether the number of tokens that went there happens to fit is no sign that they are these rows."""
    model = adapted(switch(), ["wi"])
    refused = 0
    for seed in range(40):
        rows = 2 + seed % 3
        mosld.set_routing(model, task_ids=[row % 3 for row in range(rows)])
        ids = token_ids(rows=rows, length=1 + seed % 5, seed=seed)
        try:
            model(input_ids=ids, decoder_input_ids=ids)
        except ValueError as error:
            assert "task_ids cannot be told for" in str(error) and "expert" in str(error)
            refused += 1
    assert refused == 40


def test_an_expert_that_gets_as_many_tokens_as_there_are_rows_is_refused():
    """Its tokens are whichever went there, and no sign that they are one of each row."""
    model = adapted(switch(), r".*encoder\.block\.1.*expert_0\.wi")
    ((name, _),) = all_adapters(model)
    seen: list[int] = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    fitted = 0
    for seed in range(60):
        ids = token_ids(rows=3, length=2 + seed % 4, seed=seed)
        mosld.set_routing(model, task_ids=[0, 1, 2])
        seen.clear()
        try:
            model(input_ids=ids, decoder_input_ids=ids)
        except ValueError as error:
            assert "task_ids cannot be told for" in str(error)
            fitted += seen[0] == 3
            continue
        assert not seen or seen[0] == ids.numel()  # all tokens of all rows, one after the other
    assert fitted


def test_windows_of_images_where_pixels_are_the_only_input():
    config = tf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4)
    torch.manual_seed(0)
    model = adapted(tf.SwinModel(config).eval(), r".*(query|value|q_proj|v_proj)")
    pixels = torch.randn(3, 3, 16, 16)
    mosld.set_routing(model, task_ids=[2, 0, 1])
    together = model(pixel_values=pixels).last_hidden_state
    for row, task in enumerate([2, 0, 1]):
        mosld.set_routing(model, task_ids=task)
        torch.testing.assert_close(model(pixel_values=pixels[row : row + 1]).last_hidden_state[0], together[row])


def test_two_threads_have_a_task_each():
    model = adapted(tiny_llama(), ["q_proj", "down_proj"])
    ids = token_ids()
    expected = [one_by_one(model, ids, [task] * 3) for task in range(3)]
    wrong: list[int] = []

    def serve(task: int) -> None:
        for _ in range(50):
            with mosld.routing(model, task_ids=[task] * 3), torch.no_grad():
                out = model(input_ids=ids).logits
            if not torch.allclose(out, expected[task], atol=1e-5):
                wrong.append(task)

    threads = [threading.Thread(target=serve, args=(task,)) for task in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_set_holds_in_a_thread_that_is_started_later():
    """A model that generates in a thread of its own, as streaming servers do."""
    model = adapted(tiny_llama(), ["q_proj"])
    ids = token_ids()
    mosld.set_routing(model, task_ids=[2, 2, 2])
    found = []
    thread = threading.Thread(target=lambda: found.append(model(input_ids=ids).logits.detach()))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], one_by_one(model, ids, [2, 2, 2]))


def test_blocks_of_routing_nest_and_end_with_an_error():
    model = adapted(tiny_llama(), ["q_proj"])
    ids = token_ids()
    expected = [one_by_one(model, ids, [task] * 3) for task in range(3)]

    def now():
        with torch.no_grad():
            return model(input_ids=ids).logits

    mosld.set_routing(model, task_ids=0)
    with mosld.routing(model, task_ids=1):
        with pytest.raises(RuntimeError, match="ends"), mosld.routing(model, task_ids=2):
            torch.testing.assert_close(now(), expected[2])
            raise RuntimeError("ends")
        torch.testing.assert_close(now(), expected[1])
    torch.testing.assert_close(now(), expected[0])


def test_ids_that_were_set_in_inference_mode_serve_training():
    model = adapted(tiny_llama(), ["q_proj"]).train()
    with torch.inference_mode():
        mosld.set_routing(model, task_ids=torch.tensor([0, 1, 2]))
        model(input_ids=token_ids())
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    gates = adapted(tiny_llama(), ["q_proj"], router="external", num_tasks=None).train()
    with torch.inference_mode():
        mosld.set_routing(gates, gates=torch.tensor([0.2, 0.3, 0.5]))
    gates(input_ids=token_ids(), labels=token_ids()).loss.backward()
