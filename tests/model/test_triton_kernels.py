"""The Triton kernels without a GPU: in Triton's interpreter, compiled, and when they are called."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.heads import make_head
from support.tiny_models import VOCAB_SIZE
from torch import Tensor

from hf_topk.model import kernels

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int64: "i64",
}


class OnCuda(Tensor):
    """A tensor that claims to be on CUDA."""

    is_cuda = True


def calls(kind: type[Tensor] = Tensor, dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], Tensor]]:
    """A call of every function with a kernel, at sizes that need no masking."""
    hidden, weight = (torch.ones(rows, 640, dtype=dtype).as_subclass(kind) for rows in (2, 1000))
    rows = torch.zeros(2, 48, dtype=torch.int64)
    codes = torch.zeros(60, 16, 64, dtype=torch.uint8)
    inputs, experts = torch.ones(2, 384).as_subclass(kind), torch.zeros(2, 5, dtype=torch.int64)
    return {
        "gather_dot": lambda: kernels.gather_dot(hidden, weight, weight[:, 0].contiguous(), rows),
        "int8_products": lambda: kernels.int8_products(hidden, weight.to(torch.int8), weight[:, 0].contiguous()),
        "packed_products": lambda: kernels.packed_products(inputs, codes.as_subclass(kind), codes, experts),
    }


# The kernels


@pytest.mark.slow
@needs_triton
def test_kernels_in_the_interpreter() -> None:
    """In another process; see the file that it runs."""
    file = Path(__file__).with_name("interpreted_triton_kernels.py")
    command = [sys.executable, "-m", "pytest", "--quiet", "--no-header", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=file.parents[2], check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple, dict]]:
    """The kernels that would have been launched, with their arguments."""
    from hf_topk.model import triton_head, triton_kernels

    recorded: list[tuple[Any, tuple, dict]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            assert all(isinstance(size, int) for size in grid)
            return lambda *args, **constants: recorded.append((self.kernel, args, constants))

    for module in (triton_kernels, triton_head):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(kernel))
    monkeypatch.setattr(kernels, "runs_on_triton", lambda *inputs: True)
    return recorded


def compile_for_cuda(kernel: Any, args: tuple, constants: dict, capability: int) -> str:
    """The PTX that Triton compiles for a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants.pop(name) for name in ("num_warps",) if name in constants}
    given = dict(zip(kernel.arg_names, args, strict=False)) | constants
    signature, fixed, hints = {}, {}, {}
    for place, (name, value) in enumerate(given.items()):
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif name in constants or value is None or value == 1:
            signature[name], fixed[(place,)] = "constexpr", value
        else:
            signature[name] = "i32"
        if isinstance(value, Tensor) or (signature[name] == "i32" and value % 16 == 0):
            hints[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, fixed, hints), target=GPUTarget("cuda", capability, 32), options=options
    )
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["gather_dot", "int8_products", "packed_products"])
def test_kernels_compile_for_cuda(
    name: str, capability: int, launches: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    calls()[name]()
    compiled = [compile_for_cuda(*launch, capability) for launch in launches]
    assert len(compiled) == 1
    assert "ld.global.v4" in compiled[0]  # rows are read 16 bytes at a time


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("expert_size", "num_experts", "num_always_on"), [(19, 5, 6), (19, 5, 5), (1, 100, 0)])
def test_the_head_compiles_for_cuda(
    expert_size: int,
    num_experts: int,
    num_always_on: int,
    capability: int,
    launches: list,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All its launches; with and without ids that repeat."""
    from hf_topk.model import triton_head

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"expert_size": expert_size, "num_experts": num_experts, "num_always_on": num_always_on}
    head = make_head(num_rescored=2, num_experts_per_tok=3, dtype=torch.bfloat16, **sizes)
    head.router.pack()
    monkeypatch.setattr(head, "exact_logits", lambda hidden, ids: kernels.gather_dot(hidden, head.weight, None, ids))
    scored = triton_head.score(head, torch.ones(2, 32, dtype=torch.bfloat16))
    scored.ids.zero_()
    assert triton_head.logits_of(head, scored).shape == (2, VOCAB_SIZE)
    assert len(launches) == 11
    for launch in launches:
        compile_for_cuda(*launch, capability)


# When they run


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were called."""
    names: list[str] = []

    def fake(name: str) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            names.append(name)
            return torch.empty(0)

        return call

    fakes = SimpleNamespace(**{name: fake(name) for name in calls()})
    monkeypatch.setitem(sys.modules, "hf_topk.model.triton_kernels", fakes)
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    return names


def test_cuda_tensors_go_to_triton(chosen: list[str]) -> None:
    for call in calls(OnCuda).values():
        call()
    assert chosen == ["gather_dot", "int8_products", "packed_products"]


def test_cpu_tensors_never_go_to_triton(chosen: list[str]) -> None:
    for call in calls().values():
        assert call().numel()
    assert chosen == []


@pytest.fixture
def cuda_head(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A head that believes that its tensors are on CUDA, whose Triton steps return words."""
    fakes = SimpleNamespace(score=lambda head, hidden: "scored", logits_of=lambda head, scored: "logits")
    monkeypatch.setitem(sys.modules, "hf_topk.model.triton_head", fakes)
    head = make_head(num_rescored=20)

    def runs_on_triton(*inputs: Tensor | None) -> bool:
        return not any(some is not None and some.requires_grad for some in inputs)

    monkeypatch.setattr("hf_topk.model.head.runs_on_triton", runs_on_triton)
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    return head


def test_the_head_goes_to_triton_with_a_packed_router(cuda_head: Any) -> None:
    hidden = torch.ones(1, 32).as_subclass(OnCuda)
    assert cuda_head.score(hidden) != "scored"
    cuda_head.router.pack()
    assert cuda_head.score(hidden) == "scored"
    assert cuda_head.score(torch.ones(1, 32)) != "scored"


def test_what_is_trained_does_not_go_to_triton(cuda_head: Any) -> None:
    """Neither the rows of a router nor, once it is packed, its biases."""
    hidden = torch.ones(1, 32)
    cuda_head.router.requires_grad_()
    scored = cuda_head.score(hidden)
    assert cuda_head.logits_of(scored).requires_grad
    cuda_head.router.pack()
    assert cuda_head.score(hidden.as_subclass(OnCuda)).scores.requires_grad
    cuda_head.router.requires_grad_(False)
    assert cuda_head.logits_of(cuda_head.score(hidden)) == "logits"


@pytest.mark.parametrize("expert_size", [64, 65])
def test_large_experts_do_not_go_to_triton(cuda_head: Any, expert_size: int) -> None:
    cuda_head.router.pack()
    cuda_head.expert_ids = torch.zeros(50, expert_size, dtype=torch.long)
    assert cuda_head._runs_in_triton(torch.ones(1, 32).as_subclass(OnCuda)) == (expert_size == 64)


def test_the_plain_reference_runs_where_triton_is_missing(chosen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert [call().shape for call in calls(OnCuda).values()] == [(2, 48), (2, 1000), (2, 5, 16)]
    assert chosen == []


@pytest.mark.parametrize("needs_gradient", ["hidden", "weight", "bias"])
def test_gradients_go_through_the_plain_reference(chosen: list[str], needs_gradient: str) -> None:
    shapes = {"hidden": (2, 8), "weight": (50, 8), "bias": (50,)}
    tensors = {name: torch.ones(shape).as_subclass(OnCuda) for name, shape in shapes.items()}
    tensors[needs_gradient].requires_grad_()
    rows = torch.zeros(2, 3, dtype=torch.int64)
    assert kernels.gather_dot(**tensors, rows=rows).requires_grad
    assert chosen == []
    with torch.no_grad():
        kernels.gather_dot(**tensors, rows=rows)
    assert chosen == ["gather_dot"]


def test_gradients_of_inputs_go_through_the_plain_reference(chosen: list[str]) -> None:
    inputs = torch.ones(2, 8).as_subclass(OnCuda).requires_grad_()
    assert kernels.int8_products(inputs, torch.ones(5, 8, dtype=torch.int8), torch.ones(5)).requires_grad
    codes = torch.zeros(3, 2, 2, dtype=torch.uint8).as_subclass(OnCuda)
    assert kernels.packed_products(inputs, codes, codes[..., :1], None).requires_grad
    assert chosen == []


# Beside torch.compile

TRACE = """
from types import SimpleNamespace
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton

_triton.has_triton = lambda: True  # as if there were a GPU

from hf_topk.model import kernels, triton_head

traced = []

def keep(graph, inputs):
    traced.extend(node.target.__name__ for node in graph.graph.nodes if "triton" in str(node.target))
    return graph.forward

def call(hidden, weight, bias, rows, factors, codes):
    return (kernels.gather_dot(hidden, weight, bias, rows), kernels.int8_products(hidden, factors, bias),
            kernels.packed_products(hidden, *codes, rows))

def rows(*shape):
    codes = torch.empty(*shape, 4, dtype=torch.uint8)
    return SimpleNamespace(basis=torch.empty(24, 40, dtype=torch.int8), basis_scales=torch.empty(24),
                           center=torch.empty(24), codes_4bit=codes, codes_2bit=codes, bias=torch.empty(*shape))

def make_head(weight):
    ids = {"always_on_ids": torch.empty(3, dtype=torch.int64), "expert_ids": torch.empty(6, 16, dtype=torch.int64)}
    sizes = {"num_always_on": 3, "num_experts": 6, "expert_size": 16, "num_experts_per_tok": 2, "num_rescored": 20}
    head = SimpleNamespace(router=rows(6), tail=rows(6, 16), out_features=99,
                           has_short_experts=False, **ids, **sizes)
    head.tail.log_prior = torch.empty(6, 16)
    head.exact_logits = lambda hidden, ids: kernels.gather_dot(hidden, weight, None, ids)
    return head

def run_head(hidden):
    return triton_head.logits_of(head, triton_head.score(head, hidden))

with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
    hidden, weight, bias = torch.empty(3, 40), torch.empty(99, 40), torch.empty(99)
    picks, factors = torch.empty(3, 7, dtype=torch.int64), torch.empty(99, 40, dtype=torch.int8)
    codes = [torch.empty(99, 2, width, dtype=torch.uint8) for width in (6, 7)]
    logits = torch.compile(call, fullgraph=True, backend=keep)(hidden, weight, bias, picks, factors, codes)
    head = make_head(weight)
    assert torch.compile(run_head, fullgraph=True, backend=keep)(hidden).shape == (3, 99)
assert [tuple(some.shape) for some in logits] == [(3, 7), (3, 99), (3, 7, 2)]
print(*traced)
"""


@pytest.mark.slow
@needs_triton
def test_launches_are_traced_into_one_graph() -> None:
    done = subprocess.run([sys.executable, "-c", TRACE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["triton_kernel_wrapper_mutation"] * (3 + 11)
