"""Serves one converted model to OpenAI clients with the server of `transformers serve`."""

import socket
import sys
import time
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from .loading import load_converted
from .model.dense_model import takes_images
from .model.errors import InputError
from .model.modeling_topk_experts import TopKExpertsForCausalLM

# For models without a chat template: they continue the text of the messages, one message per line.
PLAIN_TEMPLATE = """
{%- for message in messages -%}
    {{ message.content if message.content is string else message.content | map(attribute='text') | join(' ') }}
    {{- '\n' if not loop.last }}
{%- endfor -%}
"""
TEXT_PARTS = ("text", "input_text", "output_text")  # of messages, in the two kinds of requests


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
    """Answer requests until interrupted; requests with images, audio or files are refused.

    Args:
        directory: a converted model, a folder or a repository on the Hub, which is also its name in requests.
        host: the address to listen on.
        port: the port to listen on.
        head_mode: "auto", "sparse" or "dense".
        lossless: whether decoding is lossless unless a request says otherwise.
        dtype: "float32", "bfloat16", or "auto" for the dtype on disk.
        device: such as "cpu" or "cuda:0", or "auto" for the accelerator, if any.

    Raises:
        InputError: when the server's packages are missing, the address is in use, there is no such device, or the model
            does not load.
    """
    if not is_serve_available():
        raise InputError("the packages of the server are missing: pip install 'hf-topk[serve]'")
    _check_address(host, port)
    model, tokenizer = load_converted(directory, dtype=dtype, device=device)
    model.head_mode = head_mode  # type: ignore[assignment]  # the setter checks it
    if lossless and model.generation_config is not None:
        model.generation_config.lossless = True  # type: ignore[attr-defined]
    name = directory.rstrip("/")
    print(f"hf-topk: serving model '{name}' at http://{host}:{port}/v1", file=sys.stderr)
    if tokenizer.chat_template is None:
        print("hf-topk: the model has no chat template and continues the plain text of messages", file=sys.stderr)
        tokenizer.chat_template = _plain_template(tokenizer)
    _run_server(name, model, tokenizer, host, port)


def _check_address(host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).split(" (")[0]
        raise InputError(
            f"cannot listen on {host}:{port} ({reason}): choose another --port, or an address of this machine as --host"
        ) from error


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template for plain text, with the BOS token if the tokenizer adds one."""
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + PLAIN_TEMPLATE if starts else PLAIN_TEMPLATE


def _run_server(
    name: str, model: TopKExpertsForCausalLM, tokenizer: PreTrainedTokenizerBase, host: str, port: int
) -> None:
    """Run Transformers' server with three changes."""
    from transformers.cli.serve import Serve

    _serve_one_model(name, model, tokenizer)
    _refuse_all_but_text()
    _give_reasons()
    with suppress(KeyboardInterrupt):  # the normal end of a server
        Serve(force_model=name, host=host, port=port, log_level="error")


def _serve_one_model(name: str, model: TopKExpertsForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Serve only this model; by default the server downloads any model that a client names."""
    from fastapi import HTTPException
    from transformers.cli.serving import model_manager
    from transformers.cli.serving.utils import Modality

    class OneModel(model_manager.ModelManager):
        def process_model_name(self, model_id: str) -> str:  # type: ignore[override]  # of every request
            if model_id != name:
                raise HTTPException(404, f"There is no model '{model_id}' here, only '{name}'.")
            return name

        def load_model_and_processor(self, *_: Any, **__: Any) -> Any:
            return model, tokenizer

        async def load_model_streaming(self, *_: Any, **__: Any) -> Any:
            yield f'data: {{"status": "ready", "model": "{name}", "cached": true}}\n\n'

        def get_gen_models(self) -> list[dict[str, Any]]:  # type: ignore[override]
            return [{"id": name, "object": "model", "created": started, "owned_by": ""}]

        @staticmethod
        def get_model_modality(*_: Any, **__: Any) -> Modality:
            return modality

    started = int(time.time())
    # Some vision-language chat templates accept only lists of parts, which this modality produces.
    modality = Modality.VLM if takes_images(model.base) else Modality.LLM
    model_manager.ModelManager = OneModel  # type: ignore[misc]


def _refuse_all_but_text() -> None:
    """Refuse images, audio and files, which the server would silently drop."""
    from fastapi import HTTPException
    from transformers.cli.serving.utils import BaseHandler, Modality

    parse = BaseHandler.get_processor_inputs_from_messages

    def parse_text(messages: list[dict[str, Any]], modality: Modality) -> list[dict[str, Any]]:
        if others := other_parts(messages):
            raise HTTPException(
                400,
                f"This server takes only text, and a message has a part of type '{others[0]}': leave it out, or give "
                "it to `generate` in Python.",
            )
        return parse(messages, modality)

    BaseHandler.get_processor_inputs_from_messages = staticmethod(parse_text)  # type: ignore[method-assign]


def other_parts(messages: list[dict[str, Any]]) -> list[str]:
    """Types of the parts of messages that are not text."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [str(part.get("type")) for part in parts if part.get("type") not in TEXT_PARTS]


def _give_reasons() -> None:
    """Put the reason of a refusal where OpenAI clients show it."""
    from fastapi import HTTPException, Request
    from fastapi.responses import JSONResponse
    from transformers.cli.serving import server

    build = server.build_server

    def build_with_reasons(*arguments: Any, **choices: Any) -> Any:
        app = build(*arguments, **choices)

        @app.exception_handler(HTTPException)
        async def refuse(_: Request, refusal: HTTPException) -> JSONResponse:
            error = {"message": str(refusal.detail), "type": "invalid_request_error"}
            return JSONResponse({"error": error}, refusal.status_code)

        return app

    server.build_server = build_with_reasons
