"""Candidate generators that Transformers chooses by the class, head and checkpoint of the target."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import QUICK, tiny_converted, tiny_dense, tiny_text, tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import MtpModel
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoePreTrainedModel

from hf_topk import TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert_checkpoint
from studies.tiny_models import PROBE, tiny_model

PROMPT = PROBE[:1]
CHOICES = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}


def converted(dense: PreTrainedModel, experts: int = 6) -> TopKExpertsForCausalLM:
    """A converted model; it is the dense model if all 6 experts are picked."""
    return tiny_converted(dense, num_experts_per_tok=experts, head_mode="sparse")


def generate(model: Any, **choices: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(PROMPT, **{**CHOICES, **choices})


def check_target(dense: PreTrainedModel, **assisted: Any) -> None:
    """Check that greedy tokens are the target's own, and sampled ones those of the dense model with the same drafts."""
    expected = generate(dense)
    assert generate(dense, **assisted).equal(expected)
    assert generate(converted(dense), **assisted).equal(expected)
    sampled = {**assisted, "do_sample": True, "top_k": 0}
    assert generate(converted(dense), **sampled).equal(generate(dense, **sampled))
    few = converted(dense, 1)
    assert generate(few, **assisted).equal(generate(few))
    assert generate(few, **assisted, lossless=True).equal(expected)


def test_early_exit_drafting() -> None:
    dense = tiny_dense(tied=False)
    check_target(dense, assistant_early_exit=1)
    assert dense.config.num_hidden_layers == 2


def test_block_drafting_with_the_target_s_head() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "muse_glimmer_assistant",
        **sizes,
        head_dim=8,
        num_hidden_layers=2,
        layer_types=["full_attention"] * 2,
        target_layer_ids=[0, 1],
        block_size=4,
        mask_token_id=3,
    )
    torch.manual_seed(1)
    assistant = AutoModel.from_config(config).eval()
    check_target(tiny_dense(tied=False), assistant_model=assistant, speculation_type="dflash")


class Gemma4AssistantDrafter(nn.Module):
    """Replaces a Gemma 4 assistant, which Transformers 5.23 cannot build; drafts from the target's hidden state."""

    device = torch.device("cpu")

    def __init__(self, target: PreTrainedModel) -> None:
        super().__init__()
        self.config, self.head = target.config, target.get_output_embeddings()
        self.generation_config = GenerationConfig(num_assistant_tokens=3)
        self.drafts = 0

    def forward(self, inputs_embeds: Tensor, shared_kv_states: dict[str, Any], **_: Any) -> SimpleNamespace:
        assert shared_kv_states is not None
        self.drafts += 1
        state = inputs_embeds.chunk(2, dim=-1)[1]
        return SimpleNamespace(logits=self.head(state), last_hidden_state=state)


def test_assistant_for_classes_of_gemma_4_alone() -> None:
    dense = tiny_model(AutoModelForImageTextToText, "gemma4")
    assistant = Gemma4AssistantDrafter(dense)
    expected = generate(dense)
    for experts, choices in ((6, {}), (1, {"lossless": True})):
        before = assistant.drafts
        assert generate(converted(dense, experts), assistant_model=assistant, **choices).equal(expected)
        assert assistant.drafts > before


@pytest.fixture(scope="module")
def with_further_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a dense checkpoint with a multi-token prediction layer."""
    folder = tmp_path_factory.mktemp("mtp") / "dense"
    dense = tiny_model(AutoModelForCausalLM, "glm4_moe")
    dense.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name, tensor in MtpModel(dense, 1).state_dict().items():
        if name.startswith("layers.0."):
            on_disk = name.replace("layers.0.", "model.layers.2.").replace("mtp_block.", "")
            on_disk = on_disk.replace("post_norm", "shared_head.norm")
            tensors |= as_saved(on_disk, torch.randn(tensor.shape, generator=generator) * 0.2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def as_saved(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors as on disk, where experts and layers are separate tensors."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: tensor}
    before, _, kind = name.rpartition(".")
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return {
        f"{before}.{expert}.{one}.weight": part.contiguous()
        for expert, of_one in enumerate(tensor)
        for one, part in zip(kinds, of_one.chunk(len(kinds)), strict=True)
    }


def test_multi_token_prediction_layers(
    with_further_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the dense checkpoint, copied to the folder of the converted model."""
    monkeypatch.setattr(Glm4MoePreTrainedModel, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    dense = AutoModelForCausalLM.from_pretrained(with_further_layers)
    check_target(dense, use_mtp=True)
    recipe = Recipe(**QUICK, text=str(tiny_text(tmp_path / "text.jsonl")))
    convert_checkpoint(str(with_further_layers), tmp_path / "out", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.num_experts_per_tok, model.head_mode = model.head.num_experts, "sparse"
    head, names = model.head, model.state_dict().keys()
    assert generate(model, use_mtp=True).equal(generate(dense))
    assert model.head is head
    assert model.state_dict().keys() == names


def test_a_model_without_prediction_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="num_mtp_layers"):
        generate(converted(tiny_dense(tied=False)), use_mtp=True)
