"""The speed of decoding, from what `hf-topk bench --json` printed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..bench.report import NAMES
from ..model.errors import InputError, one_line
from ..model.head import TopKExpertsHead


@dataclass(frozen=True)
class Rate:
    """Tokens/s of one way to decode.

    Attributes:
        name: of the way, for people.
        median: over rounds.
        low: first quartile.
        high: third quartile.
    """

    name: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """The speed of greedy decoding at batch 1.

    Attributes:
        circumstances: machine, threads and dtype.
        rates: of the dense model, the converted one and other methods.
    """

    circumstances: str
    rates: list[Rate]

    @property
    def by_name(self) -> dict[str, Rate]:
        """The rates by name."""
        return {rate.name: rate for rate in self.rates}

    @classmethod
    def read(cls, file: Path, head: TopKExpertsHead) -> Self:
        """Read what `hf-topk bench --json` printed.

        Args:
            file: that holds it.
            head: of the model that it should be of.

        Raises:
            InputError: when the file cannot be read, holds something else, or is of another model.
        """
        try:
            metrics: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            rates = [
                Rate(name, metrics["e2e"][key], *metrics["spread"]["e2e"][key])
                for key, name in ((f"{key}_tok_s", name) for key, name in NAMES.items())
                if metrics["e2e"].get(key) is not None
            ]
            sizes = metrics["sizes"]
            circumstances = f"{metrics['machine']}, {metrics['threads']} threads, {metrics['dtype']}"
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{file} is not what `hf-topk bench DIR --json` prints ({one_line(error)}): write it with "
                f"`hf-topk bench DIR --json > {file}`"
            ) from error
        for name in ("vocab_size", "num_experts", "num_experts_per_tok"):
            own = head.out_features if name == "vocab_size" else getattr(head, name)
            if sizes.get(name) != own:
                raise InputError(f"{file} is of another model: its {name} is {sizes.get(name)}, this model's is {own}")
        return cls(circumstances, rates)
