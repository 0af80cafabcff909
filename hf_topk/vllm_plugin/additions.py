"""Separates the tensors that conversion added from the dense model's, while vLLM loads a checkpoint."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..model.configuration_topk_experts import TopKExpertsConfig
from ..model.errors import InputError
from ..model.head import TopKExpertsHead

AGAIN = "convert or fetch the model again"


def names_of_additions(config: TopKExpertsConfig) -> frozenset[str]:
    """Names of the tensors that conversion added, within the head."""
    with torch.device("meta"):
        size = (config.hidden_size, config.dense_config.get_text_config().vocab_size)
        return frozenset(TopKExpertsHead(nn.Linear(*size, bias=False), config).additions())


class Additions:
    """The tensors of a checkpoint that conversion added.

    Attributes:
        names: that they can have within the head.
        found: tensors by name.
    """

    def __init__(self, names: frozenset[str]) -> None:
        """Start with no tensors.

        Args:
            names: of [`names_of_additions`].
        """
        self.names = names
        self.found: dict[str, Tensor] = {}

    def set_aside(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Store the added tensors in `found`, and yield all others.

        Args:
            weights: names and tensors of the checkpoint.

        Raises:
            InputError: when the checkpoint cannot be read.
        """
        # A dense model may have a `router.bias` of its own, but no second tensor with such a name beside it.
        by_parent: dict[str, dict[str, Tensor]] = defaultdict(dict)
        try:
            for name, tensor in weights:
                own_name = next((own for own in self.names if name.endswith(f".{own}")), None)
                if own_name is None:
                    yield name, tensor
                else:
                    by_parent[name.removesuffix(own_name)][own_name] = tensor
        except SafetensorError as error:
            raise InputError(f"a file of the checkpoint is damaged ({error}): {AGAIN}") from error
        for parent, tensors in by_parent.items():
            if len(tensors) > 1:
                self.found = tensors
            else:
                yield from ((parent + own_name, tensor) for own_name, tensor in tensors.items())

    def load_into(self, head: TopKExpertsHead) -> None:
        """Copy the found tensors into a head.

        Args:
            head: of the same configuration.

        Raises:
            InputError: when one is missing, or does not fit the configuration or the vocabulary.
        """
        places = head.additions()
        missing = sorted(places.keys() - self.found.keys())
        if missing:
            raise InputError(f"the checkpoint is not complete, '{missing[0]}' of the head is missing: {AGAIN}")
        for name, place in places.items():
            found = self.found[name]
            if found.shape != place.shape:
                raise InputError(
                    f"'{name}' of the head is {list(found.shape)}, config.json says {list(place.shape)}: {AGAIN}"
                )
            with torch.no_grad():
                place.copy_(found)
        self.found = {}
        check_ids(head)


def check_ids(head: TopKExpertsHead) -> None:
    """Check that every token of the vocabulary is always on or in an expert.

    Args:
        head: the head, on all rows.

    Raises:
        InputError: when a token is missing, or an id is outside the vocabulary.
    """
    ids = torch.cat([head.always_on_ids, head.expert_ids.flatten()]).unique()
    if not torch.equal(ids, torch.arange(head.out_features, device=ids.device)):
        raise InputError(f"the experts' token ids are not those of a vocabulary of {head.out_features}: {AGAIN}")
