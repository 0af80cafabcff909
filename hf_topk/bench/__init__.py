"""Benchmarks of speed against the dense head and other methods."""
