"""Converted models load by every kind of name, with the package or with their own code."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bare_environment import python_without_the_package
from support.command_line import run_main
from support.tiny_models import QUICK, tiny_checkpoint, tiny_converted, tiny_dense, tiny_text

from hf_topk import TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert_checkpoint

COMMIT = "a" * 40
REPOSITORY = "models--me--one"
# For each line of input, the names that a process of its own loads one after the other: whose code, which tokens.
LOADER = """
import json, os, pathlib, sys
remote, go_on = sys.argv[1] == "remote", sys.argv[2:]
if not remote:
    import hf_topk
import torch
from transformers import AutoModelForCausalLM

def load(name):
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=remote)

def result(model):
    choices = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    tokens = model.generate(torch.arange(4).unsqueeze(0), **choices)[0].tolist()
    return {"tokens": tokens, "code": pathlib.Path(sys.modules[type(model.head).__module__].__file__).read_text()}

for line in sys.stdin:
    if not os.fork():
        folder, *names = json.loads(line)
        os.chdir(folder)
        models = [load(name) for name in names]
        print(json.dumps([result(model) for model in models]), flush=True)
        os._exit(0)
    os.wait()
"""
HOWS = ["installed", "remote"]
pytestmark = pytest.mark.slow  # each starts Python once more


def tokens_of(model: TopKExpertsForCausalLM) -> list[int]:
    choices: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    return model.generate(torch.arange(4).unsqueeze(0), **choices)[0].tolist()


@pytest.fixture(scope="module")
def models() -> dict[str, TopKExpertsForCausalLM]:
    """Two converted models that generate different tokens."""
    one = tiny_converted(tiny_dense(tied=False), head_mode="sparse")
    two = tiny_converted(tiny_dense("gpt2", tied=False), head_mode="sparse")
    assert tokens_of(one) != tokens_of(two)
    return {"one/out": one, "two/out": two}  # of one name, by which Transformers calls their code


@pytest.fixture(scope="module")
def place(models: dict[str, TopKExpertsForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two folders, the second with code of another version, and the first also in a Hub cache."""
    place = tmp_path_factory.mktemp("place")
    for name, model in models.items():
        model.save_pretrained(place / name)
    with (place / "two" / "out" / "head.py").open("a") as code:
        code.write("# another version\n")
    in_hub_cache(place / "one" / "out", place / "home")
    return place


def in_hub_cache(folder: Path, home: Path) -> None:
    """Copy a folder to a cache of `huggingface_hub`: files by hash, and links by name."""
    repository = home / "hub" / REPOSITORY
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in folder.iterdir():
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, repository / "blobs" / name)
        (repository / "snapshots" / COMMIT / file.name).symlink_to(f"../../blobs/{name}")


def command_of(how: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """A command that loads a model, with the package or with the code beside the weights."""
    bare = folder / "bare" / "bin" / "python"
    if how == "remote" and not bare.exists():
        python_without_the_package(folder / "bare")
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    return [str(bare) if how == "remote" else sys.executable, "-c", LOADER, how], environment


def load(how: str, folder: Path, *cases: tuple[Path, ...], within: tuple[str, ...] = ()) -> list[list[dict[str, Any]]]:
    """The current folder and the name of each case."""
    command, environment = command_of(how, folder)
    lines = "".join(json.dumps([str(part) for part in case]) + "\n" for case in cases)
    done = subprocess.run(
        [*within, *command], input=lines, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(cases), done.stderr
    return found


@pytest.mark.parametrize("how", HOWS)
def test_loads_by_every_name(how: str, place: Path, models: dict[str, TopKExpertsForCausalLM]) -> None:
    snapshot = place / "home" / "hub" / REPOSITORY / "snapshots" / COMMIT
    ways = [
        (place / "one" / "out", ".", "./", "../out"),
        (place / "one", "out/", "./out/", "out"),
        (place, snapshot, f"{snapshot}/", "me/one"),
        (snapshot, ".", "./"),
    ]
    expected = tokens_of(models["one/out"])
    for way, found in zip(ways, load(how, place, *ways), strict=True):
        assert [one["tokens"] for one in found] == [expected] * (len(way) - 1), way


@pytest.mark.parametrize("how", HOWS)
def test_two_models_load_in_one_process(how: str, place: Path, models: dict[str, TopKExpertsForCausalLM]) -> None:
    orders = [("one/out", "two/out"), ("two/out", "one/out"), ("two/out", "me/one", "one/out")]
    for order, found in zip(orders, load(how, place, *[(place, *order) for order in orders]), strict=True):
        names = ["one/out" if name == "me/one" else name for name in order]
        assert [one["tokens"] for one in found] == [tokens_of(models[name]) for name in names], order
        if how == "remote":  # each has the code that it came with
            assert [one["code"] for one in found] == [(place / name / "head.py").read_text() for name in names], order


@pytest.fixture
def ordinary_user() -> tuple[str, ...]:
    """A prefix of commands that runs them as a user who may read the test's folders, but not write to them."""
    if os.geteuid() != 0:
        return ()
    user = ("--reuid=65534", "--regid=65534", "--clear-groups")
    reads = ("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search")  # as Python may be in root's home
    command = ("setpriv", *user, *reads)
    if not shutil.which("setpriv") or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("root cannot become another user that reads its files here")
    return command


@pytest.fixture
def read_only(place: Path) -> Iterator[Path]:
    """The same, writable only by root."""
    python_without_the_package(place / "bare")
    shutil.rmtree(place / "modules", ignore_errors=True)
    (place / "modules").mkdir()
    (place / "modules").chmod(0o777)
    folders = [place / "home", *(path for path in (place / "home").rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield place
    for folder in folders:
        folder.chmod(0o755)


WRITES = "import os, sys; sys.exit(os.access(sys.argv[1], os.W_OK))"


@pytest.mark.parametrize("how", HOWS)
def test_loads_offline_from_a_read_only_cache(
    how: str, read_only: Path, ordinary_user: tuple[str, ...], models: dict[str, TopKExpertsForCausalLM]
) -> None:
    home = read_only / "home" / "hub" / REPOSITORY
    subprocess.run([*ordinary_user, sys.executable, "-c", WRITES, str(home)], check=True)
    found = load(how, read_only, (read_only, "me/one", "one/out"), within=ordinary_user)
    assert [one["tokens"] for one in found[0]] == [tokens_of(models["one/out"])] * 2


OVERWRITTEN = """
models = [load(name) for name in go_on]
print("loaded", flush=True)
sys.stdin.readline()
print(json.dumps([result(model) for model in [*models, *map(load, go_on)]]), flush=True)
"""


@pytest.mark.parametrize("how", HOWS)
def test_a_loaded_model_is_unchanged_when_its_folder_is_overwritten(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(Path("old"), tiny_dense(tied=False))
    other = tiny_dense(tied=False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flip(0))
    tiny_checkpoint(Path("new"), other)
    tiny_text(Path("text.jsonl"))
    recipe = Recipe.from_dict({**QUICK, "text": "text.jsonl", "num_experts_per_tok": 2})
    Path("recipe.yaml").write_text(recipe.to_yaml())
    old = convert_checkpoint("old", "out", recipe).model
    command, environment = command_of(how, tmp_path)
    command[2] = LOADER.partition("for line in sys.stdin")[0] + OVERWRITTEN
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, "out"], stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout
        assert process.stdout.readline() == "loaded\n"
        assert run_main(monkeypatch, "convert", "new", "out", "--recipe", "recipe.yaml", "--overwrite") == 0
        found = json.loads(process.communicate("\n")[0])
    new = TopKExpertsForCausalLM.from_pretrained("out")
    assert tokens_of(old) != tokens_of(new)
    assert [one["tokens"] for one in found] == [tokens_of(old), tokens_of(new)]
