"""`vllm serve` of a converted model with the `openai` client."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from support.tiny_models import CHAT_TEMPLATE, character_tokenizer
from support.vllm_engine import save_converted
from transformers import AutoModelForCausalLM

PROMPT = "once upon a time"
NEW_TOKENS = 12
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_converted(tmp_path_factory.mktemp("serving") / "out")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def address(served: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", "out", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "128"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    log = served.parent / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=served.parent, stdout=file, stderr=file, env=environment)
    try:
        for _ in range(3000):
            if "Application startup complete" in log.read_text() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)


def chat(client: openai.OpenAI, **choices: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": PROMPT}]
    asked = {"model": "out", "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, **choices}
    return client.chat.completions.create(**asked)


def complete(client: openai.OpenAI, prompt: str, **choices: Any) -> Any:
    asked = {"model": "out", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, **choices}
    return client.completions.create(**asked)


def test_completion_is_that_of_transformers(client: openai.OpenAI, served: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32), character_tokenizer()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert complete(client, PROMPT).choices[0].text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_chat_streamed_is_chat(client: openai.OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True)]
    assert len(parts) > 2
    assert "".join(parts) == whole


def test_several_answers(client: openai.OpenAI) -> None:
    texts = [choice.message.content for choice in chat(client, n=4, temperature=1.0, seed=1).choices]
    assert len(set(texts)) == 4


def test_logprobs(client: openai.OpenAI) -> None:
    [choice] = complete(client, PROMPT, logprobs=5, echo=True, max_tokens=1).choices
    assert all(-100 < logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])


def test_json_by_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
    for temperature in (0, 1):
        said = chat(client, max_tokens=100, temperature=temperature, response_format=schema).choices[0].message.content
        found = json.loads(said)
        assert found.keys() == {"a", "b"}


def test_concurrent_requests_and_a_disconnected_client(client: openai.OpenAI) -> None:
    prompts = [f"{number} times {number}" for number in range(32)]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts[:4]]
    stream = chat(client, stream=True, max_tokens=100)
    next(iter(stream))
    stream.close()
    with ThreadPoolExecutor(len(prompts)) as pool:
        texts = list(pool.map(lambda prompt: complete(client, prompt).choices[0].text, prompts))
    assert len(texts) == 32
    assert all(texts)
    assert texts[:4] == alone


def test_counters_are_beside_vllms_own(client: openai.OpenAI, address: str) -> None:
    def counters() -> dict[str, float]:
        said = urllib.request.urlopen(f"{address}/metrics").read().decode()
        assert "vllm:generation_tokens_total" in said
        return {name: float(value) for name, value in re.findall(r"^hf_topk:(\w+) (\S+)$", said, re.MULTILINE)}

    before = counters()
    answer = complete(client, PROMPT, extra_body={"ignore_eos": True})
    grown = {name: value - before[name] for name, value in counters().items()}
    assert answer.usage.completion_tokens == NEW_TOKENS
    # 8 always-on tokens and those of 2 experts of 16, at each position.
    assert grown == {"sparse_steps_total": 12, "dense_steps_total": 0, "rows_read_total": 12 * (8 + 2 * 16)}
