"""The fixtures of these tests."""

from hub.fixtures import folder as folder
from hub.fixtures import here as here
from hub.fixtures import home as home
from hub.fixtures import hub as hub
from hub.fixtures import login as login
from hub.fixtures import run as run
from hub.fixtures import runner as runner
from hub.fixtures import server as server
