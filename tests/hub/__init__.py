"""A Hub on this machine, and the tests against it."""
