"""Fills the tables of docs/results.md: python benchmarks/run_experiments.py (see --help)."""

from experiments.supervised import main

if __name__ == "__main__":
    main()
