"""The folder that a conversion writes, card and all."""
