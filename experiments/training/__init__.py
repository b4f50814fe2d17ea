"""Trains one run: networks, data on the device, compiled step, epochs."""
