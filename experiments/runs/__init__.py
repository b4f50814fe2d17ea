"""Trains runs in one or more processes and writes their folders."""
