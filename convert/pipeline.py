"""A conversion in memory: hidden states, partition, distillation, operating point."""

import dataclasses
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_topk.evaluation.fidelity import Fidelity, measure_fidelity
from hf_topk.evaluation.observations import Observer
from hf_topk.model.configuration_topk_experts import TopKExpertsConfig
from hf_topk.model.encoder_decoder import converted_class
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.model.ties import check_ties
from hf_topk.windows import Window, readable_length

from .load_calibration_text import Sample, check_windows, read_calibration_text
from .processes import ALONE, Processes
from .recipe import Recipe, ResolvedRecipe, calibration_text_name
from .report import Report, StepClock
from .steps.choose_operating_point import (
    Target,
    agrees,
    check_target,
    choose_num_rescored,
    choose_operating_point,
)
from .steps.choose_ranks import choose_ranks, default_ranks
from .steps.distill import (
    STATES_FOR_STATISTICS,
    evenly_spaced,
    expert_masses,
    groups_of,
    start_router,
    token_statistics,
    train_router,
)
from .steps.find_head import check_causal, check_finite, head_of
from .steps.fit_combiner import fit_combiner
from .steps.generate_targets import windows_with_targets
from .steps.held_out import DenseArgmax, dense_argmax, split_by_document
from .steps.hidden_states import HiddenStates, collect
from .steps.pack_router_and_tail import Quantiser, cast_additions, metric_of
from .steps.place_tokens import place_tokens
from .steps.special_tokens import check_ends_always_on, end_ids, special_ids, unused_ids

POSITIONS_WITH_LOGITS = 2500  # of the held-out ones, about


def convert(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe,
    *,
    windows: Sample | None = None,
    folder: Path | None = None,
    processes: Processes = ALONE,
    stored_type: torch.dtype | None = None,
) -> Report:
    """Convert a dense language model in memory.

    Args:
        model: the dense model; it is not changed, and its tensors are shared with the result.
        tokenizer: its tokenizer, or the processor of a speech model; reads the text.
        recipe: every choice.
        windows: of the calibration text, or the examples of a model with an encoder; read from `recipe.text` if None.
        folder: for the hidden states, which a later call with the same arguments resumes from; temporary if None.
        processes: that share the forward passes of the dense model; released after the last one.
        stored_type: dtype to store the result in; that of `model` if None.

    Returns:
        The converted model and its metrics.

    Raises:
        InputError: when model, calibration text and recipe do not fit together.
        TargetNotReachedError: when no allowed operating point reaches the target agreement of the recipe.

    Examples:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> from hf_topk.convert import Recipe, convert
        >>> dense = AutoModelForCausalLM.from_pretrained("dense")
        >>> report = convert(dense, AutoTokenizer.from_pretrained("dense"), Recipe(text="books/"))
        >>> report.model.save_pretrained("converted")
        >>> report.fidelity.agreement > 0.99
        True
    """
    head = head_of(model)
    resolved = recipe.resolve(head.out_features, readable_length(model.config, recipe.window_length))
    check_ends_always_on(resolved.num_always_on, end_ids(model.generation_config), head.out_features)
    if windows is None:
        windows = read_calibration_text(model.config, tokenizer, resolved)[0]
    if not model.config.is_encoder_decoder:  # which may have to generate the targets first
        check_windows(cast(list[Window], windows), *head.weight.shape)
    with tempfile.TemporaryDirectory() as temporary:
        return convert_checked(
            model, tokenizer, resolved, windows, folder or Path(temporary), processes=processes, stored_type=stored_type
        )


def convert_checked(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: ResolvedRecipe,
    sample: Sample,
    folder: Path,
    *,
    processes: Processes = ALONE,
    stored_type: torch.dtype | None = None,
) -> Report:
    """As [`convert`], with arguments that are already checked, all but the weights."""
    started, clock = time.monotonic(), StepClock()
    check_finite(head_of(model))
    has_encoder = model.config.is_encoder_decoder
    with clock("targets") if has_encoder else nullcontext():
        windows = windows_with_targets(model, sample, recipe, folder, processes)
    check_causal(model, windows[0] if has_encoder else None)
    check_ties(model)
    if has_encoder:
        check_windows(windows, *head_of(model).weight.shape)
    to_distil_on, held_out = split_by_document(windows, recipe.held_out, recipe.seed)
    kept = HiddenStates.open(folder, head_of(model).in_features, model.dtype)
    with clock("hidden states"):
        states = collect(model, to_distil_on, kept, processes)
    processes.release()
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    kinds = special_ids(model, tokenizer, recipe.num_always_on), unused_ids(tokenizer, recipe.vocab_size)
    converted, quantise, router_kl = _convert_head(model, *kinds, states, recipe, clock, stored_type or model.dtype)
    with clock("operating point"):
        dense = dense_argmax(converted, held_out)
        agreed = _set_operating_point(converted, dense, recipe, quantise)
        if recipe.combine == "learned":
            fit_combiner(converted.head, states, recipe.seed)
            cast_additions(converted.head)
            agreed = agrees(converted.head, dense)
        observer = Observer(converted.head)
        fidelity = _measure(converted, held_out, dense, agreed, observer)
        reached, by_kind = dense.reached(agreed), dense.by_kind(agreed)
        if recipe.target_agreement is not None:
            check_target(reached, fidelity, by_kind, Target.of(recipe), converted.head.num_experts_per_tok)
    return Report(
        model=converted,
        recipe=recipe,
        fidelity=fidelity,
        agreement_by_kind=by_kind,
        agreement_reached=reached,
        observations=observer.observations(f"held-out documents of {calibration_text_name(recipe.text)}"),
        dense_argmax=dense,
        num_experts=converted.head.num_experts,
        added_bytes=converted.head.added_bytes(),
        distilled_positions=states.shape[0],
        router_kl=router_kl,
        seconds=time.monotonic() - started,
        step_seconds=clock.seconds,
        probe=held_out[0] if has_encoder else None,
    )


def _convert_head(
    model: PreTrainedModel,
    specials: list[int],
    unused: list[int],
    states: Tensor,
    recipe: ResolvedRecipe,
    clock: StepClock,
    stored_type: torch.dtype,
) -> tuple[TopKExpertsForCausalLM, Quantiser, float]:
    """Make the converted model, with a float router and no tail yet; return it with the router's KL divergence."""
    converted = converted_class(model.config, model).from_dense(model, config_of(model, recipe))
    head = converted.head
    weight, bias = head.weight.detach(), None if head.full_bias is None else head.full_bias.detach()
    with clock("token statistics"):
        statistics = token_statistics(states, weight, bias)
    head.stored_type = converted.config.dtype = stored_type
    converted.config.get_text_config().dtype = stored_type
    with clock("partition"):
        place_tokens(head, specials, unused, statistics, recipe.seed)
    with clock("experts' masses"):
        masses = expert_masses(states, weight, bias, groups_of(head))
    with clock("distillation"):
        start_router(head.router, states, masses)
        router_kl = train_router(
            head.router, states, masses, recipe.distill_steps, recipe.batch_size, recipe.learning_rate, recipe.seed
        )
        metric = metric_of(evenly_spaced(states, STATES_FOR_STATISTICS).to(weight.device))
    return converted, Quantiser(converted, metric, statistics.probabilities, unused), router_kl


def _measure(
    converted: TopKExpertsForCausalLM, held_out: list[Window], dense: DenseArgmax, agreed: Tensor, observer: Observer
) -> Fidelity:
    """Agreement at all held-out positions; what takes all logits at some."""
    some = held_out[:: -(-len(dense.best) // POSITIONS_WITH_LOGITS)]
    return dataclasses.replace(
        measure_fidelity(converted, some, observer),
        agreement=int(agreed.sum()) / len(agreed),
        agreement_lower_bound=dense.bound(agreed),
        positions=len(agreed),
    )


def _set_operating_point(
    converted: TopKExpertsForCausalLM, dense: DenseArgmax, recipe: ResolvedRecipe, quantise: Quantiser
) -> Tensor:
    """Quantise router and tail; choose their ranks, k and R unless the recipe gives them.

    Returns:
        Whether the sparse argmax is then the dense argmax, bool [N].
    """
    converted.head.requires_grad_(True)
    for added in converted.head.children():  # trained only in joint training
        cast(Any, added).requires_grad_(False)
    if recipe.num_experts_per_tok is None:
        argmax_ranks = choose_ranks(converted, dense, recipe, quantise)
        return choose_operating_point(converted, dense, argmax_ranks, Target.of(recipe))
    quantise(default_ranks(recipe))
    if recipe.num_rescored is None:
        choose_num_rescored(converted, dense)
    return agrees(converted.head, dense)


def config_of(model: PreTrainedModel, recipe: ResolvedRecipe) -> TopKExpertsConfig:
    """The configuration of the model that a resolved recipe makes of a dense one."""
    copied = ["expert_size", "num_always_on", "combine", "sparse_max_positions"]
    choices, ranks = recipe.to_dict(), default_ranks(recipe)
    copied += ["num_rescored"] if recipe.num_rescored is not None else []
    return TopKExpertsConfig(
        text_config=model.config,
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.num_experts_per_tok or 1,
        router_rank=ranks.router,
        tail_rank=ranks.tail,
        **{name: choices[name] for name in copied},
    )
