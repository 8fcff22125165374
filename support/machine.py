"""What a machine can do: its peak speed, whether it has a compiler, and what fits its memory.

train_gpt2.py asks these questions; the lecture has one machine and knows the answers.
"""

import ctypes
import platform
import re
import shutil
import sys

import torch

from support.command import UserError, explain, say

# Dense bfloat16 TFLOP/s (float16 for V100 and T4) from the vendors' data sheets; the first entry
# found in the device's name is used.
PEAK_TFLOPS = {
    "GB200": 2500,
    "B200": 2250,
    "GH200": 989,
    "H200 NVL": 835,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H20": 148,
    "A100": 312,
    "A40": 149.7,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 6000 Ada": 364,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """A device's operations per second by its data sheet.

    None if it is not in PEAK_TFLOPS (a Laptop, Ti or D is another chip, and MIG a part of one), and
    in float32, which has another peak.
    """
    this = device_name(device)
    for name, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b(?! (Ti|D|Laptop)|.* MIG )", this) and dtype != torch.float32:
            return 1e12 * tflops
    return None


def flops_per_token(model, seq_len: int) -> int:
    """Operations to train a GPT on one token ("PaLM", 2022, appendix B).

    6 for each parameter in a matrix product: forward multiplies and adds, and backward does so
    twice, for the gradients of the input and of the weight. (wpe is only added, and not counted.)
    Attention takes 12 L C T more. GPT-2 (124M): 0.855 GFLOP, and 448 TFLOP for a batch of 2^19
    tokens: 360 ms on 8 A100s at half of 312 TFLOP/s each.
    """
    weights = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    return 6 * weights + 12 * model.config.n_layer * model.config.n_embd * seq_len


def utilization(model, seq_len: int, tokens_per_second: float, dtype: torch.dtype) -> float | None:
    """The share of a device's peak that its tokens per second take (MFU); None if unknown."""
    peak = peak_flops(model.lm_head.weight.device, dtype)
    return flops_per_token(model, seq_len) * tokens_per_second / peak if peak else None


def open_device(name: str, local_rank: int) -> torch.device:
    """The device of this process; of GPUs, the one of its number. Raises UserError.

    "auto" is a GPU of NVIDIA's or AMD's ("cuda"), or the CPU. Apple's GPU ("mps") must be asked
    for: on M1 and M2, torch 2.13 can add to a sum of 32,767 products or more what lies behind the
    matrices in memory (pytorch#193487, #195163). Backward of lm_head has sums of 50,304.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and shutil.which("nvidia-smi"):
            say("torch cannot use an NVIDIA GPU here; --device cuda says why")
    if name == "mps":
        say("warning: on M1 and M2, torch 2.13 multiplies some matrices wrongly (pytorch#193487)")
    with explain(f"--device {name} cannot be used"):
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if device.type == "cpu":
            keep_freed_memory()
        torch.zeros(1, device=device)
        return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: --dtype, or the fastest here that trains well."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # tensor cores can multiply bfloat16 from Ampere (8.0) on
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if ampere else torch.float16
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    has_bfloat16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32


def bfloat16_stream(device_type: str) -> bool:
    """Whether the residual stream should be bfloat16: on a GPU, under autocast to bfloat16.

    A CPU's LayerNorm would add up the gradients of its biases in bfloat16, too, and they came out
    up to 11% wrong. On a GPU, autocast computes LayerNorm in float32.
    """
    gpu = device_type == "cuda" and torch.is_autocast_enabled("cuda")
    return gpu and torch.get_autocast_dtype("cuda") == torch.bfloat16


def can_compile(wanted: bool | None, runtime) -> bool:
    """Whether to use torch.compile: if it is wanted, and finds Triton or a C++ compiler on all
    ranks. One that cannot would slow the others down."""
    if wanted is False or (wanted is None and runtime.device_type == "mps"):
        return False
    try:  # to compile something small is the only sure sign
        torch.compile(torch.sin)(torch.zeros(8, device=runtime.device))
        works = True
    except Exception:  # each part of the compiler fails with its own type
        works = False
    works = all(runtime.gather(works))
    if not works:
        say("no working compiler for torch.compile: training runs eagerly, and slower")
    return works


def peak_memory(device_type: str) -> int:
    """The most bytes used so far, on the GPU or by this process; 0 if unknown."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":  # it has no resource module
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep_freed_memory() -> bool:
    """Tell glibc, if it is the C library here, to keep large freed buffers -> whether it is.

    By default it returns them to the kernel, and every step pays for new pages (runs/bench-cpu).
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
    glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    if glibc:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        accepted = mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        if not accepted:
            mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that an older glibc accepts
    return glibc


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------
#
# What a training step needs on a GPU. For GPT-2 (124M) with a micro-batch of 64 x 1024 tokens,
# compiled, in bfloat16:
#
#   parameters    18 bytes each: weight 4, gradient 4, AdamW's two averages 8, and
#                 autocast's copy in bfloat16 2                                        2.2 GB
#   activations   32 C bytes per token and layer, for backward: 16 C numbers in
#                 bfloat16, the inputs of the two LayerNorms 2, what these give 2, q, k
#                 and v 3, attention's output 1, the MLP's hidden layer before and after
#                 GELU 8. (In float16 the LayerNorms' inputs are float32: 36 C.) One
#                 layer more stands for the last LayerNorm and for what backward holds
#                 while it works                                                      20.9 GB
#   logits        2 bytes each: the compiler fuses the softmax and writes the
#                 gradient over the logits. Run eagerly, cross_entropy holds them
#                 three times in float32, 12 bytes, and the total is 65 GB              6.6 GB
#                                                                            together 29.8 GB
#
# On an H200 the step above took 28.6 GB. The eager total was held against a simulation of every
# allocation.


def step_bytes(c, parameters: int, tokens: int, compiled: bool, dtype, world: int = 1) -> int:
    """Bytes at the peak of a step with micro-batches of so many tokens. `c` is a GPTConfig."""
    size = 4 if dtype == torch.float32 else 2  # of an activation
    per_parameter = 16 if dtype == torch.float32 else 18
    if world > 1:
        per_parameter += 4  # DDP's buckets, next to the gradients of the first step
    # Eagerly, backward keeps the float32 copies that autocast makes for the LayerNorms.
    stream = 2 if compiled and dtype == torch.bfloat16 else 4
    activations = (c.n_layer + 1) * (2 * stream + 14 * size) * c.n_embd
    logits = (size if compiled else 3 * 4) * c.vocab_size
    if compiled and c.vocab_size % 8:
        logits *= 3  # the compiler pads ragged matrices, in copies
    return per_parameter * parameters + tokens * (activations + logits)


def choose_micro_batch(config, model, compiled: bool, resuming: bool, runtime) -> int:
    """--micro_batch, or as many sequences as fit into a GPU's free memory, up to 65,536 tokens.

    Raises UserError, naming what works, if --batch_tokens does not divide evenly.
    """
    alone = (config.micro_batch or 1) * config.seq_len
    unit = alone * runtime.world
    if config.batch_tokens % unit:
        factor = "micro_batch * " if config.micro_batch else ""
        what = f"--batch_tokens {config.batch_tokens} is not a multiple of {factor}"
        works = max(1, round(config.batch_tokens / unit)) * unit
        hint = f"try {works}"
        if resuming:  # the run's batch stays
            shares = config.batch_tokens // alone
            ranks = [str(n) for n in range(1, shares + 1) if shares % n == 0]
            hint = f"this run can continue on {', '.join(ranks[:8])} ranks"
            if config.micro_batch:
                hint = "try --micro_batch 0"
        raise UserError(f"{what}seq_len * ranks = {unit}; {hint}")
    if config.micro_batch:
        return config.micro_batch
    share = config.batch_tokens // unit  # the sequences of a rank
    sizes = [n for n in range(1, share + 1) if share % n == 0]
    device = model.lm_head.weight.device
    if device.type != "cuda":  # larger is not faster there
        return max(n for n in sizes if n == 1 or n * config.seq_len <= 8192)
    # step_bytes counts the weights, which are there already. A tenth is for CUDA and fragments.
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    parameters = sum(p.numel() for p in model.parameters())
    best = 1
    for n in sizes:
        tokens = n * config.seq_len
        need = step_bytes(model.config, parameters, tokens, compiled, runtime.dtype, runtime.world)
        if tokens <= 65536 and need <= 0.9 * free:
            best = n
    return best
