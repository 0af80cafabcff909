"""Uploads and downloads, by the real client in another process, with a local server."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from support.bare_environment import python_without_the_package
from support.command_line import contents
from support.seq2seq_models import tiny_model, tiny_pairs
from support.tiny_models import QUICK, tiny_checkpoint, tiny_dense
from transformers import AutoModelForCausalLM

from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.evaluation.observations import Miss, Observations
from hub.fixtures import TOKEN, Run, check_no_token, environment_of
from hub.server import Commit, Fault, Hub, Repository

PUSH = ("push", "out", "me/x")
LOAD = """
import importlib.util, json, sys

import torch
{before}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("me/x"{choices})
model.head_mode = "sparse"
tokens = model.generate(torch.arange(4).unsqueeze(0), max_new_tokens=12, eos_token_id=None, pad_token_id=1)
print(json.dumps({{
    "module": type(model).__module__,
    "tokens": tokens[0].tolist(),
    "vocabulary": len(AutoTokenizer.from_pretrained("me/x"{choices})),
    "is_installed": importlib.util.find_spec("hf_topk") is not None,
}}))
"""
PUSH_A_MODEL = """
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("out")
model.{call}
"""


def snippets_of(card: bytes) -> set[str]:
    return {part.split('"')[1] for part in card.decode().split("from_pretrained(")[1:]}


# There and back


@pytest.mark.slow
@pytest.mark.usefixtures("login")
def test_converts_pushes_and_loads_with_and_without_the_package(
    run: Run, hub: Hub, here: Path, home: Path, tmp_path: Path
) -> None:
    done = run("convert", "model", "new", "--recipe", "recipe.yaml", "--push-to-hub", "x", "--json", token="")
    assert done.code == 0, done.err
    check_no_token(TOKEN, done.out, done.err, here, home)
    commit = hub.repositories["me/x"].at("main")
    assert json.loads(done.out)["url"] == f"{hub.url}/me/x/commit/{commit.oid}"
    assert not hub.repositories["me/x"].private

    local = {name: data for name, data in contents(here / "new").items() if name not in ("README.md", "recipe.yaml")}
    assert {name: commit.files[name] for name in local} == local
    assert set(commit.files) == {*local, "README.md", "recipe.yaml", ".gitattributes"}
    assert snippets_of(commit.files["README.md"]) == {"me/x"}
    assert b"![" in commit.files["README.md"]
    assert commit.files["agreement.svg"].startswith(b"<svg")

    model = AutoModelForCausalLM.from_pretrained(here / "new")
    model.head_mode = "sparse"
    expected = model.generate(torch.arange(4).unsqueeze(0), max_new_tokens=12, eos_token_id=None, pad_token_id=1)
    bare = python_without_the_package(tmp_path / "bare")
    for python, before, choices in (
        (sys.executable, "import hf_topk", ""),
        (bare, "", ", trust_remote_code=True"),
    ):
        command = [str(python), "-c", LOAD.format(before=before, choices=choices)]
        environment = environment_of(hub, home)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["tokens"] == expected[0].tolist()
        assert found["vocabulary"] == 100
        assert found["is_installed"] == (python == sys.executable)
        assert found["module"].startswith("hf_topk." if found["is_installed"] else "transformers_modules.me.")


# What is fetched


@pytest.fixture
def sharded(hub: Hub, tmp_path: Path) -> Repository:
    """A dense model of several shards on the Hub, with a second copy of its weights for another program."""
    tiny_checkpoint(tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    tiny_dense().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    (tmp_path / "sharded" / "consolidated.safetensors").write_bytes(b"twice the size")
    (tmp_path / "sharded" / "qwen.tiktoken").write_bytes(b"IQ== 0")
    (tmp_path / "sharded" / "LICENCE.md").write_bytes(b"Do as you like.")
    files = {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()}
    hub.repositories["them/sharded"] = Repository(revisions={"main": Commit(os.urandom(20).hex(), files)})
    return hub.repositories["them/sharded"]


@pytest.mark.slow
def test_an_interrupted_download_is_resumed(run: Run, hub: Hub, here: Path, sharded: Repository) -> None:
    shards = sorted(name for name in sharded.at("main").files if name.startswith("model-"))
    assert len(shards) > 2
    command = ("convert", "them/sharded", "new", "--recipe", "recipe.yaml")
    hub.faults.append(Fault("GET", shards[-1], 403, message="out of order"))
    done = run(*command)
    assert done.code == 2
    assert "the download from the Hub failed" in done.err or "the Hub refuses it" in done.err
    hub.faults.clear()
    hub.requests.clear()
    done = run(*command)
    assert done.code == 0, done.err
    assert sum(shards[-1] in request for request in hub.requests if request.startswith("GET ")) == 1
    assert not any("consolidated" in request for request in hub.requests)
    assert {"qwen.tiktoken", "LICENCE.md"} <= {path.name for path in (here / "new").iterdir()}
    hub.requests.clear()
    offline = "import huggingface_hub.constants as c; c.HF_HUB_OFFLINE = True; hf_topk.cli.main()"
    done = run(*command, "--overwrite", script=offline)
    assert done.code == 0, done.err
    assert hub.requests == []


# What arrives


def test_pushes_a_folder(run: Run, hub: Hub, here: Path) -> None:
    done = run(*PUSH)
    commit = hub.repositories["me/x"].at("main")
    assert (done.code, done.out) == (0, f"{hub.url}/me/x/commit/{commit.oid}\n")
    assert "Uploading" in done.err
    assert done.err.count("\n") == 1
    assert {name for name in contents(here / "out") if commit.files[name] != contents(here / "out")[name]} == {
        "README.md",
        "recipe.yaml",
    }


@pytest.mark.slow
def test_pushes_a_translation_model(run: Run, hub: Hub, here: Path) -> None:
    tiny_checkpoint(here / "dense", tiny_model("marian")[0])
    pairs = tiny_pairs(here / "pairs.jsonl")
    recipe = Recipe(text=str(pairs), num_experts_per_tok=2, **{**QUICK, "positions": 400, "window_length": 12})
    convert_checkpoint(str(here / "dense"), here / "translator", recipe)
    done = run("push", "translator", "me/x")
    assert done.code == 0, done.err
    files = hub.files("me/x")
    assert set(json.loads(files["config.json"])["auto_map"]) == {"AutoConfig", "AutoModelForSeq2SeqLM"}
    assert "encoder_decoder.py" in files
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "translation"
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card.text
    assert snippets_of(files["README.md"]) == {"me/x"}


def test_does_not_push_hidden_files_and_byte_code(run: Run, hub: Hub, here: Path) -> None:
    before = {*contents(here / "out"), ".gitattributes"}
    for name in (".env", ".cache/huggingface/x", "__pycache__/head.pyc", ".out.work/states", "samples/one.txt"):
        (here / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "out" / name).write_text("x")
    assert run(*PUSH).code == 0
    assert set(hub.files("me/x")) == before | {"samples/one.txt"}


def test_the_card_and_the_recipe_contain_no_local_path(run: Run, hub: Hub, here: Path) -> None:
    assert run(*PUSH).code == 0
    path = Recipe.from_yaml(here / "out" / "recipe.yaml").text
    assert Path(path).is_absolute()
    files = hub.files("me/x")
    assert yaml.safe_load(files["recipe.yaml"])["text"] == "text.jsonl"
    assert not any(path.encode() in data for data in files.values())


def test_no_quote_of_the_calibration_text_is_pushed(run: Run, hub: Hub, here: Path) -> None:
    miss = Miss([5, 17], 3, 8, 9, 0.5, 0.25, 0.125, "router")
    seen = Observations.from_json((here / "out" / "report.json").read_text())
    (here / "out" / "report.json").write_text(dataclasses.replace(seen, missed=1, misses=[miss]).to_json())
    (here / "out" / "report.html").write_text("quotes")
    assert run(*PUSH).code == 0
    files = hub.files("me/x")
    assert Observations.from_json(files["report.json"].decode()) == dataclasses.replace(seen, missed=1, misses=[])
    assert "report.html" not in files


def test_a_second_push_changes_nothing(run: Run, hub: Hub) -> None:
    first, second = (json.loads(run(*PUSH, "--json").out) for _ in range(2))
    assert first == second
    assert first["repository"] == "me/x"
    assert first["commit"] == hub.repositories["me/x"].at("main").oid


def test_private_makes_a_private_repository(run: Run, hub: Hub) -> None:
    assert run(*PUSH, "--private").code == 0
    assert hub.repositories["me/x"].private
    assert run(*PUSH, "--private").code == 0  # which is one that is there


def test_a_revision_is_pushed_to_its_branch(run: Run, hub: Hub) -> None:
    for _ in range(2):
        assert run(*PUSH, "--revision", "k/4").code == 0
    assert set(hub.files("me/x")) == {".gitattributes"}
    assert "config.json" in hub.files("me/x", "k/4")


def test_create_pr_leaves_main_as_it_is(run: Run, hub: Hub, here: Path) -> None:
    hub.repositories["them/x"] = Repository()
    done = run("push", "out", "them/x", "--create-pr")
    assert (done.code, done.out) == (0, f"{hub.url}/them/x/discussions/1\n")
    assert set(hub.files("them/x")) == {".gitattributes"}
    assert "config.json" in hub.files("them/x", "refs/pr/1")
    assert snippets_of(hub.files("them/x", "refs/pr/1")["README.md"]) == {"them/x"}
    before = hub.repositories["them/x"].at("refs/pr/1").oid
    (here / "out" / "more.txt").write_text("x")
    assert run("push", "out", "them/x", "--revision", "refs/pr/1").code == 0  # to go on with it
    assert hub.repositories["them/x"].at("refs/pr/1").oid != before


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--private", "--revision", "small"), ("--create-pr",)])
def test_a_conversion_is_pushed_to_its_destination(options: tuple[str, ...], run: Run, hub: Hub, here: Path) -> None:
    is_new = "--private" in options
    name, revision = ("us/x", "small") if is_new else ("them/x", "refs/pr/1")
    if not is_new:
        hub.repositories[name] = Repository()
    done = run("convert", "model", "new", "--recipe", "recipe.yaml", "--push-to-hub", name, *options)
    assert done.code == 0, done.err
    found = hub.repositories[name]
    assert found.private == is_new
    assert set(hub.files(name)) == {".gitattributes"}
    assert set(contents(here / "new")) < set(hub.files(name, revision))
    assert (f"commit/{found.at('small').oid}" if is_new else "discussions/1") in done.out


def test_pushes_to_an_organization(run: Run, hub: Hub) -> None:
    assert run("push", "out", "us/x").code == 0
    assert "config.json" in hub.files("us/x")


@pytest.mark.parametrize("status", [404, 405, 501])
def test_pushes_to_a_server_without_the_checks(status: int, run: Run, hub: Hub) -> None:
    """A server without `whoami`, repository information and `auth-check`."""
    hub.faults += [Fault("GET", "/whoami", status), Fault("GET", "/auth-check", status)]
    for info in ((), (Fault("GET", "/api/models/me/x", 404),)):
        hub.faults += info
        hub.repositories["me/x"] = Repository()
        done = run(*PUSH)
        assert (done.code, done.out) == (0, f"{hub.url}/me/x/commit/{hub.repositories['me/x'].at('main').oid}\n")
    assert "config.json" in hub.files("me/x")


# A model in memory


@pytest.mark.parametrize(
    "call",
    [
        'push_to_hub("me/x", tags=["mine"])',
        'save_pretrained("out", push_to_hub=True, repo_id="me/x")',
        'save_pretrained("saved", push_to_hub=True, repo_id="me/x")',
    ],
)
def test_a_model_is_pushed_with_its_card_and_code(call: str, run: Run, hub: Hub, here: Path) -> None:
    written = ModelCard.load(here / "out" / "README.md")
    done = run(script=PUSH_A_MODEL.format(call=call))
    assert done.code == 0, done.err
    files = hub.files("me/x")
    card = ModelCard(files["README.md"].decode())
    assert card.text.replace("me/x", "model-topk") == written.text
    assert set(card.data.tags) == {*written.data.tags, *(["mine"] if "mine" in call else [])}
    assert card.data.eval_results == written.data.eval_results
    assert files["agreement.svg"] == (here / "out" / "agreement.svg").read_bytes()
    assert json.loads(files["config.json"])["auto_map"] == {
        "AutoConfig": "configuration_topk_experts.TopKExpertsConfig",
        "AutoModelForCausalLM": "modeling_topk_experts.TopKExpertsForCausalLM",
    }
    assert {"head.py", "triton_kernels.py", "hub_card.py"} < set(files)


def test_a_model_without_a_card_is_pushed_with_its_tags(run: Run, hub: Hub, here: Path) -> None:
    (here / "out" / "README.md").unlink()
    assert run(script=PUSH_A_MODEL.format(call='push_to_hub("me/x")')).code == 0
    assert ModelCard(hub.files("me/x")["README.md"].decode()).data.tags == ["hf-topk", "topk_experts"]


def test_a_model_from_the_hub_keeps_its_card(run: Run, hub: Hub, here: Path) -> None:
    assert run(*PUSH).code == 0
    edited = hub.files("me/x")["README.md"].replace(b"## Limits", b"## My own words")
    hub.files("me/x")["README.md"] = edited
    for name in ("me/x", "me/y"):
        script = PUSH_A_MODEL.format(call=f'push_to_hub("{name}")').replace('"out"', '"me/x"')
        done = run(script=script)
        assert done.code == 0, done.err
        assert b"## My own words" in hub.files(name)["README.md"]
        assert snippets_of(hub.files(name)["README.md"]) == {name}


def test_a_model_from_a_branch_is_pushed_with_the_card_of_the_branch(run: Run, hub: Hub) -> None:
    for revision in ("main", "k4"):
        assert run(*PUSH, "--revision", revision).code == 0
        files = hub.files("me/x", revision)
        files["README.md"] = files["README.md"].replace(b"## Limits", f"## Words of {revision}".encode())
    script = PUSH_A_MODEL.format(call='push_to_hub("me/y")').replace('"out"', '"me/x", revision="k4"')
    done = run(script=script)
    assert done.code == 0, done.err
    assert b"## Words of k4" in hub.files("me/y")["README.md"]
