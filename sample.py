"""Write text with a model.

    python sample.py --model log --prompt "Once upon a time"      # what a run has learned
    python sample.py --model log/best                             # with its best validation loss
    python sample.py --model gpt2 --samples 4 --temperature 0.8   # OpenAI's GPT-2 (124M)

A single sample appears as it is drawn. A prompt that is longer than the model's context is cropped
to its last tokens, and text may become longer than the context, too.
"""

import contextlib
import sys

import torch

from support import checkpoint, shards
from support.command import OneLineParser, UserError, run_command, say
from train_gpt2 import Runtime, build, generate


def show_as_drawn():
    """A function that prints the text of one token after another."""
    pending = b""  # the first bytes of a character that the next token may complete

    def show(tokens: torch.Tensor) -> None:
        nonlocal pending
        pending += shards.gpt2_tokenizer().decode_bytes(tokens.tolist())
        try:
            text = pending.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return
            text = pending.decode("utf-8", "replace")
        pending = b""
        say(text, end="")

    return show


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser("sample.py", __doc__)
    add = parser.add_argument
    models = "an --out_dir (its newest checkpoint), --out_dir/best (its best), a checkpoint, a"
    models += " transformers folder, or gpt2[-medium, -large, -xl]"
    add("--model", default="log", help=f"{models} (default: %(default)s)")
    add("--prompt", help="text to continue (default: the one of the model's run)")
    add("--samples", type=int, default=1, help="number of texts (default: %(default)s)")
    add("--max_new_tokens", type=int, default=100, help="length of each (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="below 1, likely tokens are likelier (1)")
    add("--top_k", type=int, default=50, help="draw from so many tokens (default: %(default)s)")
    add("--seed", type=int, default=42, help="another seed gives other texts")
    add("--device", default="auto", help="cuda, mps or cpu (default: cuda, else cpu)")
    args = parser.parse_args(argv)
    for name, least in dict(samples=1, max_new_tokens=1, top_k=1, temperature=0).items():
        if not getattr(args, name) >= least:
            raise UserError(f"--{name} {getattr(args, name)}: it must be at least {least}")
    if args.temperature == 0:  # in the limit, the likeliest token is drawn
        args.temperature, args.top_k = 1.0, 1
    runtime = Runtime(args.device, "float32")
    with contextlib.redirect_stdout(sys.stderr):  # stdout gets the text alone
        content = checkpoint.load(args.model)
    model = build(content["network"], content["model"]).to(runtime.device).eval()
    prompt = content["settings"].get("prompt", "Hello, I'm a language model,")
    prompt = prompt if args.prompt is None else args.prompt
    options = dict(temperature=args.temperature, top_k=args.top_k, seed=args.seed)
    options |= dict(samples=args.samples, max_new_tokens=args.max_new_tokens)
    if args.samples == 1:
        say(prompt, end="")
        generate(model, shards.encode_prompt(prompt), **options, show=show_as_drawn())
        say()
    else:
        tokens = generate(model, shards.encode_prompt(prompt), **options)
        say("\n---\n".join(shards.decode(row) for row in tokens.tolist()))
    runtime.close()


if __name__ == "__main__":
    run_command("sample.py", main)
