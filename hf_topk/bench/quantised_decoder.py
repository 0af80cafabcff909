"""Quantises the linear layers of the decoder to int8 or int4, as is common on CPUs, for benchmarks.

It uses the torch kernels that torchao's CPU formats are built on; in eager mode torchao's own are slower than float32.
"""

from typing import cast

import torch
from torch import Tensor, nn

from ..model.errors import InputError
from ..model.kernels import COLUMNS_OF_KERNEL, int4_kernel, int8_kernel
from ..model.modeling_topk_experts import TopKExpertsForCausalLM

DECODER_FORMATS = ("int8", "int4")
GROUP = 32  # columns per scale and zero point in int4, as in llama.cpp's formats
ROWS_OF_KERNEL = 16
SMALLEST_SCALE = 1e-9


class Int8Linear(nn.Module):
    """A linear layer of int8 rows with one scale each; inputs and products are rounded to bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        """Quantise a layer."""
        super().__init__()
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=-1).clamp_min(SMALLEST_SCALE) / 127
        self.register_buffer("rows", (weight / scales.unsqueeze(-1)).round().to(torch.int8))
        self.register_buffer("scales", scales.bfloat16())
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..., d] to [..., rows]."""
        rows, scales = cast(Tensor, self.rows), cast(Tensor, self.scales)
        return _like_linear(int8_kernel(inputs.flatten(0, -2), rows, scales), inputs, self.bias)


class Int4Linear(nn.Module):
    """A linear layer of int4 rows with a scale and a zero point per 32 columns."""

    def __init__(self, linear: nn.Linear) -> None:
        """Quantise a layer."""
        super().__init__()
        groups = linear.weight.detach().float().unflatten(-1, (-1, GROUP))
        least, most = groups.amin(dim=-1), groups.amax(dim=-1)
        scales = ((most - least) / 15).clamp_min(SMALLEST_SCALE).bfloat16().float()
        zeros = least + 8 * scales
        codes = ((groups - zeros.unsqueeze(-1)) / scales.unsqueeze(-1)).round().add(8).clamp(0, 15)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
        self.register_buffer("packed", packed)
        self.register_buffer(
            "scales_and_zeros", torch.stack([scales, zeros], dim=-1).transpose(0, 1).bfloat16().contiguous()
        )
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..., d] to [..., rows]."""
        packed, scales_and_zeros = cast(Tensor, self.packed), cast(Tensor, self.scales_and_zeros)
        return _like_linear(int4_kernel(inputs.flatten(0, -2), packed, GROUP, scales_and_zeros), inputs, self.bias)


def _like_linear(products: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    products = products.to(inputs.dtype).unflatten(0, inputs.shape[:-1])
    return products if bias is None else products + bias


def check_decoder_format(decoder_format: str, device: torch.device) -> None:
    """Refuse an unknown format.

    Raises:
        InputError: when it is not one of `DECODER_FORMATS`, or the device is not a CPU.
    """
    if decoder_format not in DECODER_FORMATS:
        raise InputError(f"unknown decoder format '{decoder_format}': choose one of {', '.join(DECODER_FORMATS)}")
    if device.type != "cpu":
        raise InputError(
            f"a decoder in {decoder_format} runs only on CPUs, not on {device}: leave out --body or --device"
        )


def quantise_decoder(model: TopKExpertsForCausalLM, decoder_format: str) -> None:
    """Quantise the linear layers of the decoder in place; the head and the embeddings are left alone.

    Args:
        model: a converted model on a CPU.
        decoder_format: one of `DECODER_FORMATS`. Layers whose sizes the kernels do not support are left alone.
    """
    columns, kind = (COLUMNS_OF_KERNEL, Int8Linear) if decoder_format == "int8" else (GROUP, Int4Linear)
    for name, module in list(model.base.named_modules()):
        is_linear = type(module) is nn.Linear and name != model.head_name
        if is_linear and module.in_features % columns == 0 and module.out_features % ROWS_OF_KERNEL == 0:
            model.base.set_submodule(name, kind(module))
