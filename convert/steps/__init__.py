"""The steps of a conversion."""
