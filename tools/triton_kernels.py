"""Compile the Triton kernels of inductor's program down to the GPU's machine code.

Triton brings its own assembler (ptxas) and disassembler, so that this needs no CUDA and no GPU.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch._inductor.config
import triton
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Binary:
    """One kernel in one configuration; a GPU would time all of a kernel's and keep the fastest."""

    name: str
    registers: int  # of a thread, at most 255
    spilled: int  # bytes of a thread that found no register and went to slow memory


def compile_kernel(name: str, source: str) -> list[Binary]:
    """The machine code of each of a kernel's configurations, for the GPU of cuda_code.pretend."""
    # Hook: both lines would let triton look for a GPU's driver; the pretended one is set already.
    with (
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
        torch._inductor.config.patch("use_static_cuda_launcher", False),  # it drops the code
    ):
        kernel = getattr(PyCodeCache.load(source), name)
        kernel._precompile_worker()  # Hook: all that inductor does up to loading it onto the GPU
    return [resources(name, result.kernel.asm["cubin"]) for result in kernel.compile_results]


def resources(name: str, cubin: bytes) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, found.groups())
    return Binary(name, registers, stack + local)
