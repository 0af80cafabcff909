"""`hf-topk serve` with the `openai` client."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from support.image_models import tiny_llava
from support.tiny_models import tiny_converted, tiny_dense, tiny_tokenizer
from transformers import AutoModelForCausalLM

PROMPT = "w3 w14 w15"
MESSAGES: list[Any] = [{"role": "system", "content": "w3"}, {"role": "user", "content": "w14 w15"}]
NEW_TOKENS = 12
# As LLaVA has it: what a message says is nothing but a list of parts.
TEMPLATE_OF_PARTS = "{% for one in messages %}{% for part in one.content %}{{ part.text }} {% endfor %}{% endfor %}"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving") / "out"
    tiny_converted(tiny_dense(tied=False), num_experts_per_tok=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address() -> str:
    return free_address()


@pytest.fixture(scope="module")
def server(folder: Path, address: str) -> Iterator[subprocess.Popen[bytes]]:
    with running(folder, address) as process:
        yield process


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return f"127.0.0.1:{one.getsockname()[1]}"


@contextmanager
def running(folder: Path, address: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "hf_topk.cli", "serve", "out", "--port", address.partition(":")[2]]
    with (folder.parent / "log").open("wb") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, cwd=folder.parent, stdout=log, stderr=log, env=environment)
    try:
        for _ in range(600):
            said = (folder.parent / "log").read_text()
            if "Uvicorn running" in said or process.poll() is not None:
                break
            time.sleep(0.1)
        assert f"serving model 'out' at http://{address}/v1" in said, said
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(server: subprocess.Popen[bytes], address: str) -> openai.OpenAI:
    return client_of(address)


def client_of(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=60)


def expected(folder: Path, **choices: Any) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny_tokenizer()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **choices)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat(client: openai.OpenAI, **choices: Any) -> Any:
    asked = {"model": "out", "messages": MESSAGES, "max_tokens": NEW_TOKENS, "temperature": 0, **choices}
    return client.chat.completions.create(**asked)


def test_only_this_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["out"]


def test_chat(client: openai.OpenAI, folder: Path) -> None:
    answer = chat(client)
    assert answer.model == "out"
    assert answer.choices[0].message.content == expected(folder)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, NEW_TOKENS)


def test_streamed_chat(client: openai.OpenAI, folder: Path) -> None:
    chunks = list(chat(client, stream=True))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts).split() == expected(folder).split()
    assert sum(map(bool, texts)) >= NEW_TOKENS // 2
    assert chunks[-1].choices[0].finish_reason == "length"


def test_completion(client: openai.OpenAI, folder: Path) -> None:
    answer = client.completions.create(model="out", prompt=PROMPT, max_tokens=NEW_TOKENS, temperature=0)
    assert answer.choices[0].text == expected(folder)


def test_responses_endpoint(client: openai.OpenAI, folder: Path) -> None:
    asked: dict[str, Any] = {"model": "out", "input": MESSAGES, "max_output_tokens": NEW_TOKENS, "temperature": 0}
    assert client.responses.create(**asked, stream=False).output_text == expected(folder)
    events = list(client.responses.create(**asked, stream=True))
    assert events[-1].type == "response.completed"
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(texts).split() == expected(folder).split()


def test_health(client: openai.OpenAI, address: str) -> None:
    answer = client.with_options(base_url=f"http://{address}").get("/health", cast_to=object)
    assert answer == {"status": "ok"}


def test_two_requests_at_once(client: openai.OpenAI, folder: Path) -> None:
    config = json.dumps({"lossless": True, "max_new_tokens": NEW_TOKENS, "eos_token_id": 0, "pad_token_id": 1})
    lossless, sparse = expected(folder, lossless=True), expected(folder)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(chat, client, extra_body=body) for body in [{"generation_config": config}, None] * 3]
    assert [one.result().choices[0].message.content for one in asked] == [lossless, sparse] * 3


def test_lossless_chat(client: openai.OpenAI, folder: Path) -> None:
    """By the field of the request for a generation config."""
    config = {"lossless": True, "max_new_tokens": NEW_TOKENS, "eos_token_id": 0, "pad_token_id": 1}
    answer = chat(client, extra_body={"generation_config": json.dumps(config)})
    dense = expected(folder, lossless=True)
    assert answer.choices[0].message.content == dense != expected(folder)


def test_other_models_are_refused(client: openai.OpenAI, address: str) -> None:
    with pytest.raises(openai.BadRequestError, match="'out'"):
        chat(client, model="gpt2")
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt2' here, only 'out'"):
        client.with_options(base_url=f"http://{address}").post("/load_model", body={"model": "gpt2"}, cast_to=object)


def check_images_are_refused(client: openai.OpenAI) -> None:
    messages = [*MESSAGES, {"role": "user", "content": [{"type": "text", "text": "w3"}, IMAGE]}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=r"takes only text.*'image_url'.*`generate` in Python"):
            chat(client, messages=messages, stream=stream)
    image: Any = {"type": "input_image", "image_url": IMAGE["image_url"]["url"], "detail": "auto"}
    with pytest.raises(openai.BadRequestError, match=r"takes only text.*'input_image'"):
        client.responses.create(model="out", input=[image], stream=False)


def test_images_in_requests_are_refused(client: openai.OpenAI) -> None:
    check_images_are_refused(client)


def test_a_vision_language_model_answers_text_and_refuses_images(tmp_path: Path) -> None:
    dense, _ = tiny_llava()
    tiny_converted(dense).save_pretrained(tmp_path / "out")
    tokenizer, address = tiny_tokenizer(), free_address()
    tokenizer.chat_template = TEMPLATE_OF_PARTS
    tokenizer.save_pretrained(tmp_path / "out")
    with running(tmp_path / "out", address):
        client, text = client_of(address), expected(tmp_path / "out")
        assert chat(client).choices[0].message.content == text
        in_parts = [{"role": "user", "content": [{"type": "text", "text": word} for word in PROMPT.split()]}]
        assert chat(client, messages=in_parts).choices[0].message.content == text
        completion = client.completions.create(model="out", prompt=PROMPT, max_tokens=NEW_TOKENS, temperature=0)
        assert completion.choices[0].text == text
        check_images_are_refused(client)


def test_a_model_survives_a_reset_of_the_compiler(client: openai.OpenAI, address: str) -> None:
    before = chat(client).choices[0].message.content
    client.with_options(base_url=f"http://{address}").post("/reset", cast_to=object)
    assert chat(client).choices[0].message.content == before


def test_second_server_at_the_same_port(server: subprocess.Popen[bytes], folder: Path, address: str) -> None:
    command = [sys.executable, "-m", "hf_topk.cli", "serve", "out", "--port", address.partition(":")[2]]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"hf-topk: cannot listen on {address} (Address already in use)")


def test_interrupt_ends_it(server: subprocess.Popen[bytes], client: openai.OpenAI, folder: Path) -> None:
    chat(client)
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
    said = (folder.parent / "log").read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("INFO:")
