"""Weights from influence in other people's trainers; each module imports the package that it is for."""
