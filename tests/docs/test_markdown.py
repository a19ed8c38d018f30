"""The paragraphs and tables of the pages that are written."""

from docs.build.markdown import WIDTH, table, wrapped


def test_a_paragraph_keeps_its_words_within_the_width():
    text = "- " + " ".join(f"word{number}" for number in range(100))
    lines = wrapped(text)
    assert " ".join(" ".join(lines).split()) == text
    assert all(len(line) <= WIDTH for line in lines)
    assert all(line.startswith("  word") for line in lines[1:])


def test_no_line_begins_with_what_markdown_would_read_as_a_mark():
    for width in range(100, 125):
        start = "x" * width
        for mark in ("- 3", "1. x", "# x", "| x", "+ 3"):
            lines = wrapped(f"{start} {mark} and more")
            assert not any(line.startswith(mark) for line in lines)


def test_short_code_stays_in_one_line():
    for width in range(90, 125):
        text = "\n".join(wrapped(f"{'x' * width} and `python -m docs.build.methods` writes it"))
        assert "`python -m docs.build.methods`" in text


def test_a_table_has_a_head_and_keeps_bars_in_its_cells():
    assert table(("a", "b"), [(1, "x|y")]) == ["| a | b |", "|---|---|", r"| 1 | x\|y |"]
