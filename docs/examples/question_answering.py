"""Question answering over a given passage, with each head: python question_answering.py [MODEL]."""

import sys

from common import Output, load, print_comparison, print_texts, write_with_each_head
from transformers import BatchEncoding, PreTrainedTokenizerBase

PASSAGES = (
    (
        "The lighthouse on Gull Island was built in 1874 by Anna Brandt, an engineer from Hamburg. It is 31 metres "
        "high. Its lamp burned whale oil until 1902, when it was changed to electricity. The last keeper, Olaf Reed, "
        "left the island in 1968.",
        (
            ("Who built the lighthouse?", "Brandt"),
            ("In which year was it built?", "1874"),
            ("How high is it?", "31"),
            ("What did the lamp burn at first?", "whale oil"),
            ("Who was the last keeper?", "Reed"),
        ),
    ),
    (
        "Every March the village of Torra holds a cheese market. The cheese is made from the milk of brown goats, "
        "which graze on the slopes of Mount Sele. In 2019 the first prize went to Lucia Ferri, a baker, for a cheese "
        "that had aged for fourteen months in a disused railway tunnel.",
        (
            ("In which month is the market?", "March"),
            ("Which animals give the milk?", "goats"),
            ("Who won the first prize in 2019?", "Ferri"),
            ("For how many months had the cheese aged?", "fourteen"),
            ("Where had the cheese aged?", "tunnel"),
        ),
    ),
)


def prompt_of(tokenizer: PreTrainedTokenizerBase, passage: str, question: str) -> BatchEncoding:
    """The passage and the question, as a user's message if the model has a chat template, else as plain text."""
    text = f"{passage}\n\nQuestion: {question}"
    if tokenizer.chat_template is None:
        return tokenizer(f"{text}\nAnswer:", return_tensors="pt")
    message = {"role": "user", "content": f"Answer in a few words, from this passage alone.\n\n{text}"}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)


def main(folder: str | None = None, new_tokens: int = 32) -> tuple[dict[str, Output], dict[str, int]]:
    """Answer the questions; print and return the answers and how many are right, by head."""
    model, tokenizer = load(folder)
    asked = [(passage, *pair) for passage, pairs in PASSAGES for pair in pairs]
    inputs = [prompt_of(tokenizer, passage, question) for passage, question, _ in asked]
    outputs = write_with_each_head(model, inputs, max_new_tokens=new_tokens, do_sample=False)
    texts = {head: tokenizer.batch_decode(output.answers, True) for head, output in outputs.items()}
    right = {
        head: sum(expected.lower() in answer.lower() for (*_, expected), answer in zip(asked, answers, strict=True))
        for head, answers in texts.items()
    }
    print_texts([question for _, question, _ in asked], texts)
    print_comparison(outputs, right={head: f"{count} of {len(asked)}" for head, count in right.items()})
    return outputs, right


if __name__ == "__main__":
    main(*sys.argv[1:])
