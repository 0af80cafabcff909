"""A conversion at the size of real models, without their weights: `make study NAME=at_size ARGS="--shape SHAPE"`.

The head is random but has the structure of real ones: rows form clusters of very unequal sizes, the energy decays over
the directions, and frequent tokens lie further along a direction that all states share. The decoder has no layers. Its
state at a token is near that token's row, so that the token, its cluster and frequent tokens get most of the
probability. Everything after the decoder is the real pipeline.
"""

import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_topk.bench.shapes import SHAPES, shape_config
from hf_topk.cli import main
from hf_topk.convert.pipeline import convert
from hf_topk.convert.recipe import Recipe
from hf_topk.model.errors import InputError
from hf_topk.progress import progress
from hf_topk.windows import Window

BYTES_BESIDE_HEADS = 2 * 10**9  # RAM that a conversion may take on top of twice the head
WINDOW_LENGTH = 200
ROWS_AT_ONCE = 4096
NOISE_VECTORS = 4096
DIRECTIONS_AT_HALF = 64  # the direction with half the energy of the first
SHARE_OF_CLUSTER, SHARE_OF_LIKELIHOOD = 0.6, 0.1  # of a row's energy
LOGIT_DEVIATION, LIKELIHOOD_DEVIATION = 2.0, 1.5  # of logits of unrelated tokens, and of the part from the frequency
NEARNESS = (1.0, 2.2)  # of a state to its row, relative to that of probability one half


class StatesNearRows(nn.Embedding):
    """Replaces the decoder: a state near the row of each token, from this token and the one before it."""

    noise: Tensor

    def __init__(self, vocab_size: int, hidden_size: int, noise: Tensor, nearness: float) -> None:
        """Prepare; the rows are set later.

        Args:
            vocab_size: V.
            hidden_size: d.
            noise: vectors to add to the rows, [number of vectors, d], norm 1.
            nearness: the cosine of state and row at which the token has a probability of one half.
        """
        super().__init__(vocab_size, hidden_size, device="meta")
        self.register_buffer("noise", noise, persistent=False)
        self.nearness = nearness

    def forward(self, token_ids: Tensor) -> Tensor:
        """States, before the final norm: token ids [B, T] to [B, T, d]."""
        before = nn.functional.pad(token_ids, (1, 0))[:, :-1]
        low, high = NEARNESS
        drawn = (token_ids * 7919 + before * 104_729) % 1009 / 1009
        share = (self.nearness * (low + (high - low) * drawn.square())).clamp_max(0.9).unsqueeze(-1)
        rows = nn.functional.normalize(super().forward(token_ids).float(), dim=-1)
        noise = self.noise[(token_ids * 31 + before) % NOISE_VECTORS] + self.noise[(before * 17 + 5) % NOISE_VECTORS]
        return (share * rows + (1 - share.square()).sqrt() * 0.5**0.5 * noise.float()).to(self.weight.dtype)


def model_with_random_head(vocab_size: int, hidden_size: int, seed: int) -> tuple[PreTrainedModel, Tensor]:
    """Make a bfloat16 model with a head of a given size.

    Args:
        vocab_size: V.
        hidden_size: d.
        seed: of all random numbers.

    Returns:
        The model, and the frequency of each token, not normalised, [V].
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = (1 + torch.arange(hidden_size) / DIRECTIONS_AT_HALF).rsqrt()
    spectrum /= spectrum.square().mean().sqrt()

    def vectors(count: int) -> Tensor:
        return torch.randn(count, hidden_size, generator=generator) * spectrum

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=0,
        num_attention_heads=1,
        max_position_embeddings=WINDOW_LENGTH,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    frequencies = 1 / (10 + torch.randperm(vocab_size, generator=generator))
    likelihood = frequencies.log()
    likelihood = ((likelihood - likelihood.mean()) / likelihood.std()).unsqueeze(-1)
    clusters = vectors(vocab_size // 100)
    sizes = 1 / torch.arange(1, len(clusters) + 1)  # relative
    common = vectors(1)
    own = 1 - SHARE_OF_CLUSTER - SHARE_OF_LIKELIHOOD
    norm = LOGIT_DEVIATION / float(spectrum.pow(4).mean().sqrt())  # of a row
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weight = model.lm_head.weight.data
    with progress("Making the head", vocab_size, "tokens") as advance:
        for start in range(0, vocab_size, ROWS_AT_ONCE):
            part = weight[start : start + ROWS_AT_ONCE]
            cluster = clusters[torch.multinomial(sizes, len(part), replacement=True, generator=generator)]
            rows = SHARE_OF_CLUSTER**0.5 * cluster + own**0.5 * vectors(len(part))
            rows += SHARE_OF_LIKELIHOOD**0.5 * likelihood[start : start + ROWS_AT_ONCE] * common
            part.copy_(rows * norm / hidden_size**0.5)
            advance(len(part))
    # The log-sum-exp of all other logits, which are nearly normal around zero.
    log_sum = torch.tensor(float(vocab_size)).log() + LOGIT_DEVIATION**2 / 2
    common *= LIKELIHOOD_DEVIATION / (norm * (SHARE_OF_LIKELIHOOD * hidden_size) ** 0.5)
    noise = nn.functional.normalize(vectors(NOISE_VECTORS) + 0.5**0.5 * common, dim=-1).to(torch.bfloat16)
    nearness = float(log_sum) / norm / hidden_size**0.5
    states = StatesNearRows(vocab_size, hidden_size, noise, nearness)
    states.weight = model.lm_head.weight
    model.model.embed_tokens = states
    return model.eval(), frequencies


def random_windows(frequencies: Tensor, positions: int, seed: int) -> list[Window]:
    """Draw token ids, every window a document of its own.

    Args:
        frequencies: of the tokens, not normalised, [V].
        positions: tokens of all windows.
        seed: of the random draws.
    """
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.multinomial(frequencies, positions, replacement=True, generator=generator)
    return [Window(number, tuple(ids.tolist())) for number, ids in enumerate(token_ids.split(WINDOW_LENGTH))]


def convert_at_size(vocab_size: int, hidden_size: int, recipe: Recipe) -> dict[str, object]:
    """Convert a model with a random head, and measure the cost.

    Args:
        vocab_size: V.
        hidden_size: d.
        recipe: every choice; its text is not read.

    Returns:
        Seconds per step, peak memory of this process, and the metrics of the conversion.
    """
    model, frequencies = model_with_random_head(vocab_size, hidden_size, recipe.seed)
    windows = random_windows(frequencies, recipe.positions, recipe.seed)
    with tempfile.TemporaryDirectory() as folder:
        report = convert(model, None, recipe, windows=windows, folder=Path(folder))
    head_bytes = report.model.head.dense_bytes()
    allowed = 2 * head_bytes + BYTES_BESIDE_HEADS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "positions": recipe.positions,
        "threads": torch.get_num_threads(),
        "step_seconds": {step: round(seconds, 1) for step, seconds in report.step_seconds.items()},
        "seconds": round(sum(report.step_seconds.values()) - report.step_seconds["hidden states"], 1),
        "head_bytes": head_bytes,
        "peak_bytes": peak,
        "peak_share": peak / allowed,
        **{name: value for name, value in report.metrics().items() if name not in ("seconds", "positions")},
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def at_size(
    shape: Annotated[str | None, typer.Option(help=f"Shape of the head: {', '.join(SHAPES)}.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Rows of the head, instead of a shape.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Columns of the head, instead of a shape.")] = None,
    positions: Annotated[int, typer.Option(help="Hidden states, a tenth of them held out.")] = 100_000,
    target_agreement: Annotated[float, typer.Option(help="The agreement that k is chosen for.")] = 0.995,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: torch's own choice]")] = None,
) -> None:
    """Convert a random head of a real size; print seconds per step, peak memory and agreement."""
    if shape is not None:
        config = shape_config(shape)
        vocab_size, hidden_size = config.vocab_size, config.hidden_size
    if vocab_size is None or hidden_size is None:
        raise InputError("no size: give --shape, or --vocab-size and --hidden-size")
    if threads is not None:
        torch.set_num_threads(threads)
    choices = {"positions": positions, "target_agreement": target_agreement, "allow_below_target": True}
    print(json.dumps(convert_at_size(vocab_size, hidden_size, Recipe.from_dict(choices)), indent=2))


if __name__ == "__main__":
    main(app)
