"""What dense, sparse and lossless decoding write of the same sources, beside one another and beside what is right."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..examples import Example, hears, read_examples
from ..model.errors import InputError
from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from ..progress import progress
from ..targets import ROOM_FOR_PROMPT, SOURCES_AT_ONCE, TargetWindow, write, write_targets
from ..windows import Window, readable_length
from .fidelity import Fidelity, measure_fidelity
from .lossless_comparison import head_mode

INSTALL_HINTS = {"sacrebleu": "pip install 'hf-topk[translation]'", "jiwer": "pip install 'hf-topk[speech]'"}
WAYS = ("dense", "sparse", "lossless")
Score = Callable[[Sequence[str], Sequence[str]], dict[str, float]]  # of targets and texts, by measure


@dataclass(frozen=True)
class Outputs:
    """Figures of a model that reads one thing and writes another.

    Attributes:
        fidelity: of the sparse head, on the targets that are given, or on what the dense model writes if none is.
        agreement_along_output: share of positions of what the dense model writes where both heads choose the same.
        sources: how many were read.
        same: sources of which sparse and lossless decoding write the same as dense decoding, by way.
        scores: of the sources with a target, by measure and by way: "chrF" and "BLEU" of a translation, 0 to 100, and
            "WER" of a transcript, the word error rate as a share. Case and punctuation do not count in the latter.
    """

    fidelity: Fidelity
    agreement_along_output: float
    sources: int
    same: dict[str, int]
    scores: dict[str, dict[str, float]]

    def figures(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        others = {
            "agreement_along_output": self.agreement_along_output,
            "sources": self.sources,
            "same_as_dense": self.same,
            "scores": self.scores,
        }
        return dataclasses.asdict(self.fidelity) | others

    def rows(self) -> dict[str, str]:
        """What there is beside the fidelity, for people to read."""
        same = ", ".join(f"{way} {count:,}" for way, count in self.same.items())
        return {
            "along its output": f"{self.agreement_along_output:.2%} (same likeliest token along what it writes)",
            "same output": f"{same} of {self.sources:,} sources",
            **{
                measure: ", ".join(f"{way} {score:.4g}" for way, score in by_way.items())
                for measure, by_way in self.scores.items()
            },
        }


def measure_outputs(model: TopKExpertsForCausalLM, tokenizer: Any, text: str, positions: int | None) -> Outputs:
    """Measure a converted model on sources, with targets or without.

    Args:
        model: a converted model with an encoder.
        tokenizer: its tokenizer, or its processor if it hears speech.
        text: pairs or source text, or a folder of recordings.
        positions: of a sample; None takes all.

    Raises:
        InputError: when the text does not suit the model, or what makes the scores is not installed.
    """
    length = readable_length(model.config) - ROOM_FOR_PROMPT
    examples, _ = read_examples(text, model.config.dense_config, tokenizer, length, seed=0)
    is_heard = hears(model.config.dense_config)
    score = None if all(one.target is None for one in examples) else (_wer if is_heard else _chrf_and_bleu)()
    with head_mode(model, "dense"):
        windows = write_targets(model, examples, length, positions)
        examples = examples[: len(windows)]
        own = write_targets(model, [dataclasses.replace(one, target_ids=None) for one in examples], length)
    fidelity = measure_fidelity(model, _whole(windows))
    along = measure_fidelity(model, _whole(own)) if score else fidelity
    texts = _texts(model, getattr(tokenizer, "tokenizer", tokenizer), examples, length)
    same = {way: sum(one == other for one, other in zip(texts["dense"], texts[way], strict=True)) for way in WAYS[1:]}
    scores = {} if score is None else _scores(score, examples, texts)
    return Outputs(fidelity, along.agreement, len(examples), same, scores)


def target_windows(model: TopKExpertsForCausalLM, tokenizer: Any, text: str, positions: int | None) -> list[Window]:
    """Windows of the targets of sources; the dense model writes those that are missing.

    Args:
        model: a converted model with an encoder.
        tokenizer: its tokenizer, or its processor if it hears speech.
        text: pairs or source text, or a folder of recordings.
        positions: of a sample; None takes all.

    Raises:
        InputError: when the text does not suit the model.
    """
    length = readable_length(model.config) - ROOM_FOR_PROMPT
    examples, _ = read_examples(text, model.config.dense_config, tokenizer, length, seed=0)
    with head_mode(model, "dense"):
        return _whole(write_targets(model, examples, length, positions))


def _scores(score: Score, examples: Sequence[Example], texts: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Scores of the sources with a target, by measure and by way."""
    scores: dict[str, dict[str, float]] = {}
    for way, written in texts.items():
        pairs = [(one.target, text) for one, text in zip(examples, written, strict=True) if one.target]
        for measure, value in score([target for target, _ in pairs], [text for _, text in pairs]).items():
            scores.setdefault(measure, {})[way] = value
    return scores


def _whole(windows: Sequence[TargetWindow | None]) -> list[Any]:
    whole = [one for one in windows if one is not None]
    if not whole:
        raise InputError("the model writes nothing of these sources: give others, or targets as well")
    return whole


def _texts(model: Any, tokenizer: Any, examples: Sequence[Example], new_tokens: int) -> dict[str, list[str]]:
    """What each way of decoding writes."""
    texts: dict[str, list[str]] = {way: [] for way in WAYS}
    with progress("Writing with both heads", len(examples), "sources") as advance:
        for start in range(0, len(examples), SOURCES_AT_ONCE):
            some = examples[start : start + SOURCES_AT_ONCE]
            for way in WAYS:
                with head_mode(model, "dense" if way == "dense" else "sparse"):
                    rows = write(model, some, new_tokens, lossless=way == "lossless")
                texts[way] += tokenizer.batch_decode([list(row) for row, _ in rows], skip_special_tokens=True)
            advance(len(some))
    return texts


def _chrf_and_bleu() -> Score:
    try:
        from sacrebleu import corpus_bleu, corpus_chrf
    except ImportError as error:
        raise InputError(f"scores of translations need sacrebleu: {INSTALL_HINTS['sacrebleu']}") from error

    def score(targets: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
        chrf, bleu = corpus_chrf(list(texts), [list(targets)]), corpus_bleu(list(texts), [list(targets)])
        return {"chrF": chrf.score, "BLEU": bleu.score}

    return score


def _wer() -> Score:
    try:
        import jiwer
    except ImportError as error:
        raise InputError(f"word error rates need jiwer: {INSTALL_HINTS['jiwer']}") from error
    words = jiwer.Compose(
        [
            jiwer.ToLowerCase(),
            jiwer.RemovePunctuation(),
            jiwer.RemoveMultipleSpaces(),
            jiwer.Strip(),
            jiwer.ReduceToListOfListOfWords(),
        ]
    )

    def score(targets: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
        return {"WER": jiwer.wer(list(targets), list(texts), words, words)}

    return score
