"""Every configuration type of the installed transformers: shrunk, adapted, trained for two steps, saved and loaded."""
