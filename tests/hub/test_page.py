"""The Python code of docs/hub.md runs as it is printed."""

import shutil
from pathlib import Path

from support.pages import code_of

from hub.fixtures import Run
from hub.server import Hub


def test_python_of_the_page_runs(run: Run, hub: Hub, here: Path) -> None:
    shutil.copytree(here / "out", here / "OUT")
    assert run("push", "out", "me/gemma-topk", "--private").code == 0
    done = run(script="\n".join(code_of("docs/hub.md")))
    assert done.code == 0, done.err
    assert "me/gemma-topk" in done.out.splitlines()[-1]
    assert "tokenizer.json" in hub.files("me/gemma-topk")
