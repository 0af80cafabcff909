"""Serves one converted model to OpenAI clients with the server of `transformers serve`."""

import socket
import sys
import time
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from .loading import load_converted
from .model.dense_model import looks_at_images
from .model.errors import InputError
from .model.modeling_topk_experts import TopKExpertsForCausalLM

# For models that were not trained to chat: they go on from the texts of the messages, one to a line.
PLAIN_TEMPLATE = "{{ messages | map(attribute='content') | join('\n') }}"


def serve(
    directory: str,
    host: str,
    port: int,
    *,
    head_mode: str = "auto",
    lossless: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Answer requests until interrupted.

    Args:
        directory: a converted model, a folder or a repository of the Hub; clients call it by this name.
        host: the address to listen at.
        port: the port to listen at.
        head_mode: "auto", "sparse" or "dense".
        lossless: whether answers are the dense model's own where a request does not say.
        dtype: "float32", "bfloat16", or "auto": as the model is stored.
        device: such as "cpu" or "cuda:0", or "auto": the accelerator if there is one.

    Raises:
        InputError: when the server's packages are missing, the address is taken, there is no such device, or the model
            does not load or looks at images.
    """
    if not is_serve_available():
        raise InputError("the packages of the server are missing: pip install 'hf-topk[serve]'")
    _check_address(host, port)
    model, tokenizer = load_converted(directory, dtype=dtype, device=device)
    if looks_at_images(model.base):
        raise InputError(
            f"{directory} looks at images ({type(model.base).__name__}), which the server would leave out: "
            "serve a model of text alone, or give images to `generate` in Python"
        )
    model.head_mode = head_mode  # type: ignore[assignment]  # the setter refuses what is no mode
    if lossless and model.generation_config is not None:
        model.generation_config.lossless = True  # type: ignore[attr-defined]
    name = directory.rstrip("/")
    print(f"hf-topk: serving model '{name}' at http://{host}:{port}/v1", file=sys.stderr)
    if tokenizer.chat_template is None:
        print("hf-topk: it has no chat template, and goes on from the plain text of the messages", file=sys.stderr)
        tokenizer.chat_template = _plain_template(tokenizer)
    _run_server(name, model, tokenizer, host, port)


def _check_address(host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).split(" (")[0]
        raise InputError(
            f"cannot listen at {host}:{port} ({reason}): choose another --port, or an address of this machine as --host"
        ) from error


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template by which the plain text becomes the tokens that it is outside of a chat."""
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + PLAIN_TEMPLATE if starts else PLAIN_TEMPLATE


def _run_server(
    name: str, model: TopKExpertsForCausalLM, tokenizer: PreTrainedTokenizerBase, host: str, port: int
) -> None:
    """Run Transformers' server; by itself it knows no classes but its own, and downloads what is asked for."""
    from fastapi import HTTPException
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    class OneModel(model_manager.ModelManager):
        def process_model_name(self, model_id: str) -> str:  # type: ignore[override]  # all requests come through here
            if model_id != name:
                raise HTTPException(404, f"There is no model '{model_id}' here, only '{name}'.")
            return name

        def load_model_and_processor(self, *_: Any, **__: Any) -> Any:
            return model, tokenizer

        async def load_model_streaming(self, *_: Any, **__: Any) -> Any:
            yield f'data: {{"status": "ready", "model": "{name}", "cached": true}}\n\n'

        def get_gen_models(self) -> list[dict[str, Any]]:  # type: ignore[override]
            return [{"id": name, "object": "model", "created": started, "owned_by": ""}]

    started = int(time.time())
    model_manager.ModelManager = OneModel  # type: ignore[misc]
    with suppress(KeyboardInterrupt):  # how a server ends
        Serve(force_model=name, host=host, port=port, log_level="error")
