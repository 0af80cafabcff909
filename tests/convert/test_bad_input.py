"""Refused input: one line, exit code 2, and no file written or removed."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import check_refused
from support.tiny_models import QUICK, tiny_checkpoint, tiny_dense, tiny_text, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedTokenizerFast

from hf_topk.convert import Recipe, convert_checkpoint

OPTIONS = ("--expert-size", 16, "--positions", 600, "--router-rank", 4, "--tail-rank", 4)
as_root = os.geteuid() == 0

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    text = tiny_text(folder / "text.jsonl")
    convert_checkpoint(str(checkpoint), folder / "out", Recipe.from_dict({**QUICK, "text": str(text)}))
    return folder / "out"


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return tiny_text(tmp_path / "text.jsonl")


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Check that a command is refused, given its arguments and parts of its error line."""
    monkeypatch.chdir(tmp_path)

    return partial(check_refused, monkeypatch, capsys)


# No model, or no dense causal language model


def write_bert(folder: Path) -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)


def write_t5(folder: Path) -> None:
    config = AutoConfig.for_model("t5", vocab_size=100, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    AutoModel.from_config(config).save_pretrained(folder)


def write_whisper(folder: Path) -> None:
    config = AutoConfig.for_model(
        "whisper",
        vocab_size=100,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    AutoModel.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("write", "kind"), [(write_bert, "BertForMaskedLM"), (write_t5, "T5Model"), (write_whisper, "WhisperModel")]
)
def test_refuses_models_without_a_single_vocabulary_head(
    write: Callable[[Path], None], kind: str, tmp_path: Path, refused: Refused
) -> None:
    write(tmp_path / "other")
    refused("convert", "other", "out", parts=(kind, "no single vocabulary head", "choose a causal language model"))


def test_refuses_an_encoder_without_is_decoder(tmp_path: Path, refused: Refused) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "other")
    edit_config(tmp_path / "other", architectures=None)
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    options = ("--expert-size", 16, "--positions", 600)
    refused(
        "convert",
        "other",
        "out",
        *options,
        parts=("BertLMHeadModel attends to later tokens", "choose a causal language model"),
    )


@pytest.mark.parametrize("name", ["./gone", "/nowhere/gone", "some/deep/path"])
def test_refuses_a_missing_folder(name: str, refused: Refused) -> None:
    refused("convert", name, "out", parts=(f"no such model: there is no folder {name}",))


def test_refuses_an_invalid_repository_name(refused: Refused) -> None:
    refused(
        "convert", "what is this", "out", parts=("no such model", "'what is this'", "not a valid name of a repository")
    )


def test_refuses_a_file_in_place_of_a_folder(model: Path, refused: Refused) -> None:
    refused("convert", "model/model.safetensors", "out", parts=("is a file", "give its folder"))


def test_refuses_an_already_converted_model(converted: Path, refused: Refused) -> None:
    refused("convert", converted, "out", parts=("already converted", "give the dense model it was made from"))


def test_refuses_too_many_arguments(refused: Refused) -> None:
    refused("convert", "a", "b", "c", parts=("expected [MODEL] OUT, got 3 arguments (a, b, c)", "quote paths"))


def test_refuses_a_name_when_the_hub_cannot_be_reached(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    refused("convert", "nobody/no-such-model", "out", parts=("no such model", "nobody/no-such-model", "the network"))


# A checkpoint that is not whole


def edit_config(folder: Path, **choices: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **choices}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rename_all(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)


def shard(folder: Path) -> Path:
    """Split the weights into shards with an index; returns the index."""
    (folder / "model.safetensors").unlink()
    tiny_dense().save_pretrained(folder, max_shard_size="30KB")
    return folder / "model.safetensors.index.json"


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    index = json.loads(shard(folder).read_text())
    (folder / sorted(set(index["weight_map"].values()))[1]).unlink()


def name_an_absent_tensor(folder: Path) -> None:
    index = shard(folder)
    value = json.loads(index.read_text())
    value["weight_map"]["model.layers.7.mlp.up_proj.weight"] = min(value["weight_map"].values())
    index.write_text(json.dumps(value))


def other_tokenizer(folder: Path, tokens: int) -> None:
    vocabulary = {f"t{number}": number for number in range(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


NOT_WHOLE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ("is not a model", "no config.json in")),
    "config cut short": (lambda folder: truncate(folder / "config.json"), ("config.json is damaged", "fetch")),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[1]"),
        ("is damaged (not a JSON object)",),
    ),
    "unknown model type": (lambda folder: edit_config(folder, model_type="zorglub"), ("cannot read", "'zorglub'")),
    "no model type": (lambda folder: (folder / "config.json").write_text("{}"), ("cannot read the configuration",)),
    "wrong type in the config": (
        lambda folder: edit_config(folder, hidden_size="big"),
        ("cannot read the configuration", "hidden_size"),
    ),
    "quantised": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("is quantised", "give the checkpoint it was made from"),
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("has no weights", "model.safetensors")),
    "only a pickle": (only_a_pickle, ("pickled weights (pytorch_model.bin)", "convert them first", "save_pretrained(")),
    "random bytes": (
        lambda folder: (folder / "model.safetensors").write_bytes(os.urandom(4096)),
        ("model.safetensors is damaged or cut short", "fetch the model again"),
    ),
    "empty weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        ("model.safetensors is damaged or cut short", "fetch the model again"),
    ),
    "weights cut short": (
        lambda folder: truncate(folder / "model.safetensors"),
        ("model.safetensors is damaged or cut short", "fetch the model again"),
    ),
    "lost shard": (lose_a_shard, ("the weights are not complete", "-of-", "is missing", "fetch the model again")),
    "absent tensor": (name_an_absent_tensor, ("'model.layers.7.mlp.up_proj.weight'", "no shard has it")),
    "index without a map": (
        lambda folder: shard(folder).write_text("{}"),
        ("index.json is damaged (no weight map)", "fetch the model again"),
    ),
    "missing tensor": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        ("are not complete", "'model.layers.1.mlp.up_proj.weight'", "fetch the model again"),
    ),
    "another class's names": (
        lambda folder: edit_tensors(folder, rename_all),
        ("not those of a LlamaForCausalLM", "is missing", "'other.model.", "check `architectures` in config.json"),
    ),
    "other shapes than the config's": (
        lambda folder: edit_config(folder, intermediate_size=64),
        ("the weights of", "do not load", "fetch the model again"),
    ),
    "NaN in the head": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors["model.embed_tokens.weight"][50].fill_(torch.nan)),
        ("the head's weight holds NaN", "fetch it again"),
    ),
    "NaN in the decoder": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan)),
        ("hidden states are not finite", "check its weights"),
    ),
    "tokenizer larger than the head": (lambda folder: other_tokenizer(folder, 130), ("130 tokens", "100 rows", "own")),
    "tokenizer far too small": (lambda folder: other_tokenizer(folder, 20), ("20 tokens", "100 rows", "own tokenizer")),
    "damaged tokenizer": (
        lambda folder: truncate(folder / "tokenizer.json"),
        ("the tokenizer in", "cannot be read", "fetch the model again"),
    ),
    "tokenizer of something else": (
        lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'),
        ("the tokenizer in", "cannot be read", "fetch the model again"),
    ),
    "text but no tokenizer": (
        lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
        ("needs a tokenizer", "in its folder"),
    ),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_refuses_an_incomplete_checkpoint(case: str, model: Path, text: Path, refused: Refused) -> None:
    damage, parts = NOT_WHOLE[case]
    damage(model)
    refused("convert", "model", "out", "--text", text, *OPTIONS, parts=parts)


def test_refuses_nan_in_the_bias_of_the_head(tmp_path: Path, text: Path, refused: Refused) -> None:
    dense = tiny_dense("phi", tied=False, bias=True)
    with torch.no_grad():
        dense.lm_head.bias[3] = torch.nan
    tiny_checkpoint(tmp_path / "biased", dense)
    refused("convert", "biased", "out", "--text", text, *OPTIONS, parts=("the head's bias holds NaN", "fetch it again"))


# Sample text


def cannot_read(file: Path) -> None:
    if as_root:
        pytest.skip("root may read everything")
    file.write_text("words")
    file.chmod(0)


TEXTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda file: None, ("text.txt",)),
    "empty": (lambda file: file.write_text(""), ("text.txt is empty", "give a file that holds text")),
    "white space": (lambda file: file.write_text(" \n\t\n"), ("text.txt' holds no text", "only white space")),
    "unreadable": (cannot_read, ("text.txt", "Permission denied")),
    "binary": (lambda file: file.write_bytes(b"words\0\1\2" * 100), ("text.txt is binary", "save it as UTF-8")),
    "not UTF-8": (lambda file: file.write_bytes(b"words \xff\xfe w1" * 9), ("text.txt is not UTF-8", "save it as")),
    "empty folder": (lambda file: file.mkdir(), ("text.txt",)),
    "one word": (lambda file: file.write_text("w1"), ("too short", "give more text")),
    "too few positions": (
        lambda file: file.write_text("w1 w2 " * 10),
        ("the calibration text has 20 positions, fewer than the 32 dimensions of a hidden state", "give more text"),
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_refuses_unsuitable_text(case: str, model: Path, tmp_path: Path, refused: Refused) -> None:
    write, parts = TEXTS[case]
    write(tmp_path / "text.txt")
    refused("convert", "model", "out", "--text", "./text.txt", *OPTIONS, parts=parts)


def test_refuses_conversations_without_a_chat_template(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "w1 w2"}]}\n' * 99)
    parts = ("the text has conversations", "no chat template", "give plain text")
    refused("convert", "model", "out", "--text", "chats.jsonl", *OPTIONS, parts=parts)


def test_refuses_too_few_positions_of_the_bundled_texts(model: Path, refused: Refused) -> None:
    arguments = ("convert", "model", "out", "--positions", 20, "--expert-size", 16)
    refused(*arguments, parts=("the calibration text has 20 positions, fewer than the 32", "raise `positions`"))


# Choices

CHOICES: dict[str, tuple[object, tuple[str, ...]]] = {
    "num_experts_per_tok: 0": (("-k", 0), ("num_experts_per_tok is 0", "at least 1")),
    "num_experts_per_tok: 7": (("-k", 7), ("num_experts_per_tok is 7", "only 6 experts", "choose fewer")),
    "expert_size: 0": (("--expert-size", 0), ("expert_size is 0", "at least 1")),
    "expert_size: 101": (("--expert-size", 101), ("expert_size is 101", "vocabulary of 100", "choose a smaller")),
    "num_always_on: 100": (("--num-always-on", 100), ("num_always_on is 100", "choose fewer")),
    "num_always_on: -1": (("--num-always-on", -1), ("num_always_on is -1", "at least 0")),
    "tail_rank: 0": (("--tail-rank", 0), ("tail_rank is 0", "at least 1")),
    "router_rank: 0": (("--router-rank", 0), ("router_rank is 0", "at least 1")),
    "positions: 0": (("--positions", 0), ("positions is 0", "at least 1")),
    "num_rescored: 0": (None, ("num_rescored is 0", "at least 1")),
    "router: low_rank": (None, ("unknown recipe key 'router'", "did you mean 'router_rank'?")),
    "combine: zorglub": (("--combine", "zorglub"), ("unknown combine 'zorglub'", "choose one of", "router", "learned")),
    "combine: exakt": (("--combine", "exakt"), ("unknown combine 'exakt'", "did you mean 'exact'?")),
    "expert_sise: 16": (None, ("unknown recipe key 'expert_sise'", "did you mean 'expert_size'?")),
    "zorglub: 16": (None, ("unknown recipe key 'zorglub'", "choose one of", "expert_size")),
    "combine: [exact]": (None, ("unknown combine",)),
    "expert_size: big": (None, ("expert_size", "int")),
    "expert_size: 1.5": (None, ("expert_size", "int")),
    "held_out: 1.0": (None, ("held_out is 1.0", "below 1")),
    "learning_rate: .nan": (None, ("learning_rate is nan", "above 0")),
    "window_length: 1": (None, ("window_length is 1", "at least 2")),
    "- a\n- b": (None, ("recipe.yaml is not a mapping", "expert_size: 16")),
    "a: [": (None, ("recipe.yaml is not valid YAML",)),
    "\x00": (None, ("recipe.yaml is not valid YAML",)),
}


@pytest.mark.parametrize("choice", [choice for choice, (option, _) in CHOICES.items() if option])
def test_refuses_an_option(choice: str, model: Path, text: Path, refused: Refused) -> None:
    option, parts = CHOICES[choice]
    refused("convert", "model", "out", "--text", text, *OPTIONS, *option, parts=parts)


@pytest.mark.parametrize("choice", CHOICES)
def test_refuses_a_recipe_file(choice: str, model: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{choice}\n")
    expert_size = () if choice.startswith("expert_size") else ("--expert-size", 16)
    arguments = ("convert", "model", "out", "--text", text, "--recipe", "recipe.yaml", *expert_size)
    refused(*arguments, parts=CHOICES[choice][1])


@pytest.mark.parametrize(("name", "reason"), [("gone.yaml", "No such file"), ("model", "Is a directory")])
def test_refuses_a_recipe_that_cannot_be_read(name: str, reason: str, model: Path, refused: Refused) -> None:
    refused("convert", "model", "out", "--recipe", name, parts=(f"cannot read the recipe {name}", reason))
