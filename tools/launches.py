"""Run inductor's program without a GPU: what it launches, and how much memory it holds.

The program is the one that a GPU would run, line by line. Only its buffers are meta tensors here,
and a launch is written down instead of being made.
"""

import re
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from counted_memory import CountedMemory
from cuda_code import Code

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention.default
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
SUM = torch.ops.aten.sum.dim_IntList


@dataclass(frozen=True)
class Launch:
    name: str
    bytes: float  # read and written, each tensor once
    flops: float  # on tensor cores; 0 for all but matrix products and attention


class Recorder(CountedMemory):
    """Stands in for all that the program calls, and notes each launch."""

    def __init__(self):
        super().__init__()
        self.launches = []
        self.kernels = []  # names and sources of the program's Triton kernels

    def note(self, name, tensors, flops=0.0) -> None:
        moved = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        self.launches.append(Launch(name, moved, flops))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """What the program calls as torch's own operation."""
        result = super().__torch_dispatch__(operation, types, args, kwargs)
        if operation is SUM:
            self.note("sum", [args[0], result])
        # One product of all T x T pairs takes 2 B H T T D operations, and the causal mask spares
        # half of them. Forward makes two products, backward five.
        if operation is ATTENTION:
            B, H, T, D = args[0].shape
            self.note("flash_attention", [*args[:3], *result[:2]], 2.0 * B * H * T * T * D)
        if operation is ATTENTION_BACKWARD:
            B, H, T, D = args[1].shape
            self.note("flash_attention_backward", [*args[:6], *result], 5.0 * B * H * T * T * D)
        return result

    def mm(self, a, b, out) -> None:
        M, K, N = *a.shape, b.size(1)  # (M, K) (K, N) -> (M, N)
        self.note(f"mm {M} x {K} x {N}", [a, b, out], 2.0 * M * K * N)

    def addmm(self, bias, a, b, out, alpha=1, beta=1) -> None:
        M, K, N = *a.shape, b.size(1)
        self.note(f"addmm {M} x {K} x {N}", [bias, a, b, out], 2.0 * M * K * N)

    def triton(self, name, source, **options):
        """A Triton kernel; its source says how many bytes it moves (profile_bandwidth)."""
        self.kernels.append((name, source))
        moved = 1e9 * float(re.search(r"'kernel_num_gb': ([\d.e+-]+)", source)[1])
        return SimpleNamespace(run=lambda *args, **named: self.launch(name, moved))

    def launch(self, name, moved) -> None:
        self.launches.append(Launch(name, moved, 0.0))

    def wait(self, scope) -> None:
        """The program waits here until its kernels are compiled: nothing to do."""

    def load(self, source: str):
        """The function that the program defines."""
        replaced = {
            "torch._inductor.async_compile.AsyncCompile": lambda: self,
            "torch._inductor.select_algorithm.extern_kernels": self,
            "torch._C._dynamo.guards._empty_strided_cuda": empty_strided,
            "torch._C._dynamo.guards._reinterpret_tensor": torch.as_strided,
            "torch._C._dynamo.guards.copy_if_misaligned": lambda tensor: tensor,
            "torch._C._cuda_getCurrentRawStream": lambda device: 0,
        }
        scope = {"__name__": "program"}
        with ExitStack() as stack:
            for name, value in replaced.items():
                stack.enter_context(mock.patch(name, value, create=True))
            exec(compile(source, "program", "exec"), scope)  # noqa: S102  our own compiler's text
        return scope["call"]


def empty_strided(size, stride, dtype):
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


@dataclass
class MicroBatch:
    """What inductor's program does for one micro-batch."""

    forward: list[Launch]
    backward: list[Launch]
    kernels: list[tuple[str, str]]  # names and sources of its Triton kernels
    peak: int  # the most bytes that are held at any time, `run` says of what


def run(code: Code) -> MicroBatch:
    """Go through forward and backward of a step's second micro-batch under AdamW.

    So the peak includes the weights (4 bytes a parameter), AdamW's two averages (8) and the
    gradients of the first micro-batch (4).
    """
    with Recorder() as recorder:
        inputs = [empty_strided(*described) for described in code.inputs]
        parameters = [tensor for tensor in inputs if tensor.is_floating_point()]
        beside = [torch.empty_like(tensor) for tensor in parameters for _ in range(3)]

        loss, *saved = recorder.load(code.forward)(list(inputs))
        forward = list(recorder.launches)
        # The program empties the list it is called with, to free what it no longer needs.
        arguments = [*saved, torch.empty_like(loss)]
        del saved
        gradients = recorder.load(code.backward)(arguments)
        backward = recorder.launches[len(forward) :]
        del beside, gradients
    return MicroBatch(forward, backward, recorder.kernels, recorder.peak)
