"""Baselines, one method a file. Their names are those of the entry points in ``pyproject.toml``."""
