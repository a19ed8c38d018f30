"""The page of what works with what is the tests' own list."""

from docs.build.compatibility import PAGE, tables


def test_the_page_lists_what_the_tests_run():
    assert tables() in PAGE.read_text()
