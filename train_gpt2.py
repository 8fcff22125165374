"""Reproduce GPT-2 (124M) in one script: the model, the data, the optimizer and the training run.

It follows the lecture "Let's reproduce GPT-2 (124M)" (https://www.youtube.com/watch?v=l8pRSuU81PU).
Read it from top to bottom: each section builds on the ones before it, and its banner names the
chapters of the lecture that it covers.

    python train_gpt2.py                                    # the demo: Shakespeare, 3 to 7 minutes
    python fineweb.py                                       # once: the real data, 20 GB of disk
    python train_gpt2.py --preset gpt2                      # one GPU (an H200: 5 hours, computed)
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --preset gpt2    # eight GPUs
    python sample.py --model log --prompt "Once upon a time"  # text by the model of a run

Contents: 1. the network, 2. sampling, 3. settings, 4. the machine, 5. the data, 6. the optimizer
and its schedule, 7. the training step, 8. evaluation, 9. the run.

Single letters are sizes: B batch (sequences), T time (tokens in a sequence), C channels, H heads,
D = C / H, V vocabulary, L layers. Shape comments read "what goes in -> comes out".
"""

import functools
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import hellaswag
from support import checkpoint, machine, muon, shards
from support.command import Stop, UserError, merge, parse_flags, progress, run_command, say, setting
from support.log import Log, describe_run, text_of

HERE = Path(__file__).parent

# --------------------------------------------------------------------------------------------------
# 1. The network (0:13:47 the nn.Module; 0:28:08 published parameters; 0:52:53 cross entropy;
#    1:06:14 wte and lm_head; 1:13:47 initialization; 2:00:18 flash attention; 2:06:54 nice numbers)
# --------------------------------------------------------------------------------------------------
# A GPT reads T tokens and predicts, at each of them, the one that comes next. Every token is a
# vector of C numbers. These vectors are the residual stream: they start as the token's embedding
# plus its position's, and each of L blocks adds to them twice. Attention is communication, where
# tokens take in what earlier tokens know. The MLP is computation, where each token works on what it
# has. Both read a normalized copy of the stream (LayerNorm comes before them) and only ever add to
# the stream itself, so the gradient of the loss flows back to the embeddings undisturbed.
#
# Where the 124M parameters are: a block's matrices have 12 C^2 (attention 3 + 1, the MLP 4 + 4), so
# 12 blocks of 768 channels have 84.9M; the token embeddings have 50,257 C = 38.6M, the positions
# 1,024 C = 0.8M, biases and LayerNorms 0.1M. Together 124,439,808 (124,475,904 with the vocabulary
# padded to 50,304).


@dataclass(frozen=True)
class GPTConfig:
    """The model's sizes; setting() makes each a field and a flag. Defaults: GPT-2 (124M)."""

    seq_len: int = setting(1024, "tokens per sequence", least=1)  # T: how far the model looks back
    # V: GPT-2 has 50,257 tokens, padded to 393 x 128. Kernels load aligned blocks of 16 bytes (8
    # numbers in bfloat16); with 50,257 columns, only every eighth row of logits starts on one.
    vocab_size: int = setting(50304, "vocabulary, with padding", least=shards.VOCAB_SIZE)
    n_layer: int = setting(12, "number of layers", least=1)  # L
    n_head: int = setting(12, "attention heads per layer", least=1)  # H
    n_embd: int = setting(768, "number of channels", least=1)  # C


class CausalSelfAttention(nn.Module):
    """Let each token take in information from itself and the tokens before it.

    A token has a query (what it looks for), a key (what it offers) and a value (what it says). The
    better its query fits another token's key, the more of that token's value it takes in. H heads
    do this side by side with D channels each, so a token can look for H things at once.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) -> (B, T, 3C) -> three of (B, T, C)
        shape = (B, T, self.n_head, C // self.n_head)  # (B, T, H, D)
        q, k, v = (z.view(shape).transpose(1, 2) for z in (q, k, v))  # (B, T, C) -> (B, H, T, D)
        # softmax(q k^T / sqrt(D) + mask) v; the mask is -inf for later tokens (plain_attention in
        # bench.py). A sum of D products grows like sqrt(D); undivided, the softmax would saturate.
        # FlashAttention (2022) goes tile by tile and never stores the (B, H, T, T) scores.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C): the heads side by side
        return self.c_proj(y)  # mixes what the heads found: (B, T, C) -> (B, T, C)


class MLP(nn.Module):
    """Let each token work on what it has, on its own: four times as wide, and back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        # GPT-2 was trained with the tanh approximation, because TensorFlow's erf was slow then.
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))  # each token gathers what earlier tokens know
        return x + self.mlp(self.ln_2(x))  # and thinks about it on its own


class GPT(nn.Module):
    """GPT-2: a decoder-only transformer with LayerNorm before each sublayer (GPT-2 paper, 2.3).

    The parameters have the published names. support/published.py transposes OpenAI's matrices.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),  # token -> vector
                wpe=nn.Embedding(config.seq_len, config.n_embd),  # position -> vector
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # One matrix at both ends: similar tokens should get similar embeddings and similar logits,
        # and the model is a quarter smaller ("Using the Output Embedding to Improve Language
        # Models", 2016; GPT-2's code).
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Initialize the weights from torch's global generator (see torch.manual_seed).

        weight                      standard deviation   why
        of Linear and Embedding     0.02                 GPT-2's code; near 1 / sqrt(C) = 0.036, at
                                                         which a Linear's output is as large as its
                                                         input
        of c_proj                   0.02 / sqrt(2 L)     GPT-2 paper, 2.3: 2 L of them add to the
                                                         stream, and its variance should not grow
        wpe                         0.02                 the lecture; GPT-2's code has 0.01 here
        Biases are 0, and LayerNorm starts as the identity. With torch's default embeddings, of
        standard deviation 1, the first loss was 434.6 instead of about 11.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and name != "lm_head":  # wte's weight
                scale = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj") else 1.0
                module.weight.normal_(mean=0.0, std=0.02 * scale)
                if getattr(module, "bias", None) is not None:  # an Embedding has none
                    module.bias.zero_()

    def hidden(self, tokens):
        """tokens (B, T) -> the final hidden states (B, T, C), from which lm_head makes logits."""
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)  # (B, T, C) + (T, C)
        # Autocast (section 4) makes what the blocks add bfloat16. On a GPU the stream is bfloat16,
        # too, which halves its memory traffic (not in the lecture; 4% faster on an H200).
        x = x.bfloat16() if machine.bfloat16_stream(x.device.type) else x
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Hidden states (..., C) -> logits (..., 50257) in float32, for probabilities.

        The padded ids are cut off: they stand for no text.
        """
        return self.lm_head(x)[..., : shards.VOCAB_SIZE].float()

    def forward(self, tokens, targets=None):
        """tokens (B, T) -> logits (B, T, V); with targets (B, T) -> mean cross-entropy.

        An untrained model guesses: ln 50304 = 10.83 nats, or a bit more. Anything far off is a bug.
        """
        logits = self.lm_head(self.hidden(tokens))  # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits
        # Autocast would compute this in float32 anyway; .float() says so.
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @staticmethod
    def from_pretrained(source: str) -> "GPT":
        """Load a published model (gpt2, gpt2-medium, gpt2-large, gpt2-xl), a transformers folder,
        or a checkpoint of ours. Raises UserError if it is not a plain GPT-2.
        """
        content = checkpoint.load(source)
        return build(content["network"], content["model"])


def build(sizes: dict, weights: dict) -> GPT:
    """A model with these sizes and weights, in eval mode."""
    return checkpoint.load_weights(GPT(GPTConfig(**sizes)), weights).eval()


# --------------------------------------------------------------------------------------------------
# 2. Sampling (0:33:31 prefix tokens, tokenization; 0:37:02 the sampling loop; 3:23:10 in training)
# --------------------------------------------------------------------------------------------------
# The model gives a probability to each possible next token. We draw one, append it, and ask again.
# We draw only from the top 50: each of the other 50,207 is unlikely, but together they come up
# often, and one bad token spoils the text for good, because the model continues from it.


@torch.no_grad()
def generate(model, prompt, max_new_tokens, samples=4, temperature=1, top_k=50, seed=42, show=None):
    """Continue `prompt` (token ids, at least one) -> (samples, len(prompt) + max_new_tokens).

    Each token is one of the `top_k` most likely (top_k=1 is greedy decoding). A temperature below 1
    makes likely tokens likelier. `show`, if given, is called with each new token of the samples.
    The generator is on the CPU, so the random numbers are the same on every device.
    """
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(prompt, device=device).repeat(samples, 1)  # (T) -> (B, T)
    for _ in range(max_new_tokens):
        x = model.hidden(tokens[:, -model.config.seq_len :])[:, -1]  # (B, T) -> (B, T, C) -> (B, C)
        logits = model.logits(x) / temperature  # (B, C) -> (B, 50257)
        logits, ids = logits.topk(min(top_k, logits.size(1)))  # (B, 50257) -> (B, top_k)
        choice = torch.multinomial(logits.softmax(dim=1).cpu(), 1, generator=generator)  # (B, 1)
        tokens = torch.cat([tokens, ids.gather(1, choice.to(device))], dim=1)  # -> (B, T + 1)
        if show:
            show(tokens[:, -1])
    return tokens


# --------------------------------------------------------------------------------------------------
# 3. Settings (2:14:55 the hyperparameters of GPT-2 and GPT-3)
# --------------------------------------------------------------------------------------------------
# Every setting is one line: a default, a flag, its help, its source. setting() makes the dataclass
# field that carries them. First wins: a flag; what was loaded (section 9); the preset; the default.


@dataclass(frozen=True)
class TrainConfig(GPTConfig):
    """The model's sizes, and how to train it. Most defaults are the lecture's. Batch, warmup and
    validation are in tokens, so they mean the same with sequences of any length."""

    preset: str = setting("", "what to start from; other flags override it", group="run")
    out_dir: str = setting("log", "folder for metrics.jsonl and the checkpoints")
    init_from: str = setting("", "start from a model, as sample.py --model takes it: gpt2, log")
    resume: bool = setting(False, "continue from the newest checkpoint in --out_dir")
    eval_only: bool = setting(False, "only print validation loss and samples of --init_from")
    seed: int = setting(1337, "random seed for weights, data order and samples")  # the lecture

    data: str = setting(str(HERE / "edu_fineweb10B"), "folder of shards, or a text", group="data")
    epochs: float = setting(1.0, "passes over the training data")  # the lecture
    max_steps: int = setting(0, "number of steps; overrides --epochs unless 0")
    batch_tokens: int = setting(2**19, "tokens per step", least=1)  # GPT-3 paper, table 2.1: 0.5M
    micro_batch: int = setting(0, "sequences per forward pass on a device; 0: by memory")

    optimizer: str = setting("adamw", "updates matrices", choices="adamw muon", group="optimizer")
    learning_rate: float = setting(6e-4, "peak learning rate")  # GPT-3 paper, table 2.1
    min_lr_ratio: float = setting(0.1, "final rate as a fraction of the peak")  # GPT-3, app. B
    warmup_tokens: int = setting(375_000_000, "tokens of linear warmup")  # GPT-3, app. B
    weight_decay: float = setting(0.1, "decay of matrices and embeddings")  # GPT-3, app. B
    grad_clip: float = setting(1.0, "clip the gradient to this norm; 0: never")  # GPT-3, app. B

    val_every: int = setting(250, "steps between validation losses; 0: never", group="evaluation")
    val_tokens: int = setting(20 * 2**19, "number of validation tokens to read")  # the lecture
    sample_every: int = setting(250, "steps between samples; 0: never")  # the lecture
    prompt: str = setting("Hello, I'm a language model,", "text that samples continue")  # lecture
    hellaswag_every: int = setting(250, "steps between HellaSwag scores; 0: never")  # the lecture
    checkpoint_every: int = setting(250, "steps between checkpoints; 0: one at the end")  # ours

    device: str = setting("auto", "cuda, mps or cpu; auto: cuda, else cpu", group="machine")
    dtype: str = setting("auto", "matmul precision", choices="auto bfloat16 float16 float32")
    compile: bool | None = setting(None, "use torch.compile; by default, if a compiler works")

    def __post_init__(self):
        if self.n_embd % self.n_head:
            works = next(n for n in range(self.n_head, 0, -1) if self.n_embd % n == 0)
            raise UserError(f"--n_head {self.n_head} must divide --n_embd; try {works}")

    def sizes(self) -> dict:
        """GPTConfig's settings alone, the `network` of a checkpoint."""
        return {size.name: getattr(self, size.name) for size in fields(GPTConfig)}


# What differs from the defaults. Layers and channels: GPT-2 paper, table 2; heads: GPT-2's code.
# Batch (0.5M and 1M, as powers of two) and learning rate: GPT-3 paper, table 2.1, the row of the
# nearest size.
PRESETS = {
    "gpt2": dict(),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, learning_rate=3.0e-4),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, learning_rate=2.5e-4),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, learning_rate=2.0e-4, batch_tokens=2**20),
    "gpt3": dict(seq_len=2048),
    "gpt2-muon": dict(optimizer="muon", learning_rate=3.6e-3),  # tried only small (runs/muon-cpu)
    # Ours: among the best of 14 configurations, 165 s each on a CPU (runs/demo-cpu).
    "demo": dict(n_layer=4, n_head=3, n_embd=96, seq_len=32, batch_tokens=24 * 32, epochs=2.5,
                 learning_rate=4e-3, warmup_tokens=77_000, prompt="First Citizen:\n",
                 sample_every=500, hellaswag_every=0, data=str(HERE / "input.txt"), compile=False),
}  # fmt: skip
FIXED = {"preset", "batch_tokens", "seed", "optimizer"}  # with the sizes, fixed on --resume


def make_config(flags: dict, loaded: dict, fixed: set[str]) -> TrainConfig:
    """Merge all settings; of the loaded ones, flags may not change those in `fixed`."""
    guess = "gpt2" if shards.list_shards(HERE / "edu_fineweb10B", "train") else "demo"
    given = flags.get("preset") or loaded.get("preset")
    config = merge(TrainConfig, PRESETS, given or guess, loaded, flags, fixed)
    why = "" if given else " (--preset chooses another)"
    say(f"preset {config.preset}{why}, data {config.data}")  # say() prints on rank 0 only
    return config


# --------------------------------------------------------------------------------------------------
# 4. The machine (0:41:47 device; 1:28:14 TF32; 1:39:38 bfloat16; 1:48:15 compile; 2:46:52 DDP)
# --------------------------------------------------------------------------------------------------
# A GPU multiplies matrices much faster than it moves numbers to and from its memory. So numbers
# with fewer bits and fewer trips to memory make it faster. The lecture's A100, in ms for 16 x 1024
# tokens (bench.py climbs the same ladder on your machine):
#
#     float32       1000   8 bits of exponent, 23 of mantissa
#     TF32           333   8 and 10 bits, only as the input of tensor cores; sums stay in float32
#     bfloat16       300   8 and 7 bits: float32's range with less precision, so nothing overflows.
#                          (float16 has 5 and 10: small gradients become 0, so the loss is scaled
#                          up before backward and the gradients down after it, by a GradScaler)
#     compile        130   chains of elementwise operations become one kernel, one trip to memory
#     flash           96   attention's (T, T) scores stay on the chip: more FLOPs, less traffic
#     50304           93   a vocabulary that kernels can load in whole pieces
#     fused AdamW     90   a few kernels for all 148 parameter tensors


class Runtime:
    """Where this process runs: as rank `rank` of `world` processes, each on its own device.

    torchrun starts one process per GPU and tells each its place by three environment variables:
    RANK numbers all processes, LOCAL_RANK those of one machine, and WORLD_SIZE is how many there
    are. Under plain python, a process has none of the three, and is rank 0 of 1.
    """

    def __init__(self, device: str, dtype: str):
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        values = [os.environ[name] for name in names if name in os.environ]
        if len(values) not in (0, 3):
            raise UserError("set all of RANK, LOCAL_RANK and WORLD_SIZE, as torchrun does, or none")
        self.rank, self.local_rank, self.world = map(int, values or (0, 0, 1))
        self.micro_batch = 8  # sequences at a time, until main() has chosen
        self.stop = Stop()  # becomes true when this rank is told to stop (Ctrl-C, SIGTERM, ...)
        self.all_stop = False  # becomes true when any rank was told to; self.sum() finds out
        self.device = machine.open_device(device, self.local_rank)
        self.device_type = self.device.type
        # bfloat16 where it is fast, float16 on GPUs before Ampere (2020), float32 elsewhere.
        self.dtype = machine.choose_dtype(dtype, self.device)
        # Sums are float64, which mps lacks.
        self.sum_dtype = torch.float32 if self.device_type == "mps" else torch.float64
        if self.device_type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
        if self.world > 1:  # nccl connects GPUs, gloo CPUs
            gpu = self.device if self.device_type == "cuda" else None
            dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu)

    def autocast(self):
        """Matrix products in self.dtype; weights, LayerNorm and softmax stay in float32."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device_type, self.dtype) if half else nullcontext()

    def sum(self, *values) -> list[float]:
        """Sum each value over all ranks. Sets `all_stop`, too, if any of them was told to stop.

        Python waits here for the GPU and the other ranks, so pass all values in one call.
        """
        zero = torch.zeros((), dtype=self.sum_dtype, device=self.device)
        # zero + value: a number becomes a tensor on the device
        total = torch.stack([zero + value for value in (*values, bool(self.stop))])
        if self.world > 1:
            dist.all_reduce(total)
        *sums, stops = total.tolist()
        self.all_stop = stops > 0
        return sums

    def gather(self, value) -> list:
        """The values of all ranks, on each of them."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.gather(None)

    def close(self) -> None:
        """End the run; with several ranks, end this process."""
        if self.world > 1:
            dist.destroy_process_group()
            # A normal exit may hang: freeing DDP waits for threads that wait for Python's GIL.
            os._exit(0)

    def to_device(self, tokens):
        """Copy tokens to the device. From pinned memory, Python need not wait for the copy."""
        if self.device_type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(self.device, non_blocking=self.device_type == "cuda")


# --------------------------------------------------------------------------------------------------
# 5. The data (0:45:50 batches; 1:02:00 data loader lite; 3:10:21 FineWeb-Edu)
# --------------------------------------------------------------------------------------------------
# fineweb.py writes shards of 10^8 tokens. A sequence is T = 1024 tokens and one more, since each
# token's target is the next one. So a shard has (10^8 - 1) // 1024 = 97,656 sequences; the 99
# training shards, the last of them shorter, have 9,623,011, or 18,794 steps of 512.


@functools.lru_cache(maxsize=8)  # a shard's order serves 97,656 / 512 = 190 steps
def order_of(size: int, seed: int | None, epoch: int, part: int) -> np.ndarray:
    """0 .. size - 1, shuffled by (seed, epoch, part). Part 0 is the shards, 1 + i is shard i."""
    if seed is None:  # keep the files' order
        return np.arange(size)
    return np.random.default_rng((seed, epoch, part)).permutation(size)


class DataLoaderLite:
    """Batches as a pure function of (seed, step): there is no position to keep or to restore.

    So ranks cannot drift apart, resuming takes only the step, and the batches are the same for any
    number of ranks and any micro-batch.

    Sequence i of a shard is T + 1 tokens from i * T on: the first T are the inputs, the last T
    the targets. Sequence g of the run is in epoch g // epoch_sequences. Every epoch shuffles the
    shards, and the sequences within each shard. Seed None keeps the files' order.
    """

    def __init__(self, arrays: list[np.ndarray], seq_len: int, seed: int | None):
        self.arrays = arrays  # the shards
        self.seq_len = seq_len
        self.seed = seed
        self.counts = [max(0, len(array) - 1) // seq_len for array in arrays]
        self.epoch_sequences = sum(self.counts)

    def sequence(self, g: int) -> np.ndarray:
        """Sequence g of the run -> (T + 1,) uint16."""
        epoch, left = divmod(g, self.epoch_sequences)
        for shard in order_of(len(self.arrays), self.seed, epoch, 0):
            if left < self.counts[shard]:  # it is in this shard
                break
            left -= self.counts[shard]  # it comes after this shard
        order = order_of(self.counts[shard], self.seed, epoch, 1 + shard)
        first = order[left] * self.seq_len
        array = self.arrays[shard]
        return shards.check_ids(array[first : first + self.seq_len + 1], array)

    def sequences(self, numbers) -> torch.Tensor:
        """The sequences with these numbers -> (count, T + 1) int64."""
        return torch.from_numpy(np.stack([self.sequence(g) for g in numbers]).astype(np.int64))

    def batch(self, step: int, config: TrainConfig, runtime: Runtime) -> torch.Tensor:
        """This rank's part of a step -> (micro-steps, B, T + 1) int64. A thread calls it ahead of
        time, so it must not use torch's generator: draw from (seed, step) if you need randomness.

        A step has N = batch_tokens / T sequences, and step s starts at s * N. Micro-step m of rank
        r takes B of them, from (m * world + r) * B on.
        """
        N, B = config.batch_tokens // self.seq_len, runtime.micro_batch
        starts = range(step * N + runtime.rank * B, (step + 1) * N, runtime.world * B)
        return torch.stack([self.sequences(range(g, g + B)) for g in starts])


# --------------------------------------------------------------------------------------------------
# 6. The optimizer and its schedule (2:14:55 AdamW; 2:21:06 warmup and cosine; 2:26:21 decay, fused)
# --------------------------------------------------------------------------------------------------
# AdamW keeps two running averages for each parameter: of its gradient and of the gradient's square.
# It steps by the first over the root of the second, so every parameter moves by about the learning
# rate or less, however large its gradients are. The averages are unreliable at first, hence the
# warmup. Weight decay pulls each weight toward 0, so the model does not lean on a few large ones.
# Averages, weight and gradient are 16 bytes per parameter: 2.0 GB for GPT-2 (124M).


def make_optimizers(model: GPT, config: TrainConfig) -> dict[str, torch.optim.Optimizer]:
    """AdamW for all parameters; with --optimizer muon, Muon takes the matrices in the blocks.

    Matrices and embeddings decay. Biases and LayerNorm's gains do not: they only shift and scale.
    """
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    optimizers = {}
    if config.optimizer == "muon":  # support/muon.py explains it
        in_blocks = set(model.transformer.h.parameters())
        matrices = [p for p in decay if p in in_blocks]
        decay = [p for p in decay if p not in in_blocks]
        optimizers["Muon"] = muon.Muon(matrices, config.learning_rate, config.weight_decay)
    groups = [dict(params=decay, weight_decay=config.weight_decay)]
    groups += [dict(params=no_decay, weight_decay=0.0)]
    adamw = dict(betas=(0.9, 0.95), eps=1e-8, fused=True)  # GPT-3 paper, appendix B
    optimizers["AdamW"] = torch.optim.AdamW(groups, config.learning_rate, **adamw)
    return optimizers


def count_steps(config: TrainConfig, epoch_sequences: int) -> int:
    """The number of steps: as many whole batches as the epochs have, or --max_steps."""
    tokens = int(config.epochs * epoch_sequences) * config.seq_len
    steps = config.max_steps or tokens // config.batch_tokens
    if steps == 0:
        what = f"--batch_tokens {config.batch_tokens} is more than the {tokens} to train on"
        raise UserError(f"{what}; try a smaller one, or more --epochs")
    return steps


def learning_rate(tokens: int, total_tokens: int, config: TrainConfig) -> float:
    """The rate of a step. `tokens` includes the step's own, or the first rate would be 0."""
    lowest = config.learning_rate * config.min_lr_ratio
    # A warmup that is longer than the run becomes a third of it.
    warmup = config.warmup_tokens if config.warmup_tokens < total_tokens else total_tokens / 3
    if tokens < warmup:  # a straight line up,
        return config.learning_rate * tokens / warmup
    # then half a cosine down
    done = (tokens - warmup) / (total_tokens - warmup)
    return lowest + (config.learning_rate - lowest) * 0.5 * (1.0 + math.cos(math.pi * done))


# --------------------------------------------------------------------------------------------------
# 7. The training step (0:56:42 one step; 2:14:55 clipping; 2:34:09 accumulation; 2:46:52 DDP)
# --------------------------------------------------------------------------------------------------
# Half a million tokens do not fit on a GPU, so a step adds up the gradients of micro-batches.
# Beware of the mean: four losses a, b, c, d have the mean (a + b + c + d) / 4, but four backward
# passes add up the gradient of a + b + c + d. Hence each loss is divided by the number of
# micro-steps. With several ranks, each does this for its share, and DDP averages their gradients.


class TrainState:
    """What training changes and a checkpoint keeps: model, optimizers, and float16's loss scale."""

    def __init__(self, model: GPT, config: TrainConfig, runtime: Runtime):
        self.model = model
        self.optimizers = make_optimizers(model, config)
        float16 = runtime.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(runtime.device_type, enabled=float16)
        # DDP puts "module." before all names and waits for all ranks, so only train_step uses it.
        self.ddp = DDP(model, gradient_as_bucket_view=True) if runtime.world > 1 else model

    def parts(self) -> dict:
        """What has a state_dict(), by its name in a checkpoint; "model" is what others load."""
        return {"model": self.model, "scaler": self.scaler, **self.optimizers}


def train_step(state, batch, lr, config, runtime) -> tuple[float, float]:
    """One step -> the mean loss of the whole batch, and the gradient's norm before clipping. If one
    is not finite, the update is skipped: it would destroy the weights."""
    for optimizer in state.optimizers.values():
        # DDP's gradients are views of the buffers that it exchanges, so they are zeroed, not freed.
        optimizer.zero_grad(set_to_none=runtime.world == 1)
    inputs, targets = batch[..., :-1], batch[..., 1:]  # (micro-steps, B, T) each
    mean_loss = 0.0
    for m in range(len(batch)):
        # DDP averages gradients over the ranks during backward. no_sync() puts that off to the last
        # micro-step, so they are exchanged once per step instead of once per micro-step.
        last = m == len(batch) - 1
        with nullcontext() if last or runtime.world == 1 else state.ddp.no_sync():
            with runtime.autocast():
                loss = state.ddp(inputs[m], targets[m]) / len(batch)  # their sum is the mean
            state.scaler.scale(loss).backward()
        mean_loss += loss.detach()
    for optimizer in state.optimizers.values():
        state.scaler.unscale_(optimizer)  # before the norm is taken
        for group in optimizer.param_groups:
            group["lr"] = lr
    # One bad batch should not throw the model off, so the gradient's norm is capped.
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip or math.inf)
    # So far Python has only queued work; here it waits for the GPU. So timing a step needs no
    # torch.cuda.synchronize. (The update below is queued, and timed with the next step.) The ranks'
    # norms are equal, so taking their mean changes nothing.
    loss, norm = (total / runtime.world for total in runtime.sum(mean_loss, norm))
    if math.isfinite(loss) and math.isfinite(norm):
        for optimizer in state.optimizers.values():
            state.scaler.step(optimizer)
    state.scaler.update()  # after an overflow in float16 (normal now and then) it lowers the scale
    return loss, norm


# --------------------------------------------------------------------------------------------------
# 8. Evaluation (3:23:10 validation split and loss, sampling; 3:28:23 HellaSwag)
# --------------------------------------------------------------------------------------------------
# The training loss says how well the model learns, the validation loss whether that carries over to
# text that it has not seen. A loss in nats per token depends on the tokenizer; divided by ln 2 and
# by the mean bytes of a token it is in bits per byte, comparable across tokenizers. HellaSwag asks
# which of four endings fits a story: chance is 0.25, and GPT-2 (124M) has an acc_norm of 0.2955.


@torch.no_grad()
def validate(model, loader, config, runtime) -> dict | None:
    """The mean loss of the first --val_tokens tokens, in nats per token and in bits per byte; None
    if the run is to stop. The tokens are the same for any batch and any number of ranks."""
    end = min(max(1, config.val_tokens // config.seq_len), loader.epoch_sequences)
    nats = torch.zeros((), dtype=runtime.sum_dtype, device=runtime.device)
    count = text_bytes = 0
    B = runtime.micro_batch
    for first in progress(range(runtime.rank * B, end, runtime.world * B), "validation"):
        if runtime.stop:
            break
        rows = loader.sequences(range(first, min(first + B, end)))
        text_bytes += int(shards.token_bytes()[rows[:, 1:].numpy()].sum())
        tokens = rows[:, 1:].numel()
        count += tokens
        # Pad the last batch to B rows, or torch.compile would compile another shape. The loss skips
        # targets of -100; as an input, -100 is no token, so clamp turns it into token 0.
        rows = runtime.to_device(F.pad(rows, (0, 0, 0, B - len(rows)), value=-100))
        with runtime.autocast():
            nats += model(rows[:, :-1].clamp(min=0), rows[:, 1:]) * tokens
    nats, count, text_bytes = runtime.sum(nats, count, text_bytes)
    if runtime.all_stop:
        return None
    return dict(loss=nats / count, bits_per_byte=nats / math.log(2) / max(text_bytes, 1))


def sample(model, config, step, max_new_tokens, runtime) -> dict | None:
    """Continue --prompt four times, seeded by --seed + step; None if the run is to stop."""
    if runtime.stop:
        return None
    with runtime.autocast():
        prompt = shards.encode_prompt(config.prompt)
        rows = generate(model, prompt, max_new_tokens, seed=config.seed + step)
    return dict(texts=[shards.decode(row) for row in rows.tolist()])


def score_hellaswag(model, examples, runtime) -> dict | None:
    """Each rank scores a share. An ending's score is the sum (acc) or mean (acc_norm) of the
    log-probabilities of its tokens. The best of the four is the model's answer."""
    with runtime.autocast():
        mine = examples[runtime.rank :: runtime.world]
        counts = hellaswag.count_right(model, mine, runtime.stop)
    scores = hellaswag.Scores(*runtime.sum(*counts))
    return None if runtime.all_stop else dict(acc=scores.acc, acc_norm=scores.acc_norm)


# --------------------------------------------------------------------------------------------------
# 9. The run (3:28:23 starting the run)
# --------------------------------------------------------------------------------------------------
# support/log.py prints and records; support/checkpoint.py writes what a run can continue from.


def due(every: int, step: int, steps: int) -> bool:
    """Whether this step is one of those that come every `every` steps, or the last."""
    return every > 0 and (step % every == 0 or step == steps)


def load_settings(flags: dict) -> tuple[TrainConfig, GPT, dict | None]:
    """Flags -> all settings, the model to train, and the checkpoint to resume, if there is one."""
    saved = checkpoint.newest(Path(flags.get("out_dir", "log"))) if flags.get("resume") else None
    content = saved or (checkpoint.load(flags["init_from"]) if flags.get("init_from") else None)
    if content is None:  # a new model
        if flags.get("eval_only"):
            raise UserError("--eval_only needs --init_from, or --resume and a checkpoint")
        config = make_config(flags, {}, set())
        torch.manual_seed(config.seed)
        return config, GPT(GPTConfig(**config.sizes())), None
    network, settings = content["network"], content["settings"]
    if saved:  # --resume: all of the run's settings
        loaded = network | settings
        fixed = set(network) | FIXED
        if "epochs" in flags:  # a new --epochs wins over the old --max_steps
            loaded["max_steps"] = 0
    else:  # --init_from: only the model's sizes, but with --eval_only the run's settings, too
        loaded = network | settings if flags.get("eval_only") else network
        fixed = set(network)
        if flags.get("seq_len", 0) <= network["seq_len"]:
            fixed.remove("seq_len")  # a model can be trained on sequences shorter than it can read
    config = make_config(flags, loaded, fixed)
    # The loaded sizes win (config.seq_len may be shorter). A size that you have added since the
    # checkpoint is in config only.
    return config, build(config.sizes() | network, content["model"]), saved


def main(argv: list[str] | None = None) -> None:
    # What to train, on what, and where.
    flags = parse_flags(TrainConfig, PRESETS, "train_gpt2.py", __doc__, argv)
    config, model, saved = load_settings(flags)
    runtime = Runtime(config.device, config.dtype)
    first = saved["step"] if saved else 0
    train_shards, val_shards = shards.open_data(config.data, config.seq_len)
    loader = DataLoaderLite(train_shards, config.seq_len, config.seed)
    val_loader = DataLoaderLite(val_shards, config.seq_len, None)
    found = (first, loader.epoch_sequences, val_loader.epoch_sequences)
    if len(set(runtime.gather(found))) > 1:
        raise UserError("the ranks found different checkpoints or data: all need the same folders")
    model.to(runtime.device)
    if config.eval_only:
        runtime.micro_batch = config.micro_batch or runtime.micro_batch
        say(text_of("val", validate(model.eval(), val_loader, config, runtime)))
        say(text_of("sample", sample(model, config, 0, 64, runtime)))
        return runtime.close()
    examples = []
    if config.hellaswag_every:
        examples = hellaswag.load_examples(downloads=runtime.local_rank == 0, wait=runtime.barrier)
    steps = count_steps(config, loader.epoch_sequences)

    # What trains it, and what the run leaves behind.
    compiled = machine.can_compile(config.compile, runtime)
    if compiled:  # this compiles model(...) only: samples and HellaSwag call model.hidden
        model.compile(dynamic=False)
    fits = machine.choose_micro_batch(config, model, compiled, saved is not None, runtime)
    runtime.micro_batch = min(runtime.gather(fits))  # another rank may have less free memory
    header = describe_run(config, steps, model, compiled, loader, runtime)
    state = TrainState(model, config, runtime)
    saver = checkpoint.Saver(state.parts(), header, runtime.rank)
    saver.restore(saved, steps)
    log = Log(config.out_dir, first, steps, header, runtime.rank)
    reader = ThreadPoolExecutor(1)  # reads the next batch while the GPU computes
    ahead = reader.submit(loader.batch, first, config, runtime)
    runtime.stop.listen()

    for step in range(first, steps + 1):  # `step` updates are done
        if runtime.all_stop:  # train_step's runtime.sum() found out
            break
        model.eval()
        if due(config.checkpoint_every, step, steps):  # before evaluations, which could fail
            saver.save(step)  # it skips step 0, and the step that --resume has just loaded
        if due(config.val_every, step, steps):
            log("val", step, validate(model, val_loader, config, runtime))
        if due(config.hellaswag_every, step, steps) and not runtime.all_stop:
            log("hellaswag", step, score_hellaswag(model, examples, runtime))
        if step > 0 and runtime.rank == 0 and due(config.sample_every, step, steps):
            log("sample", step, sample(model, config, step, 32, runtime))
        if step == steps or runtime.all_stop:
            break

        began = time.perf_counter()
        model.train()
        torch.manual_seed(hash((config.seed, step, runtime.rank)))  # for dropout, if you add it
        batch = runtime.to_device(ahead.result())
        ahead = reader.submit(loader.batch, step + 1, config, runtime)
        seen = (step + 1) * config.batch_tokens
        lr = learning_rate(seen, steps * config.batch_tokens, config)
        loss, norm = train_step(state, batch, lr, config, runtime)
        # float16 overflows now and then, until its scale is 1 (the scale of all other dtypes).
        if not math.isfinite(loss) or (not math.isfinite(norm) and state.scaler.get_scale() <= 1):
            saver.give_up(step, loss, norm)  # raises UserError
        seconds = time.perf_counter() - began
        speed = config.batch_tokens / seconds  # tokens per second
        mfu = machine.utilization(model, config.seq_len, speed / runtime.world, runtime.dtype)
        values = dict(loss=loss, lr=lr, grad_norm=norm, step_ms=1000 * seconds)
        log("train", step, values | dict(tokens_per_second=speed, mfu=mfu))

    failure = saver.close(step)  # why the last checkpoint was not written, or ""
    log.close(step, runtime.stop.last_words(step) if runtime.all_stop else "")
    if failure:
        raise UserError(failure)
    runtime.close()


if __name__ == "__main__":
    run_command("train_gpt2.py", main, if_out_of_memory="try half of the --micro_batch named above")
