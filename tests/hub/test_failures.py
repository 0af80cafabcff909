"""Uploads that are refused, and uploads that fail half-way; see `fixtures`."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import contents

from hub.fixtures import TOKEN, Done, Run
from hub.server import Fault, Hub, Repository

pytestmark = pytest.mark.slow

PUSH = ("push", "out", "me/x")
INTERRUPTED = """
import hf_topk.convert.hub

def stop(*_):
    raise KeyboardInterrupt

hf_topk.convert.hub._files = stop
hf_topk.cli.main()
"""


# What fails half-way


def repeats(done: Done, run: Run) -> Done:
    """Run the command that an error message names."""
    command = shlex.split(done.err.rpartition("`hf-topk ")[2].partition("`")[0])
    return run(*command)


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (Fault("PUT", "/storage/", 500), "the Hub answered 500 (out of order): wait a while"),
        (Fault("PUT", "/storage/", 403, message="expired"), "the Hub answered 403 (expired)"),
        (Fault("POST", "/commit/"), "cannot be reached (RemoteProtocolError)"),
        (Fault("POST", "/commit/", 413, message="too large"), "the Hub answered 413 (too large)"),
        (Fault("POST", "/branch/", 400, message="bad name"), "the Hub answered 400 (bad name)"),
    ],
)
def test_an_upload_that_fails_can_be_repeated(fault: Fault, part: str, run: Run, hub: Hub, here: Path) -> None:
    before = contents(here)
    hub.faults.append(fault)
    done = run(*PUSH, "--private", "--revision", "small")
    assert done.code == 1
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if not line.startswith("Uploading ")]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("hf-topk: the upload to me/x failed: ")
    assert part in lines[0]
    assert "out is complete" in lines[0]
    assert contents(here) == before
    assert all(set(commit.files) == {".gitattributes"} for commit in hub.repositories["me/x"].revisions.values())
    hub.faults.clear()
    assert repeats(done, run).code == 0
    assert "config.json" in hub.files("me/x", "small")
    assert hub.repositories["me/x"].private


def test_a_conversion_whose_upload_fails_is_kept(run: Run, hub: Hub, here: Path) -> None:
    hub.faults.append(Fault("POST", "/commit/"))
    done = run("convert", "model", "new", "--recipe", "recipe.yaml", "--push-to-hub", "x", "--create-pr")
    assert done.code == 2  # there is nothing yet to open a pull request at
    assert sorted(path.name for path in here.iterdir()) == ["model", "out", "recipe.yaml", "text.jsonl"]
    done = run("convert", "model", "new", "--recipe", "recipe.yaml", "--push-to-hub", "x")
    assert done.code == 1
    assert "the upload to me/x failed" in done.err
    assert "push it again with `hf-topk push new me/x`" in done.err
    assert sorted(path.name for path in here.iterdir()) == ["model", "new", "out", "recipe.yaml", "text.jsonl"]
    hub.faults.clear()
    assert repeats(done, run).code == 0
    assert set(contents(here / "new")) < set(hub.files("me/x"))


def test_a_temporary_failure_is_retried(run: Run, hub: Hub) -> None:
    hub.faults.append(Fault("PUT", "/storage/", 503, times=1))
    assert run(*PUSH).code == 0
    assert "config.json" in hub.files("me/x")


def test_an_interrupted_upload_names_the_command_to_repeat(run: Run) -> None:
    done = run(*PUSH, script=INTERRUPTED)
    assert done.code == 130
    assert done.err == (
        "hf-topk: the upload to me/x was interrupted; out is complete: push it again with `hf-topk push out me/x`\n"
    )
    assert repeats(done, run).code == 0


# What is refused before anything is done


def is_there(hub: Hub, **choices: Any) -> None:
    hub.repositories["me/x"] = Repository(**choices)


REFUSED: dict[str, tuple[tuple[str, ...], Callable[[Hub], object], str, tuple[str, ...]]] = {
    "nobody": (PUSH, lambda hub: None, "", ("you are not logged in", "hf auth login", "HF_TOKEN")),
    "unknown token": (PUSH, lambda hub: hub.users.clear(), TOKEN, ("the Hub answered 401", "HF_TOKEN")),
    "read token": (
        PUSH,
        lambda hub: hub.add_user(TOKEN, "me", role="read"),
        TOKEN,
        ("is read-only", "settings/tokens"),
    ),
    "another's name": (("push", "out", "them/x"), is_there, TOKEN, ("cannot create a repository for them", "me/x")),
    "another's": (
        ("push", "out", "them/x"),
        lambda hub: hub.repositories.update({"them/x": Repository()}),
        TOKEN,
        ("the Hub answered 403", "--create-pr"),
    ),
    "another's private": (
        ("push", "out", "them/x"),
        lambda hub: hub.repositories.update({"them/x": Repository(private=True)}),
        TOKEN,
        ("cannot create a repository for them",),
    ),
    "no pull request": ((*PUSH, "--create-pr"), lambda hub: None, TOKEN, ("cannot push to me/x", "answered 404")),
    "public": ((*PUSH, "--private"), is_there, TOKEN, ("me/x exists and is public", "settings", "--private")),
    "no revision": ((*PUSH, "--revision", "refs/pr/9"), is_there, TOKEN, ("the Hub answered 404", "check the names")),
    "both": ((*PUSH, "--revision", "a", "--create-pr"), lambda hub: None, TOKEN, ("leave out --revision",)),
    "no name": (("push", "out", "a/b/c"), lambda hub: None, TOKEN, ("a/b/c is not a valid repository", "OWNER/NAME")),
    "whose": (
        ("push", "out", "x"),
        lambda hub: hub.faults.append(Fault("GET", "/whoami", 404)),
        TOKEN,
        ("does not tell the token's user", "write OWNER/x"),
    ),
    "whoever's": (
        ("push", "out", "them/x"),
        lambda hub: (
            hub.faults.extend([Fault("GET", "/whoami", 404), Fault("GET", "/auth-check", 403)])
            or hub.repositories.update({"them/x": Repository()})
        ),
        TOKEN,
        ("the Hub answered 403", "--create-pr"),
    ),
    "whoever's pull request": (
        ("push", "out", "them/x", "--create-pr"),
        lambda hub: hub.faults.append(Fault("GET", "/whoami", 404)),
        TOKEN,
        ("cannot push to them/x", "the Hub answered 404"),
    ),
    "no network": (
        PUSH,
        lambda hub: hub.faults.append(Fault("GET", "/whoami")),
        TOKEN,
        ("http://127.0.0.1", "cannot be reached", "check the network"),
    ),
    "down": (PUSH, lambda hub: hub.faults.append(Fault("GET", "/api/", 503)), TOKEN, ("answered 503", "wait")),
    "too many": (PUSH, lambda hub: hub.faults.append(Fault("GET", "/api/", 429)), TOKEN, ("answered 429", "wait")),
    "gated": (
        PUSH,
        lambda hub: hub.faults.append(Fault("GET", "/api/models/", 403, code="GatedRepo")),
        TOKEN,
        ("answered 403", "ask for access"),
    ),
    "no folder": (("push", "gone", "me/x"), lambda hub: None, TOKEN, ("there is no gone/config.json",)),
    "no model": (("push", ".", "me/x"), lambda hub: None, TOKEN, ("there is no config.json",)),
    "dense": (("push", "model", "me/x"), lambda hub: None, TOKEN, ("model is a dense model ('llama')",)),
    "a conversion": (
        ("convert", "model", "new", "--recipe", "recipe.yaml", "--push-to-hub", "them/x"),
        lambda hub: None,
        TOKEN,
        ("cannot create a repository for them",),
    ),
    "no destination": (
        ("convert", "model", "new", "--recipe", "recipe.yaml", "--private"),
        lambda hub: None,
        TOKEN,
        ("need --push-to-hub REPO",),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_at_once(case: str, run: Run, hub: Hub, here: Path) -> None:
    arguments, prepare, token, parts = REFUSED[case]
    prepare(hub)
    before, repositories = contents(here), sorted(hub.repositories)
    done = run(*arguments, token=token)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("hf-topk: ")
    assert done.err.count("\n") == 1, done.err
    for part in parts:
        assert part in done.err
    assert contents(here) == before
    assert sorted(hub.repositories) == repositories
    assert all(request.startswith("GET ") for request in hub.requests)


def test_refuses_an_incomplete_folder(run: Run, hub: Hub, here: Path) -> None:
    max((here / "out").glob("*.safetensors")).unlink()
    done = run(*PUSH)
    assert done.code == 2
    assert "not complete" in done.err
    assert hub.requests == []
