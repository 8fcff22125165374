"""A GPU that is not there: the project's CUDA path, run by a CPU build of torch.

    with fake_cuda("NVIDIA A100-SXM4-80GB", (8, 0)):
        train_gpt2.main(["--device", "cuda", "--no-compile", ...])
        print(waits)

Inside the context torch.cuda is available and the device "cuda:0" works. A tensor there is an
OnGPU: it says that it is on cuda:0 and has CUDA's dispatch keys, so autograd and autocast treat it
as CUDA's. It holds its numbers in a CPU tensor. Every operation

- raises RuntimeError if it mixes devices where CUDA refuses to;
- is counted in `waits`, by the project's line, if on a GPU the CPU has to wait for it;
- runs the CPU's kernel on what is inside, so losses, gradients and updates are real.

It cannot show CUDA's kernels, memory, streams, nccl, torch.compile or speed. It uses private parts
of torch, so it needs the pinned version, built for the CPU, and Linux.
"""

import ctypes
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")
aten = torch.ops.aten

waits = Counter()  # ("train_gpt2.py:123 function", what it did) -> how often the CPU waited

INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
COPYING = {aten.copy_.default, aten._to_copy.default}
# Next to tensors on the GPU, a single number may be on the CPU, but not in these.
STRICT = {aten.cat.default, aten.stack.default}
# The CPU needs their result, or its size. The first is item(), float(), int() and bool().
WAITING = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
WAITING.update([aten.masked_select.default, aten.nonzero.default, aten.repeat_interleave.Tensor])


def where() -> str:
    """The innermost line that is the project's, not a test's or torch's."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.parent in (ROOT, ROOT / "support"):
            return f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def wait(what: str) -> None:
    waits[where(), what] += 1


def count_wait(func, given: dict, on_gpu: list, between_devices: bool) -> None:
    """Count an operation if the CPU waits for it. `given` are its arguments by name."""
    if on_gpu and func in WAITING:
        wait(func.__name__)
    if func in COPYING and between_devices:
        source = given["src"] if func is aten.copy_.default else given["self"]
        if not (getattr(source, "pinned", False) and given.get("non_blocking")):
            wait("copy")
    if func in INDEXING:
        indices = [index for index in given["indices"] if index is not None]
        if any(index.dtype == torch.bool for index in indices):
            wait("index by a mask")
        if not all(isinstance(index, OnGPU) for index in indices):
            wait("index from the CPU")


def change_tensors(value, change):
    """Apply `change` to a tensor, or to those in a list or tuple; leave other values alone."""
    if isinstance(value, list | tuple):
        return type(value)(change_tensors(part, change) for part in value)
    return change(value) if isinstance(value, torch.Tensor) else value


def run(func, args, kwargs):
    """Run an operation as torch calls it, where OnGPU tensors are CUDA's."""
    if func is torch.ops.prim.device.default:  # torch's C++ asks a tensor for its device
        return args[0].device
    on_gpu, on_cpu = [], []

    def unwrap(tensor):
        (on_gpu if isinstance(tensor, OnGPU) else on_cpu).append(tensor)
        return tensor.inner if isinstance(tensor, OnGPU) else tensor

    inside = change_tensors(args, unwrap)
    inside_kwargs = {key: change_tensors(value, unwrap) for key, value in kwargs.items()}
    asked = kwargs.get("device")
    result_on_gpu = bool(on_gpu)
    if asked is not None and not OnGPU.in_backward:  # backward is told that all is on the CPU
        result_on_gpu = torch.device(asked).type == "cuda"
    if not on_gpu and not result_on_gpu:
        return func(*args, **kwargs)
    one_number = func not in STRICT and all(tensor.dim() == 0 for tensor in on_cpu)
    indexed = func in INDEXING and isinstance(args[0], OnGPU)
    if on_gpu and on_cpu and not (one_number or indexed or func in COPYING):
        raise RuntimeError(f"{where()}: {func} found tensors on cuda:0 and on cpu")
    arguments = func._schema.arguments
    given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    count_wait(func, given, on_gpu, between_devices=bool(on_cpu) or not result_on_gpu)

    if asked is not None:
        inside_kwargs["device"] = CPU
    result = func(*inside, **inside_kwargs)
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    if written:  # in place, or out=: the result is what was given, not a new tensor
        results = [given[name] for name in written if name in given][: len(func._schema.returns)]
        return results[0] if len(results) == 1 else tuple(results) or None
    return change_tensors(result, OnGPU) if result_on_gpu else result


class OnGPU(torch.Tensor):
    """A tensor that says it is on cuda:0, with its numbers in `inner`, on the CPU."""

    in_backward = False

    @staticmethod
    def __new__(cls, inner):
        keys = dict(dispatch_device=True, device_for_backend_keys=CUDA)
        tensor = torch.Tensor._make_subclass(cls, inner, False, **keys)
        tensor.inner = inner
        return tensor

    # For a tensor on cuda:0, backward would want a CUDA stream to add up its gradients.
    device = property(lambda self: CPU if OnGPU.in_backward else CUDA)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})  # in a thread where FakeGPU is not on

    def to(self, *args, **kwargs):
        """Like Tensor.to, whose C++ would copy from cuda:0 to cuda:0."""
        copy = kwargs.pop("copy", False)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            wait("copy")
            return self.detach().inner.to(dtype or self.dtype, copy=True)
        return torch.Tensor.to(self, dtype or self.dtype, copy=copy)

    def tolist(self):
        wait("tolist")
        return self.detach().inner.tolist()


class FakeGPU(TorchDispatchMode):
    """Sees every operation, so also those that make a tensor from none, such as zeros."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


real_backward = torch.autograd.backward


def backward(*args, **kwargs):
    OnGPU.in_backward = True
    try:
        return real_backward(*args, **kwargs)
    finally:
        OnGPU.in_backward = False


def pin_memory(tensor, device=None):
    copy = tensor.clone()
    copy.pinned = True
    return copy


@contextmanager
def device_guard():
    """Use the CPU's device guard, which does nothing, for CUDA. A CPU build has none for it."""
    libraries = Path(torch.__file__).parent / "lib"
    c10 = ctypes.CDLL(str(libraries / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    real = guards[1]  # by device type: 0 is the CPU, 1 CUDA
    guards[1] = guards[0]
    try:
        yield
    finally:
        guards[1] = real
        # Let torch look for a driver again.
        python = ctypes.CDLL(str(libraries / "libtorch_python.so"))
        python["_ZN5torch5utils24set_requires_device_initEN3c1010DeviceTypeEb"](1, True)


@contextmanager
def fake_cuda(name="NVIDIA A100-SXM4-80GB", capability=(8, 0)):
    """Pretend to have a GPU of this name and compute capability."""
    fakes = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,  # it looks for a driver
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: name,
        "is_bf16_supported": lambda *args, **kwargs: capability >= (8, 0),
    }
    swap = torch.__future__.get_swap_module_params_on_conversion()
    lift = torch._C._only_lift_cpu_tensors()
    waits.clear()
    with pytest.MonkeyPatch.context() as patch, device_guard():
        for key, value in fakes.items():
            patch.setattr(torch.cuda, key, value)
        patch.setattr(torch.Tensor, "pin_memory", pin_memory)
        patch.setattr(torch.autograd, "backward", backward)
        torch.__future__.set_swap_module_params_on_conversion(True)  # model.to can change a class
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1, device=...) starts on the CPU
        try:  # backward has no thread for cuda:0
            with torch.autograd.set_multithreading_enabled(False), FakeGPU():
                yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swap)
            torch._C._set_only_lift_cpu_tensors(lift)
