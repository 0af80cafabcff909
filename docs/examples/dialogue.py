"""A dialogue of several turns, streamed, with one KV cache: python dialogue.py [MODEL]."""

import sys
import time
from dataclasses import dataclass, field

import torch
from common import HEADS, Output, choose_head, load, print_comparison, same_length
from transformers import DynamicCache, PreTrainedTokenizerBase, TextStreamer

from hf_topk import TopKExpertsForCausalLM

QUESTIONS = (
    "What is a lighthouse for?",
    "Who lives in it?",
    "Write one sentence that such a person might say about the sea.",
)
# For models without a chat template, such as the bundled one, which goes on from it as from any other text.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role.capitalize() }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass
class Dialogue:
    """A conversation with one model; the KV cache keeps what the turns have in common.

    Attributes:
        model: a converted model.
        tokenizer: its tokenizer, with a chat template.
        new_tokens: the most tokens of an answer.
    """

    model: TopKExpertsForCausalLM
    tokenizer: PreTrainedTokenizerBase
    new_tokens: int = 48
    messages: list[dict[str, str]] = field(default_factory=list)
    cache: DynamicCache = field(default_factory=DynamicCache)
    cached_ids: list[int] = field(default_factory=list)
    reused: int = 0

    def say(self, text: str, head: str) -> list[int]:
        """Answer a message, streamed to standard output, and return the answer's tokens."""
        self.messages.append({"role": "user", "content": text})
        prompt = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        prompt_ids = prompt["input_ids"][0].tolist()
        # What the template makes of an answer need not be the tokens that were written: keep what is the same.
        same = same_length(self.cached_ids, prompt_ids[:-1])
        if same < len(self.cached_ids):
            self.cache.crop(same - len(self.cached_ids))
        self.reused += same
        output = self.model.generate(
            **prompt,
            past_key_values=self.cache,
            max_new_tokens=self.new_tokens,
            do_sample=False,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **choose_head(self.model, head),
        )[0].tolist()
        self.cached_ids = output[: self.cache.get_seq_length()]
        answer = output[len(prompt_ids) :]
        content = self.tokenizer.decode(answer, skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": content})
        return answer


def main(folder: str | None = None, new_tokens: int = 48) -> dict[str, Output]:
    """Hold the same dialogue with each head; print and return the answers by head."""
    model, tokenizer = load(folder)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    outputs, reused = {}, {}
    for head in HEADS:
        print(f"\n{head}")
        torch.manual_seed(0)
        dialogue, output = Dialogue(model, tokenizer, new_tokens), Output()
        for question in QUESTIONS:
            print(f"> {question}")
            began = time.perf_counter()
            output.answers.append(dialogue.say(question, head))
            output.seconds += time.perf_counter() - began
            stats = model.last_generation_stats
            output.dense_passes += stats.dense_passes if stats else len(output.answers[-1]) * (head == "dense")
        outputs[head], reused[head] = output, f"{dialogue.reused:,}"
    print_comparison(outputs, positions_reused=reused)
    return outputs


if __name__ == "__main__":
    main(*sys.argv[1:])
