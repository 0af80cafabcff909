"""Translation by prompting, with each head: python translation.py [MODEL].

It scores translations with sacrebleu: pip install 'hf-topk[translation]'.
"""

import sys

from common import Output, load, print_comparison, print_texts, write_with_each_head
from sacrebleu import corpus_chrf

SHOWN = (
    ("Good morning.", "Bonjour."),
    ("The cat sleeps on the chair.", "Le chat dort sur la chaise."),
    ("Where is the station?", "Où est la gare ?"),
)
SENTENCES = (
    ("Good evening.", "Bonsoir."),
    ("The dog is in the garden.", "Le chien est dans le jardin."),
    ("Where is the library?", "Où est la bibliothèque ?"),
    ("I would like a coffee, please.", "Je voudrais un café, s'il vous plaît."),
    ("The house is very old.", "La maison est très vieille."),
    ("We live in a small town.", "Nous habitons dans une petite ville."),
    ("She reads a book every week.", "Elle lit un livre chaque semaine."),
    ("The train leaves at nine o'clock.", "Le train part à neuf heures."),
)


def prompt_of(sentence: str) -> str:
    """The sentence after some that are translated."""
    shown = "".join(f"English: {english}\nFrench: {french}\n\n" for english, french in SHOWN)
    return f"{shown}English: {sentence}\nFrench:"


def main(folder: str | None = None, new_tokens: int = 32) -> tuple[dict[str, Output], dict[str, float]]:
    """Translate the sentences; print and return the tokens and the chrF of the translations, by head."""
    model, tokenizer = load(folder)
    inputs = [tokenizer(prompt_of(sentence), return_tensors="pt") for sentence, _ in SENTENCES]
    outputs = write_with_each_head(model, inputs, max_new_tokens=new_tokens, do_sample=False)
    texts = {
        # A translation ends with its line; a base model goes on with sentences of its own.
        head: [text.strip().partition("\n")[0] for text in tokenizer.batch_decode(output.answers, True)]
        for head, output in outputs.items()
    }
    chrf = {head: corpus_chrf(found, [[french for _, french in SENTENCES]]).score for head, found in texts.items()}
    print_texts([sentence for sentence, _ in SENTENCES], texts)
    print_comparison(outputs, chrF={head: f"{score:.1f}" for head, score in chrf.items()})
    return outputs, chrf


if __name__ == "__main__":
    main(*sys.argv[1:])
