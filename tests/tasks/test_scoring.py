"""Encoding and scoring: the right tokens are scored, and a score does not depend on the batch it was computed in."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mosld.tasks.encode import IGNORED, Encoded, Encoder
from mosld.tasks.examples import Example, Task, TaskFileError
from mosld.tasks.proportions import mix, parse_proportions
from mosld.tasks.scoring import log_likelihoods, score_tasks
from tests.helpers.models import tiny_llama


def byte_tokenizer(**special) -> PreTrainedTokenizerFast:
    """One token a byte: what is scored can be read off."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, "<pad>": 1, **{character: i + 2 for i, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", **special)


TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=len(TOKENIZER))


def text(ids):
    return TOKENIZER.decode(ids)


@pytest.mark.parametrize(
    ("prompt", "answer", "prompt_tokens", "answer_tokens"),
    [
        ("Is it?", "yes", "Is it?", " yes"),
        ("Is it? ", "yes", "Is it?", " yes"),
        ("Is it?\n", "yes", "Is it?", "\nyes"),
        ("Is it?", " yes", "Is it?", " yes"),
        ("", "yes", "<end>", "yes"),
    ],
)
def test_prompt_and_answer_are_split_as_lm_evaluation_harness_splits_them(prompt, answer, prompt_tokens, answer_tokens):
    encoded = Encoder(TOKENIZER, 64).pair(prompt, answer)
    assert (text(encoded.prompt), text(encoded.answer)) == (prompt_tokens, answer_tokens)


def test_a_long_prompt_loses_its_beginning_and_the_answer_nothing():
    encoded = Encoder(TOKENIZER, 10).pair("0123456789", "yes")
    assert (text(encoded.prompt), text(encoded.answer)) == ("456789", " yes")


def test_an_answer_that_does_not_fit_is_refused():
    with pytest.raises(TaskFileError, match="has 5 tokens, which does not fit max_length=4"):
        Encoder(TOKENIZER, 4).pair("x", "long")


def test_a_first_token_is_kept_where_the_tokenizer_has_one():
    tokenizer = byte_tokenizer(bos_token="<end>")
    tokenizer.add_bos_token = True
    if tokenizer("a").input_ids[0] != 0:  # the setting does not reach a tokenizer without a template
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<end> $A", special_tokens=[("<end>", 0)]
        )
    encoder = Encoder(tokenizer, 6)
    assert encoder.pair("0123456789", "y").prompt[0] == 0
    assert text(encoder.pair("0123456789", "y").prompt[1:]) == "789"


def test_the_loss_falls_on_the_answer_and_the_end_token_alone():
    row = Encoder(TOKENIZER, 64).training_row(Example.multiple_choice("Is it?", ["no", "yes"], 1))
    labelled = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert text(labelled) == " yes<end>" and row["labels"][-5:] == row["input_ids"][-5:]
    assert len(row["attention_mask"]) == len(row["input_ids"]) == len("Is it? yes") + 1


def by_hand(model, pair: Encoded) -> float:
    """One row, one token at a time."""
    total, context = 0.0, list(pair.prompt)
    for token in pair.answer:
        total += model(torch.tensor([context])).logits[0, -1].log_softmax(-1)[token].item()
        context.append(token)
    return total


def test_log_likelihoods_equal_token_by_token_and_do_not_depend_on_the_batch(model):
    encoder = Encoder(TOKENIZER, 64)
    pairs = [
        encoder.pair(p, a) for p, a in [("a", "bc"), ("a much longer prompt", "x"), ("mid", "dling answer"), ("", "q")]
    ]
    alone = [log_likelihoods(model, [pair], 1)[0][0] for pair in pairs]
    for batch_size in (1, 2, 4):
        together = log_likelihoods(model, pairs, 1, batch_size)
        assert [t for t, _ in together] == pytest.approx(alone, abs=1e-4)
    assert alone == pytest.approx([by_hand(model, pair) for pair in pairs], abs=1e-4)
    other_padding = log_likelihoods(model, pairs, 50, 4)
    assert [t for t, _ in other_padding] == pytest.approx(alone, abs=1e-4)


def test_greedy_is_told_from_not_greedy(model):
    prompt = TOKENIZER("abc").input_ids
    best = model(torch.tensor([prompt])).logits[0, -1].argmax().item()
    other = (best + 1) % 90
    results = log_likelihoods(model, [Encoded(prompt, [best]), Encoded(prompt, [other])], 1)
    assert [greedy for _, greedy in results] == [True, False]


def test_scores_are_counted_from_sums_and_from_sums_per_character(model):
    encoder = Encoder(TOKENIZER, 64)
    examples = [Example.multiple_choice(f"{i}?", ["a", "bcdefgh", "ij"], 0 if i % 3 else 1) for i in range(9)]
    (score,) = score_tasks(model, encoder, [Task("t", examples[:1], examples)]).values()
    right = right_norm = 0
    for example in examples:
        sums = [by_hand(model, encoder.pair(example.prompt, choice)) for choice in example.choices]
        right += max(range(3), key=sums.__getitem__) == example.answer
        norms = [s / len(c) for s, c in zip(sums, example.choices, strict=True)]
        right_norm += max(range(3), key=norms.__getitem__) == example.answer
    assert (score.accuracy, score.accuracy_norm, score.n) == (right / 9, right_norm / 9, 9)
    assert right != right_norm  # the two conventions differ here
    assert score.chance == pytest.approx(1 / 3)
    assert score.majority == pytest.approx(1 / 3)  # training saw "bcdefgh", which is right for every third


def test_free_text_is_scored_by_greedy_agreement(model):
    (score,) = score_tasks(model, Encoder(TOKENIZER, 64), [Task("t", [], [Example("a", "zebra")])]).values()
    assert (score.accuracy, score.accuracy_norm, score.chance, score.majority) == (0.0, None, None, None)


def test_majority_is_not_guessed_from_the_test_answers(model):
    examples = [Example.multiple_choice("?", [f"a{i}", f"b{i}"], 0) for i in range(4)]
    (score,) = score_tasks(model, Encoder(TOKENIZER, 64), [Task("t", [], examples)]).values()
    assert score.majority is None and score.chance == 0.5


def test_no_batch_is_no_score(model):
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
            log_likelihoods(model, [Encoded([5], [6])], 1, size)


def test_a_row_is_never_longer_than_the_greatest_length():
    encoder = Encoder(TOKENIZER, 7)
    assert len(encoder.training_row(Example("1?", "even"))["input_ids"]) == 7
    with pytest.raises(TaskFileError, match="does not fit max_length=6"):
        Encoder(TOKENIZER, 6).training_row(Example("1?", "even"))


def test_scoring_leaves_the_mode_of_the_model(model):
    model.train()
    log_likelihoods(model, [Encoded([5], [6])], 1)
    assert model.training
    model.eval()


def test_a_model_in_training_is_scored_without_its_dropout(model):
    dropping = tiny_llama(vocab_size=len(TOKENIZER), attention_dropout=0.5).train()
    pairs = [Encoded([5, 6, 7], [8, 9]), Encoded([10], [11])]
    assert log_likelihoods(dropping, pairs, 1) == log_likelihoods(model, pairs, 1)


def tasks_of(**sizes):
    return [Task(name, [Example(f"{name}{i}", "x") for i in range(size)]) for name, size in sizes.items()]


def counts(examples):
    return {name: sum(e.prompt.startswith(name) for e in examples) for name in "ab"}


def test_mixing_follows_the_proportions():
    tasks = tasks_of(a=30, b=10)
    assert mix(tasks) == tasks[0].train + tasks[1].train
    assert counts(mix(tasks, "equal")) == {"a": 20, "b": 20}
    assert counts(mix(tasks, {"a": 1, "b": 3})) == {"a": 10, "b": 30}
    assert counts(mix(tasks, {"a": 1, "b": 0})) == {"a": 40, "b": 0}
    repeated = [e.prompt for e in mix(tasks, {"a": 1, "b": 3}) if e.prompt.startswith("b")]
    assert all(repeated.count(f"b{i}") == 3 for i in range(10))
    assert mix(tasks, "equal", seed=1) == mix(tasks, "equal", seed=1) != mix(tasks, "equal", seed=2)


def test_proportions_are_parsed_or_refused():
    assert parse_proportions("equal", ["a", "b"]) == "equal"
    assert parse_proportions("a=1,b=2.5", ["a", "b"]) == {"a": 1.0, "b": 2.5}
    for bad in ("a=1", "a=1,b=x", "a=1,b=1,c=1", "a=-1,b=2", "a=0,b=0", "even"):
        with pytest.raises(ValueError, match="proportions must|weights must"):
            parse_proportions(bad, ["a", "b"])
