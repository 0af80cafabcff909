"""peft: LoRA on a converted model, saved, loaded and merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.tiny_models import tiny_converted, tiny_dense
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from hf_topk import InputError, TopKExpertsForCausalLM, TopKExpertsHead
from studies.tiny_models import tiny_model

IDS = torch.randint(2, 98, (4, 16), generator=torch.Generator().manual_seed(0))
PROMPT = IDS[:1, :6]
CHOICES: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Warned of by peft itself, at every call.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def adapted(target_modules: Any, base: TopKExpertsForCausalLM | None = None, **choices: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=target_modules, init_lora_weights=False, **choices)
    return get_peft_model(base or tiny_converted(), config)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    return model.eval()(input_ids=ids).logits


def train(model: Any, steps: int = 10) -> list[float]:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("targets", "expected"), [("all-linear", PROJECTIONS), (["q_proj", "v_proj"], {"q_proj", "v_proj"})]
)
def test_saved_loaded_and_merged(targets: Any, expected: set[str], tmp_path: Path) -> None:
    model = adapted(targets)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert names == expected
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    losses = train(model)
    assert losses[-1] < losses[0]
    expected_logits, tokens = logits_of(model), model.generate(input_ids=PROMPT, **CHOICES)
    model.save_pretrained(tmp_path / "adapter")
    without_peft = tiny_converted()
    without_peft.load_adapter(tmp_path / "adapter")
    assert logits_of(without_peft).equal(expected_logits)
    loaded = PeftModel.from_pretrained(tiny_converted(), tmp_path / "adapter")
    assert logits_of(loaded).equal(expected_logits)
    assert loaded.generate(input_ids=PROMPT, **CHOICES).equal(tokens)
    lossless = loaded.generate(input_ids=PROMPT, lossless=True, **CHOICES)
    assert loaded.get_base_model().last_generation_stats is not None
    loaded.get_base_model().head_mode = "dense"
    assert lossless.equal(loaded.generate(input_ids=PROMPT, **CHOICES))
    loaded.get_base_model().head_mode = "auto"
    merged = loaded.merge_and_unload()
    assert isinstance(merged, TopKExpertsForCausalLM)
    torch.testing.assert_close(logits_of(merged), expected_logits, rtol=1e-4, atol=1e-4)
    assert merged.generate(PROMPT, **CHOICES).equal(tokens)
    merged.save_pretrained(tmp_path / "merged")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    for ids in (IDS, PROMPT):  # dense, and sparse
        assert logits_of(again, ids).equal(logits_of(merged, ids))


@pytest.mark.parametrize(("model_type", "targets"), [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"])])
def test_an_adapter_of_the_wrapped_model_is_saved_and_loaded(
    model_type: str, targets: list[str], tmp_path: Path
) -> None:
    tiny_converted(tiny_dense(model_type)).save_pretrained(tmp_path / "model")
    model, again = (AutoModelForCausalLM.from_pretrained(tmp_path / "model") for _ in range(2))
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False)
    config.fan_in_fan_out = model_type == "gpt2"
    model.add_adapter(config)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model)
    assert not expected.equal(logits_of(again))
    found = again.load_adapter(tmp_path / "adapter")
    assert not found.missing_keys
    assert not found.unexpected_keys
    at_once = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(at_once, TopKExpertsForCausalLM)
    with_peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter"
    )
    for loaded in (again, at_once, with_peft):
        assert logits_of(loaded).equal(expected)
        assert loaded.generate(input_ids=PROMPT, **CHOICES).equal(model.generate(PROMPT, **CHOICES))


def test_router_is_trained_with_an_adapter() -> None:
    model = adapted(["q_proj", "v_proj"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with model.get_base_model().joint_training():
        train(model)
    after = model.merge_and_unload(safe_merge=True).head.router.state_dict()
    changed = [name for name in after if not after[name].equal(before[f"base_model.model.base.lm_head.router.{name}"])]
    assert sorted(changed) == ["bias", "rows"]


def test_an_adapted_head_works_once_merged(tmp_path: Path) -> None:
    model = adapted(["q_proj", "lm_head"], tiny_converted(tiny_dense(tied=False)))
    losses = train(model)
    assert losses[-1] < losses[0]
    with pytest.raises(InputError, match="merge it first"):
        model.generate(input_ids=PROMPT, **CHOICES)
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert isinstance(merged.head, TopKExpertsHead)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generate(PROMPT, **CHOICES).equal(merged.generate(PROMPT, **CHOICES))


def test_adapters_around_ends_tied_by_the_text_configuration_are_refused() -> None:
    dense = tiny_model(AutoModelForImageTextToText, "llama4")
    config = AutoConfig.for_model(**dense.config.to_dict())
    config.text_config.tie_word_embeddings = True
    assert not config.tie_word_embeddings
    tied = tiny_converted(AutoModelForImageTextToText.from_config(config))
    assert tied.head.weight is tied.get_input_embeddings().weight
    model = adapted(["lm_head"], tied)
    with pytest.raises(InputError, match="tied in this model, so it cannot be merged"):
        logits_of(model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fully_trained_head_is_merged(tied: bool, tmp_path: Path) -> None:
    dense = tiny_dense(tied=tied)
    model = adapted(["q_proj"], tiny_converted(dense), modules_to_save=["lm_head"])
    losses = train(model, steps=3)
    assert losses[-1] < losses[0]
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert isinstance(merged.head, TopKExpertsHead)
    assert merged.head.weight is not merged.get_input_embeddings().weight
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    assert not merged.head.weight.equal(dense.lm_head.weight)
    merged.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert logits_of(loaded).equal(logits_of(merged))
    assert loaded.generate(PROMPT, **CHOICES).equal(merged.generate(PROMPT, **CHOICES))


@pytest.mark.filterwarnings("ignore:Model with .tie_word_embeddings=True:UserWarning")
@pytest.mark.parametrize("choices", [{}, {"ensure_weight_tying": True}])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]])
def test_refuses_adapters_around_tied_ends(targets: list[str], choices: dict[str, Any]) -> None:
    model = adapted(targets, **choices)
    with pytest.raises(InputError, match="tied in this model"):
        train(model)
