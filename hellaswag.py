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
standard error is 0.0045: a difference of less than 0.01 between two runs means nothing.

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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from support import machine, shards
from support.command import OneLineParser, UserError, first_line, run_command
from support.files import whole_file

# --------------------------------------------------------------------------------------------------
# 1. Settings (lecture 3:28:23, HellaSwag)
# --------------------------------------------------------------------------------------------------

FOLDER = Path(__file__).parent / "hellaswag"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
RECORDS = {"val": 10_042, "train": 39_905}  # [the data set's card]; "test" has no labels
LABELS = (0, 1, 2, 3, "0", "1", "2", "3")  # GitHub's copy has numbers, Hugging Face's has text

BATCH_SIZE = 128  # contexts that the model reads together, all of the same length
# Tokens of endings that it reads together. Fewer need less padding and memory (0.2 GB of logits for
# 1,024 tokens); a GPU is faster with more.
TOKENS = {"cpu": 1024, "cuda": 4096, "mps": 4096}
PADDING = -100  # a target that F.cross_entropy ignores

# Scores of OpenAI's models, without and with --harness. They have not been reproduced here.
PUBLISHED = {  # [build-nanogpt, hellaswag.py; medium and large: llm.c, dev/vislog.ipynb]
    "gpt2": ("acc 0.2859 acc_norm 0.2955", "acc 0.2892 acc_norm 0.3114"),
    "gpt2-medium": ("acc_norm 0.3752", ""),
    "gpt2-large": ("acc_norm 0.4320", ""),
    "gpt2-xl": ("acc 0.3842 acc_norm 0.4893", "acc 0.4004 acc_norm 0.5089"),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("hellaswag.py", description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    kinds = "gpt2[-medium, -large, -xl], a checkpoint, an --out_dir or a transformers folder"
    add("--model", default="gpt2", help=f"model to score: {kinds} (default: gpt2)")
    add("--data", metavar="FILE", help="score the records in FILE, any number of them")
    add("--split", choices=list(RECORDS), default="val", help="part of HellaSwag (default: val)")
    add("--limit", metavar="N", type=int, help="score only the first N records")
    add("--device", default="auto", help="cuda, mps or cpu (default: the best available)")
    add("--batch_size", type=int, default=BATCH_SIZE, help="contexts per batch (%(default)s)")
    add("--harness", action="store_true", help="score as lm-evaluation-harness does")
    add("--show", metavar="N", type=int, default=0, help="print the first N examples with losses")
    args = parser.parse_args(argv)
    for name, least in dict(limit=1, batch_size=1, show=0).items():
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


def download(split: str, path: Path, pauses=(1.0, 5.0)) -> None:
    """Download a split of HellaSwag and check it. Only a valid file is written. Raises UserError
    after the last of several attempts, with `pauses` between them (seconds)."""
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
    raise UserError(f"{what}, or train without it: --hellaswag_every 0")


@contextmanager
def all_or_none(runtime):
    """Raise an error on all ranks if one of them fails, so that none waits for the others."""
    error = None
    try:
        yield
    except (UserError, OSError) as problem:
        error = problem
    if runtime.sum(error is not None)[0] > 0:
        raise error or UserError("HellaSwag: another rank failed; each machine needs the file")


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


def load_examples(runtime, path=None, split="val", harness=False) -> list[Example]:
    """Load the records of the file at `path`, or of HellaSwag's `split`, which rank 0 downloads if
    it is missing. Raises UserError or OSError on all ranks."""
    file = Path(path or FOLDER / f"hellaswag_{split}.jsonl")
    with all_or_none(runtime):
        if runtime.rank == 0 and path is None and not file.exists():
            download(split, file)
    with all_or_none(runtime):
        records = parse(file.read_bytes(), str(file), None if path else RECORDS[split])
    return [render(record, harness) for record in records]


# --------------------------------------------------------------------------------------------------
# 3. Scoring (lecture 3:28:23)
# --------------------------------------------------------------------------------------------------
# The four endings of an example share its context. Say it has 70 tokens, and each ending 23: the
# lecture's code reads 4 x 93 = 372 tokens. Here the model reads the context once, and each ending
# continues from a copy of its keys and values: 70 + 4 x 23 = 162 tokens, and the same scores.


@dataclass(frozen=True)
class Scores:
    acc: float  # shares of `total` examples
    acc_norm: float
    total: int

    def __str__(self) -> str:
        return f"hellaswag {self.total} records: acc {self.acc:.4f} acc_norm {self.acc_norm:.4f}"


def batches(examples: list[Example], batch_size: int, seq_len: int) -> list[list[Example]]:
    """Crop contexts to what the model can read, and batch those of the same length, so that none is
    padded. The longest come first: too little memory shows at once. Raises UserError."""
    groups = {}  # length -> examples
    for example in examples:
        longest = max(map(len, example.endings))
        room = seq_len + 1 - longest  # + 1: the model does not read an ending's last token
        if room < 1:
            what = f"an ending has {longest} tokens, and the model reads at most {seq_len}"
            raise UserError(f"HellaSwag: {what}; train without it: --hellaswag_every 0")
        context = example.context[-room:]
        groups.setdefault(len(context), []).append(replace(example, context=context))
    result = []
    for length in sorted(groups, reverse=True):
        group = groups[length]
        result += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return result


def token_losses(model, x, targets):
    """Hidden states (N, C), next tokens (N,) -> losses (N,), float32, in nats (0 for PADDING)."""
    logits = model.lm_head(x).float()  # (N, C) -> (N, V)
    logits[:, shards.VOCAB_SIZE :] = -torch.inf  # padded ids stand for no text
    return F.cross_entropy(logits, targets, reduction="none")


@torch.no_grad()
def log_probabilities(model, batch: list[Example], runtime) -> torch.Tensor:
    """B examples with contexts of S tokens -> (B, 4), each ending's log-probability, in nats."""
    endings = [ending for example in batch for ending in example.endings]
    by_length = sorted(range(len(endings)), key=lambda row: len(endings[row]))
    longest = 1 + len(endings[by_length[-1]])
    at_once = max(1, TOKENS[runtime.device_type] // longest)
    contexts = torch.tensor([example.context for example in batch])  # (B, S)
    sums = torch.zeros(len(endings), device=runtime.device)
    with runtime.autocast():
        cache = model.new_cache()
        if contexts.size(1) > 1:
            model.hidden(runtime.to_device(contexts[:, :-1]), cache)
        for i in range(0, len(endings), at_once):
            rows = by_length[i : i + at_once]
            # A row starts with the context's last token, which predicts the ending's first.
            tokens = [batch[row // 4].context[-1:] + endings[row] for row in rows]
            tokens = [row + [PADDING] * (len(tokens[-1]) - len(row)) for row in tokens]
            tokens = runtime.to_device(torch.tensor(tokens))  # (R, 1 + E)
            rows = runtime.to_device(torch.tensor(rows))
            owners = rows // 4  # (R,), the example of each ending
            past = model.new_cache()  # (B, H, S - 1, D) -> (R, H, S - 1, D)
            past.layers = {n: (k[owners], v[owners]) for n, (k, v) in cache.layers.items()}
            x = model.hidden(tokens[:, :-1].clamp(min=0), past)  # (R, E) -> (R, E, C)
            losses = token_losses(model, x.flatten(0, 1), tokens[:, 1:].flatten())  # (R * E,)
            sums[rows] = -losses.view(len(rows), -1).sum(dim=1)  # (R, E) -> (R,)
    return sums.view(-1, 4)


def choose(batch: list[Example], sums, runtime) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (B, 4) -> choices (B,), by sum and by sum / length. The first of equals."""
    # The same ending twice gets one score, since its rows may be rounded differently.
    firsts = torch.tensor([[e.endings.index(ending) for ending in e.endings] for e in batch])
    lengths = runtime.to_device(torch.tensor([e.lengths for e in batch]))
    sums = sums.gather(1, runtime.to_device(firsts)).masked_fill(lengths == 0, -torch.inf)
    return sums.argmax(dim=1), (sums / lengths).argmax(dim=1)


def evaluate(model, examples, runtime, batch_size=BATCH_SIZE, progress=False) -> Scores:
    """Score the examples. The ranks share the batches, which are the same for any number of ranks.
    The counts stay on the device: Python waits for a GPU only at the end. Raises UserError."""
    mine = batches(examples, batch_size, model.config.seq_len)[runtime.rank :: runtime.world]
    right = right_norm = total = 0
    bar = tqdm(mine, unit="batch", disable=not progress or runtime.rank > 0)
    for batch in bar:
        choice, choice_norm = choose(batch, log_probabilities(model, batch, runtime), runtime)
        labels = runtime.to_device(torch.tensor([example.label for example in batch]))
        right = right + (choice == labels).sum()
        right_norm = right_norm + (choice_norm == labels).sum()
        total = total + len(batch)
        if progress:  # Python waits for each batch
            bar.set_postfix_str(f"acc {right / total:.4f} acc_norm {right_norm / total:.4f}")
    right, right_norm, total = runtime.sum(right, right_norm, total)
    return Scores(right / total, right_norm / total, round(total))


# --------------------------------------------------------------------------------------------------
# 4. The command
# --------------------------------------------------------------------------------------------------


def show(model, example: Example, runtime) -> None:
    """Print an example and its four losses, in nats per token (with --harness, per character)."""
    decode = shards.gpt2_tokenizer().decode
    batch = batches([example], 1, model.config.seq_len)[0]
    sums = log_probabilities(model, batch, runtime)
    losses = -sums[0].cpu() / torch.tensor(example.lengths)
    runtime.print(f"---\nContext:\n {decode(batch[0].context)}\nEndings:")
    for i, ending in enumerate(example.endings):
        runtime.print(f"{i} (loss: {losses[i]:.4f}){decode(ending)}")
    runtime.print(f"predicted: {choose(batch, sums, runtime)[1].item()}, actual: {example.label}")


def main(argv: list[str] | None = None) -> None:
    import train_gpt2  # here, because train_gpt2 imports this file

    args = parse_arguments(argv)
    runtime = train_gpt2.Runtime(train_gpt2.TrainConfig(device=args.device, dtype="float32"))
    torch.set_float32_matmul_precision("highest")  # TF32 would change close choices
    examples = load_examples(runtime, args.data, args.split, args.harness)[: args.limit]
    model = train_gpt2.load_model(args.model).to(runtime.device)
    try:
        for example in examples[: args.show]:
            show(model, example, runtime)
        scores = evaluate(model, examples, runtime, args.batch_size, progress=True)
    except Exception as error:
        if not machine.is_out_of_memory(error):
            raise
        hint = f"--batch_size {args.batch_size // 2}" if args.batch_size > 1 else "--device cpu"
        raise UserError(f"out of memory; try {hint}") from None
    shares = (scores.acc, scores.acc_norm)
    errors = [(p * (1 - p) / max(scores.total - 1, 1)) ** 0.5 for p in shares]  # as in the harness
    line = f"{scores}, standard error {errors[0]:.4f} {errors[1]:.4f}"
    published = PUBLISHED.get(args.model, ("", ""))[args.harness]
    runtime.print(f"{line}; published {published}" if published else line)
    runtime.close()


if __name__ == "__main__":
    run_command("hellaswag.py", main)
