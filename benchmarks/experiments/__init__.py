"""What weights from influence are worth in training: digits with wrong labels, and with classes that are rare.

One command runs what is missing in `results/` and writes the tables of docs/results.md:

    python benchmarks/run_experiments.py
"""
