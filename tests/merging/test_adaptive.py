"""Coefficients and masks that unlabelled data decides."""

from dataclasses import replace

import pytest
import torch

from mosld.merging.adaptive import AdaptiveSettings, minimise_entropy
from mosld.merging.concrete import (
    ConcreteSettings,
    _inner_step,
    final,
    rescaled,
    sampled,
    sum_of_entropies,
    train_masks,
)
from mosld.merging.dense import DenseMerge
from mosld.merging.elementwise import summed
from mosld.merging.unlabelled import Question, Unlabelled, choice_entropy, without_labels
from mosld.tasks.encode import Encoder
from mosld.tasks.examples import Example, Task
from mosld.tasks.scoring import log_likelihoods
from tests.models import tiny_llama
from tests.tasks.test_scoring import byte_tokenizer

TOKENIZER = byte_tokenizer()
ENCODER = Encoder(TOKENIZER, 64)


def task(name: str, count: int = 8) -> Task:
    items = [Example.multiple_choice(f"{name}{i}?", ["ab", "cde", "f"][: 2 + i % 2], i % 2) for i in range(count)]
    return Task(name, [], items)


TASKS = [without_labels(ENCODER, task(name)) for name in "xy"]


def base():
    return tiny_llama(vocab_size=len(TOKENIZER)).eval()


def vectors(model) -> list[tuple[str, torch.Tensor]]:
    names = [n for n, _ in model.named_parameters() if n.endswith(("q_proj.weight", "up_proj.weight"))]
    torch.manual_seed(3)
    return [(n, 0.3 * torch.randn(2, *model.get_parameter(n).shape)) for n in names]


def test_questions_hold_no_answer():
    (question, *_) = TASKS[0].questions
    assert vars(question).keys() == {"choices"}
    turned = Task("x", [], [replace(e, answer=0) for e in task("x").test])
    assert without_labels(ENCODER, turned) == TASKS[0]  # whichever is right, the questions are the same


@torch.no_grad()
def test_the_entropy_is_that_of_the_choices_likelihoods():
    model = base()
    model.lm_head.weight.mul_(30)  # of a model that is undecided every token counts alike
    own = choice_entropy(
        lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits, TASKS[0].questions, ENCODER.pad
    )
    expected = []
    for question in TASKS[0].questions:
        sums = torch.tensor([total for total, _ in log_likelihoods(model, question.choices, ENCODER.pad)])
        expected.append(torch.distributions.Categorical(logits=sums).entropy())
    torch.testing.assert_close(own, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_dense_merge_is_the_model_with_the_sum_added():
    model, coefficients = base(), torch.tensor([0.5, -0.25])
    merge = DenseMerge(model, vectors(model))
    other = base()
    for name, update in summed(lambda: vectors(other), coefficients):
        other.get_parameter(name).add_(update)
    ids = torch.randint(0, len(TOKENIZER), (2, 6))
    expected = other(ids).logits
    torch.testing.assert_close(merge(coefficients)(ids, torch.ones_like(ids)), expected)
    by_layer = coefficients.expand(len(merge.layers), 2)
    torch.testing.assert_close(merge(by_layer)(ids, torch.ones_like(ids)), expected)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)  # left as it is
    assert merge.write(coefficients) < 1e-6
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("by_layer", [False, True])
def test_the_entropy_falls_and_a_run_that_was_cut_off_goes_on_exactly(tmp_path, by_layer):
    model = base()
    merge = DenseMerge(model, vectors(model))
    shape = (len(merge.layers), 2) if by_layer else (2,)
    settings = AdaptiveSettings(steps=6, learning_rate=0.05, batch_size=8, save_steps=3)
    whole, losses = minimise_entropy(merge, shape, TASKS, ENCODER.pad, settings)
    assert losses[-1] < losses[0] and (whole != 0.3).all()
    minimise_entropy(merge, shape, TASKS, ENCODER.pad, replace(settings, steps=3), tmp_path)
    resumed, again = minimise_entropy(merge, shape, TASKS, ENCODER.pad, settings, tmp_path)
    assert torch.equal(resumed, whole) and again == losses
    with pytest.raises(ValueError, match="needs unlabelled data of at least one task"):
        minimise_entropy(merge, shape, [], ENCODER.pad)


def test_a_relaxed_mask_becomes_the_discrete_one_as_the_temperature_falls():
    torch.manual_seed(0)
    logits = {"w": torch.randn(50, 40)}
    discrete = final(logits, 0.5, discrete=True)["w"]
    assert torch.equal(discrete, rescaled((logits["w"] > 0).float()))
    torch.testing.assert_close(final(logits, 1e-6)["w"], discrete, rtol=1e-3, atol=1e-3)
    drawn = sampled(logits, 0.5, torch.Generator().manual_seed(0))["w"]
    assert drawn.mean() == pytest.approx(1.0, rel=1e-4)
    kept = sampled({"w": torch.full((200, 200), 1.0)}, 1e-4, torch.Generator().manual_seed(0))["w"] > 0
    assert kept.float().mean() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.01)


@pytest.mark.parametrize("inner_rate", [None, 1.0])
def test_masks_are_trained_by_the_entropy_and_repeat_with_the_seed(inner_rate):
    model = base()
    merge = DenseMerge(model, vectors(model))
    settings = ConcreteSettings(steps=3, learning_rate=0.1, batch_size=8, inner_rate=inner_rate)
    masks, losses = train_masks(merge, TASKS, 2, ENCODER.pad, settings)
    assert len(losses) == 3 and all((phi != 0).any() for phi in masks.values())
    again, _ = train_masks(merge, TASKS, 2, ENCODER.pad, settings)
    assert all(torch.equal(masks[name], again[name]) for name in masks)


def test_the_inner_step_goes_down_the_slope_of_the_coefficients_with_the_mask_held():
    model = base()
    model.lm_head.weight.data.mul_(10)
    merge = DenseMerge(model, vectors(model))
    batches, start = [list(unlabelled.questions) for unlabelled in TASKS], torch.tensor([0.3, 0.3])
    masks = sampled(
        {n: torch.zeros(t.shape[1:]) for n, t in merge.parts.items()}, 0.5, torch.Generator().manual_seed(0)
    )
    moved = _inner_step(merge, masks, start, batches, ENCODER.pad, rate=2.0)
    slope = []
    for k in range(2):
        ends = [start.clone().index_add(0, torch.tensor([k]), torch.tensor([step])) for step in (1e-3, -1e-3)]
        with torch.no_grad():
            losses = [sum_of_entropies(lambda c=c: merge(c, masks), batches, ENCODER.pad) for c in ends]
        slope.append((losses[0] - losses[1]) / 2e-3)
    torch.testing.assert_close(moved, start - 2.0 * torch.stack(slope), rtol=1e-2, atol=1e-3)
    assert (moved - start).abs().max() > 1e-2
    one, other = (
        train_masks(merge, TASKS, 2, ENCODER.pad, ConcreteSettings(steps=1, batch_size=8, inner_rate=rate))[1]
        for rate in (None, 1.0)
    )
    assert one != other


def test_batches_are_decided_by_the_seed_and_cover_every_question():
    unlabelled = Unlabelled("z", tuple(Question(()) for _ in range(6)))
    seen = [q for _, batch in zip(range(3), unlabelled.batches(2, 5), strict=False) for q in batch]
    assert {id(q) for q in seen} == {id(q) for q in unlabelled.questions}
