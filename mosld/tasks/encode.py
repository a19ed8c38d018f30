"""Text to tokens: prompt and answer side by side, split as lm-evaluation-harness splits them.

Prompt and answer are joined by one space unless there already is white space between them, and tokenised together;
what the prompt alone does not account for is the answer. Longer inputs lose the beginning of the prompt.
"""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .examples import Example, TaskFileError

# The label that transformers' losses leave out.
IGNORED = -100


class Encoded(NamedTuple):
    """Token ids of a prompt, never empty, and of the answer after it, never empty."""

    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        """Of both together."""
        return len(self.prompt) + len(self.answer)


class Encoder:
    """Encodes prompts and answers.

    Args:
        tokenizer: Its begin token, if it adds one, stands before every prompt; its end token ends a row of training.
        max_length: The greatest number of tokens of a prompt and its answer together.

    Raises:
        ValueError: For a max_length below 2.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        self.tokenizer, self.max_length = tokenizer, max_length
        bos = tokenizer.bos_token_id
        self.prefix: list[int] = [bos] if isinstance(bos, int) and tokenizer("a").input_ids[:1] == [bos] else []
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.end: list[int] = [eos] if isinstance(eos, int) else []
        # It is masked wherever it stands, so that any token serves.
        self.pad = pad if isinstance(pad, int) else 0

    def pair(self, prompt: str, answer: str, reserved: int = 0) -> Encoded:
        """Encode a prompt and an answer.

        Args:
            prompt: Loses its beginning where it is too long.
            answer: Is kept whole.
            reserved: How many more tokens there must be room for.

        Returns:
            The tokens of both.

        Raises:
            TaskFileError: When the answer alone does not fit.
        """
        kept = prompt.rstrip()
        between = prompt[len(kept) :] or ("" if answer[:1].isspace() or not kept else " ")
        prompt_ids = self._ids(kept)
        answer_ids = self._ids(kept + between + answer)[len(prompt_ids) :]
        room = self.max_length - reserved - len(answer_ids) - len(self.prefix)
        # At least one token must precede the answer: the prefix, or one of the prompt.
        least_room = 0 if self.prefix else 1
        if room < least_room or not answer_ids:
            raise TaskFileError(
                f"the answer {answer!r:.40} has {len(answer_ids)} tokens, "
                f"which does not fit max_length={self.max_length}"
            )
        prompt_ids = self.prefix + (prompt_ids[-room:] if room else [])
        if not prompt_ids:  # as lm-evaluation-harness does for an empty context
            prompt_ids = self.end or [0]
        return Encoded(prompt_ids, answer_ids)

    def training_row(self, example: Example) -> dict[str, list[int]]:
        """input_ids, attention_mask and labels; the loss falls on the answer's tokens and the end token alone."""
        prompt, answer = self.pair(example.prompt, example.completion, reserved=len(self.end))
        input_ids = prompt + answer + self.end
        return {
            "input_ids": input_ids,
            "attention_mask": [1] * len(input_ids),
            "labels": [IGNORED] * len(prompt) + answer + self.end,
        }

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []
