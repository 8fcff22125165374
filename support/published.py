"""Models in transformers' format: those that OpenAI published, and folders that others can load.

The weights have the same names as in train_gpt2.py. OpenAI stored its matrices as (in, out), and
nn.Linear has (out, in), so they are turned both ways. What transformers takes on faith is
checked here: a folder that is not a plain GPT-2, with GPT-2's tokenizer, is refused.
"""

import json
import shutil
from pathlib import Path

import torch

from support.command import UserError, explain, say
from support.shards import VOCAB_BPE, VOCAB_SIZE, byte_characters, merges

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's four models
# What a plain GPT-2 has in its config.json.
PLAIN = dict(
    activation_function=("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    layer_norm_epsilon=(1e-5,),
    scale_attn_weights=(True,),
    scale_attn_by_inverse_layer_idx=(False,),
)


def quiet_transformers():
    """Import transformers, only when it is needed: it takes seconds, and training does without."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def turn(weights: dict) -> dict:
    """Turn the matrices from OpenAI's (in, out) to nn.Linear's (out, in), or back."""
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {k: w.t() if k.endswith(turned) else w for k, w in weights.items()}


def vocabulary() -> dict[str, int]:
    """GPT-2's tokens by their names in transformers' files -> their ids."""
    names = [*byte_characters(), *map("".join, merges()), "<|endoftext|>"]
    return {name: i for i, name in enumerate(names)}


def check_folder(folder: Path) -> None:
    """Check what transformers does not: the tokenizer, and a head of the model's own.

    Raises UserError, or other errors if the files are damaged.
    """
    from safetensors import safe_open

    if not list(folder.glob("*.safetensors")) and (folder / "pytorch_model.bin").exists():
        load = f"from transformers import GPT2LMHeadModel as M; M.from_pretrained('{folder}')"
        hint = f"convert it: python -c \"{load}.save_pretrained('{folder}')\""
        raise UserError(f"{folder} has pytorch_model.bin, but no model.safetensors; {hint}")
    tokens = vocabulary()
    if (folder / "vocab.json").exists():
        tokens = json.loads((folder / "vocab.json").read_text("utf-8"))
    elif (folder / "tokenizer.json").exists():
        tokens = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    if not vocabulary().items() <= tokens.items():
        raise UserError(f"{folder} does not use GPT-2's tokenizer, and this project has no other")
    tied = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                if name.endswith(("wte.weight", "lm_head.weight")):
                    tied.append(file.get_tensor(name))
    if any(not torch.equal(tied[0], other) for other in tied[1:]):
        raise UserError(f"{folder} is not a plain GPT-2: its lm_head.weight is not its wte.weight")


def read(name_or_folder: str) -> tuple[dict, dict]:
    """Read a published model or a folder -> its sizes, as GPTConfig names them, and its weights.

    The vocabulary stays unpadded: OpenAI's logits are around -35, so an added row of zeros, with
    its logit of 0, would win every softmax.
    Raises UserError if that fails, or if it is not a plain GPT-2.
    """
    folder = Path(name_or_folder)
    if not (folder / "config.json").is_file() and name_or_folder not in NAMES:
        what = f"{name_or_folder} is not a checkpoint, a folder with one, a transformers folder"
        raise UserError(f"{what}, or one of {', '.join(NAMES)}")
    transformers = quiet_transformers()
    if not folder.is_dir():
        say(f"fetching {name_or_folder} from huggingface.co, unless it is here")
    with explain(f"cannot load GPT-2 weights from {name_or_folder}"):
        if folder.is_dir():
            check_folder(folder)
        # From safetensors: unlike a pickle, such a file cannot hold code.
        options = dict(use_safetensors=True, output_loading_info=True, dtype=torch.float32)
        theirs, info = transformers.GPT2LMHeadModel.from_pretrained(name_or_folder, **options)
    c = theirs.config
    odd = [name for name, values in PLAIN.items() if getattr(c, name) not in values]
    odd += ["n_inner"] if c.n_inner not in (None, 4 * c.n_embd) else []
    odd += sorted(info["missing_keys"])  # transformers has drawn these weights at random
    if odd:
        raise UserError(f"{name_or_folder} is not a plain GPT-2: look at its {odd[0]}")
    if c.vocab_size < VOCAB_SIZE:
        what = f"{name_or_folder} has {c.vocab_size:,} tokens, where GPT-2 has {VOCAB_SIZE:,}"
        raise UserError(f"{what}: it does not use GPT-2's tokenizer")
    sizes = dict(seq_len=c.n_positions, vocab_size=c.vocab_size)
    sizes |= dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    return sizes, turn(theirs.state_dict())


def from_state_dict(content: dict, path: Path) -> dict:
    """Take a GPT-2's state dict of torch.save -> what a checkpoint of ours has of it.

    torch.compile's and DDP's prefixes of the names go, and OpenAI's matrices are turned. A state
    dict does not tell the number of heads: they have 64 channels, as in all four published models.
    Raises UserError if it is something else.
    """
    if "model_args" in content:
        hint = (
            f"torch.save(torch.load('{path}')['model'], 'weights.pt') makes a file that can be read"
        )
        raise UserError(f"{path} is a checkpoint of nanoGPT; {hint}")
    weights = {}
    for name, tensor in content.items():
        name = str(name).removeprefix("module.").removeprefix("_orig_mod.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # masks of the attention
            weights[name] = tensor
    table, positions = "transformer.wte.weight", "transformer.wpe.weight"
    layers = [name for name in weights if name.endswith(".attn.c_attn.weight")]
    if not layers or not {table, positions} <= weights.keys():
        some = ", ".join(sorted(map(str, content))[:4])
        raise UserError(f"{path} is not a checkpoint, and has no weights of a GPT-2; it has {some}")
    weights.setdefault("lm_head.weight", weights[table])
    vocab_size, n_embd = weights[table].shape
    if weights[layers[0]].shape == (n_embd, 3 * n_embd):
        weights = turn(weights)
    what = f"{path} is not a plain GPT-2"
    if not torch.equal(weights["lm_head.weight"], weights[table]):
        raise UserError(f"{what}: its lm_head.weight is not its wte.weight")
    if vocab_size < VOCAB_SIZE or n_embd % 64:
        raise UserError(f"{what}: it has {vocab_size:,} tokens and {n_embd} channels")
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    names = [f"transformer.h.{i}.{part}" for i in range(len(layers)) for part in parts]
    names = [
        f"{name}.{kind}" for name in [*names, "transformer.ln_f"] for kind in ("weight", "bias")
    ]
    odd = {*names, table, positions, "lm_head.weight"} ^ weights.keys()
    if odd:
        raise UserError(f"{what}: look at its {min(odd)}")
    sizes = dict(seq_len=len(weights[positions]), vocab_size=vocab_size)
    sizes |= dict(n_layer=len(layers), n_head=n_embd // 64, n_embd=n_embd)
    return dict(network=sizes, settings={}, model=weights)


@torch.no_grad()
def to_transformers(model):
    """Our model -> transformers' with the same weights, without padded rows, and the same logits.

    Raises UserError if the network is not GPT-2's: transformers has no place for a changed one.
    """
    transformers, c = quiet_transformers(), model.config
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=c.seq_len,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    weights = turn(model.state_dict())
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][:VOCAB_SIZE]
    what = "this network is not GPT-2's, which is all that transformers could load"
    with explain(what):
        theirs.load_state_dict(weights)
    tokens = torch.arange(min(64, c.seq_len))[None]
    logits = model.eval().logits(model.hidden(tokens))
    apart = (theirs(tokens).logits - logits).abs().max().item()
    if not apart < 1e-3 * max(1, logits.abs().max().item()):
        raise UserError(f"{what} (with its weights, GPT-2's logits are off by {apart:.2g})")
    return theirs


def write(folder: str | Path, model) -> None:
    """Write a model's weights, and the tokenizer, as transformers reads them.

    Raises UserError if the network is not GPT-2's, if the folder cannot be written, or has files.
    """
    theirs = to_transformers(model)
    folder = Path(folder)
    with explain(f"{folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} has files in it; give the name of a new folder")
        theirs.generation_config.max_length = model.config.seq_len  # or a pipeline may go beyond it
        theirs.save_pretrained(folder)
        pairs = [tuple(pair) for pair in merges()]
        tokenizer = quiet_transformers().GPT2TokenizerFast(vocab=vocabulary(), merges=pairs)
        tokenizer.model_max_length = model.config.seq_len
        tokenizer.save_pretrained(folder)
        (folder / "vocab.json").write_text(json.dumps(vocabulary()), "utf-8")  # for older programs
        shutil.copyfile(VOCAB_BPE, folder / "merges.txt")
