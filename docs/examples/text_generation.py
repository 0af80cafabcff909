"""Text generation, greedy and sampled, with each head: python text_generation.py [MODEL]."""

import sys

from common import HEADS, Output, load, print_comparison, write_with_each_head

PROMPTS = (
    "The old man looked at the sea and said",
    "When the train had left the station, she",
    "There are three reasons why cities grow:",
    "In the year of the great flood, the people of the valley",
    "My dear friend, I write to you because",
    "The house had been empty for years, and",
    "It is often said that knowledge",
    "At the edge of the forest there lived",
)
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0},
}


def main(folder: str | None = None, new_tokens: int = 64) -> dict[str, dict[str, Output]]:
    """Write, print and return what each head makes of the prompts, by way of generation and head."""
    model, tokenizer = load(folder)
    results = {}
    for way, choices in WAYS.items():
        inputs = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
        outputs = write_with_each_head(model, inputs, max_new_tokens=new_tokens, **choices)
        print(f"\n{way}")
        for head in HEADS:
            print(f"  {head}: {PROMPTS[0]}{tokenizer.decode(outputs[head].answers[0], skip_special_tokens=True)}")
        print_comparison(outputs)
        results[way] = outputs
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
