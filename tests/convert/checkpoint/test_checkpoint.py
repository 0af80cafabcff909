"""The folder that a conversion writes: unchanged dense tensors, added ones in another shard, and companion files."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.command_line import contents
from support.tiny_models import QUICK, tiny_checkpoint, tiny_dense, tiny_text
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_topk import TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.evaluation.observations import Observations

TOKEN_IDS = torch.arange(3, 40).unsqueeze(0)


def shard_of(folder: Path, dense: PreTrainedModel) -> Path:
    """Save a checkpoint of several shards."""
    tiny_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    dense.save_pretrained(folder, max_shard_size="30KB")
    return folder


def gpt2_of_old(folder: Path) -> Path:
    """Save a GPT-2 checkpoint with names without `transformer.`, as in the oldest checkpoints."""
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
    """A dense checkpoint, its contents, and the folder of the converted model."""
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


def test_the_dense_checkpoint_is_unchanged(folders: SimpleNamespace) -> None:
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


def test_observations_are_kept_beside_the_metrics(folders: SimpleNamespace) -> None:
    assert Observations.from_json((folders.out / "report.json").read_text()) == folders.report.observations
    assert not (folders.out / "report.html").exists()  # only if it is asked for


def test_companion_files_are_copied(folders: SimpleNamespace) -> None:
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


def test_the_written_recipe_is_the_recipe_of_the_conversion(folders: SimpleNamespace) -> None:
    recipe = Recipe.from_yaml(folders.out / "recipe.yaml")
    assert recipe.to_dict() == folders.report.recipe.to_dict()
    assert recipe.expert_size == 16
    left_open = {"target_agreement", "max_bytes_read", "num_experts_per_tok", "num_rescored"}
    assert {name for name, value in recipe.to_dict().items() if value is None} == left_open
    config, head = AutoConfig.from_pretrained(folders.out), folders.report.model.head
    assert (config.num_experts_per_tok, config.num_rescored) == (head.num_experts_per_tok, head.num_rescored)


def test_files_have_the_usual_permissions(folders: SimpleNamespace) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("folders", ["sharded", "gpt2 of old", "phi biased"], indirect=True)
def test_the_folder_loads_in_a_new_process_as_both_models(folders: SimpleNamespace, tmp_path: Path) -> None:
    """As the converted model with the Auto classes, and as the dense model with `text_config`."""
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


def test_no_key_is_missing_or_unexpected(folders: SimpleNamespace) -> None:
    for config in (None, AutoConfig.from_pretrained(folders.out).text_config):
        _, found = AutoModelForCausalLM.from_pretrained(folders.out, config=config, output_loading_info=True)
        assert not found["missing_keys"]
        assert not found["mismatched_keys"]
        left_over = set() if config is None else set(weight_map(folders.out)) - set(weight_map(folders.dense))
        assert set(found["unexpected_keys"]) <= left_over


def test_ties_are_those_of_the_dense_model(folders: SimpleNamespace) -> None:
    dense = AutoModelForCausalLM.from_pretrained(folders.dense)
    converted = AutoModelForCausalLM.from_pretrained(folders.out)
    assert isinstance(converted, TopKExpertsForCausalLM)
    is_tied = [
        model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (dense, converted)
    ]
    assert is_tied[0] == is_tied[1]


@pytest.mark.parametrize(
    ("stray", "model_type", "warned_of"),
    [
        ("mtp.fc.weight", "mellum", set()),  # which the dense class knows to be of no use to it
        ("value_head.weight", "mellum", {"base.model.value_head.weight"}),
        ("value_head.weight", "gpt2", {"base.transformer.value_head.weight"}),
    ],
)
def test_unused_tensors_of_the_checkpoint_are_copied(
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
