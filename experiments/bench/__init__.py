"""Measurements of speed and memory: ``python -m experiments.bench``."""
