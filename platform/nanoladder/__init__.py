"""Sweeps, ladders, laws and launches on Ray."""
