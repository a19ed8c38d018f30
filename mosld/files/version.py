"""The version, which pyproject.toml reads here: a checkout that is not installed knows it too."""

__version__ = "0.1.0"
