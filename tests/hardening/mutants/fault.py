"""What a planted fault is: one exact replacement in one source file, and the tests that should notice."""

from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """One replacement.

    name: unique, as `--only` takes it. file: from the repository's root.
    old: text that occurs there exactly once. new: what stands there instead.
    harm: what somebody who uses the library would get. tests: pytest's paths, the fewest that should notice.
    excuse: why no test can notice, of a fault that may survive; "" for all others.
    """

    name: str
    file: str
    old: str
    new: str
    harm: str
    tests: tuple[str, ...]
    excuse: str = ""

    def planted(self, text: str) -> str:
        """The file's text with the fault; raises ValueError where `old` does not occur exactly once."""
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"the old text of {self.name} must occur exactly once in {self.file}, got {found}")
        return text.replace(self.old, self.new)

    @property
    def test_files(self) -> list[str]:
        return sorted({test.partition("::")[0] for test in self.tests})

    def texts(self, root: Path) -> list[str]:
        """What decides whether the fault is caught, as far as we look: itself, its file, and its tests' files."""
        files = (self.file, *self.test_files)
        return [self.old, self.new, *self.tests, *((root / file).read_text() for file in files)]
