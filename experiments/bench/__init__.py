"""Measurements of speed and size; see ``python -m experiments bench``.

Those that users need not repeat are ``python -m experiments.bench.NAME``.
"""
