"""Runs and their folders: who trains what, where, and what is kept."""
