"""Compares outputs of an encoder-decoder in dense, sparse and lossless decoding, with each other and with targets."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import eq
from typing import Any

from ..examples import Example, is_speech_model, read_examples
from ..model.errors import InputError
from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from ..progress import progress
from ..targets import ROOM_FOR_PROMPT, SOURCES_AT_ONCE, generate_targets, not_empty, windows_of_examples
from ..windows import Window, readable_length
from .fidelity import Fidelity, measure_fidelity
from .lossless_comparison import head_mode

WITH_EXPERTS = ("sparse", "lossless")  # decodings
Score = Callable[[Sequence[str], Sequence[str]], dict[str, float]]  # values by metric, from targets and outputs


@dataclass(frozen=True)
class Outputs:
    """Metrics of a converted encoder-decoder.

    Attributes:
        fidelity: of the sparse head, on the targets of the text; without targets on the dense model's outputs.
        agreement_along_output: top-1 agreement on the dense model's outputs.
        sources: number of sources.
        same: number of sources with the same output as dense decoding, of sparse and of lossless decoding.
        scores: of the outputs against the targets, by metric and by decoding: "chrF" and "BLEU" of translations, 0 to
            100, and "WER" of transcripts, the word error rate as a share, without case and punctuation.
    """

    fidelity: Fidelity
    agreement_along_output: float
    sources: int
    same: dict[str, int]
    scores: dict[str, dict[str, float]]

    def metrics(self) -> dict[str, Any]:
        """The metrics by their names in `hf-topk evaluate --json`."""
        others = {
            "agreement_along_output": self.agreement_along_output,
            "sources": self.sources,
            "same_as_dense": self.same,
            "scores": self.scores,
        }
        return dataclasses.asdict(self.fidelity) | others

    def rows(self) -> dict[str, str]:
        """The metrics other than fidelity, as lines of a table."""
        same = ", ".join(f"{decoding} {count:,}" for decoding, count in self.same.items())
        return {
            "along its output": f"{self.agreement_along_output:.2%} (top-1 agreement on the dense model's outputs)",
            "same output": f"{same} of {self.sources:,} sources",
            **{
                metric: ", ".join(f"{decoding} {score:.4g}" for decoding, score in values.items())
                for metric, values in self.scores.items()
            },
        }


def measure_outputs(model: TopKExpertsForCausalLM, tokenizer: Any, text: str, positions: int | None) -> Outputs:
    """Decode sources with the dense head, the sparse head and lossless, and measure the outputs.

    Args:
        model: a converted encoder-decoder.
        tokenizer: its tokenizer, or its processor if it is a speech model.
        text: pairs or source text, or a folder of recordings.
        positions: tokens of the targets, at most; None takes all.

    Raises:
        InputError: when the text does not suit the model, or the package of the scores is not installed.
    """
    length = readable_length(model.config) - ROOM_FOR_PROMPT
    examples, _ = read_examples(text, model.config.dense_config, tokenizer, length, seed=0)
    has_targets = any(one.target is not None for one in examples)
    score = (_wer if is_speech_model(model.config.dense_config) else _chrf_and_bleu)() if has_targets else None
    with head_mode(model, "dense"):
        windows = windows_of_examples(model, examples, length, positions)
        examples = examples[: len(windows)]
        own = windows_of_examples(model, [dataclasses.replace(one, target_ids=None) for one in examples], length)
    fidelity = measure_fidelity(model, not_empty(windows))
    along = measure_fidelity(model, not_empty(own)) if score else fidelity
    dense = [(*one.token_ids, one.last_token) if one else () for one in own]
    rows = {"dense": dense, **_generate_with_experts(model, examples, length)}
    decode = getattr(tokenizer, "tokenizer", tokenizer).batch_decode
    texts = {decoding: decode([list(row) for row in some], skip_special_tokens=True) for decoding, some in rows.items()}
    same = {decoding: sum(map(eq, texts["dense"], texts[decoding])) for decoding in WITH_EXPERTS}
    scores = {} if score is None else _scores(score, examples, texts)
    return Outputs(fidelity, along.agreement, len(examples), same, scores)


def target_windows(model: TopKExpertsForCausalLM, tokenizer: Any, text: str, positions: int | None) -> list[Window]:
    """Windows of the targets of sources; the dense model generates those that are missing.

    Args:
        model: a converted model with an encoder.
        tokenizer: its tokenizer, or its processor if it is a speech model.
        text: pairs or source text, or a folder of recordings.
        positions: of a sample; None takes all.

    Raises:
        InputError: when the text does not suit the model.
    """
    length = readable_length(model.config) - ROOM_FOR_PROMPT
    examples, _ = read_examples(text, model.config.dense_config, tokenizer, length, seed=0)
    with head_mode(model, "dense"):
        return not_empty(windows_of_examples(model, examples, length, positions))


def _scores(score: Score, examples: Sequence[Example], texts: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Scores of the outputs whose source has a target, by metric and by decoding."""
    scores: dict[str, dict[str, float]] = {}
    for decoding, outputs in texts.items():
        pairs = [(one.target, output) for one, output in zip(examples, outputs, strict=True) if one.target]
        for metric, value in score([target for target, _ in pairs], [output for _, output in pairs]).items():
            scores.setdefault(metric, {})[decoding] = value
    return scores


def _generate_with_experts(
    model: Any, examples: Sequence[Example], new_tokens: int
) -> dict[str, list[tuple[int, ...]]]:
    """The token ids generated for each source, with the decoder's prompt, by decoding."""
    rows: dict[str, list[tuple[int, ...]]] = {decoding: [] for decoding in WITH_EXPERTS}
    with head_mode(model, "sparse"), progress("Generating with the sparse head", len(examples), "sources") as advance:
        for start in range(0, len(examples), SOURCES_AT_ONCE):
            some = examples[start : start + SOURCES_AT_ONCE]
            for decoding in WITH_EXPERTS:
                made = generate_targets(model, some, new_tokens, lossless=decoding == "lossless")
                rows[decoding] += [row for row, _ in made]
            advance(len(some))
    return rows


def _chrf_and_bleu() -> Score:
    try:
        from sacrebleu import corpus_bleu, corpus_chrf
    except ImportError as error:
        raise InputError("scores of translations need sacrebleu: pip install 'hf-topk[translation]'") from error

    def score(targets: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
        chrf, bleu = corpus_chrf(list(texts), [list(targets)]), corpus_bleu(list(texts), [list(targets)])
        return {"chrF": chrf.score, "BLEU": bleu.score}

    return score


def _wer() -> Score:
    try:
        import jiwer
    except ImportError as error:
        raise InputError("word error rates need jiwer: pip install 'hf-topk[speech]'") from error
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
