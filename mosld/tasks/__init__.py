"""Tasks: examples from files or embedded, tokens, mixing, scoring."""
