"""The model card of a saved adapter: what it is, its sizes by layer, its scores where known, how to load it.

PEFT writes `README.md` with every saved model, a template to be filled in. `write_card` puts its own part there,
between two comments, and replaces that part alone when the adapter is saved again; everything else in the file stays.
It is called by `MoSLDConfig.save_pretrained`, hence by everything that saves through PEFT (`save_pretrained`,
`Trainer`, `push_to_hub`), and once more by `mosld train` with the scores. Models adapted through transformers' own
`add_adapter` get no card, for transformers saves the weights after the configuration: call
`write_card(folder, MoSLDConfig.from_pretrained(folder))` for one.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..files.adapter_folder import WEIGHTS, read_config
from ..files.atomic import write_text_atomic
from ..files.errors import escape_control_chars
from .weights import AdapterWeights, SavedLayer

README = "README.md"
BEGIN, END = "<!-- mosld: renewed whenever the adapter is saved -->", "<!-- mosld: end -->"
# What peft.auto offers for a configuration's task_type.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def write_card(
    folder: str | os.PathLike, config: Any, tasks: Mapping[str, Mapping[str, Any]] | None = None
) -> Path | None:
    """Write or renew the card of the adapter saved in `folder`; returns its path, None where no weights are saved.

    config: the MoSLDConfig that lies in `folder`, as `MoSLDConfig.from_pretrained` reads it.
    tasks: task name -> its scores as in `results.json` (accuracy in [0, 1], n items, chance). None makes a card without
        scores, also where there were some before: the weights may be others now.
    raises AdapterFileError for files that are damaged, of another method, or do not fit each other.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        return None
    read_config(folder)
    weights = AdapterWeights(folder / WEIGHTS, config.mixture_of)
    path = folder / README
    card = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData(), template_str=EMPTY)
    _complete(card, config)
    own = f"{BEGIN}\n{_describe(config, weights, tasks or {})}\n{END}"
    if BEGIN in card.text and END in card.text:
        before, _, rest = card.text.partition(BEGIN)
        card.text = before + own + rest.partition(END)[2]
    else:
        card.text = _heading(config) + own + "\n" + _without_template(card.text)
    write_text_atomic(path, str(card))
    return path


def readable_card(path: Path) -> None:
    """Put a model card aside that cannot be read: PEFT, which renews it before it saves the weights, would stop there.

    warns of it, with the name that the file has then.
    """
    if not path.is_file():
        return
    try:
        ModelCard.load(path)
    except Exception as error:  # of YAML, of text that is no text, of metadata that is no mapping
        aside = path.with_name("README.unreadable.md")
        path.replace(aside)
        first = str(error).strip().partition("\n")[0]
        warnings.warn(f"{path} is no model card that can be read ({first}): it is {aside.name} now", stacklevel=5)


EMPTY = "---\n{{ card_data }}\n---\n"


def _complete(card: ModelCard, config: Any) -> None:
    """The metadata by which the hub finds and loads it."""
    data: Any = card.data
    data.library_name = "peft"
    data.tags = sorted({*(data.tags or []), "mosld"})
    if config.base_model_name_or_path and not data.base_model:
        data.base_model = config.base_model_name_or_path


def _without_template(text: str) -> str:
    """`text` without PEFT's template, where nobody has filled in anything."""
    template = ModelCard.from_template(ModelCardData()).text.strip()
    return "\n" + text.strip().removeprefix(template).strip() + "\n"


def _heading(config: Any) -> str:
    name = _plain(Path(config.base_model_name_or_path or "").name)
    return f"\n# MoSLD adapter{f' of {name}' if name else ''}\n\n"


def _describe(config: Any, weights: AdapterWeights, tasks: Mapping[str, Mapping[str, Any]]) -> str:
    parts = [
        "An adapter of the method of [MoSLD](https://arxiv.org/abs/2412.08946): experts that share their "
        "down-projection A, of which a router picks some for every token.",
        _table(("", ""), _facts(config, weights)),
        "## Layers",
        _table(("layer", "layers", "in -> out", "experts", "parameters"), _layer_rows(weights.layers)),
    ]
    if tasks:
        parts += [
            "## Tasks",
            "Accuracy on held-out items, in percent.",
            _table(("task", "items", "accuracy", "chance"), _task_rows(tasks)),
        ]
    parts += ["## Loading", f"```python\n{_loading(config)}\n```"]
    return "\n\n".join(parts)


def _task_rows(tasks: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for name, score in tasks.items():
        rows.append((name, str(score.get("n", "")), _percent(score.get("accuracy")), _percent(score.get("chance"))))
    return rows


def _facts(config: Any, weights: AdapterWeights) -> list[tuple[str, str]]:
    """Name and value of what concerns the whole adapter."""
    base = config.base_model_name_or_path
    experts = sorted({layer.num_experts for layer in weights.layers.values()})
    parameters = sum(layer.parameters for layer in weights.layers.values())
    facts = [
        ("base model", f"`{_plain(base)}`" if base else "not recorded"),
        ("method", "MoSLD (`peft_type` MOSLD), a mixture of LoRA experts that share A"),
        ("rank, alpha", f"{config.r}, {config.alpha:g}"),
        ("experts per layer", " to ".join(map(str, dict.fromkeys((experts[0], experts[-1]))))),
        ("experts chosen per token", str(config.top_k)),
        ("dropout on A in training", f"{config.dropout:g}"),
        ("parameters", f"{parameters:,} in {len(weights.layers)} layers"),
    ]
    if config.task_type:
        facts.insert(1, ("task type", str(getattr(config.task_type, "value", config.task_type))))
    if weights.others:
        others = ", ".join(f"`{name}` {shape}" for name, shape in weights.others.items())
        facts.append(("saved beside the adapter", others))
    return facts


def _layer_rows(layers: Mapping[str, SavedLayer]) -> list[tuple[str, ...]]:
    """One row for all layers that differ in their numbers alone, with the numbers that the row covers."""
    alike: dict[tuple[str, SavedLayer], list[str]] = {}
    for name, layer in layers.items():
        numbers = re.findall(r"\.(\d+)(?=\.)", name)
        alike.setdefault((re.sub(r"\.\d+(?=\.)", ".*", name), layer), []).append(".".join(numbers))
    rows = []
    for (name, layer), numbers in alike.items():
        sizes = f"{layer.in_features} -> {layer.out_features}"
        parameters = f"{len(numbers) * layer.parameters:,}"
        rows.append((f"`{name}`", _ranges(numbers), sizes, str(layer.num_experts), parameters))
    return rows


def _ranges(numbers: list[str]) -> str:
    """ "0", "1", "2", "5" -> "0 to 2, 5"; nothing for a layer without a number."""
    runs: list[list[str]] = []
    for number in numbers:
        follows = runs and number.isdigit() and runs[-1][-1].isdigit() and int(number) == int(runs[-1][-1]) + 1
        if follows:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _table(heads: tuple[str, ...], rows: list) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(name: str) -> str:
    """A name of somebody else's as it can stand in a heading, in a table and between backticks, without markup."""
    return re.sub(r"[`|<>\[\]\\]", "_", escape_control_chars(" ".join(name.split())))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _loading(config: Any) -> str:
    task = getattr(config.task_type, "value", config.task_type)
    first = "import mosld  # registers the method with PEFT, so it comes first"
    if task in AUTO_CLASSES and config.base_model_name_or_path:
        name = AUTO_CLASSES[task]
        return f'{first}\nfrom peft import {name}\n\nmodel = {name}.from_pretrained("path/to/this/adapter")'
    return (
        f"{first}\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "path/to/this/adapter")  '
        "# base_model: the model it was trained on"
    )
