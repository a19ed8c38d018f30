"""docs/results/merging.md tells what the committed files of its runs say."""

import json
import re
from pathlib import Path

from mosld.experiments import compare_report
from mosld.merging.methods import METHODS, WIRELESS

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "benchmarks/results/merging"
PAGE = re.sub(r"\\\n +", "", (ROOT / "docs/results/merging.md").read_text())


def average(tasks: dict) -> float:
    return 100 * sum(own["accuracy"] for own in tasks.values()) / len(tasks)


def test_its_table_is_that_of_the_committed_comparison_which_has_every_method():
    committed = json.loads((FOLDER / "compare.json").read_text())
    assert compare_report.markdown(committed).split(compare_report.EQUAL[:60])[0].strip() in PAGE
    merged = {line["row"].removesuffix("-merged") for line in committed["rows"] if line["setting"] == "merged"}
    assert merged == set(METHODS) - {WIRELESS} and committed["seeds"] == [0, 1, 2]
    (given,) = re.findall(r"^mosld compare .* --merge (\S+)", PAGE, flags=re.MULTILINE)
    assert set(given.split(",")) == merged


def test_its_channels_are_those_of_the_committed_study():
    committed = json.loads((FOLDER / "snr.json").read_text())
    for own in committed["channels"]:
        ratio = "" if own["noise"] == "ideal" else f"{own['snr_db']:g}"
        line = f"| {own['noise']} | {ratio} | {average(own['tasks']):.1f} | {average(own['realigned']):.1f} |"
        assert line in PAGE, line
    assert f"| frozen base | | {average(committed['base']):.1f} | |" in PAGE
    assert len(committed["channels"]) == 11 and committed["settings"]["merge"]["method"] == WIRELESS
