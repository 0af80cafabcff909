"""What a conversion leaves on disk: the dense tensors as they were, whole or not at all."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.command_line import check_refused, contents, run_main
from support.tiny_models import QUICK, tiny_checkpoint, tiny_dense, tiny_text
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_topk import TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.convert.checkpoint import write as checkpoint
from hf_topk.evaluation.observations import Observations
from hf_topk.model.errors import TopKExpertsError

OPTIONS = ("--text", "text.jsonl", "--recipe", "recipe.yaml")
FILES = {"model", "recipe.yaml", "text.jsonl"}
TOKEN_IDS = torch.arange(3, 40).unsqueeze(0)


def shard_of(folder: Path, dense: PreTrainedModel) -> Path:
    """A checkpoint of several shards."""
    tiny_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    dense.save_pretrained(folder, max_shard_size="30KB")
    return folder


def gpt2_of_old(folder: Path) -> Path:
    """A GPT-2 checkpoint whose names lack `transformer.`, as the oldest have."""
    dense = tiny_dense("gpt2")
    tiny_checkpoint(folder, dense)
    dense.transformer.save_pretrained(folder)
    config = {**json.loads((folder / "config.json").read_text()), "architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MAKERS = {
    "tied": lambda folder: tiny_checkpoint(folder),
    "untied": lambda folder: tiny_checkpoint(folder, tiny_dense(tied=False)),
    "sharded": lambda folder: shard_of(folder, tiny_dense(tied=False)),
    "bfloat16": lambda folder: tiny_checkpoint(folder, tiny_dense().to(torch.bfloat16)),
    "gpt2 untied": lambda folder: tiny_checkpoint(folder, tiny_dense("gpt2", tied=False)),
    "gpt2 of old": gpt2_of_old,
    "phi biased": lambda folder: tiny_checkpoint(folder, tiny_dense("phi", tied=False, bias=True)),
}


@pytest.fixture(scope="module", params=MAKERS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A dense checkpoint, what was in it, and the folder it was converted into."""
    folder = tmp_path_factory.mktemp("folders")
    dense = MAKERS[request.param](folder / "dense")
    (dense / "LICENSE").write_text("Do as you like.")
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    (dense / "training_args.bin").write_bytes(b"not for others")
    (dense / ".cache").mkdir()
    before = contents(dense)
    text = tiny_text(folder / "text.jsonl")
    report = convert_checkpoint(str(dense), folder / "out", Recipe.from_dict({**QUICK, "text": str(text)}))
    return SimpleNamespace(dense=dense, out=folder / "out", before=before, report=report, parent=folder)


def weight_map(folder: Path) -> dict[str, str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return json.loads(index.read_text())["weight_map"]
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), "model.safetensors")


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# The laws on disk


def test_the_dense_shards_are_the_same_bytes(folders: SimpleNamespace) -> None:
    dense, out = (
        [hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards_of(folder)]
        for folder in (folders.dense, folders.out)
    )
    assert out[:-1] == dense


def test_the_dense_names_are_kept_and_the_rest_is_in_a_shard_of_its_own(folders: SimpleNamespace) -> None:
    dense, out = weight_map(folders.dense), weight_map(folders.out)
    names = [[shard.name for shard in shards_of(folder)] for folder in (folders.dense, folders.out)]
    place = dict(zip(names[0], names[1][:-1], strict=True))
    assert {name: place[shard] for name, shard in dense.items()} == {name: out[name] for name in dense}
    added = {name: shard for name, shard in out.items() if name not in dense}
    assert set(added.values()) == {names[1][-1]}
    assert {"always_on_ids", "expert_ids"} < {name.rpartition(".")[2] for name in added}
    with safe_open(folders.out / names[1][-1], framework="pt") as tensors:
        assert set(tensors.keys()) == set(added)


def test_the_source_is_left_as_it_was(folders: SimpleNamespace) -> None:
    assert contents(folders.dense) == folders.before
    assert sorted(path.name for path in folders.parent.iterdir()) == ["dense", "out", "text.jsonl"]


def bytes_of(shard: Path) -> int:
    with safe_open(shard, framework="pt") as tensors:
        return sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118 - it is no mapping


def test_the_added_bytes_are_counted_right(folders: SimpleNamespace) -> None:
    *dense, added = map(bytes_of, shards_of(folders.out))
    metrics = json.loads((folders.out / "figures.json").read_text())
    assert metrics["added_bytes"] == added
    assert metrics["added_bytes_share"] == added / folders.report.model.head.dense_bytes()
    index = json.loads((folders.out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(dense) + added


def test_what_was_seen_is_kept_beside_the_metrics(folders: SimpleNamespace) -> None:
    assert Observations.from_json((folders.out / "report.json").read_text()) == folders.report.observations
    assert not (folders.out / "report.html").exists()  # only if it is asked for


def test_what_belongs_to_the_model_comes_along(folders: SimpleNamespace) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "chat_template.jinja"):
        assert (folders.out / name).read_bytes() == (folders.dense / name).read_bytes()
    assert not (folders.out / "training_args.bin").exists()
    assert not (folders.out / ".cache").exists()


def test_the_card_has_the_base_model_s_licence(folders: SimpleNamespace) -> None:
    card = ModelCard.load(folders.out / "README.md")
    assert (card.data.license, card.data.language, card.data.library_name) == ("mit", "en", "transformers")
    assert "hf-topk" in card.data.tags
    assert f"{100 * folders.report.fidelity.agreement:.2f} %" in card.text
    assert dataclasses.replace(folders.report.recipe, text="text.jsonl").to_yaml() in card.text


def test_the_recipe_beside_the_weights_is_the_one_that_was_used(folders: SimpleNamespace) -> None:
    recipe = Recipe.from_yaml(folders.out / "recipe.yaml")
    assert recipe.to_dict() == folders.report.recipe.to_dict()
    assert recipe.expert_size == 16
    left_open = {"target_agreement", "max_bytes_read", "num_experts_per_tok", "num_rescored"}
    assert {name for name, value in recipe.to_dict().items() if value is None} == left_open
    config, head = AutoConfig.from_pretrained(folders.out), folders.report.model.head
    assert (config.num_experts_per_tok, config.num_rescored) == (head.num_experts_per_tok, head.num_rescored)


def test_others_may_read_every_file(folders: SimpleNamespace) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in folders.out.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert folders.out.stat().st_mode & 0o777 == 0o777 & ~umask


LOAD = """
import sys
import torch
import hf_topk
from transformers import AutoConfig, AutoModelForCausalLM
folder, file = sys.argv[1:]
token_ids = torch.arange(3, 40).unsqueeze(0)
converted = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
config = AutoConfig.from_pretrained(folder).text_config
dense = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="auto")
logits = {"type": type(dense).__name__, "text": dense(token_ids).logits}
for converted.head_mode in ("dense", "sparse"):
    logits[converted.head_mode] = converted(token_ids).logits
torch.save(logits, file)
"""


@pytest.mark.parametrize("folders", ["sharded", "gpt2 of old", "phi biased"], indirect=True)
def test_the_folder_loads_in_a_new_process_as_both_models(folders: SimpleNamespace, tmp_path: Path) -> None:
    """As the converted model through the Auto classes, and as the dense model through `text_config`."""
    command = [sys.executable, "-c", LOAD, folders.out, tmp_path / "logits.pt"]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=120)
    got = torch.load(tmp_path / "logits.pt")
    dense = AutoModelForCausalLM.from_pretrained(folders.dense, dtype="auto")
    assert got["type"] == type(dense).__name__
    assert torch.equal(got["text"], dense(TOKEN_IDS).logits)
    assert torch.equal(got["dense"], dense(TOKEN_IDS).logits)
    folders.report.model.head_mode = "sparse"
    torch.testing.assert_close(got["sparse"], folders.report.model(TOKEN_IDS).logits)


def test_the_folder_loads_as_the_dense_model(folders: SimpleNamespace) -> None:
    config = AutoConfig.from_pretrained(folders.out).text_config
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="auto")
        for folder in (folders.dense, folders.out)
    )
    assert type(after) is type(before)
    assert torch.equal(after(TOKEN_IDS).logits, before(TOKEN_IDS).logits)


def test_nothing_is_missing_or_left_over_when_it_loads(folders: SimpleNamespace) -> None:
    for config in (None, AutoConfig.from_pretrained(folders.out).text_config):
        _, found = AutoModelForCausalLM.from_pretrained(folders.out, config=config, output_loading_info=True)
        assert not found["missing_keys"]
        assert not found["mismatched_keys"]
        left_over = set() if config is None else set(weight_map(folders.out)) - set(weight_map(folders.dense))
        assert set(found["unexpected_keys"]) <= left_over


def test_embeddings_that_were_tied_stay_tied(folders: SimpleNamespace) -> None:
    dense = AutoModelForCausalLM.from_pretrained(folders.dense)
    converted = AutoModelForCausalLM.from_pretrained(folders.out)
    assert isinstance(converted, TopKExpertsForCausalLM)
    is_tied = [
        model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (dense, converted)
    ]
    assert is_tied[0] == is_tied[1]


# Whole or not at all


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a dense model and a text."""
    tiny_checkpoint(tmp_path / "model")
    tiny_text(tmp_path / "text.jsonl")
    (tmp_path / "recipe.yaml").write_text(Recipe.from_dict(QUICK).to_yaml())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return partial(check_refused, monkeypatch, capsys, "convert", "model")


def convert_here(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    return run_main(monkeypatch, "convert", "model", "out", *OPTIONS, *options)


def no_space(*arguments: Any, **choices: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out")


FAILURES = {
    "copying": (checkpoint, "_copy"),
    "a companion": (checkpoint.shutil, "copyfile"),
    "the additions": (checkpoint, "save"),
    "the card": (checkpoint, "write_card"),
    "the last step": (checkpoint, "_move"),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failed_write_leaves_nothing_and_can_be_resumed(
    where: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(here)
    with monkeypatch.context() as patched:
        patched.setattr(*FAILURES[where], no_space)
        assert convert_here(patched) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-topk: ")
    assert "No space left on device" in error
    assert "--resume" in error
    assert "Traceback" not in error
    after = contents(here)
    assert {name for name in after if not name.startswith(".out.work")} == set(before)
    assert ".out.work/hidden_states.bin" in after
    assert convert_here(monkeypatch, "--resume") == 0
    assert capsys.readouterr().err.count("Running the dense model") == 1  # on what is held out alone
    assert {name.partition("/")[0] for name in contents(here)} == {*FILES, "out"}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failed_overwrite_leaves_the_old_model(where: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert convert_here(monkeypatch) == 0
    old = contents(here / "out")
    with monkeypatch.context() as patched:
        patched.setattr(*FAILURES[where], no_space)
        assert convert_here(patched, "--overwrite", "--seed", 1) == 1
    assert contents(here / "out") == old
    assert convert_here(monkeypatch, "--overwrite", "--resume", "--seed", 1) == 0
    assert contents(here / "out") != old
    assert {name.partition("/")[0] for name in contents(here)} == {*FILES, "out"}


def test_a_model_that_does_not_load_the_same_is_not_left_behind(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = checkpoint.additions_of
    monkeypatch.setattr(
        checkpoint,
        "additions_of",
        lambda model: {
            name: tensor.flip(0) if name.endswith("expert_ids") else tensor for name, tensor in honest(model).items()
        },
    )
    with pytest.raises(TopKExpertsError, match="gives different sparse logits"):
        convert_checkpoint("model", "out", Recipe.from_dict({**QUICK, "text": "text.jsonl"}))
    assert not (here / "out").exists()
    assert not (here / ".out.partial").exists()


@pytest.mark.parametrize(
    ("stray", "model_type", "warned_of"),
    [
        ("mtp.fc.weight", "mellum", set()),  # which the dense class knows to be of no use to it
        ("value_head.weight", "mellum", {"base.model.value_head.weight"}),
        ("value_head.weight", "gpt2", {"base.transformer.value_head.weight"}),
    ],
)
def test_tensors_that_the_dense_model_has_no_use_for_come_along(
    stray: str, model_type: str, warned_of: set[str], tmp_path: Path
) -> None:
    sizes = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    tiny_checkpoint(tmp_path / "model", tiny_dense(model_type, **(sizes if model_type == "mellum" else {})))
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), stray: torch.ones(2, 2)}, file, metadata={"format": "pt"})
    text = tiny_text(tmp_path / "text.jsonl")
    convert_checkpoint(str(tmp_path / "model"), tmp_path / "out", Recipe.from_dict({**QUICK, "text": str(text)}))
    assert stray in weight_map(tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(loaded, TopKExpertsForCausalLM)
    assert info["unexpected_keys"] == warned_of
    assert not info["missing_keys"]


def test_overwriting_leaves_nothing_of_the_old_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert convert_here(monkeypatch) == 0
    (here / "out" / "stale.txt").write_text("old")
    assert convert_here(monkeypatch, "--overwrite") == 0
    assert not (here / "out" / "stale.txt").exists()


@pytest.mark.parametrize("out", [".", "./", "../out/"])
def test_a_shell_in_the_folder_stays_in_it_when_it_is_overwritten(
    out: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert convert_here(monkeypatch) == 0
    before = sorted(path.name for path in here.iterdir())
    (here / "out" / "stale.txt").write_text("old")
    monkeypatch.chdir(here / "out")
    options = ("--text", "../text.jsonl", "--recipe", "../recipe.yaml", "--seed", 1, "--overwrite")
    assert run_main(monkeypatch, "convert", "../model", out, *options) == 0
    assert Path.cwd() == here / "out"
    assert Path().stat().st_ino == (here / "out").stat().st_ino
    assert Recipe.from_yaml(Path("recipe.yaml")).seed == 1
    assert not Path("stale.txt").exists()
    assert sorted(path.name for path in here.iterdir()) == before
    assert isinstance(AutoModelForCausalLM.from_pretrained("."), TopKExpertsForCausalLM)


def test_an_old_folder_that_cannot_go_yet_fails_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems keep what another process has open."""
    remove = shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False, **options: Any) -> None:
        if Path(path).name != ".out.replaced" or not Path(path).exists():
            remove(path, ignore_errors=ignore_errors, **options)
        elif not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    assert convert_here(monkeypatch) == 0
    monkeypatch.setattr(shutil, "rmtree", busy)
    assert convert_here(monkeypatch, "--overwrite", "--seed", 1) == 0
    assert Recipe.from_yaml(here / "out" / "recipe.yaml").seed == 1


# Where it cannot be written


def test_refuses_an_output_that_is_there(here: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "out").mkdir()
    refused("out", parts=("out exists", "choose another output folder", "--overwrite"))
    refused(".", parts=("exists", "--overwrite"))
    refused("model", "--overwrite", parts=("model is the model's own", "choose another"))
    (here / "out" / "thesis.txt").write_text("precious")
    refused("out", "--overwrite", parts=("out is not a converted model", "choose another"))
    refused("text.jsonl", "--overwrite", parts=("text.jsonl is not a folder", "choose another"))
    refused(".", "--overwrite", parts=("is not a converted model", "choose another"))
    (here / "link").symlink_to("out")
    refused("link", "--overwrite", parts=("link is not a folder", "choose another"))
    shutil.copytree(here / "model", here / "other")
    refused("other", "--overwrite", parts=("other is not a converted model", "choose another"))


def test_refuses_a_place_below_a_file(here: Path, refused: Any) -> None:
    refused("text.jsonl/out", parts=("cannot write to", "text.jsonl", "choose an output folder elsewhere"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_refuses_a_parent_that_is_not_writable(here: Path, refused: Any) -> None:
    (here / "locked").mkdir(mode=0o500)
    refused("locked/out", parts=("cannot write to", "locked", "change its permissions"))


def test_refuses_a_full_disk(here: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**30, used=2**30, free=2**10))
    parts = ("0 MiB left", "needs about", "make room")
    refused("out", *OPTIONS, parts=parts)
    refused("new/deep/out", *OPTIONS, parts=parts)


@pytest.fixture
def small_disk(here: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    disk = here / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full_is_told_before_or_while_writing(
    small_disk: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused("disk/out", *OPTIONS, parts=("MiB left", "make room"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, used=0, free=2**40))
    assert run_main(monkeypatch, "convert", "model", "disk/out", *OPTIONS) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-topk: cannot write")
    assert "No space left on device" in error
    assert not (small_disk / "out").exists()
    assert not (small_disk / ".out.partial").exists()
