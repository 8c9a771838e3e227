"""Measurements of the library. It is imported from the repository's root."""
