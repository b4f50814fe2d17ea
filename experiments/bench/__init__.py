"""Measurements of speed and size; see ``python -m experiments bench``."""
