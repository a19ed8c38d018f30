"""TRL's trainers make other datasets and batches of the data; each row still trains as its own task."""

import importlib.util

import pytest
import torch

import mosld
from mosld import MoSLDConfig, MoSLDTrainerMixin
from mosld.layers.host import all_adapters
from tests.helpers.models import tiny_llama
from tests.tasks.test_scoring import byte_tokenizer

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is not installed: extra `trl`"),
    pytest.mark.usefixtures("offline"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_\\w+)?` is deprecated:FutureWarning"),
]
TOKENIZER = byte_tokenizer()
TASKS = [0, 2, 1, 2, 0, 1]
WORDS = ["zero ", "one ", "two "]  # each row begins with its task


def config() -> MoSLDConfig:
    targets = ["q_proj", "v_proj"]
    return MoSLDConfig(r=2, num_experts=3, dropout=0.0, router="task", num_tasks=3, target_modules=targets)


def trainer_of(kind: str, folder, rows, **options):
    import trl
    from datasets import Dataset

    base = getattr(trl, f"{kind}Trainer")
    made = type(f"MoSLD{kind}Trainer", (MoSLDTrainerMixin, base), {})
    settings = dict(
        output_dir=str(folder), report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False,
        per_device_train_batch_size=3, max_steps=2, dataloader_pin_memory=False, seed=1,
    )  # fmt: skip
    arguments = getattr(trl, f"{kind}Config")(**{**settings, **options})
    model = tiny_llama(vocab_size=len(TOKENIZER))
    if kind == "Reward":
        from transformers import LlamaForSequenceClassification

        settings = model.config
        settings.num_labels = 1
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(settings)
    more = dict(reward_funcs=lambda completions, **_: [0.0] * len(completions)) if kind == "GRPO" else {}
    return made(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=TOKENIZER,
        peft_config=config(), **more,
    )  # fmt: skip


def text(task: int) -> str:
    return WORDS[task] + "and more"


ROWS = {
    "SFT": [{"text": text(task), "task_ids": task} for task in TASKS],
    "DPO": [{"prompt": WORDS[t], "chosen": "yes", "rejected": "never", "task_ids": t} for t in TASKS],
    "KTO": [
        {"prompt": WORDS[t], "completion": "yes", "label": bool(i % 2), "task_ids": t} for i, t in enumerate(TASKS)
    ],
    "Reward": [{"chosen": text(t), "rejected": WORDS[t] + "no", "task_ids": t} for t in TASKS],
}


def watched(trainer) -> list[tuple[list[str], list[int]]]:
    """For each forward the texts of its rows, and the ids that the layers route by."""
    seen = []
    model = trainer.model
    (_, adapter), *_ = all_adapters(model)

    def note(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        texts = [TOKENIZER.decode(row, skip_special_tokens=True) for row in ids]
        seen.append((texts, adapter.routing_input("task_ids").tolist()))

    model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("kind", ROWS)
def test_every_row_is_routed_by_its_own_task(kind, tmp_path):
    trainer = trainer_of(kind, tmp_path, ROWS[kind])
    seen = watched(trainer)
    trainer.train()
    assert seen
    for texts, ids in seen:
        assert len(texts) == len(ids)
        for words, task in zip(texts, ids, strict=True):
            assert words.replace(" ", "").startswith(WORDS[task].strip()), (words, task)
    assert {task for _, ids in seen for task in ids} == {0, 1, 2}


def test_rows_that_are_packed_are_refused(tmp_path):
    with pytest.raises(ValueError, match="MoSLDSFTTrainer with packing=True puts several rows into one"):
        trainer_of("SFT", tmp_path, ROWS["SFT"], packing=True, max_length=32)


def test_batches_of_generations_are_refused(tmp_path):
    rows = [{"prompt": WORDS[task], "task_ids": task} for task in TASKS]
    with pytest.raises(ValueError, match="MoSLDGRPOTrainer makes its batches of generations, which have no task_ids"):
        trainer_of("GRPO", tmp_path, rows, num_generations=3, max_completion_length=4)


def test_data_of_one_task_needs_no_column(tmp_path):
    rows = [{"text": text(1)} for _ in TASKS]
    trainer = trainer_of("SFT", tmp_path, rows)
    mosld.set_routing(trainer.model, task_ids=1)
    seen = watched(trainer)
    trainer.train()
    assert all(ids == [1] for _, ids in seen)
