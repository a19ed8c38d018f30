"""docs/reference/reliability.md, from the tests' names and the files of the long runs.

`python -m docs.build.reliability` writes it.
"""

import ast
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from docs.build.markdown import table, wrapped

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/reference/reliability.md"
RESULTS = ROOT / "benchmarks/results"


class Guarantee(NamedTuple):
    """text: what holds. tests: "file" or "file::test, test", under tests/, which fail where it does not."""

    text: str
    tests: tuple[str, ...]


GUARANTEES = {
    "Numbers": (
        Guarantee(
            "Values and all gradients are the formula's: in float64 to rounding, in lower precision at "
            "most 1.5 times as far from float64 as plain torch",
            ("kernels/test_operator.py", "kernels/test_triton.py", "hardening/properties/test_operator.py",
             "hardening/properties/test_accuracy.py", "mixture/test_equations.py"),
        ),
        Guarantee(
            "The input's gradient is that of the dropped A; dropped elements get none",
            ("kernels/test_operator.py::dropped_elements_of_a_get_no_gradient", "kernels/test_staged.py"),
        ),
        Guarantee(
            "A mask is the same in forward, backward and recomputation, follows from one seed of torch's"
            " generator, and is dropped at its rate",
            ("kernels/test_dropout.py", "kernels/test_triton.py::the_mask_is_the_torch_twin_bit_for_bit",
             "kernels/test_operator.py::recomputing_under_checkpointing_repeats_the_mask",
             "integration/test_compiled_checkpoints.py::inductor_runs_a_layer_again_with_the_same_dropout"),
        ),
        Guarantee(
            "A token depends on no other one in its batch; a token that is not finite spoils itself "
            "alone (but for torch's own bfloat16 product with AMX, see the end)",
            ("kernels/test_operator.py::tokens_do_not_see_each_other, a_bad_token_stays_alone",
             "kernels/test_triton.py::a_token_does_not_depend_on_its_batch, a_bad_token_stays_alone",
             "hardening/properties/test_operator.py::a_token_that_is_not_finite_is_not_hidden_and_stays_alone",
             "layers/test_invariances.py::batch_mates_and_padding_change_nothing"),
        ),
        Guarantee(
            "Relations that need no oracle: scaling alpha or B, permuting experts or tokens, cutting a "
            "batch or D_out, B of zeros, duplicated experts",
            ("hardening/properties/test_relations.py", "hardening/properties/test_bits.py"),
        ),
        Guarantee(
            "A new adapter changes no bit of the model",
            ("test_presets.py::it_starts_as_the_base_bit_for_bit_and_trains_the_adapter_alone",),
        ),
    ),
    "Training": (
        Guarantee(
            "The balance loss is neither lost nor counted twice: accumulation, activation checkpoints, "
            "autocast, a gradient scaler, torch.compile, skipped layers, several processes",
            ("training/test_trainer.py", "training/test_balance.py", "training/test_loss_scaling.py",
             "integration/test_compiled_checkpoints.py", "layers/test_skipped_layers.py",
             "integration/processes/test_ddp.py"),
        ),
        Guarantee(
            "A training that is killed goes on to the same losses and the same adapter, bit for bit; a "
            "checkpoint that is cut off or altered is passed over and named",
            ("training/test_resume.py", "hardening/faults/test_kills.py"),
        ),
        Guarantee(
            "A lost process ends the run, and the same command finishes it",
            ("hardening/faults/test_lost_rank.py",),
        ),
        Guarantee(
            "A cell of `mosld compare` that lacks memory costs that cell alone",
            ("hardening/faults/test_memory.py",),
        ),
        Guarantee(
            "PEFT's operations in any order leave every adapter, and the model, as an account of them says",
            ("hardening/properties/test_peft_sequences.py",),
        ),
    ),
    "Files": (
        Guarantee(
            "A save that is killed at any of its file-system events leaves the old adapter, the new one,"
            " or one that is refused",
            ("hardening/test_kills.py",),
        ),
        Guarantee(
            "A damaged, foreign or altered adapter is refused with the file's name and the model stays as it was",
            ("files/test_adapter_folder.py", "hardening/properties/test_corrupted_files.py",
             "hardening/properties/test_corrupted_commands.py"),
        ),
        Guarantee(
            "A full disk and a folder that cannot be written are reported, and what is finished stays",
            ("hardening/faults/test_disk.py", "hardening/faults/test_read_only.py"),
        ),
        Guarantee(
            "A configuration is what its JSON says, there and back",
            ("hardening/properties/test_config_round_trip.py",),
        ),
        Guarantee(
            "An export computes what the mixture with those gates computes",
            ("convert/test_export.py", "convert/test_export_methods.py"),
        ),
    ),
    "Security": (
        Guarantee(
            "Our code opens no pickle, calls no `eval` and no shell, and never runs a model's own code "
            "(what PEFT and the Trainer open with `weights_only=True`: "
            "[security](security.md#not-guaranteed))",
            ("hardening/security",),
        ),
        Guarantee(
            "Names in task files, adapters and checkpoints lead to nothing outside their folder",
            ("hardening/security",),
        ),
        Guarantee(
            "Task files are read within limits; every bad line is a fault with its number, up to 100,000 a file",
            ("hardening/security", "tasks/test_examples.py"),
        ),
    ),
    "Documents": (
        Guarantee("Every public name has an example that runs", ("docs/test_docstring_examples.py",)),
        Guarantee(
            "All Python of the README and of these pages runs, all commands parse",
            ("docs/test_snippets.py", "docs/test_readme.py"),
        ),
        Guarantee("Tables and ratios of the README are those of committed files", ("docs/test_readme.py",)),
    ),
}  # fmt: skip


@cache
def functions(path: Path) -> frozenset[str]:
    """Names of a file's tests without "test_", those in classes included, and of the classes that hypothesis makes."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.append(node.targets[0].id)
    tests = [name for name in names if name.startswith(("test_", "Test"))]
    return frozenset(name.removeprefix("test_") for name in tests)


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def source(data: dict[str, Any], name: str, command: str) -> str:
    """Where a section's figures are from."""
    versions = data.get("machine") or data["versions"]
    where = f"{data['machine']['processor']}, commit {data['machine']['commit'][:12]}, " if "machine" in data else ""
    link = f"[`{name}.json`](../../benchmarks/results/{name}.json)"
    return f"`{command}` ({where}torch {versions['torch']}): {link}."


def guarantees() -> list[str]:
    lines = []
    for area, own in GUARANTEES.items():
        lines += [f"### {area}", ""]
        for guarantee in own:
            links = [_link(test) for test in guarantee.tests]
            lines += wrapped(f"- {guarantee.text}. Kept by {'; '.join(links)}.")
        lines.append("")
    return lines


def _link(test: str) -> str:
    path, _, names = test.partition("::")
    link = f"[`{path}`](../../tests/{path})"
    return f"{link}: {names.replace('_', ' ')}" if names else link


def cases() -> list[str]:
    data = read("fuzz")
    by_file: dict[str, list[int]] = {}
    for name, count in data["per_test"].items():
        by_file.setdefault(name.partition("::")[0], []).append(count)
    rows = [(f"`{file}.py`", len(counts), f"{sum(counts):,}") for file, counts in sorted(by_file.items())]
    verdict = "No case failed." if data["passed"] else "**Some case failed.**"
    text = f"""{data["cases"]:,} random cases of {len(data["per_test"])} properties in {data["seconds"] / 60:.0f}
        minutes, seed {data["seed"]}. {verdict} {source(data, "fuzz", "make fuzz")} Every run of the tests tries a
        twentieth as many, the same each time. Not counted: sequences of PEFT's operations (`test_peft_sequences.py`),
        240 of up to 12 steps."""
    return [*wrapped(text), "", *table(("tests/hardening/properties/", "properties", "cases"), rows)]


def faults() -> list[str]:
    data = read("mutants")
    rows = [(area, own["faults"], own["caught"]) for area, own in data["areas"].items()]
    text = f"""{data["faults"]} mistakes that somebody could make and miss, planted one at a time: the fast tests that
        should notice fail with {data["caught"]} of them, {100 * data["share"]:.1f} %.
        {source(data, "mutants", "make mutants")}"""
    lines = [*wrapped(text), "", *table(("area", "planted", "caught"), rows), ""]
    for row in data["rows"]:
        if row["how"] == "passed":
            lines += wrapped(f"- not caught: {row['name']} in `{row['file']}`: {row['harm']}")
    return lines


def kills() -> list[str]:
    data = read("kills")
    phases = list(data["kills_by_phase"])
    rows = []
    for verb, own in data["kills_by_verb_and_phase"].items():
        counts = [own[phase] for phase in phases]
        rows.append((f"`mosld {verb}`", *counts))
    compared = data["compared"]
    command = "python -m tests.hardening.faults.fifty_kills --output benchmarks/results/kills.json"
    text = f"""SIGKILL {data["kills"]} times in {data["runs"]} runs of `mosld train`, `compare` and `merge`, each begun
        again by the same command until it ends. {data["runs_equal_to_the_undisturbed"]} of {data["runs"]} end as the
        undisturbed run, in {compared["weight_files"]} files of weights, {compared["losses"]} losses,
        {compared["items"]:,} answers and {compared["coefficients"]} coefficients, bit for bit. {data["stages_kept"]}
        finished parts were not run again, {data["steps_trained_again_since_last_checkpoint"]} steps since a last
        checkpoint were. {source(data, "kills", command)}"""
    return [*wrapped(text), "", *table(("killed in", *phases), rows)]


def soak() -> list[str]:
    data = read("soak")
    memory, resuming, switching = data["memory"], data["resuming"], data["switching"]
    held = sum(data["checks"].values())
    growth = f"resident memory after the warm-up {100 * memory['resident_growth']:+.2f} %"
    drift = f"drift of losses {resuming['loss_drift']:g}, of the adapter {resuming['adapter_drift']:g}"
    outputs = f"drift of outputs {switching['drift']:g}, memory {100 * switching['resident_growth']:+.2f} %"
    rows = [
        ("steps of training", f"{memory['steps']:,}", growth),
        ("the same, killed and resumed", f"{len(resuming['killed_after'])} times", drift),
        ("switches between three adapters", f"{switching['switches']:,}", outputs),
    ]
    text = f"{held} of {len(data['checks'])} checks hold. {source(data, 'soak', 'make soak')}"
    return [*wrapped(text), "", *table(("", "", "found"), rows)]


def curves() -> list[str]:
    data = read("curves")
    settings = data["settings"]
    within = [row["within"] for row in data["rows"] if row["name"].startswith("ours")]
    text = f"""{settings["steps"]} steps on the same batches with the same dropout masks, as moving averages of
        {settings["window"]} steps, beside the formula in float64 (last loss {data["float64"]["last_loss"]:.3f}). The
        spread is the mean distance between eager float32 runs of three seeds, {data["spread"]:.4f}; the greatest
        distance from float64 of {sum(within)} of {len(within)} curves of ours is below it.
        {source(data, "curves", "make soak")}"""
    head = (
        "run", "greatest distance from float64", "of the spread",
        "steps no further from float64 than the two most distant seeds from each other", "last loss",
    )  # fmt: skip
    rows = []
    for row in data["rows"]:
        distances = (f"{row['distance']:.4f}", f"{row['of_spread']:.2f}", f"{100 * row['inside']:.0f} %")
        rows.append((row["name"], *distances, f"{row['last_loss']:.3f}"))
    picture = "![Training curves in every dtype](reliability/curves.png)"
    remark = """Our curves: one model, one seed. The seeds' distance passes through zero where their curves cross, so
        that no curve can be within it at all steps."""
    return [*wrapped(text), "", picture, "", *table(head, rows), "", *wrapped(remark)]


LIMITS = """\
- Nothing here has run on a GPU. The kernels run in Triton's interpreter, and compile for three GPUs; `make test-gpu` is
  for one.
- `model.save_pretrained` over an existing adapter is PEFT's own save: killed between its two files it leaves new
  weights that the old checksum refuses, by name. `mosld train` and the exports have no such window.
- Weights that were altered where no checksum lies beside them, to numbers that an adapter could have, cannot be
  distinguished from others. transformers' own loaders do not look at the checksum.
- On processors with AMX torch's own bfloat16 product, the frozen layer's included, gives a token's NaN to the token
  before it where a row has an odd number of elements. Finite numbers are not touched.
- Planted faults say what the tests notice of these faults. They are ours: no tool chose them.
"""


def page() -> str:
    sections = {
        "Guarantees": guarantees(),
        "Random cases": cases(),
        "Planted faults": faults(),
        "Kills": kills(),
        "Long runs": soak(),
        "Training curves": curves(),
        "What is not guaranteed": [LIMITS.rstrip()],
    }
    purpose = """After this page you know what the library guarantees, which tests keep it, and what long runs have
        counted. `python -m docs.build.reliability` writes this page from the tests and from the files in
        [`benchmarks/results/`](../../benchmarks/results)."""
    lines = ["# Reliability", "", *wrapped(purpose)]
    for title, own in sections.items():
        lines += ["", f"## {title}", "", *own]
        while not lines[-1]:
            lines.pop()
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
