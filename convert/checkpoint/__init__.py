"""Writes the folder of a converted model, with its model card."""
