"""A user's own model and two tasks, for tests of the command line."""

import json
from pathlib import Path

from tests.helpers.models import tiny_llama
from tests.tasks.test_scoring import byte_tokenizer

FAST = ["--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--use_cpu", "true",
        "--logging_steps", "1", "--warmup_steps", "0"]  # fmt: skip


def write_data(folder: Path) -> Path:
    """A tiny model with its tokenizer and two tasks: is a digit even, does a word end in a vowel."""
    tokenizer = byte_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, rows in {
        "even": [{"prompt": f"{i}?", "choices": ["odd", "even"], "answer": 1 - i % 2} for i in range(24)],
        "vowel": [{"prompt": f"b{c}", "choices": ["no", "yes"], "answer": int(c in "aeiou")} for c in "aeioubcdfghjkl"],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(data: Path, output: Path, *more: str, command: str = "train") -> list[str]:
    """A command line on what `write_data` wrote, for `mosld.cli.main.main`."""
    tasks = [f"{name}={data / f'{name}.jsonl'}" for name in ("even", "vowel")]
    tasks = [f"{task}:{task.partition('=')[2]}" for task in tasks]
    own = ["--model", str(data / "model"), "--task", tasks[0], "--task", tasks[1], "--output", str(output)]
    return [command, *own, *more]
