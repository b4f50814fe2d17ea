"""Measurements of the program: `python -m experiments.bench.NAME`."""
