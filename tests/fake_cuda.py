"""A GPU that is not there: the project's CUDA path, run and counted by a CPU build of torch.

    with fake_cuda("NVIDIA A100-SXM4-80GB", (8, 0), memory=80e9):
        train_gpt2.main(["--device", "cuda", "--no-compile", ...])
        print(waits, kernels)

Inside the context torch.cuda is available and device="cuda" works. A tensor there is an OnGPU: it
says that it is on cuda:0 and has CUDA's dispatch keys, so autograd and autocast treat it as CUDA's.
It holds its numbers in a CPU tensor. Every operation

- raises DeviceMismatch if it mixes devices where CUDA refuses to;
- is counted in `kernels`, by name, unless it is only a view;
- is counted in `waits`, by the project's line, if on a GPU the CPU has to wait for it;
- runs the CPU's kernel on what is inside, so losses, gradients and updates are real.

It cannot show CUDA's kernels, memory, streams, nccl, torch.compile or speed; clip_grad_norm_, which
a GPU runs on all tensors at once, counts once per tensor. It uses private parts of torch and leaves
one changed, so it needs the pinned torch, Linux, and its own process.
"""

import ctypes
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.attention.bias import CausalBias
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")
aten = torch.ops.aten

kernels = Counter()  # name of an operation -> how often it ran
waits = Counter()  # ("train_gpt2.py:123 function", what it did) -> how often the CPU waited


class DeviceMismatch(RuntimeError):
    """An operation has tensors on the GPU and on the CPU."""


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


def count(func, given: dict, on_gpu: list, between_devices: bool) -> None:
    """Count an operation, and the wait if it is one. `given` are its arguments by name."""
    name = func.__name__.split(".")[0]
    if not func.is_view and func is not aten._unsafe_view.default:
        kernels[name] += 1
    if on_gpu and func in WAITING:
        wait(name)
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
        raise DeviceMismatch(f"{where()}: {func} found tensors on cuda:0 and on cpu")
    arguments = func._schema.arguments
    given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    count(func, given, on_gpu, between_devices=bool(on_cpu) or not result_on_gpu)

    if asked is not None:
        inside_kwargs["device"] = CPU
    if func in (aten._softmax.default, aten._log_softmax.default) and args[2]:
        inside = (inside[0].float(), inside[1], False)  # only CUDA's kernels go from half to float
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
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

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

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        wait("tolist")
        return self.detach().inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor on cuda:0 to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def __repr__(self, **kwargs):
        return f"OnGPU({self.inner!r})"


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


def new_bias(cls, *args):
    """Make a CausalBias. Tensor.__new__ cannot, with a FakeGPU on: it gets a whole tensor back."""
    return torch.Tensor._make_subclass(cls, torch.empty(0))


def borrow_device_guard() -> None:
    """Use the CPU's device guard, which does nothing, for CUDA. A CPU build has none for it."""
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[1] or guards[0]  # by device type: 0 is the CPU, 1 CUDA


@contextmanager
def fake_cuda(name="NVIDIA A100-SXM4-80GB", capability=(8, 0), memory=80e9):
    """Pretend to have a GPU of this name and compute capability, with `memory` free bytes."""
    fakes = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,  # it looks for a driver
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: name,
        "is_bf16_supported": lambda *args, **kwargs: capability >= (8, 0),
        "mem_get_info": lambda device=None: (int(memory), int(memory)),
        "synchronize": lambda device=None: wait("synchronize"),
        "max_memory_allocated": lambda device=None: 0,
    }
    fakes = [(torch.cuda, key, value) for key, value in fakes.items()]
    fakes.append((torch.Tensor, "pin_memory", pin_memory))
    fakes.append((torch.autograd, "backward", backward))
    fakes.append((CausalBias, "__new__", staticmethod(new_bias)))
    real = [(owner, key, getattr(owner, key)) for owner, key, _ in fakes]
    swap = torch.__future__.get_swap_module_params_on_conversion()
    lift = torch._C._only_lift_cpu_tensors()
    borrow_device_guard()
    try:
        for owner, key, value in fakes:
            setattr(owner, key, value)
        torch.__future__.set_swap_module_params_on_conversion(True)  # model.to can change a class
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1, device=...) starts on the CPU
        # Backward has no thread for cuda:0.
        with torch.autograd.set_multithreading_enabled(False), FakeGPU():
            yield
    finally:
        for owner, key, value in real:
            setattr(owner, key, value)
        torch.__future__.set_swap_module_params_on_conversion(swap)
        torch._C._set_only_lift_cpu_tensors(lift)
