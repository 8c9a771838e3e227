"""Runs that a TOML file describes: `kdaif-fast distill`."""
