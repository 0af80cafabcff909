"""Facts of a tiny converted model, as a conversion would leave them."""

import dataclasses
import json
from typing import Any

from hf_topk.console import as_json
from hf_topk.evaluation.fidelity import measure_fidelity
from hf_topk.evaluation.observations import Observer
from hf_topk.inspection.facts import Facts
from support.tiny_models import some_windows, tiny_converted, tiny_tokenizer


def tiny_facts(tokenizer: Any = None, **choices: Any) -> Facts:
    """Facts of a random model, with metrics and observations on random windows.

    Args:
        tokenizer: in place of the tiny one.
        choices: of the model's configuration.
    """
    model = tiny_converted(**choices)
    observer = Observer(model.head)
    metrics = json.loads(as_json(dataclasses.asdict(measure_fidelity(model, some_windows(), observer))))
    share = metrics["bytes_read"]
    metrics["curve"] = [
        {"num_experts_per_tok": k, "agreement": 0.9 + k / 100, "bytes_read": share * (0.8 + k / 10), "positions": 50}
        for k in (1, model.head.num_experts_per_tok, 4)
    ]
    metrics |= {"added_bytes": model.head.added_bytes(), "added_bytes_share": 0.1}
    recipe = {"text": "/home/me/texts/mine.txt", "expert_size": 16, "max_bytes_read": None}
    return Facts("tiny", model, tokenizer or tiny_tokenizer(), metrics, recipe, observer.observations("mine.txt"))
