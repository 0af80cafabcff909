"""What measures the project rather than a user's model: run in a checkout, by `make study`."""
