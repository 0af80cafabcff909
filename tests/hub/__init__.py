"""A local server with the Hub's API, and the tests that use it."""
