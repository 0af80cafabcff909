"""Special tokens: those that end a text, the tokenizer's others, and unused ids."""

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_topk.model.errors import InputError


def end_ids(generation: GenerationConfig | None) -> list[int]:
    """Ids of the tokens that stop generation.

    Args:
        generation: the dense model's generation config, if it has one.
    """
    ends = None if generation is None else generation.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, num_always_on: int) -> list[int]:
    """Ids of special tokens: those that end a text, the named ones, then others, such as markers of turns and tools.

    Args:
        model: the dense model.
        tokenizer: its tokenizer, if it has one.
        num_always_on: A; the unnamed ones, which some models reserve by the hundred, get at most a quarter of it.
    """
    ends = end_ids(model.generation_config)
    if tokenizer is None:
        return list(dict.fromkeys(ends))
    first = dict.fromkeys([*ends, *tokenizer.all_special_ids])
    added = sorted(tokenizer.added_tokens_decoder.items())
    others = [token for token, one in added if one.special and token not in first]
    return [*first, *others[: num_always_on // 4]]


def unused_ids(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> list[int]:
    """Ids without a token in the tokenizer: rows that pad a head to a round size.

    Args:
        tokenizer: the dense model's, if it has one; without it the list is empty.
        vocab_size: V.
    """
    if tokenizer is None:
        return []
    return sorted(set(range(vocab_size)).difference(tokenizer.get_vocab().values()))


def check_ends_always_on(num_always_on: int, ends: list[int], vocab_size: int) -> None:
    """Refuse a number of always-on tokens that is too small for the tokens that end a text; 0 is allowed.

    Args:
        num_always_on: A.
        ends: ids that end a text.
        vocab_size: V; ids beyond it are ignored.

    Raises:
        InputError: when A is above 0 and below the number of tokens that end a text.
    """
    needed = len({token for token in ends if 0 <= token < vocab_size})
    if 0 < num_always_on < needed:
        raise InputError(
            f"num_always_on is {num_always_on}, fewer than the {needed} tokens that end a text: choose {needed} or "
            "more, so that generation stops where the dense model does, or 0 for none"
        )
