"""HellaSwag: which of four endings fits the story? 10,042 beginnings with four endings each; people
easily see which one is right (Zellers et al., 2019, arXiv 1905.07830).

    python hellaswag.py --model gpt2                       # OpenAI's 124M model: acc 0.2859
    python hellaswag.py --model log                        # the newest checkpoint of a run
    python hellaswag.py --model log --data mine.jsonl --show 5
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model gpt2-xl --harness

A 124M model cannot answer multiple-choice questions with all endings in the prompt. So it completes
the story: each ending has a probability after the context, and the most likely one is the answer.
`acc` compares the probabilities of whole endings, `acc_norm` the mean log-probabilities of their
tokens, so that a long ending is at no disadvantage. Chance is 0.25. With 10,042 records the
standard error is 0.0046: a difference of less than 0.01 between two runs may be noise.

Published figures differ, because there are two ways to score:

                       the lecture's (default)     lm-evaluation-harness 0.4 (--harness)
    context            ctx, unchanged              activity_label: ctx_a ctx_b (capitalized)
    [title], [step]    kept                        removed
    acc                sum of log-probabilities    the same
    acc_norm           divided by tokens           divided by characters (not bytes)

Corner cases: A context that is too long loses its first tokens, until its longest ending fits (the
harness crops for each ending separately). An ending that is too long for the model is an error. An
empty context becomes <|endoftext|>. The first of equal scores wins, and the same ending twice has
the same score. An ending of length 0 is never chosen.

Contents
    1. Settings
    2. Records and examples
    3. Scoring
    4. The command
"""

import argparse
import json
import re
import sys
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from support import shards
from support.command import (
    OneLineParser,
    UserError,
    explain,
    first_line,
    progress,
    run_command,
    say,
)
from support.files import whole_file

# --------------------------------------------------------------------------------------------------
# 1. Settings (lecture 3:28:23, HellaSwag)
# --------------------------------------------------------------------------------------------------

FOLDER = Path(__file__).parent / "hellaswag"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
RECORDS = {"val": 10_042, "train": 39_905}  # [the data set's card]; "test" has no labels
LABELS = (0, 1, 2, 3, "0", "1", "2", "3")  # GitHub's copy has numbers, Hugging Face's has text

# Tokens that the model reads together. A CPU is no faster with more, and a GPU is.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 16384}

# Scores of OpenAI's models, without and with --harness. They have not been reproduced here.
PUBLISHED = {  # [build-nanogpt, hellaswag.py; medium and large: llm.c, dev/vislog.ipynb]
    "gpt2": ("acc 0.2859 acc_norm 0.2955", "acc 0.2892 acc_norm 0.3114"),
    "gpt2-medium": ("acc_norm 0.3752", ""),
    "gpt2-large": ("acc_norm 0.4320", ""),
    "gpt2-xl": ("acc 0.3842 acc_norm 0.4893", "acc 0.4004 acc_norm 0.5089"),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("hellaswag.py", __doc__)
    add = parser.add_argument
    kinds = "gpt2[-medium, -large, -xl], a checkpoint, an --out_dir or a transformers folder"
    add("--model", default="gpt2", help=f"model to score: {kinds} (default: gpt2)")
    add("--data", type=Path, metavar="FILE", help="score the records in FILE, any number of them")
    add("--split", choices=list(RECORDS), default="val", help="part of HellaSwag (default: val)")
    add("--limit", metavar="N", type=int, help="score only the first N records")
    add("--device", default="auto", help="cuda, mps or cpu (default: cuda, else cpu)")
    add("--harness", action="store_true", help="score as lm-evaluation-harness does")
    add("--show", metavar="N", type=int, default=0, help="print the first N examples with losses")
    args = parser.parse_args(argv)
    for name, least in dict(limit=1, show=0).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: it must be at least {least}")
    return args


# --------------------------------------------------------------------------------------------------
# 2. Records and examples (lecture 3:28:23)
# --------------------------------------------------------------------------------------------------
# A record is a line of JSON: the beginning of a story (ctx), four endings, and which one is right
# (label). An example is a record as tokens. It is tokenized once and scored at every evaluation.


def parse(content: bytes, name: str, count: int | None = None) -> list[dict]:
    """Parse the content of a file called `name`. Raises UserError if a line is not a record, or if
    there are no records, or not `count` of them."""
    records = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # not JSON, not UTF-8, endless brackets
            record = None
        match record:
            case {"ctx": str(), "endings": [str(), str(), str(), str()], "label": y} if y in LABELS:
                records.append(record)
            case _:
                raise UserError(f"{name}, line {number}: no JSON with ctx, 4 endings, label 0 to 3")
    if not records or (count and len(records) != count):
        raise UserError(f"{name} holds {len(records):,} records instead of {count or 'some'}")
    return records


def path_of(split: str) -> Path:
    return FOLDER / f"hellaswag_{split}.jsonl"


def download(split="val", pauses=(1.0, 5.0)) -> None:
    """Download a split of HellaSwag, unless it is here, and check it. Only a valid file is written.

    Raises UserError after the last of several attempts, with `pauses` between them (seconds).
    """
    path = path_of(split)
    if path.exists():
        return
    url = URL.format(split=split)
    print(f"downloading {url}", file=sys.stderr)
    for pause in (0, *pauses):
        time.sleep(pause)
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                content = answer.read()
            if answer.status != 200:
                raise UserError(f"HTTP status {answer.status}")
            parse(content, "the answer", RECORDS[split])
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write(content)
            return
        except Exception as error:  # connection, server and disk raise many types
            problem = first_line(error)
    what = f"cannot download HellaSwag ({problem}); download {url} to {path} yourself"
    raise UserError(f"{what} (train_gpt2.py --hellaswag_every 0 does without it)")


@dataclass(frozen=True)
class Example:
    context: list[int]  # tokens, at least one
    endings: list[list[int]]  # four
    lengths: list[int]  # what acc_norm divides by: tokens, or with --harness characters
    label: int


def clean(text: str) -> str:
    """Clean up a how-to article as the harness does: [title] ends a sentence, other marks go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def render(record: dict, harness: bool = False) -> Example:
    """Tokenize a record. An ending gets the space before it, since GPT-2's tokens for words start
    with a space. Raises UserError if the record lacks a field that the harness's prompt needs."""
    context = record["ctx"]
    endings = record["endings"]
    space = " "
    if harness:
        try:
            begun = record["ctx_a"] + " " + record["ctx_b"].capitalize()
            context = clean(record["activity_label"] + ": " + begun)
        except (KeyError, TypeError, AttributeError):
            raise UserError("--harness needs records with activity_label, ctx_a, ctx_b") from None
        endings = [clean(ending) for ending in endings]
        space = context[len(context.rstrip()) :] + " "  # trailing spaces go with the endings, too
        context = context.rstrip()
    tokens = [shards.encode(space + ending).tolist() for ending in endings]
    lengths = [len(ending) for ending in (endings if harness else tokens)]
    context = shards.encode(context).tolist() or [shards.END_OF_TEXT]
    return Example(context, tokens, lengths, int(record["label"]))


def load_examples(downloads=True, wait=None, split="val", harness=False) -> list[Example]:
    """Load a split of HellaSwag. Of several processes, one `downloads` the file, if it is not here,
    and all `wait` for it. Raises UserError."""
    if downloads:
        download(split)
    if wait:
        wait()
    return read_examples(path_of(split), RECORDS[split], harness)


def read_examples(path: Path, count: int | None = None, harness=False) -> list[Example]:
    """Read the records of a file, `count` of them or any number. Raises UserError."""
    with explain(f"{path} cannot be read"):
        content = path.read_bytes()
    found = parse(content, str(path), count)
    return [render(record, harness) for record in progress(found, "HellaSwag's records")]


# --------------------------------------------------------------------------------------------------
# 3. Scoring (lecture 3:28:23)
# --------------------------------------------------------------------------------------------------
# Each ending is appended to its context, and the model reads both: four rows for each example. Rows
# of about the same length go together, so that little is padded, and logits are computed only where
# an ending is predicted: for 23 tokens of a row of 93, say.


@dataclass(frozen=True)
class Scores:
    """How many of `total` examples are right, by the sum of log-probabilities and by their mean."""

    right: float
    right_norm: float
    total: float

    @property
    def acc(self) -> float:
        return self.right / self.total

    @property
    def acc_norm(self) -> float:
        return self.right_norm / self.total

    def __str__(self) -> str:
        scores = f"acc {self.acc:.4f} acc_norm {self.acc_norm:.4f}"
        return f"hellaswag {self.total:.0f} records: {scores}"


def crop(example: Example, seq_len: int) -> Example:
    """Drop the context's first tokens until its longest ending fits. Raises UserError."""
    longest = max(map(len, example.endings))
    room = seq_len + 1 - longest  # + 1: the model does not read an ending's last token
    if room < 1:
        what = f"an ending has {longest} tokens, and the model reads at most {seq_len}"
        raise UserError(f"HellaSwag: {what} (train_gpt2.py --hellaswag_every 0 does without it)")
    return replace(example, context=example.context[-room:])


def log_probabilities(model, examples: list[Example], stop=False) -> torch.Tensor:
    """N examples -> (N, 4), each ending's log-probability in nats; fewer once `stop` is true.

    Everything is copied to the device before the loop. Python waits for a GPU once, after it.
    """
    device = model.lm_head.weight.device
    rows = []  # number of the ending among all 4 N, its context, its tokens
    for example in examples:
        context = crop(example, model.config.seq_len).context
        rows += [(len(rows) + i, context, ending) for i, ending in enumerate(example.endings)]
    rows.sort(key=lambda row: len(row[1] + row[2]), reverse=True)
    # Padded with token 0. NumPy, because torch is slow to read lists: the plan would take twice as
    # long, and the GPU waits for it.
    tokens = np.zeros((len(rows), len(rows[0][1] + rows[0][2])), np.int64)
    # Plan all batches first. An entry is a token to predict: its place in its batch, its id, and
    # the number of its ending.
    entries = []
    batches = []  # its rows, its T, its part of the entries
    first = 0
    while first < len(rows):
        T = len(rows[first][1] + rows[first][2]) - 1  # the last token is predicted, but not read
        end = min(len(rows), first + max(1, BATCH_TOKENS[device.type] // (T + 1)))
        begin = len(entries)
        for r, (number, context, ending) in enumerate(rows[first:end]):
            row = context + ending
            tokens[first + r, : len(row)] = row
            place = r * T + len(context) - 1  # the context's last token predicts the ending's first
            entries += [(place + i, token, number) for i, token in enumerate(ending)]
        batches.append((slice(first, end), T, slice(begin, len(entries))))
        first = end
    tokens = torch.from_numpy(tokens).to(device)
    entries = torch.from_numpy(np.array(entries)).to(device)

    sums = torch.zeros(len(rows), device=device)
    for part, T, these in progress(batches, "HellaSwag"):
        if stop:
            break
        places, ids, numbers = entries[these].T  # of the E tokens to predict in these R rows
        x = model.hidden(tokens[part, :T])  # (R, T) -> (R, T, C)
        logits = model.logits(x.flatten(0, 1)[places])  # (R T, C) -> (E, C) -> (E, 50257)
        losses = F.cross_entropy(logits, ids, reduction="none")  # -> (E,)
        sums.index_add_(0, numbers, -losses)
    return sums.view(-1, 4).cpu()


def choose(examples: list[Example], sums) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (N, 4) -> choices (N,), by sum and by sum / length. The first of equals."""
    # The same ending twice gets one score, since its rows may be rounded differently.
    firsts = torch.tensor([[e.endings.index(ending) for ending in e.endings] for e in examples])
    lengths = torch.tensor([example.lengths for example in examples])
    sums = sums.gather(1, firsts).masked_fill(lengths == 0, -torch.inf)
    return sums.argmax(dim=1), (sums / lengths).argmax(dim=1)


@torch.no_grad()
def count_right(model, examples: list[Example], stop=False) -> tuple[int, int, int]:
    """Score the examples -> how many are right, by sum and by mean, and how many there are.

    An object `stop` that becomes true ends it early, and the counts mean nothing. Raises UserError.
    """
    if not examples:
        return 0, 0, 0
    choice, choice_norm = choose(examples, log_probabilities(model, examples, stop))
    labels = torch.tensor([example.label for example in examples])
    right, right_norm = (int((c == labels).sum()) for c in (choice, choice_norm))
    return right, right_norm, len(examples)


# --------------------------------------------------------------------------------------------------
# 4. The command
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def show(model, example: Example) -> None:
    """Print an example and its four losses, in nats per token (with --harness, per character)."""
    decode = shards.gpt2_tokenizer().decode
    sums = log_probabilities(model, [example])
    losses = -sums[0] / torch.tensor(example.lengths)
    context = crop(example, model.config.seq_len).context
    say(f"---\nContext:\n {decode(context)}\nEndings:")
    for i, ending in enumerate(example.endings):
        say(f"{i} (loss: {losses[i]:.4f}){decode(ending)}")
    say(f"predicted: {choose([example], sums)[1].item()}, actual: {example.label}")


def main(argv: list[str] | None = None) -> None:
    import train_gpt2  # here, because train_gpt2 imports this file

    args = parse_arguments(argv)
    runtime = train_gpt2.Runtime(args.device, "float32")
    torch.set_float32_matmul_precision("highest")  # TF32 would change close choices
    if args.data:
        examples = read_examples(args.data, None, args.harness)
    else:
        here = (runtime.local_rank == 0, runtime.barrier)
        examples = load_examples(*here, args.split, args.harness)
    examples = examples[: args.limit]
    model = train_gpt2.GPT.from_pretrained(args.model).to(runtime.device)
    for example in examples[: args.show]:
        show(model, example)
    mine = examples[runtime.rank :: runtime.world]
    scores = Scores(*runtime.sum(*count_right(model, mine)))
    shares = (scores.acc, scores.acc_norm)
    errors = [(p * (1 - p) / max(scores.total - 1, 1)) ** 0.5 for p in shares]  # as in the harness
    line = f"{scores}, standard error {errors[0]:.4f} {errors[1]:.4f}"
    whole = args.data is None and args.limit is None and args.split == "val"
    published = PUBLISHED.get(args.model, ("", ""))[args.harness] if whole else ""
    say(f"{line}; published {published}" if published else line)
    runtime.close()


if __name__ == "__main__":
    run_command("hellaswag.py", main, "try --device cpu")
