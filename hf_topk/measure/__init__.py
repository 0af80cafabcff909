"""Measurements of converted models: fidelity to the dense head, and speed."""
