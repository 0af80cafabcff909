"""The bundled dense model, and the main job run on it."""
