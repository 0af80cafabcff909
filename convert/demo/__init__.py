"""The bundled dense model, and the demo that runs on it."""
