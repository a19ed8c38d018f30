"""docs/reference/architectures.md, from benchmarks/results/sweep.json: `python -m docs.build.architectures`."""

import json
from pathlib import Path
from typing import Any

from benchmarks.sweep.checks import passes
from benchmarks.sweep.run import lora_manages, missed, silent, verdict
from docs.build.markdown import table, wrapped

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks/results/sweep.json"
PAGE = ROOT / "docs/reference/architectures.md"


def page(data: dict[str, Any]) -> str:
    rows, machine, counts = data["types"], data["machine"], data["counts"]
    ran = [row for row in rows if "not_built" not in row]
    purpose = f"""After this page you know on which of transformers' models "all-linear" was tried, and what came of it.
        `python -m benchmarks sweep` builds a shrunk model of every configuration type of transformers
        {machine["transformers"]}, adapts it, and trains it for a few steps; `python -m docs.build.architectures`
        writes this page from [its file](../../benchmarks/results/sweep.json) (torch {machine["torch"]}, peft
        {machine["peft"]})."""
    checked = """Checked of each type: the fresh model's outputs are those of the frozen one, bit for bit; every adapted
        layer ran, or a warning named it; every trained tensor moved, where a gradient came back to its layer; saved and
        loaded into another copy of the base, the outputs are the same bits."""
    summary = f"""Of {counts["types"]} types, {counts["run"]} have a model that could be shrunk and run on made-up
    inputs.
        A LoRA by PEFT adapts and trains {counts["lora adapts"]} of them, the mixture passes all checks on
        {counts["mosld passes"]}. On {counts["lora adapts and mosld does not pass"]} a LoRA does and the mixture does
        not; on {counts["silently wrong"]} something is wrong that no error or warning tells of."""
    lines = ["# Architectures", "", *wrapped(purpose), "", *wrapped(checked), "", *wrapped(summary), ""]
    wrong = [row for row in ran if row["type"] in {*missed(rows), *silent(rows)}]
    failed = [row for row in ran if not passes(row["mosld"]) and row not in wrong]
    for title, own in (("What a LoRA does and the mixture does not", wrong), ("What neither does", failed)):
        if own:
            lines += [f"## {title}", "", *table(("type", "class", "LoRA", "mixture"), map(_verdicts, own)), ""]
    lines += ["## What was run", "", *wrapped(_READING), ""]
    lines += [*table(("type", "class", "inputs", "layers", "idle", "LoRA"), map(_row, ran)), ""]
    lines += ["## What was not run", "", *wrapped(_NOT_RUN), ""]
    lines += [*wrapped(", ".join(f"`{row['type']}`" for row in rows if "not_built" in row) + "."), ""]
    return "\n".join(lines)


_READING = """"layers" are those that were adapted; "idle" those of them that the inputs did not reach (a tower of a
    model
    that got text alone, say) and that the warning named. "LoRA" is what PEFT's LoRA did on the same model: the number
    of layers, or where it ended."""
_NOT_RUN = """Configurations of parts that no automatic class builds, models that need other packages or inputs than the
    sweep makes up, and those that do not shrink below 250 million parameters. The file has each one's reason.
    Nothing is
    known against them."""


def _verdicts(row: dict[str, Any]) -> tuple[str, ...]:
    return f"`{row['type']}`", row["class"], verdict(row["lora"]), verdict(row["mosld"])


def _row(row: dict[str, Any]) -> tuple[object, ...]:
    own, lora = row["mosld"], row["lora"]
    told = lora["adapted"] if lora_manages(lora) else lora.get("error", "").partition(":")[0]
    idle = len(own.get("idle", ()))
    inputs = ", ".join(name for name in row["inputs"])
    return f"`{row['type']}`", row["class"], inputs, own.get("adapted", ""), idle or "", told


def main() -> None:
    PAGE.write_text(page(json.loads(RESULT.read_text())))
    print(PAGE)


if __name__ == "__main__":
    main()
