"""Get torch.compile to write a training step's CUDA code on a machine without a GPU.

Inductor, the compiler behind torch.compile, writes text: Triton kernels, and a Python program that
allocates buffers and launches the kernels in order. It needs to know the GPU, but not to have it.
Autograd, however, refuses to work on a GPU that is not there. So this file

1. lets dynamo record the model's forward pass on meta tensors, which have shapes but no numbers;
2. lets autograd add the backward pass on fake CPU tensors, under the CPU's autocast, which casts
   the same operations of this model as CUDA's;
3. moves that joint graph to "cuda:0" and lets inductor compile it for the GPU that is described.

This leans on parts of torch 2.13 and triton 3.7 that are not public: another version may break it.
The places are marked "Hook". All of them change the whole process, so use one process for each GPU.
"""

import ctypes
import types
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo.device_interface
import torch._functorch.config
import torch._inductor.compile_fx
import torch._inductor.config
import triton
from torch._guards import TracingContext, tracing
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

CUDA = torch.device("cuda:0")


@dataclass(frozen=True)
class GPU:
    """What the compiler asks about a GPU, and the two figures of its data sheet for a roofline."""

    name: str
    capability: tuple[int, int]  # (8, 0) is sm_80
    processors: int  # streaming multiprocessors
    shared_memory: int  # bytes that one block of threads may have
    l2_cache: int  # bytes
    flops: float  # bfloat16 operations a second, without sparsity
    bandwidth: float  # bytes a second of its memory

    @property
    def architecture(self) -> int:
        return 10 * self.capability[0] + self.capability[1]


# NVIDIA's data sheets of the SXM modules with 80 GB; the rest: CUDA programming guide, table of
# compute capabilities.
GPUS = {
    "a100": GPU("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 << 10, 40 << 20, 312e12, 2039e9),
    "h100": GPU("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 << 10, 50 << 20, 989e12, 3350e9),
}


@dataclass
class Code:
    """Inductor's program for one micro-batch: two Python sources and what they are called with."""

    forward: str
    backward: str
    inputs: list[tuple[tuple, tuple, torch.dtype]]  # of forward: shape, stride, dtype


def pretend(gpu: GPU) -> None:
    """Let torch and triton believe, for the rest of this process, that they see `gpu`."""
    properties = types.SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=gpu.processors,
        total_memory=80 << 30,
        L2_cache_size=gpu.l2_cache,
        warp_size=32,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=gpu.shared_memory,
        gcnArchName="",
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
        "get_device_properties": properties,
        "is_bf16_supported": True,
        "is_tf32_supported": True,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "set_device": None,
        "synchronize": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    interface = torch._dynamo.device_interface.CudaInterface
    for name, answer in answers.items():
        function = mock.Mock(return_value=answer)
        setattr(torch.cuda, name, function)  # Hook: a CPU build has no answers
        if hasattr(interface, name):
            setattr(interface, name, staticmethod(function))  # Hook: where dynamo keeps its copies

    # Hook: C++ looks up a "device guard" before it touches a CUDA tensor, even a fake one. Entry 1
    # of c10's table is CUDA's and empty in a CPU build; the CPU's, which does nothing, serves.
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[0]

    # Hook: triton asks its driver for the architecture and the shared memory of the GPU.
    driver = mock.Mock()
    driver.get_current_target.return_value = GPUTarget("cuda", gpu.architecture, 32)
    driver.get_current_device.return_value = 0
    driver.get_active_torch_device.return_value = CUDA
    driver.utils.get_device_properties.return_value = {
        "max_shared_mem": gpu.shared_memory,
        "multiprocessor_count": gpu.processors,
        "warpSize": 32,
    }
    triton.runtime.driver.set_active(driver)
    torch.utils._triton.has_triton.cache_clear()  # Hook: there was no GPU when it first answered


def record_forward(model, tokens):
    """The graph that dynamo hands to a compiler for model(tokens, targets), and its inputs."""
    recorded = []

    def backend(graph, inputs):
        recorded.append((graph, inputs))
        return graph

    # Targets are tokens one further on, so both are views of rows that are one token longer.
    torch.compile(model, backend=backend)(tokens[:, :-1], tokens[:, 1:])
    assert len(recorded) == 1, f"{len(recorded)} graphs: something in the model breaks the graph"
    return recorded[0]


def flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """What F.scaled_dot_product_attention calls on a GPU, and never on a CPU."""
    assert is_causal and attn_mask is None and not dropout_p
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    return attention(query, key, value, 0.0, is_causal=True)[0]


def set_devices(graph, device: torch.device) -> None:
    def moved(value):
        return device if isinstance(value, torch.device) else value

    for node in graph.nodes:
        node.args = tree_map(moved, node.args)
        node.kwargs = tree_map(moved, node.kwargs)


def write_cuda_code(model, batch: int, seq_len: int, dtype: torch.dtype, gpu: GPU) -> Code:
    """Compile forward and backward of `batch` sequences. `model` is on the meta device."""
    tokens = torch.zeros(batch, seq_len + 1, dtype=torch.long, device="meta")
    module, inputs = record_forward(model, tokens)
    set_devices(module.graph, torch.device("cpu"))
    for node in module.graph.nodes:
        if node.target is torch.nn.functional.scaled_dot_product_attention:
            node.target = flash_attention
    module.recompile()

    fake_mode = FakeTensorMode()

    def fake(tensor, device):
        """A tensor like this one, without numbers, that says it is on `device`."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        with fake_mode:
            like = torch.empty_strided(
                tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
            )
        return torch.nn.Parameter(like) if isinstance(tensor, torch.nn.Parameter) else like

    def move_to_gpu(graph) -> None:
        """Runs when autograd is done and before the graph is cut into forward and backward."""
        set_devices(graph, CUDA)
        for node in graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = tree_map(lambda value: fake(value, CUDA), node.meta["val"])
        # Inductor's pass that pads matrix products saw a CPU's graph and left it alone. So here it
        # is once more. On a GPU it pads what is then faster; here, without one, whatever it may.
        for patterns in joint_graph.pass_patterns:  # Hook
            patterns.apply(graph)

    def compile_graph(graph, inputs, **options):
        inputs = [fake(value, CUDA) for value in inputs]
        return torch._inductor.compile_fx.compile_fx_inner(graph, inputs, **options)

    sources = []

    def keep_source(lowering):  # Hook: instead of loading the program, which would need the GPU
        wrapper, _ = lowering.codegen()
        sources.append(wrapper.value)
        return types.SimpleNamespace(call=None, __file__="", __name__="", key="")

    pretend(gpu)
    settings = {
        "joint_custom_post_pass": move_to_gpu,
        "force_shape_pad": True,
        "profile_bandwidth": True,  # so that each kernel's source says how many bytes it moves
        "fx_graph_cache": False,
        "compile_threads": 1,
    }
    autograd_settings = {
        "force_non_lazy_backward_lowering": True,  # or the backward waits for a real backward()
        "enable_autograd_cache": False,
    }
    with (
        torch._inductor.config.patch(settings),
        torch._functorch.config.patch(autograd_settings),
        mock.patch.object(GraphLowering, "compile_to_module", keep_source),
        tracing(TracingContext(fake_mode)),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        fakes = [fake(value, "cpu") for value in inputs]
        torch._inductor.compile_fx.compile_fx(module, fakes, inner_compile=compile_graph)
    forward, backward = sources
    return Code(forward, backward, [(tuple(t.shape), t.stride(), t.dtype) for t in inputs])
