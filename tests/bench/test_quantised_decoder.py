"""Decoders in 8 and 4 bits: they approximate the float layers, and are measured."""

import copy

import pytest
import torch
from support.tiny_models import tiny_converted, tiny_dense
from torch import nn

from hf_topk.bench.quantised_decoder import Int4Linear, Int8Linear, check_decoder_format, quantise_decoder
from hf_topk.model.errors import InputError


@pytest.mark.parametrize(("kind", "most"), [(Int8Linear, 0.02), (Int4Linear, 0.15)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_layers_approximate_the_float_layers(kind: type, most: float, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).to(dtype)
    with torch.no_grad():
        for shape in ((1, 64), (2, 5, 64), (1, 1, 64)):
            inputs = torch.randn(shape).to(dtype)
            found, exact = kind(linear)(inputs), linear(inputs)
            assert found.dtype == dtype
            assert found.shape == exact.shape
            assert (found - exact).norm() / exact.norm() < most


@pytest.mark.parametrize(("body", "kind"), [("int8", Int8Linear), ("int4", Int4Linear)])
def test_every_linear_layer_but_the_head_is_quantised(body: str, kind: type) -> None:
    model = tiny_converted(tiny_dense(intermediate_size=64))
    before = copy.deepcopy(model.head.state_dict())
    linears = [name for name, module in model.base.named_modules() if type(module) is nn.Linear]
    quantise_decoder(model, body)
    assert {name for name, module in model.base.named_modules() if isinstance(module, kind)} == set(linears)
    assert all(tensor.equal(before[name]) for name, tensor in model.head.state_dict().items())
    ids = torch.tensor([[5, 17, 42]])
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 7)


def test_layers_of_unsupported_sizes_are_not_quantised() -> None:
    model = tiny_converted(tiny_dense(intermediate_size=40))
    quantise_decoder(model, "int4")
    assert isinstance(model.base.model.layers[0].self_attn.q_proj, Int4Linear)
    assert type(model.base.model.layers[0].mlp.down_proj) is nn.Linear


def test_refuses_an_unknown_format() -> None:
    with pytest.raises(InputError, match="unknown decoder format 'int2': choose one of int8, int4"):
        check_decoder_format("int2", torch.device("cpu"))
    with pytest.raises(InputError, match=r"runs only on CPUs, not on cuda"):
        check_decoder_format("int4", torch.device("cuda"))
