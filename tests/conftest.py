"""Settings that hold for all tests."""

import os

from hub_fixtures import folder as folder
from hub_fixtures import here as here
from hub_fixtures import home as home
from hub_fixtures import hub as hub
from hub_fixtures import run as run
from hub_fixtures import runner as runner
from hub_fixtures import server as server

# Tiny models are quicker on one thread, above all where several processes share the cores; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
