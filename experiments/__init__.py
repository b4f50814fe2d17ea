"""The paper as a program: `python -m experiments`."""
