"""Settings that hold for all tests."""

import os

# Tiny models are quicker on one thread, above all where several processes share the cores; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
