"""Fixtures of the tests that push: a server, and a process in which commands run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.tiny_models import QUICK, tiny_checkpoint, tiny_text

from hf_topk.convert import Recipe, convert_checkpoint
from hub.server import Hub, running_hub

TOKEN = "hf_" + "s3cret" * 5
# Imports once what every command needs, and runs each in a copy of the process.
RUNNER = """
import json, os, sys, traceback
import hf_topk.cli, hf_topk.convert.hub

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(asked["folder"])
    os.environ.update(asked["environment"])
    for number, name in ((1, asked["out"]), (2, asked["err"])):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    code = 1
    try:
        sys.argv = ["hf-topk", *asked["arguments"]]
        exec(asked["script"])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
"""


@dataclass
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a text, a recipe, and a converted model `out`."""
    folder = tmp_path_factory.mktemp("folder")

    tiny_checkpoint(folder / "model")
    text = tiny_text(folder / "text.jsonl")
    convert_checkpoint(str(folder / "model"), folder / "out", Recipe(text=str(text), num_experts_per_tok=2, **QUICK))
    (folder / "recipe.yaml").write_text(Recipe(text="text.jsonl", num_experts_per_tok=2, **QUICK).to_yaml())
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder."""
    return shutil.copytree(folder, tmp_path / "here")


@pytest.fixture(scope="session")
def server() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub) -> Hub:
    """The server in its initial state, with one user, `me`."""
    server.repositories, server.objects, server.faults, server.users, server.requests = {}, {}, [], {}, []
    server.add_user(TOKEN, "me", organizations=("us",))
    return server


def environment_of(server: Hub, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    # The other way to store files, Xet, is a service of its own.
    return {
        **kept,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_TOKEN_PATH": str(token_path(home)),
        "HF_HUB_DISABLE_XET": "1",
    }


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's HF_HOME."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def login(home: Path) -> Iterator[None]:
    """Logs in as `hf auth login` does."""
    token_path(home).write_text(TOKEN)
    yield
    token_path(home).unlink()


def token_path(home: Path) -> Path:
    return home.with_name("token")


@pytest.fixture(scope="session")
def runner(server: Hub, home: Path) -> Iterator[subprocess.Popen[str]]:
    environment = environment_of(server, home)
    command, pipe = [sys.executable, "-c", RUNNER], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield process
        process.kill()


@pytest.fixture
def run(runner: subprocess.Popen[str], hub: Hub, here: Path, home: Path, tmp_path: Path) -> Run:
    """Runs the command line or a script in a process with a token; checks that the token is in no output or file."""

    def run(*arguments: object, token: str = TOKEN, script: str = "hf_topk.cli.main()") -> Done:
        out, err = tmp_path / "stdout", tmp_path / "stderr"
        asked = {
            "folder": str(here),
            "arguments": list(map(str, arguments)),
            "environment": {"HF_TOKEN": token},
            "script": script,
            "out": str(out),
            "err": str(err),
        }
        print(json.dumps(asked), file=runner.stdin, flush=True)
        done = Done(int(runner.stdout.readline()), out.read_text(), err.read_text())
        check_no_token(token, done.out, done.err, here, home)
        return done

    return run


def check_no_token(token: str, out: str, err: str, *folders: Path) -> None:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    for text in (out.encode(), err.encode(), *(file.read_bytes() for file in files)):
        assert not token or token.encode() not in text
