"""lm-evaluation-harness scores an adapted model as it is, on a local file, by what the model itself says."""

import importlib.util
import json

import peft
import pytest
import torch

from mosld import MoSLDConfig
from mosld.tasks.encode import Encoder
from mosld.tasks.examples import Example, Task
from mosld.tasks.scoring import score_tasks
from tests.helpers.models import perturb, tiny_llama
from tests.tasks.test_scoring import byte_tokenizer

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed: extra `eval`"),
    pytest.mark.usefixtures("offline"),
]
TOKENIZER = byte_tokenizer()
CHOICES = (("red", "blue, or so", "green"), ("no", "yes"), ("it is cold", "it is", "cold", "c"), ("!", "? !", "x"))
QUIZ = [{"prompt": f"{'Q' * (i % 4)} {i}:", "choices": CHOICES[i % 4], "answer": i // 4 % 2} for i in range(16)]


def base():
    return tiny_llama(vocab_size=len(TOKENIZER))


@pytest.fixture(scope="module")
def adapted():
    config = MoSLDConfig(r=4, num_experts=4, dropout=0.3, target_modules="all-linear")
    model = peft.get_peft_model(base(), config)
    torch.manual_seed(2)
    perturb(model)
    return model


@pytest.fixture
def run(tmp_path):
    """Evaluates a model, or the arguments of one, on the quiz: metrics, and the log-likelihood of every choice."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUIZ))
    task = {
        "task": "quiz", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "quiz.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{prompt}}", "doc_to_choice": "choices", "doc_to_target": "answer",
    }  # fmt: skip

    def evaluate(model, batch_size=4, **arguments):
        scored = HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=batch_size, **arguments)
        # The harness's own tasks take seven seconds to list.
        results = lm_eval.simple_evaluate(scored, tasks=[task], task_manager=TaskManager(include_defaults=False))
        samples = sorted(results["samples"]["quiz"], key=lambda sample: sample["doc_id"])
        metrics = {name.partition(",")[0]: value for name, value in results["results"]["quiz"].items()}
        return metrics, [[value for value, _ in sample["filtered_resps"]] for sample in samples]

    return evaluate


@torch.no_grad()
def log_likelihoods(model):
    """The same in float64 from the model alone, a row at a time, without padding."""
    model = model.double().eval()
    rows = []
    for item in QUIZ:
        start = len(TOKENIZER(item["prompt"]).input_ids)
        rows.append([])
        for choice in item["choices"]:
            ids = torch.tensor([TOKENIZER(f"{item['prompt']} {choice}").input_ids])
            log_probs = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
            rows[-1].append(log_probs[0, start - 1 :].sum().item())
    model.float()
    return rows


def accuracies(rows):
    """The shares of items whose answer has the greatest log-likelihood, and the greatest over its characters."""
    right = right_norm = 0
    for item, values in zip(QUIZ, rows, strict=True):
        norms = [value / len(choice) for value, choice in zip(values, item["choices"], strict=True)]
        right += values.index(max(values)) == item["answer"]
        right_norm += norms.index(max(norms)) == item["answer"]
    return right / len(QUIZ), right_norm / len(QUIZ)


def flat(rows):
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def test_lm_evaluation_harness_reports_the_models_own_log_likelihoods_and_accuracy(adapted, run):
    adapted.train()  # with dropout: the harness puts it into eval mode
    metrics, rows = run(adapted)
    expected = log_likelihoods(adapted)
    torch.testing.assert_close(flat(rows), flat(expected), rtol=0, atol=1e-4)
    assert (metrics["acc"], metrics["acc_norm"]) == accuracies(expected)
    assert 0 < metrics["acc"] < 1 and metrics["acc"] != metrics["acc_norm"]


def test_the_harness_and_mosld_eval_give_the_same_accuracy(adapted, run):
    metrics, _ = run(adapted)
    task = Task("quiz", [], [Example.multiple_choice(**row) for row in QUIZ])
    score = score_tasks(adapted, Encoder(TOKENIZER, 64), [task])["quiz"]
    assert (score.accuracy, score.accuracy_norm) == (metrics["acc"], metrics["acc_norm"])


def test_in_the_harness_the_adapter_makes_the_difference_to_the_base(adapted, run):
    with_adapter, rows = run(adapted)
    plain, plain_rows = run(base())
    with adapted.disable_adapter():
        disabled, disabled_rows = run(adapted)
    assert disabled_rows == plain_rows and disabled["acc"] == plain["acc"]
    assert (flat(rows) - flat(plain_rows)).abs().min() > 1e-3
    assert with_adapter["acc"] != plain["acc"]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_harness_gets_the_same_for_every_batch_size(adapted, run, batch_size):
    metrics, rows = run(adapted)
    other_metrics, other = run(adapted, batch_size=batch_size)
    torch.testing.assert_close(flat(other), flat(rows), rtol=0, atol=1e-5)
    assert other_metrics["acc"] == metrics["acc"]


@pytest.mark.slow
def test_the_harness_loads_a_saved_adapter_by_its_folder(adapted, run, tmp_path):
    base().save_pretrained(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    _, rows = run(adapted)
    _, loaded = run(str(tmp_path / "base"), peft=str(tmp_path / "adapter"), device="cpu", dtype="float32")
    torch.testing.assert_close(flat(loaded), flat(rows), rtol=0, atol=1e-6)
