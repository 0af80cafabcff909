"""`hf-topk serve`: refused arguments, and the served model; tests/tools runs the server itself."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import check_refused, run_main
from support.image_models import tiny_llava
from support.tiny_models import tiny_converted, tiny_tokenizer
from transformers.utils import import_utils

from hf_topk import serving


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in the current folder; the server's packages count as installed."""
    tiny_converted().save_pretrained(tmp_path / "out")
    tiny_tokenizer().save_pretrained(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serving, "is_serve_available", lambda: True)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of the server."""
    calls: list[Any] = []
    monkeypatch.setattr(serving, "_run_server", lambda *arguments: calls.append(arguments))
    return calls


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import_utils.is_serve_available.cache_clear()
    monkeypatch.setattr(import_utils, "is_openai_available", lambda: False)
    monkeypatch.setattr(serving, "is_serve_available", import_utils.is_serve_available)
    check_refused(monkeypatch, capsys, "serve", "out", parts=("packages", "pip install 'hf-topk[serve]'"))
    import_utils.is_serve_available.cache_clear()


def test_port_in_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        parts = (f"cannot listen on 127.0.0.1:{port} (Address already in use)", "choose another --port")
        check_refused(monkeypatch, capsys, "serve", "out", "--port", port, parts=parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--host", "no host"], ("cannot listen on no host:", "--host")),
        (["--device", "gpu"], ("no device 'gpu'", "choose auto, cpu")),
        (["--dtype", "int4"], ("unknown dtype 'int4'", "bfloat16")),
        (["--head-mode", "fast"], ("unknown head mode 'fast'", "sparse")),
    ],
)
def test_refused(
    arguments: list[str], parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(monkeypatch, capsys, "serve", "out", "--port", _free_port(), *arguments, parts=parts)


def test_a_vision_language_model_is_served(monkeypatch: pytest.MonkeyPatch, served: list[Any]) -> None:
    dense, _ = tiny_llava()
    tiny_converted(dense).save_pretrained("pictures")
    tiny_tokenizer().save_pretrained("pictures")
    assert run_main(monkeypatch, "serve", "pictures", "--port", _free_port()) == 0
    assert type(served[0][1].base) is type(dense)


@pytest.mark.parametrize(
    ("content", "others"),
    [
        ("w1 w2", []),
        (None, []),
        ([{"type": "text", "text": "w1"}, {"type": "input_text", "text": "w2"}], []),
        ([{"type": "text", "text": "w1"}, {"type": "image_url", "image_url": {"url": "data:"}}], ["image_url"]),
        (
            [{"type": "input_image", "image_url": "data:"}, {"type": "input_audio"}, {}],
            ["input_image", "input_audio", "None"],
        ),
    ],
)
def test_parts_of_messages_that_are_no_text(content: Any, others: list[str]) -> None:
    assert serving.other_parts([{"role": "system", "content": "w3"}, {"role": "user", "content": content}]) == others


def test_choices_are_in_the_model_s_configuration(monkeypatch: pytest.MonkeyPatch, served: list[Any]) -> None:
    choices = ("--head-mode", "sparse", "--lossless", "--dtype", "bfloat16", "--port", str(_free_port()))
    assert run_main(monkeypatch, "serve", "out/", *choices) == 0
    ((name, model, tokenizer, host, port),) = served
    assert (name, host, str(port)) == ("out", "127.0.0.1", choices[-1])
    assert model.head_mode == "sparse"
    assert model.generation_config.lossless is True
    assert model.dtype == torch.bfloat16
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_without_a_chat_template_messages_are_plain_text(
    monkeypatch: pytest.MonkeyPatch, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "system", "content": "w1 w2"}, {"role": "user", "content": "w3"}]
    assert run_main(monkeypatch, "serve", "out", "--port", _free_port()) == 0
    assert "no chat template" in capsys.readouterr().err
    tokenizer = served[0][2]
    parts = [{"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "text", "text": "w2"}]}, messages[1]]
    for chat in (messages, parts):
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == "w1 w2\nw3"
    assert not hasattr(served[0][1].generation_config, "lossless")


def test_a_chat_template_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, served: list[Any]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained("out")
    assert run_main(monkeypatch, "serve", "out", "--port", _free_port()) == 0
    assert served[0][2].chat_template == tokenizer.chat_template


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]
