"""Train GPT-2 (124M) from an empty file: network, data, optimiser and the run, in one script.

It follows the lecture "Let's reproduce GPT-2 (124M)" and is meant to be read from top to bottom:
each section uses only what stands above it, and its banner names the lecture's chapters it covers.

    python train_gpt2.py                                    # a laptop: Shakespeare in three minutes
    python fineweb.py                                       # once: the real data, 20 GB of disk
    python train_gpt2.py --preset gpt2                      # one GPU: 15 hours (an A100)
    torchrun --standalone --nproc_per_node=8 train_gpt2.py  # eight GPUs: two hours
    python train_gpt2.py --init_from log --eval_only --prompt "Once upon a time"

Contents
     1. Settings
     2. The network
     3. Sampling
     4. The machine
     5. The data
     6. The optimiser and its schedule
     7. The training step
     8. Validation
     9. The run

Single letters are sizes: B batch (sequences), T time (tokens in a sequence), C channels, H heads,
D = C / H, V vocabulary, L layers, N rows of any kind, n some of them, S tokens seen so far. A shape
comment reads "what goes in -> what comes out".
"""

import argparse
import ctypes
import dataclasses
import functools
import math
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.attention.bias import causal_lower_right
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import fineweb
import hellaswag
from fineweb import UserError, first_line

# --------------------------------------------------------------------------------------------------
# 1. Settings (2:14:55 section 3, the hyperparameters of GPT-2 and GPT-3)
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPTConfig:
    """What the network is. The defaults are GPT-2 (124M): GPT-2 paper, table 2; GPT-2's code."""

    seq_len: int = 1024  # tokens, T: how far back the network can look
    vocab_size: int = 50304  # V: GPT-2's 50,257 ids, padded to a multiple of 128 (2:06:54)
    n_layer: int = 12  # L
    n_head: int = 12  # H
    n_embd: int = 768  # C


def setting(default, help: str, **options):
    """A field of TrainConfig: its default, and what argparse needs to make a flag of it."""
    return field(default=default, metadata={"help": help, **options})


DTYPES, OPTIMIZERS = ("auto", "bfloat16", "float16", "float32"), ("adamw", "muon")


def auto_or_number(text: str) -> int:
    return 0 if text == "auto" else int(text)


@dataclass(frozen=True)
class TrainConfig:
    """What the run does. The defaults are the preset "gpt2": the lecture's run.

    Batch, warmup and validation are in tokens: another number of GPUs changes no meaning.
    """

    preset: str = setting("", "a row of the presets; flags win over it")
    data: str = setting("", "a folder of shards, or a text whose last 10%% are for validation")
    out_dir: str = setting("log", "the folder of metrics.jsonl and the checkpoints")
    init_from: str = setting("", "gpt2[-medium, -large, -xl], a transformers folder, a checkpoint")
    resume: bool = setting(False, "go on from the newest checkpoint in --out_dir")
    eval_only: bool = setting(False, "only validation loss and samples of --init_from")
    prompt: str = setting("Hello, I'm a language model,", "what samples begin with")  # the lecture

    seed: int = setting(1337, "of first weights, order of the data, and samples")  # the lecture
    device: str = setting("auto", "cuda, mps or cpu")
    dtype: str = setting("auto", "of products (float32 on a GPU: TF32)", choices=DTYPES)
    compile: bool | None = setting(None, "torch.compile (default: where it works)")

    n_layer: int = setting(12, "layers")  # GPT-2 paper, table 2
    n_head: int = setting(12, "attention heads in a layer")  # GPT-2's code
    n_embd: int = setting(768, "channels")  # GPT-2 paper, table 2
    seq_len: int = setting(1024, "tokens in a sequence")  # GPT-2 paper, section 2.3

    batch_tokens: int = setting(2**19, "tokens in an update")  # GPT-3 paper, table 2.1: 0.5M
    micro_batch: int = setting(0, "sequences a device takes at once, or auto", type=auto_or_number)
    epochs: float = setting(1.0, "passes over the training data")  # the lecture
    max_steps: int = setting(0, "updates, whatever --epochs says (0: as --epochs says)")
    optimizer: str = setting("adamw", "of the blocks' matrices", choices=OPTIMIZERS)  # the lecture
    learning_rate: float = setting(6e-4, "at its highest")  # GPT-3 paper, table 2.1
    min_lr_ratio: float = setting(0.1, "last learning rate / highest")  # GPT-3 paper, appendix B
    warmup_tokens: int = setting(375_000_000, "tokens to the highest rate")  # GPT-3, appendix B
    weight_decay: float = setting(0.1, "of matrices and embeddings")  # GPT-3 paper, appendix B
    grad_clip: float = setting(1.0, "highest norm of the gradient (0: any)")  # GPT-3, appendix B

    val_every: int = setting(250, "steps between validation losses (0: never)")  # the lecture
    val_tokens: int = setting(20 * 2**19, "validation tokens to read")  # the lecture
    sample_every: int = setting(250, "steps between samples (0: never)")  # the lecture
    hellaswag_every: int = setting(250, "steps between HellaSwag scores (0: never)")  # the lecture
    timeout_minutes: float = setting(10.0, "for which processes wait for each other")  # ours
    checkpoint_every: int = setting(250, "steps between checkpoints (0: one, at the end)")  # ours
    keep_every: int = setting(0, "steps between checkpoints that stay; the newest two always do")

    def __post_init__(self):
        above_0 = "n_layer n_head n_embd seq_len batch_tokens epochs learning_rate val_tokens"
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise UserError(f"--{name} {value}: it must be a number from 0 on")
            if value == 0 and name in (*above_0.split(), "timeout_minutes"):
                raise UserError(f"--{name} 0: it must be more")
        if self.eval_only and not self.init_from:
            raise UserError("--eval_only needs --init_from: which network?")
        if self.n_embd % self.n_head:
            works = max(h for h in range(1, self.n_head) if self.n_embd % h == 0)
            what = f"--n_embd {self.n_embd} is not divisible by --n_head {self.n_head}"
            raise UserError(f"{what}; try --n_head {works}")


# Flags that may change on --resume; any other would make it a different run. A new --max_steps makes
# the run longer or shorter, and the learning rate follows its new length from there on.
MAY_CHANGE = {"data", "out_dir", "resume", "prompt", "device", "dtype", "compile", "micro_batch"}
MAY_CHANGE |= {f.name for f in dataclasses.fields(TrainConfig) if f.name.endswith("_every")}
MAY_CHANGE |= {"max_steps", "timeout_minutes"}


def resumed_settings(config: TrainConfig, given: set[str], content: dict) -> TrainConfig:
    """The checkpoint's settings, with what the command line changes of them.

    Raises UserError for a change that would make it another run.
    """
    was = {f.name: content["settings"].get(f.name, f.default) for f in dataclasses.fields(config)}
    for name in given - MAY_CHANGE:
        if getattr(config, name) != was[name]:
            what = f"--{name} {getattr(config, name)} would change the run, which has {was[name]}"
            raise UserError(f"{what}; leave it out, or start anew in another --out_dir")
    return TrainConfig(**was | {name: getattr(config, name) for name in given & MAY_CHANGE})


# Layers and channels: GPT-2 paper, table 2; heads: GPT-2's code. Batch (0.5M and 1M, as powers of
# two) and learning rate: GPT-3 paper, table 2.1, the row of the nearest size. Context: GPT-2's, and
# GPT-3's for gpt3.
COLUMNS = ("n_layer", "n_head", "n_embd", "seq_len", "batch_tokens", "learning_rate")
ROWS = {
    "gpt2": (12, 12, 768, 1024, 2**19, 6.0e-4),
    "gpt2-medium": (24, 16, 1024, 1024, 2**19, 3.0e-4),
    "gpt2-large": (36, 20, 1280, 1024, 2**19, 2.5e-4),
    "gpt2-xl": (48, 25, 1600, 1024, 2**20, 2.0e-4),
    "gpt3": (12, 12, 768, 2048, 2**19, 6.0e-4),
    "demo": (4, 3, 96, 32, 24 * 32, 4.0e-3),
}
PRESETS = {name: dict(zip(COLUMNS, row, strict=True)) for name, row in ROWS.items()}
# Ours: of the best among 14 networks after three minutes on two CPU cores (runs/demo-cpu).
PRESETS["demo"] |= dict(max_steps=1000, warmup_tokens=77_000, compile=False)
PRESETS["demo"] |= dict(val_every=250, sample_every=500, hellaswag_every=0, checkpoint_every=0)
PRESETS["demo"] |= dict(prompt="First Citizen:\n")


def read_settings(argv: list[str] | None) -> tuple[TrainConfig, set[str], str]:
    """Settings of a command line, the names that it gives, and why it has this preset.

    Raises UserError for a flag or value that does not exist.
    """
    parser = fineweb.OneLineParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    for f in dataclasses.fields(TrainConfig):
        options = {"type": type(f.default), **f.metadata}
        if f.type in (bool, bool | None):
            options = {"help": options["help"], "action": argparse.BooleanOptionalAction}
        elif f.default:
            options["help"] += f" (gpt2: {f.default})"
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **options)
    flags = vars(parser.parse_args(argv))  # what was given, and nothing else
    given = set(flags)

    here, why = Path(__file__).parent, "as --preset says"
    if "preset" not in flags:
        flags["preset"] = "demo"
        why = "no shards in edu_fineweb10B; python fineweb.py makes them, for GPT-2 (124M)"
        if fineweb.list_shards(here / "edu_fineweb10B", "train"):
            flags["preset"] = "gpt2"
            why = "edu_fineweb10B holds shards; --preset demo is the small one"
    if flags["preset"] not in PRESETS:
        raise UserError(f"--preset {flags['preset']}: there are {', '.join(PRESETS)}")
    default_data = "input.txt" if flags["preset"] == "demo" else "edu_fineweb10B"
    settings = {"data": str(here / default_data), **PRESETS[flags["preset"]], **flags}
    return TrainConfig(**settings), given, why


# --------------------------------------------------------------------------------------------------
# 2. The network (0:13:47 section 1, the nn.Module; 0:28:08 the published parameters; 0:52:53 cross
#    entropy; 1:06:14 sharing wte and lm_head; 1:13:47 initialisation; 2:00:18 flash attention)
# --------------------------------------------------------------------------------------------------


class KVCache:
    """The keys and values of the tokens that a model has read, so a new token costs only itself."""

    def __init__(self):
        self.layers = {}  # layer -> keys and values, (B, H, S, D) each, of the S tokens so far

    @property
    def length(self) -> int:
        return self.layers[0][0].size(2) if self.layers else 0

    def update(self, layer: int, k, v):
        """Append T tokens' keys and values, (B, H, T, D) each, and return all of the layer's."""
        if layer in self.layers:
            past_k, past_v = self.layers[layer]
            k = torch.cat([past_k, k], dim=2)  # (B, H, S, D) and (B, H, T, D) -> (B, H, S + T, D)
            v = torch.cat([past_v, v], dim=2)
        self.layers[layer] = k, v
        return k, v

    def select(self, rows) -> "KVCache":
        """A cache of these rows of the batch, (R,) indices; a row may be taken several times."""
        selected = KVCache()
        selected.layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.layers.items()}
        return selected


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) -> (B, T, 3C) -> three of (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, T, D) -> (B, H, S, D), S >= T
        # softmax(q k^T / sqrt(D)) v, where no token sees a later one. FlashAttention (2022)
        # computes this block by block and never writes the (B, H, T, S) scores to memory.
        mask = None if cache is None else causal_lower_right(T, k.size(2))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, H, T, D) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        # The tanh approximation, because GPT-2 was trained with it: erf was slow in its TensorFlow.
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)  # tokens tell each other what they know
        return x + self.mlp(self.ln_2(x))  # and each thinks about it by itself


class GPT(nn.Module):
    """GPT-2: a decoder-only transformer, the norms before the sublayers (GPT-2 paper, section 2.3).

    The parameters have the published checkpoint's names, so that its weights fit in.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),  # token -> vector
                wpe=nn.Embedding(config.seq_len, config.n_embd),  # position -> vector
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # One matrix at both ends: tokens alike in meaning are read alike and predicted alike, and
        # the 124M network is a quarter smaller ("Using the Output Embedding to Improve Language
        # Models", 2016; GPT-2's code).
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw new weights from torch's global random numbers: torch.manual_seed decides them.

        weight                      standard deviation   why
        of Linear and Embedding     0.02                 GPT-2's code
        of c_proj                   0.02 / sqrt(2 L)     GPT-2 paper, 2.3: 2 L of them add up in the
                                                         residual stream, whose variance is kept
        wpe                         0.02                 the lecture; GPT-2's code has 0.01 here
        Biases are 0, and LayerNorm begins as the identity.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and name != "lm_head":  # which is wte
                scale = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj") else 1.0
                module.weight.normal_(mean=0.0, std=0.02 * scale)
                if isinstance(module, nn.Linear):
                    module.bias.zero_()

    def new_cache(self) -> KVCache:
        """An empty cache for `hidden`."""
        return KVCache()

    def hidden(self, tokens, cache=None):
        """tokens (B, T) -> (B, T, C), from which lm_head predicts each next token.

        With a cache, `tokens` continue the sequences in it.
        """
        seen = 0 if cache is None else cache.length
        positions = torch.arange(seen, seen + tokens.size(1), device=tokens.device)
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)  # (B, T, C) + (T, C)
        for block in self.transformer.h:
            x = block(x, cache)
        return self.transformer.ln_f(x)

    def forward(self, tokens, targets=None):
        """tokens (B, T) -> logits (B, T, V); with targets (B, T) -> mean cross-entropy, nats."""
        x = self.hidden(tokens)
        if targets is None:
            return self.lm_head(x)
        logits = self.lm_head(x).float()  # softmax needs more precision than bfloat16 has
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def flops_per_token(self, seq_len: int) -> int:
        """Operations of training on a token: 6 for each parameter that multiplies (wpe only adds),
        and 12 L C T for attention's two products ("PaLM", 2022, appendix B)."""
        weights = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * seq_len

    # OpenAI stored these layers' weights as (in, out); nn.Linear has (out, in).
    TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

    @classmethod
    def transposed(cls, weights: dict) -> dict:
        return {k: w.t() if k.endswith(cls.TRANSPOSED) else w for k, w in weights.items()}

    @classmethod
    def from_pretrained(cls, name_or_folder: str) -> "GPT":
        """A published network (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a transformers folder's.

        Its vocabulary stays unpadded: GPT-2's logits are about -35 and lower, and a padded id's 0
        would win against them. Raises UserError when there is no such model or it is no GPT-2.
        """
        import transformers  # only here: it takes seconds, and training does without

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            load = transformers.GPT2LMHeadModel.from_pretrained
            # safetensors cannot hold code. What a file lacks would be drawn at random.
            theirs, info = load(name_or_folder, use_safetensors=True, output_loading_info=True)
            if info["missing_keys"]:
                raise ValueError(f"there is no {min(info['missing_keys'])}")
        except Exception as error:  # no network, no such name, a broken file: each has its own type
            what = f"no GPT-2 weights from {name_or_folder}"
            raise UserError(f"{what}: {first_line(error)}") from None
        c = theirs.config
        c.n_inner = None if c.n_inner == 4 * c.n_embd else c.n_inner
        plain = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5)
        plain |= dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        plain |= dict(tie_word_embeddings=True, n_inner=None)
        for key, value in plain.items():
            if getattr(c, key) != value:
                raise UserError(f"{name_or_folder} is no plain GPT-2: {key} is {getattr(c, key)}")
        model = cls(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd))
        model.load_state_dict(cls.transposed(theirs.state_dict()))
        return model

    def export_pretrained(self, folder: str | Path) -> None:
        """Write a folder for transformers.GPT2LMHeadModel.from_pretrained, without padded rows."""
        import transformers

        c, rows = self.config, min(self.config.vocab_size, fineweb.VOCAB_SIZE)
        sizes = dict(vocab_size=rows, n_positions=c.seq_len, n_embd=c.n_embd)
        sizes |= dict(n_layer=c.n_layer, n_head=c.n_head)
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        weights = self.transposed(self.state_dict())
        for name in ("transformer.wte.weight", "lm_head.weight"):
            weights[name] = weights[name][:rows]
        theirs.load_state_dict(weights)
        theirs.save_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# 3. Sampling (0:33:31 prefix tokens, tokenization; 0:37:02 the sampling loop; 3:23:10 in training)
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: GPT, prompt: list[int], max_new_tokens: int, samples=4, top_k=50, seed=42, cached=True
) -> torch.Tensor:
    """Continue `prompt` (token ids, at least one) -> (samples, len(prompt) + max_new_tokens).

    Each token is drawn from the `top_k` likeliest (1: the likeliest itself), with random numbers of
    its own: training's are left alone. `cached` keeps the keys and values of what was read, so that
    a new token costs one pass over itself alone; without it the same comes out, but for rounding.
    """
    device, context = model.lm_head.weight.device, model.config.seq_len
    generator = torch.Generator().manual_seed(seed)  # the CPU's: the same draws on every device
    tokens = torch.tensor(prompt, device=device).repeat(samples, 1)  # (T) -> (B, T)
    cache = model.new_cache()
    for _ in range(max_new_tokens):
        if cached and tokens.size(1) <= context:
            new = tokens[:, cache.length :]
            x = model.hidden(new, cache)  # (B, new) -> (B, new, C)
        else:  # the window slides: every position changes, so the cache is void
            x = model.hidden(tokens[:, -context:])  # (B, T) -> (B, T, C)
        logits = model.lm_head(x[:, -1]).float()  # (B, C) -> (B, V)
        logits[:, fineweb.VOCAB_SIZE :] = -torch.inf  # padding: these ids stand for no text
        logits, ids = logits.topk(min(top_k, logits.size(1)))  # (B, V) -> (B, K), likeliest first
        choice = torch.multinomial(logits.softmax(dim=1).cpu(), 1, generator=generator)  # (B, 1)
        tokens = torch.cat([tokens, ids.gather(1, choice.to(device))], dim=1)  # (B, T + 1)
    return tokens


# --------------------------------------------------------------------------------------------------
# 4. The machine (0:41:47 the device; 1:28:14 TF32; 1:39:38 bfloat16, float16;
#    1:48:15 torch.compile; 2:46:52 DDP)
# --------------------------------------------------------------------------------------------------

# Dense bfloat16 TFLOP/s (float16 for V100 and T4) by the makers' data sheets. The first entry whose
# words are all in the device's name is the one.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989}
PEAK_TFLOPS |= {"B200": 2250, "A100": 312, "A40": 149.7, "A10G": 70, "A10": 125, "L40S": 362}
PEAK_TFLOPS |= {"L4": 121, "RTX 4090": 165.2, "RTX 3090": 71, "V100": 125, "T4": 65}


class Runtime:
    """Where this process runs: as number `rank` of `world` that train together, on one device.

    torchrun starts the processes and tells each its number; without it there is one, with number 0.
    Raises UserError when the device cannot be used.
    """

    def __init__(self, config: TrainConfig):
        self.rank, self.world = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))
        self.kind = config.device
        if self.kind == "auto":
            mps = "mps" if torch.backends.mps.is_available() else "cpu"
            self.kind = "cuda" if torch.cuda.is_available() else mps
        try:
            index = os.getenv("LOCAL_RANK", "0")
            self.device = torch.device(f"cuda:{index}" if self.kind == "cuda" else self.kind)
            torch.zeros(1, device=self.device)
        except Exception as error:  # torch says "not here" with many types
            what = f"--device {self.kind} cannot be used"
            raise UserError(f"{what}: {first_line(error)}") from None
        self.kind = self.device.type
        self.double = torch.float32 if self.kind == "mps" else torch.float64  # Apple has no float64
        if self.kind == "cuda":
            torch.cuda.set_device(self.device)
        self.dtype = getattr(torch, self.best_dtype() if config.dtype == "auto" else config.dtype)
        # TF32: the products that stay in float32 run on tensor cores with 10 bits of mantissa.
        torch.set_float32_matmul_precision("high" if self.kind == "cuda" else "highest")
        if self.world > 1:
            # torchrun keeps its store over restarts, and in it the addresses of dead processes. A
            # prefix hides them on one machine; for several, README.md names a setting of torchrun.
            alone = os.getenv("GROUP_WORLD_SIZE", "1") == "1"
            restarts = os.getenv("TORCHELASTIC_RESTART_COUNT", "0") if alone else ""
            store = dist.PrefixStore(f"restart {restarts}", next(rendezvous("env://"))[0])
            # A process that waits longer for the others gives up, and torchrun ends the run.
            wait = timedelta(minutes=config.timeout_minutes)
            me = dict(rank=self.rank, world_size=self.world, timeout=wait)
            dist.init_process_group("nccl" if self.kind == "cuda" else "gloo", store=store, **me)

    def best_dtype(self) -> str:
        if self.kind == "cuda":  # tensor cores know bfloat16 from Ampere on, before it only float16
            ampere = torch.cuda.get_device_capability(self.device) >= (8, 0)
            return "bfloat16" if ampere else "float16"
        can = torch.cpu.get_capabilities() if self.kind == "cpu" else {}
        return "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"

    def autocast(self):
        """Matrix products in self.dtype; parameters, sums, norms and softmax stay in float32."""
        half = self.dtype != torch.float32
        return torch.autocast(self.kind, self.dtype) if half else nullcontext()

    def print(self, *args) -> None:
        if self.rank == 0:
            print(*args, flush=True)

    def sum(self, *values) -> list[float]:
        """Sum each value, a number or a scalar on the device, over all ranks.

        All ranks wait for each other here, and for the GPU, once.
        """
        options = dict(dtype=self.double, device=self.device)
        scalars = [
            v.to(self.double) if torch.is_tensor(v) else torch.full((), v, **options)
            for v in values
        ]
        total = torch.stack(scalars)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def mean(self, value: float) -> float:
        return self.sum(value)[0] / self.world

    def close(self) -> None:
        """End the run; if there are several processes, end this one."""
        if self.world > 1:
            dist.destroy_process_group()
            sys.stdout.flush()
            # Python would now free the DDP model, which joins gloo's threads while it holds the
            # GIL, and one of these may be waiting for the GIL.
            os._exit(0)

    def device_name(self) -> str:
        cpu = platform.processor() or platform.machine()
        return torch.cuda.get_device_name(self.device) if self.kind == "cuda" else cpu

    def peak_flops(self) -> float | None:
        """Operations a second of all devices at their best; None if it is not in PEAK_TFLOPS."""
        words = set(re.split(r"\W|_", self.device_name()))
        peaks = (peak for name, peak in PEAK_TFLOPS.items() if words.issuperset(name.split()))
        return next((1e12 * self.world * peak for peak in peaks), None)


def keep_freed_memory() -> bool:
    """Let glibc keep big buffers that are freed -> whether that is glibc here. It gives them back
    to the kernel, which hands out new pages fault by fault at the next step (runs/bench-cpu)."""
    glibc = platform.libc_ver()[0] == "glibc"
    if glibc:
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: larger buffers get pages of their own. Old glibc takes 32 MB at most.
        mallopt(-3, 2**31 - 1) or mallopt(-3, 2**25)
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: more than this at the heap's end is given back
    return glibc


def compile_in_place(model: GPT, config: TrainConfig, runtime: Runtime) -> str:
    """torch.compile what model(...) runs, if it can be -> "compiled" or "eager".

    In place, so that the parameters keep their names. model.forward and model.hidden stay eager,
    and with them all that meets ever new shapes: samples, HellaSwag, the end of the validation.
    """
    if config.compile is False or (config.compile is None and runtime.kind == "mps"):
        return "eager"
    try:  # compile something small: the only sure sign that Triton or a C++ compiler works
        torch.compile(torch.sin)(torch.zeros(8, device=runtime.device))
    except Exception:  # each of the compiler's parts fails with its own type
        runtime.print(
            "torch.compile finds no working compiler here: training runs eagerly, only slower"
        )
        return "eager"
    model.compile()
    return "compiled"


def step_fits(size: int, config: TrainConfig, model: GPT, runtime: Runtime) -> bool:
    """Whether forward and backward of `size` sequences fit into memory beside all the rest."""
    try:
        # The rest: AdamW's two averages, and the gradients of the micro-step before.
        rest = [torch.empty_like(p) for p in model.parameters() for _ in range(3)]
        tokens = torch.zeros(size, config.seq_len, dtype=torch.long, device=runtime.device)
        with runtime.autocast():
            loss = model(tokens, tokens)
        loss.backward()
        return bool(rest)  # held until here: the pass has to fit beside it
    except torch.OutOfMemoryError:
        torch.compiler.reset()  # or the next size would be compiled for sizes of all kinds
        return False
    finally:
        rest = loss = None
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def choose_micro_batch(config: TrainConfig, model: GPT, runtime: Runtime) -> int:
    """How many sequences a device takes at a time: --micro_batch, or as many as fit and serve.

    Raises UserError, naming a batch that works, where the batch cannot be cut so.
    """
    unit = (config.micro_batch or 1) * config.seq_len * runtime.world
    if config.batch_tokens % unit:
        works = max(1, round(config.batch_tokens / unit)) * unit
        factor = "micro_batch * " if config.micro_batch else ""
        what = f"--batch_tokens {config.batch_tokens} is not a multiple of {factor}"
        raise UserError(f"{what}seq_len * processes = {unit}; try {works}")
    if config.micro_batch:
        return config.micro_batch
    rows = config.batch_tokens // (config.seq_len * runtime.world)
    sizes = [n for n in range(rows, 0, -1) if rows % n == 0]  # all, a half, ..., one
    if runtime.kind != "cuda":  # where nothing says "too much" in time, and more is no faster
        return next((n for n in sizes if n * config.seq_len <= 8192), sizes[-1])
    for size in sizes:
        if runtime.mean(step_fits(size, config, model, runtime)) == 1:
            return size
    raise UserError("the GPU's memory holds not one sequence; try a smaller --seq_len or --preset")


# --------------------------------------------------------------------------------------------------
# 5. The data (0:45:50 batches; 1:02:00 data loader lite; 2:34:09 micro-steps; 2:46:52 processes;
#    3:10:21 FineWeb-Edu)
# --------------------------------------------------------------------------------------------------


def open_data(path: str, runtime: Runtime) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Training and validation shards, (N,) uint16 tokens each, of a folder of shards or a text.

    Raises UserError, naming the file, for what cannot be trained on.
    """
    if Path(path).is_dir():
        train, val = (fineweb.list_shards(path, split) for split in ("train", "val"))
        if not train or not val:
            what = f"no shard has {'val' if train else 'train'} in its name"
            raise UserError(f"--data {path}: {what}; python fineweb.py --help says how to make it")
        manifest = fineweb.read_manifest(path)
        if manifest and not manifest["complete"]:
            runtime.print(f"warning: {path} is incomplete; run its fineweb.py command again")
        return [fineweb.open_shard(p) for p in train], [fineweb.open_shard(p) for p in val]
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "python fineweb.py makes edu_fineweb10B; --preset demo needs only input.txt"
        raise UserError(f"--data {path} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path} is no UTF-8 text: {error}") from None
    encode, cut = fineweb.gpt2_tokenizer().encode_ordinary, int(0.9 * len(text))
    return tuple([np.array(encode(part), np.uint16)] for part in (text[:cut], text[cut:]))


def read_tokens(shard: np.ndarray, first: int, count: int) -> np.ndarray:
    """shard[first : first + count]. Raises UserError where the file is no longer what it was."""
    name = getattr(shard, "filename", "the text")  # only of memory-mapped files
    try:  # the size first: a mapped page that is gone from its file kills the process wordlessly
        if isinstance(shard, np.memmap) and os.stat(name).st_size < shard.offset + shard.nbytes:
            raise UserError(f"shard {name} was cut short during the run; put it back and --resume")
    except OSError as error:
        raise UserError(f"shard {name}: {error.strerror}; put it back and --resume") from None
    tokens = shard[first : first + count]
    if tokens.max() >= fineweb.VOCAB_SIZE:
        what = f"shard {name} holds id {tokens.max()} at token {first + tokens.argmax()}"
        raise UserError(f"{what}, above GPT-2's last, {fineweb.END_OF_TEXT}; make it again")
    return tokens


@functools.lru_cache(maxsize=8)
def permutation(size: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


class DataLoaderLite:
    """Batches as a pure function of (seed, step).

    It remembers no position. So processes cannot drift apart, resuming takes only the step, and the
    batches are the same for any number of processes and any micro-batch.

    Sequence i of a shard is its tokens i T .. (i + 1) T: T inputs, and the targets one further on.
    Sequence g of the run is in epoch g // epoch_sequences; every epoch takes the shards, and each
    shard's sequences, in an order of its own. With seed None all are taken as they stand.
    """

    def __init__(self, shards: list[np.ndarray], seq_len: int, seed: int | None, source="the data"):
        self.shards, self.seq_len, self.seed = shards, seq_len, seed
        self.counts = [max(0, len(shard) - 1) // seq_len for shard in shards]
        self.epoch_sequences = sum(self.counts)
        if not self.epoch_sequences:
            most = max(map(len, shards)) - 1
            hint = f"try --seq_len {most}" if most > 0 else "give more text"
            raise UserError(f"{source} has no sequence of {seq_len} + 1 tokens; {hint}")

    def order(self, size: int, *which: int) -> np.ndarray:
        return np.arange(size) if self.seed is None else permutation(size, self.seed, *which)

    def sequence(self, g: int) -> np.ndarray:
        """Sequence g of the run -> (T + 1,) tokens."""
        epoch, g = divmod(g, self.epoch_sequences)
        for shard in self.order(len(self.shards), epoch):
            if g < self.counts[shard]:
                break
            g -= self.counts[shard]
        i = self.order(self.counts[shard], epoch, 1 + shard)[g]
        return read_tokens(self.shards[shard], i * self.seq_len, self.seq_len + 1)

    def sequences(self, numbers) -> torch.Tensor:
        """The sequences with these numbers -> (count, T + 1) int64."""
        return torch.from_numpy(np.stack([self.sequence(g) for g in numbers]).astype(np.int64))

    def batch(self, step: int, batch_tokens: int, micro_batch: int, runtime) -> torch.Tensor:
        """This rank's part of a step -> (micro-steps, B, T + 1) int64.

        Step s takes the run's sequences from s N on, with N = batch_tokens / T. Micro-step m of
        rank r takes B of them, from s N + (m world + r) B on.
        """
        N, B = batch_tokens // self.seq_len, micro_batch
        firsts = range(step * N + runtime.rank * B, (step + 1) * N, runtime.world * B)
        tokens = torch.stack([self.sequences(range(first, first + B)) for first in firsts])
        return tokens.pin_memory() if runtime.kind == "cuda" else tokens


# --------------------------------------------------------------------------------------------------
# 6. The optimiser and its schedule (2:14:55 AdamW; 2:21:06 warmup and cosine; 2:26:21 weight decay,
#    fused AdamW)
# --------------------------------------------------------------------------------------------------


def make_optimizers(model: GPT, config: TrainConfig) -> dict[str, torch.optim.Optimizer]:
    """AdamW for all parameters; or, with --optimizer muon, Muon for the matrices in the blocks.

    Matrices and embeddings decay. Biases and LayerNorm's gains do not: they only shift and scale.
    """
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    lr, decay, optimizers = config.learning_rate, config.weight_decay, {}
    if config.optimizer == "muon":
        # Beyond the lecture ("Muon: An optimizer for hidden layers in neural networks", Jordan,
        # 2024). The averaged gradient of a matrix, U S V^T, is mostly a few large directions, and
        # AdamW's step follows them. Muon steps by about U V^T, as far in each direction: five
        # rounds of three small products orthogonalise it. The step's size is matched to AdamW's
        # ("Muon is Scalable for LLM Training", 2025, section 2.2): one schedule serves both.
        options = dict(weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        optimizers["muon"] = torch.optim.Muon(matrices, lr, **options)
        matrices = []
    groups = [dict(params=embeddings + matrices, weight_decay=decay)]
    groups += [dict(params=vectors, weight_decay=0.0)]
    # Betas and eps: GPT-3, appendix B. Fused: a few kernels for all 148 tensors, not a dozen each.
    options = dict(betas=(0.9, 0.95), eps=1e-8, fused=True)
    return optimizers | {"adamw": torch.optim.AdamW(groups, lr, **options)}


def count_steps(config: TrainConfig, epoch_sequences: int, world: int = 1) -> int:
    """The steps of a run: the whole batches in its epochs, or --max_steps.

    Raises UserError, naming a batch that works, if there is not one whole batch.
    """
    tokens = int(config.epochs * epoch_sequences) * config.seq_len
    steps = config.max_steps or tokens // config.batch_tokens
    if steps == 0:
        unit = (config.micro_batch or 1) * config.seq_len * world
        hint = f"try {tokens // unit * unit}" if tokens >= unit else "give more text or --epochs"
        what = f"--batch_tokens {config.batch_tokens} is more than there are to train on, {tokens}"
        raise UserError(f"{what}; {hint}")
    return steps


def learning_rate(tokens: int, total_tokens: int, config: TrainConfig) -> float:
    """The rate for the update that ends at `tokens` of the run's `total_tokens`. Three regimes:"""
    lowest = config.learning_rate * config.min_lr_ratio
    if tokens < config.warmup_tokens:  # 1. a line up; not from 0, an update that would do nothing
        return config.learning_rate * tokens / config.warmup_tokens
    if tokens >= total_tokens:  # 2. the end
        return lowest
    # 3. half a cosine down
    done = (tokens - config.warmup_tokens) / (total_tokens - config.warmup_tokens)
    return lowest + (config.learning_rate - lowest) * 0.5 * (1.0 + math.cos(math.pi * done))


# --------------------------------------------------------------------------------------------------
# 7. The training step (2:14:55 gradient clipping; 2:34:09 gradient accumulation; 2:46:52 DDP)
# --------------------------------------------------------------------------------------------------


def train_step(model, ddp, optimizers, scaler, batch, lr, stop, config, runtime):
    """One step -> the mean loss of the whole batch, the gradient's norm before clipping, and
    whether any rank wants to stop.

    `ddp` is the model, wrapped in DistributedDataParallel if there are several ranks. If the loss
    or the norm is not finite, the update is skipped: it would destroy the weights.
    """
    inputs, targets = batch[..., :-1], batch[..., 1:]  # (micro-steps, B, T) each
    total = 0.0
    for m, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        # DDP averages gradients over the ranks during backward: once per step is enough, at the
        # last micro-step.
        more = ddp is not model and m < len(inputs) - 1
        with ddp.no_sync() if more else nullcontext():
            with runtime.autocast():
                loss = ddp(x, y) / len(inputs)  # so the sum over micro-steps is the mean
            scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    # The only place where Python waits for the GPU, and the ranks for each other.
    sums = runtime.sum(total, norm, bool(stop))
    loss, norm, stops = sums[0] / runtime.world, sums[1] / runtime.world, sums[2]
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(loss) and math.isfinite(norm):
            scaler.step(optimizer)
        # DDP's gradients are views of the buckets that the ranks exchange; keep them there.
        optimizer.zero_grad(set_to_none=ddp is model)
    scaler.update()  # after an overflow in float16 (normal now and then) it lowers the scale
    return loss, norm, stops > 0


# --------------------------------------------------------------------------------------------------
# 8. Validation (3:23:10 validation split and loss)
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(model, loader, config, micro_batch, runtime) -> tuple[float, float]:
    """The mean loss in nats a token, and bits a byte, of the loader's first --val_tokens tokens.

    The tokens are the same for any batch and number of processes, so that any two runs compare.
    Bits a byte compare between tokenizers too, since a text has the same bytes for each.
    """
    end = min(max(1, config.val_tokens // config.seq_len), loader.epoch_sequences)
    nats = torch.zeros((), dtype=runtime.double, device=runtime.device)
    tokens, text = 0, 0
    for first in range(runtime.rank * micro_batch, end, runtime.world * micro_batch):
        rows = loader.sequences(range(first, min(first + micro_batch, end)))
        x, y = rows[:, :-1].to(runtime.device), rows[:, 1:].to(runtime.device)
        forward = model if len(rows) == micro_batch else model.forward  # compiled for full ones
        with runtime.autocast():
            nats += forward(x, y) * y.numel()
        tokens, text = (
            tokens + y.numel(),
            text + int(fineweb.token_bytes()[rows[:, 1:].numpy()].sum()),
        )
    nats, tokens, text = runtime.sum(nats, tokens, text)
    return nats / tokens, nats / math.log(2) / max(text, 1)


# --------------------------------------------------------------------------------------------------
# 9. The run (3:28:23 starting the run)
# --------------------------------------------------------------------------------------------------


def load_network(source: str) -> GPT:
    """The network of a checkpoint, an --out_dir's newest one, a transformers folder, or a name.

    Raises UserError for anything else.
    """
    path = Path(source)
    if path.is_dir() and checkpoint.files(path):
        path = checkpoint.files(path)[-1]
    if path.is_file():
        content = checkpoint.read(path)
        model = GPT(GPTConfig(**content["network"]))
        model.load_state_dict(content["model"])
        return model
    published = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    if source in published or (path / "config.json").is_file():
        model = GPT.from_pretrained(source)
        if model.config.vocab_size >= fineweb.VOCAB_SIZE:
            return model
        what = f"--init_from {source} knows {model.config.vocab_size} tokens"
        raise UserError(f"{what}, GPT-2's tokenizer has {fineweb.VOCAB_SIZE}")
    what = "is no checkpoint, no folder of checkpoints, no transformers folder, and none of"
    raise UserError(f"--init_from {source} {what} {', '.join(published)}")


def make_network(config: TrainConfig, given: set[str], saved: dict | None):
    """The network, new or of --init_from or of the checkpoint, and the settings with its sizes.

    Raises UserError when flags ask for another size than --init_from has.
    """
    sizes = ("n_layer", "n_head", "n_embd")
    if saved:  # its weights come with the optimiser's state
        return GPT(GPTConfig(**saved["network"])), config
    if not config.init_from:
        torch.manual_seed(config.seed)
        wanted = {name: getattr(config, name) for name in sizes}
        return GPT(GPTConfig(seq_len=config.seq_len, **wanted)), config
    model = load_network(config.init_from)
    has, most = {name: getattr(model.config, name) for name in sizes}, model.config.seq_len
    for name in given & has.keys():
        wanted = getattr(config, name)
        if wanted != has[name]:
            what = f"--{name} {wanted}: {config.init_from} has {has[name]}"
            raise UserError(f"{what}; leave the flag out")
    if "seq_len" in given and config.seq_len > most:
        what = f"--seq_len {config.seq_len}: {config.init_from} has {most}"
        raise UserError(f"{what}; try --seq_len {most}")
    whole = config.eval_only and "seq_len" not in given
    seq_len = most if whole else min(config.seq_len, most)
    return model, dataclasses.replace(config, seq_len=seq_len, **has)


def check_resumed(saved: dict, steps: int, loader: DataLoaderLite) -> None:
    """Raise UserError if a checkpoint does not fit the run."""
    if saved["step"] > steps:
        raise UserError(f"the checkpoint is of step {saved['step']}, the run ends at {steps}")
    if saved["epoch_sequences"] != loader.epoch_sequences:
        counts = f"{loader.epoch_sequences} sequences instead of {saved['epoch_sequences']}"
        raise UserError(f"the training data has changed since the checkpoint: {counts}; restore it")


def due(every: int, step: int, steps: int) -> bool:
    """Whether what is done every so many steps is due now; after the last step it always is."""
    return every > 0 and (step % every == 0 or step == steps)


def show_validation(step, model, loader, config, micro_batch, records, runtime) -> None:
    loss, bits = validation_loss(model, loader, config, micro_batch, runtime)
    runtime.print(f"step {step:5d} | validation loss {loss:.4f} | {bits:.4f} bits per byte")
    if records:
        records.write("val", step=step, loss=loss, bits_per_byte=bits)


def show_samples(step, model, config, records, runtime, max_new_tokens=32) -> None:
    """Process 0 continues --prompt in four ways, seeded by --seed + step."""
    if runtime.rank > 0:
        return
    tokenizer = fineweb.gpt2_tokenizer()
    prompt = tokenizer.encode_ordinary(config.prompt) or [fineweb.END_OF_TEXT]
    with runtime.autocast():
        tokens = generate(model, prompt, max_new_tokens, seed=config.seed + step)
    texts = [tokenizer.decode(row) for row in tokens.tolist()]
    for text in texts:
        runtime.print(f"--- sample at step {step}\n{text}")
    runtime.print("---")
    if records:
        records.write("sample", step=step, texts=texts)


def show_hellaswag(step, model, examples, records, runtime) -> None:
    scores = hellaswag.evaluate(model, examples, runtime)
    share = dict(acc=scores.acc, acc_norm=scores.acc_norm, total=scores.total)
    records.write("hellaswag", step=step, **share)
    runtime.print(f"step {step:5d} | {scores}")


def evaluate_only(model, val_loader, config, runtime) -> None:
    rows = max(1, 8192 // config.seq_len)
    show_validation(0, model, val_loader, config, rows, None, runtime)
    show_samples(0, model, config, None, runtime, max_new_tokens=64)
    runtime.close()


def main(argv: list[str] | None = None) -> None:
    keep_freed_memory()
    config, given, why = read_settings(argv)
    folder, saved = Path(config.out_dir), None
    if config.resume:
        saved, why = checkpoint.newest(folder)
        config = resumed_settings(config, given, saved) if saved else config
    runtime = Runtime(config)
    runtime.print(f"preset {config.preset}: {why}")

    # What to train, and on what.
    train_shards, val_shards = open_data(config.data, runtime)
    model, config = make_network(config, given, saved)
    model.to(runtime.device)
    source = f"--data {config.data}"
    val_loader = DataLoaderLite(val_shards, config.seq_len, None, source)
    if config.eval_only:
        return evaluate_only(model, val_loader, config, runtime)
    examples = hellaswag.load_examples(runtime=runtime) if config.hellaswag_every else []
    loader = DataLoaderLite(train_shards, config.seq_len, config.seed, source)
    how = compile_in_place(model, config, runtime)
    micro_batch = choose_micro_batch(config, model, runtime)
    steps = count_steps(config, loader.epoch_sequences, runtime.world)
    checkpoint.open_folder(folder, config.resume)

    # What trains it.
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(runtime.kind, enabled=runtime.dtype == torch.float16)
    header = checkpoint.describe_run(
        dataclasses.asdict(config),
        dataclasses.asdict(model.config),
        loader.epoch_sequences,
        runtime,
    )
    parts = dict(model=model, scaler=scaler, **optimizers)
    saver = checkpoint.Saver(folder, parts, header, runtime)
    first = 0
    if saved:
        first = saved["step"]
        check_resumed(saved, steps, loader)
        saver.restore(saved)
        saved = None  # 1.5 GB
    if runtime.mean(first) != first:
        raise UserError("the ranks found different checkpoints; they need one --out_dir together")
    records = checkpoint.Records(folder, first, header, runtime)
    stop, stopped = checkpoint.Stop(), False
    # Only the training step uses the DDP wrapper. So state_dict keys stay clean, and one rank can
    # sample alone.
    ddp = model
    if runtime.world > 1:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)

    parameters = sum(p.numel() for p in model.parameters())
    epochs = steps * config.batch_tokens / config.seq_len / loader.epoch_sequences
    runtime.print(
        f"{parameters:,} parameters; {runtime.world} x {runtime.kind}, {runtime.dtype}, {how}\n"
        f"{steps:,} steps of {config.batch_tokens:,} tokens, {micro_batch} sequences of"
        f" {config.seq_len} at a time: {epochs:.2f} epochs"
    )

    def read(step):
        return loader.batch(step, config.batch_tokens, micro_batch, runtime)

    reader = ThreadPoolExecutor(1)  # reads the next batch while the GPU computes
    ahead = reader.submit(read, first)
    flops = model.flops_per_token(config.seq_len)
    peak = runtime.peak_flops()
    shown = 0.0
    for step in range(first, steps + 1):  # `step` updates are done
        if stopped:
            break
        if step > first and due(config.checkpoint_every, step, steps):
            saver.save(step)
        if due(config.val_every, step, steps):
            show_validation(step, model, val_loader, config, micro_batch, records, runtime)
        if due(config.hellaswag_every, step, steps):
            show_hellaswag(step, model, examples, records, runtime)
        if due(config.sample_every, step, steps):
            show_samples(step, model, config, records, runtime)
        if step == steps:
            break
        began = time.perf_counter()
        lr = learning_rate((step + 1) * config.batch_tokens, steps * config.batch_tokens, config)
        batch = ahead.result().to(runtime.device, non_blocking=True)
        ahead = reader.submit(read, step + 1)
        loss, norm, stopped = train_step(
            model, ddp, optimizers, scaler, batch, lr, stop.signal, config, runtime
        )
        # A norm is not finite where float16 overflows: the scaler halves its scale, down to 1.
        if not math.isfinite(loss) or (not math.isfinite(norm) and scaler.get_scale() <= 1):
            last = checkpoint.files(folder)[-1:] or ["none"]
            what = f"loss {loss} and gradient norm {norm} at step {step}"
            hint = "try --resume --dtype float32, or --init_from it with a lower --learning_rate"
            raise UserError(f"{what}; last good checkpoint: {last[0]}; {hint}")
        now = time.perf_counter()
        speed = config.batch_tokens / (now - began)
        mfu = speed * flops / peak if peak else None
        records.write(
            "train",
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            step_ms=1000 * (now - began),
            tokens_per_second=speed,
            mfu=mfu,
        )
        if step == first:
            first_done = now  # the first step may compile: it says nothing about the others
        if now - shown > 1 or step == steps - 1:
            shown = now
            left = (steps - step - 1) * (now - first_done) / max(step - first, 1)
            runtime.print(
                f"step {step:5d}/{steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f}"
                f" | {1000 * (now - began):.0f} ms | {speed:,.0f} tokens/s"
                + (f" | mfu {mfu:.1%}" if mfu else "")
                + (f" | eta {timedelta(seconds=round(left))}" if left else "")
            )
    saver.close(step)
    if stopped:
        by = stop.signal or "another rank"
        runtime.print(
            f"stopped by {by} after step {step}; run the same command with --resume to go on"
        )
    runtime.close()


if __name__ == "__main__":
    fineweb.run_command("train_gpt2.py", main)
