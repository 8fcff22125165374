"""
hellaswag.py: can the network tell how a story goes on? 10,042 beginnings with four endings each, of
which people find one likely and the other three odd (Zellers et al., 2019, arXiv 1905.07830).

    python hellaswag.py --model gpt2                       # a published network: acc 0.2859
    python hellaswag.py --model log                        # the newest checkpoint of a run
    python hellaswag.py --model gpt2 --harness             # as lm-evaluation-harness scores
    python hellaswag.py --model gpt2 --data mine.jsonl --show 5
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model gpt2-xl

A network of 124M parameters fails at multiple choice, where all endings stand in the prompt. So it
is asked for completion: each ending has a probability after the beginning, and the likeliest one is
the network's choice. `acc` goes by the probability of the whole ending, `acc_norm` by the mean over
its tokens, so that a long ending is not worse for being long.

A record, one JSON object a line, is either the caption of a video or a part of a how-to article:

    ctx       the beginning: ctx_a, and for captions the first words of the next sentence, ctx_b
    endings   four texts
    label     0 to 3: the right one
    activity_label, ctx_a, ctx_b (which --harness needs), ind, split, split_type, source_id

Contents
    1. Settings
    2. Records: finding, fetching, checking
    3. Examples: records as tokens
    4. Scoring
    5. The command
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from fineweb import END_OF_TEXT, VOCAB_SIZE, UserError, first_line, gpt2_tokenizer, write_atomically

# --------------------------------------------------------------------------------------------------
# 1. Settings (lecture 3:28:23, HellaSwag)

FOLDER = Path(__file__).parent / "hellaswag"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
RECORDS = {"val": 10_042, "train": 39_905}  # [the data set's card]; "test" has no labels
LABELS = ("0", "1", "2", "3")  # GitHub's copy has numbers, the hub's has text

BATCH_SIZE = 128  # examples whose contexts are equally long; each has four endings
# Endings at a time, of the batch's in the order of their lengths: the fewer, the less padding. A
# GPU wants more.
ROWS = {"cpu": 64, "cuda": 128, "mps": 128}
PADDING = -1  # the id of no token
VOCAB_SLICE = 2048  # ids at a time for which all predicted tokens of a batch get their logits

# OpenAI's networks: completion style, and by lm-evaluation-harness (True).
PUBLISHED = {
    ("gpt2", False): "acc 0.2859 acc_norm 0.2955",  # [build-nanogpt, hellaswag.py]
    ("gpt2-medium", False): "acc_norm 0.3752",  # [llm.c, dev/vislog.ipynb]
    ("gpt2-large", False): "acc_norm 0.4320",  # [the same]
    ("gpt2-xl", False): "acc 0.3842 acc_norm 0.4893",  # [build-nanogpt, and so the next two]
    ("gpt2", True): "acc 0.2892 acc_norm 0.3114",
    ("gpt2-xl", True): "acc 0.4004 acc_norm 0.5089",
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("hellaswag.py", description=__doc__.strip().split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="gpt2", help="published name, folder or checkpoint (default: gpt2)")
    add("--data", metavar="FILE", help="local records, any number (default: --split, downloaded)")
    add("--split", choices=list(RECORDS), default="val", help="(default: val)")
    add("--limit", type=int, help="only the first so many records")
    add("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    add("--batch_size", type=int, default=BATCH_SIZE, help="examples (default: %(default)s)")
    add("--harness", action="store_true", help="prompt and lengths of lm-evaluation-harness")
    add("--show", type=int, default=0, metavar="N", help="print the first N with their losses")
    args = parser.parse_args(argv)
    for name, least in dict(limit=1, batch_size=1, show=0).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: it must be at least {least}")
    return args


# --------------------------------------------------------------------------------------------------
# 2. Records: finding, fetching, checking


def parse(content: bytes, name: str, count: int | None = None) -> list[dict]:
    """The records of a file's content, which `name` stands for in messages.

    Raises UserError if a line is no record, or if there are none, or not `count` of them.
    """
    records = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, no UTF-8, brackets without end
            record = None
        match record:
            case {"ctx": str(), "endings": [str(), str(), str(), str()], "label": label} if (
                str(label) in LABELS
            ):
                records.append(record)
            case _:
                what = "no JSON with ctx, four endings and a label from 0 to 3"
                raise UserError(f"{name}, line {number}: {what}")
    if not records or (count and len(records) != count):
        raise UserError(f"{name} holds {len(records):,} records instead of {count or 'some'}")
    return records


def fetch(url: str) -> bytes:
    """What is at `url`, whole. Raises UserError, or what sockets, TLS and HTTP raise."""
    import requests
    from tqdm import tqdm

    content, plain = bytearray(), {"Accept-Encoding": "identity"}  # so that lengths compare
    with requests.get(url, stream=True, timeout=30, headers=plain) as response:
        if response.status_code != 200:
            raise UserError(f"HTTP status {response.status_code}")
        size = int(response.headers.get("Content-Length", 0))
        with tqdm(total=size or None, unit="B", unit_scale=True, desc="HellaSwag") as bar:
            for chunk in response.iter_content(2**16):
                content += chunk
                bar.update(len(chunk))
    if size and len(content) != size:
        raise UserError(f"the connection was cut after {len(content):,} of {size:,} bytes")
    return bytes(content)


def download(split: str, folder: Path, pauses=(1.0, 5.0)) -> Path:
    """hellaswag_<split>.jsonl in `folder`: as it is there, or else fetched and checked.

    A failure is followed by another try after each of the `pauses` (seconds). Only a whole and
    right file ever gets the name; after the last failure there is none. Raises UserError.
    """
    path, url = folder / f"hellaswag_{split}.jsonl", URL.format(split=split)
    for pause in (*pauses, None):
        if path.exists():
            break
        try:
            content = fetch(url)
            parse(content, "the answer", RECORDS[split])
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, b"", content)
        except Exception as error:  # network, server and disk fail with types of their own
            if pause is None:
                raise UserError(
                    f"HellaSwag is not to be had ({first_line(error)}); fetch {url} by hand to "
                    f"{path}, or train without it: --hellaswag_every 0"
                ) from error
            time.sleep(pause)
    return path


def read_records(path: Path | str | None, split: str, rank: int) -> list[dict]:
    """The records of a file of the user's, or of the whole split. Only rank 0 may fetch it."""
    if path is None and rank == 0:
        download(split, FOLDER)
    file = Path(path or FOLDER / f"hellaswag_{split}.jsonl")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    return parse(content, str(file), None if path else RECORDS[split])


# --------------------------------------------------------------------------------------------------
# 3. Examples: records as tokens


@dataclass(frozen=True)
class Example:
    """A record as token ids: tokenized once, scored at every evaluation."""

    context: list[int]  # at least one
    endings: list[list[int]]  # four
    lengths: list[int]  # by which acc_norm divides: tokens, for the harness characters
    label: int


def clean(text: str) -> str:
    """The harness's clean-up of how-to articles: [title] ends a sentence, other marks go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def render(record: dict, harness: bool = False) -> Example:
    """Tokenize a record: the context, and each ending with a space before it.

    That space belongs to the ending's first word, as in GPT-2's vocabulary, so that no token spans
    both. A context without tokens becomes <|endoftext|>: the ending then begins a document.
    `harness` has the prompt of lm-evaluation-harness 0.4's task `hellaswag`. Raises UserError if a
    record lacks the fields for that.
    """
    context, endings = record["ctx"], record["endings"]
    space = " "
    if harness:
        try:
            begun = record["ctx_a"] + " " + record["ctx_b"].capitalize()
            context = clean(record["activity_label"] + ": " + begun)
        except (KeyError, TypeError, AttributeError):
            raise UserError("--harness needs records with activity_label, ctx_a, ctx_b") from None
        endings = [clean(ending) for ending in endings]
        bare = context.rstrip()  # white space at its end is the endings', again for GPT-2's tokens
        context, space = bare, context[len(bare) :] + " "
    encode = gpt2_tokenizer().encode_ordinary
    tokens = [encode(space + ending) for ending in endings]
    lengths = [len(ending) for ending in (endings if harness else tokens)]
    return Example(encode(context) or [END_OF_TEXT], tokens, lengths, int(record["label"]))


def load_examples(
    path: Path | str | None = None, split: str = "val", runtime=None, harness: bool = False
) -> list[Example]:
    """The examples of the file at `path`, or of HellaSwag's `split`, fetched if need be.

    With a `runtime` of several processes the first one fetches while the others wait, and if any of
    them fails all do: none is left waiting. Raises UserError.
    """
    rank, error, records = runtime.rank if runtime else 0, None, []
    for turn in (0, 1):  # the first process, then the others
        if turn == min(rank, 1):
            try:
                records = read_records(path, split, rank)
            except UserError as problem:
                error = problem
        failed = runtime.sum(float(error is not None))[0] if runtime else error
        if failed:
            raise error or UserError(
                "HellaSwag: another process cannot read it; each machine needs the file"
            )
    return [render(record, harness) for record in records]


# --------------------------------------------------------------------------------------------------
# 4. Scoring


@dataclass(frozen=True)
class Scores:
    right: int  # by the whole ending's probability
    right_norm: int  # by the mean over its length
    total: int

    @property
    def acc(self) -> float:
        return self.right / self.total

    @property
    def acc_norm(self) -> float:
        return self.right_norm / self.total

    def __str__(self) -> str:
        line = f"acc {self.acc:.4f} acc_norm {self.acc_norm:.4f}"
        return f"hellaswag {self.total} records: {line}"


def standard_error(share: float, total: int) -> float:
    """Of a share of `total` independent trials; as the harness, with total - 1."""
    return math.sqrt(share * (1 - share) / max(total - 1, 1))


def batches(examples: list[Example], batch_size: int, seq_len: int) -> list[list[Example]]:
    """Batches of examples with equally long contexts, so that no context is padded.

    The longest come first: if memory does not do, that shows at once. Contexts too long for the
    network lose tokens on the left, the farthest from the ending. Raises UserError if an ending
    alone is too long.
    """

    def longest(example: Example) -> int:
        return max(1, *map(len, example.endings))

    fitting = []
    for example in examples:
        room = seq_len + 1 - longest(example)  # + 1: an ending's last token is not read
        if room < 1:
            what = f"an ending of {longest(example)} tokens, longer than the context of {seq_len}"
            raise UserError(f"HellaSwag: {what}; train without it: --hellaswag_every 0")
        fitting.append(dataclasses.replace(example, context=example.context[-room:]))
    fitting.sort(key=lambda example: (len(example.context), longest(example)), reverse=True)
    result = []
    for _, group in itertools.groupby(fitting, key=lambda example: len(example.context)):
        group = list(group)
        result += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return result


def token_losses(model, x, targets):
    """(N, C) and the tokens (N) that follow -> their losses (N), in float32.

    Logits are never held whole. Slices are of the vocabulary, without its padding, and not of the
    rows: matrix products are fastest with many rows.
    """
    total = torch.full(targets.shape, -math.inf, device=x.device)
    right = torch.zeros_like(total)
    for i, ids in enumerate(model.lm_head.weight[:VOCAB_SIZE].split(VOCAB_SLICE)):
        logits = F.linear(x, ids).float()  # (N, C) (v, C) -> (N, v)
        # log(sum(exp(logits))); log_softmax is one kernel, torch.logsumexp several.
        total = torch.logaddexp(total, logits[:, 0] - logits.log_softmax(dim=1)[:, 0])
        at = (targets - i * VOCAB_SLICE)[:, None]
        here = logits.gather(1, at.clamp(0, len(ids) - 1))  # (N, v) -> (N, 1)
        right = torch.where((at >= 0) & (at < len(ids)), here, right[:, None])[:, 0]
    return total - right


@torch.no_grad()
def log_probabilities(model, batch: list[Example], runtime) -> list[list[float]]:
    """B examples with contexts of S tokens -> (B, 4): of each ending the log-probability, nats.

    A context is read once, and its keys and values serve all its endings. These are taken some at a
    time, in the order of their lengths, and padded on the right, where no token looks. The network
    runs in the runtime's dtype; the softmax, over GPT-2's ids alone, is in float32.
    """
    device, endings = runtime.device, [ending for example in batch for ending in example.endings]
    hidden, following = [], []
    by_length = sorted(range(len(endings)), key=lambda row: len(endings[row]))
    with runtime.autocast():
        cache = model.new_cache()
        contexts = torch.tensor([example.context for example in batch], device=device)
        first = model.hidden(contexts, cache)[:, -1:]  # (B, S) -> (B, 1, C)
        for i in range(0, len(endings), ROWS[device.type]):
            rows = by_length[i : i + ROWS[device.type]]
            E = max(1, len(endings[rows[-1]]))
            padded = [endings[row] + [PADDING] * (E - len(endings[row])) for row in rows]
            tokens = torch.tensor(padded, device=device)  # (R, E)
            owners = torch.tensor(rows, device=device) // 4  # (R)
            # The context's last token predicts an ending's first, that the second, and so on.
            x = first[owners]  # (B, 1, C) -> (R, 1, C)
            if E > 1:
                past = model.new_cache()
                past.layers = {i: (k[owners], v[owners]) for i, (k, v) in cache.layers.items()}
                x = torch.cat([x, model.hidden(tokens[:, :-1].clamp(min=0), past)], 1)  # (R, E, C)
            real = tokens != PADDING
            hidden.append(x[real])  # (R, E, C) -> (n, C)
            following.append(tokens[real])
        losses = token_losses(model, torch.cat(hidden), torch.cat(following)).cpu()
    sums = torch.zeros(len(endings))
    lengths = [len(endings[row]) for row in by_length]
    for row, part in zip(by_length, losses.split(lengths), strict=True):
        sums[row] = -part.sum()
    return sums.view(-1, 4).tolist()


def choose(example: Example, sums: list[float]) -> tuple[int, int]:
    """The network's choice by sum, and by sum / length. Of equals, the first.

    An ending of no tokens, or of no length, says nothing and is never preferred.
    """
    # The same ending twice gets one score, whatever the rounding in its row of the batch.
    sums = [sums[example.endings.index(ending)] for ending in example.endings]
    sums = [s if ending else -math.inf for s, ending in zip(sums, example.endings, strict=True)]
    means = [s / n if n else -math.inf for s, n in zip(sums, example.lengths, strict=True)]
    return sums.index(max(sums)), means.index(max(means))


def evaluate(
    model, examples: list[Example], runtime, batch_size: int = BATCH_SIZE, progress: bool = False
) -> Scores:
    """How many of the examples the network gets right; the processes share them.

    All batches are made in every process, and each takes every world-th: so they are the same for
    any number of processes. Raises UserError if an ending is longer than the network's context.
    """
    from tqdm import tqdm

    mine = batches(examples, batch_size, model.config.seq_len)[runtime.rank :: runtime.world]
    right, right_norm, total = 0, 0, 0
    with tqdm(total=sum(map(len, mine)), unit="", disable=not progress or runtime.rank > 0) as bar:
        for batch in mine:
            for example, sums in zip(batch, log_probabilities(model, batch, runtime), strict=True):
                choice, choice_norm = choose(example, sums)
                right += choice == example.label
                right_norm += choice_norm == example.label
            total += len(batch)
            bar.set_postfix_str(f"acc {right / total:.4f} acc_norm {right_norm / total:.4f}", False)
            bar.update(len(batch))
    return Scores(*map(round, runtime.sum(right, right_norm, total)))


# --------------------------------------------------------------------------------------------------
# 5. The command


def describe(model, example: Example, runtime) -> str:
    """An example with its four losses, nats a token (with --harness, a character)."""
    decode = gpt2_tokenizer().decode
    [[example]] = batches([example], 1, model.config.seq_len)
    [sums] = log_probabilities(model, [example], runtime)
    lines = ["---", f"Context:\n {decode(example.context)}", "Endings:"]
    for i, ending in enumerate(example.endings):
        loss = -sums[i] / example.lengths[i] if example.lengths[i] else math.inf
        lines.append(f"{i} (loss: {loss:.4f}){decode(ending)}")
    return "\n".join([*lines, f"predicted: {choose(example, sums)[1]}, actual: {example.label}"])


def run(args: argparse.Namespace) -> None:
    """Score --model. Raises UserError."""
    import train_gpt2  # here, because train_gpt2 imports this file

    config = train_gpt2.TrainConfig(device=args.device, dtype="float32")
    runtime = train_gpt2.Runtime(config)
    examples = load_examples(args.data, args.split, runtime, args.harness)[: args.limit]
    model = train_gpt2.load_model(args.model).to(runtime.device)
    for example in examples[: args.show]:
        runtime.print(describe(model, example, runtime))
    scores = evaluate(model, examples, runtime, args.batch_size, progress=True)
    errors = [standard_error(share, scores.total) for share in (scores.acc, scores.acc_norm)]
    line = f"{scores}, standard error {errors[0]:.4f} {errors[1]:.4f}"
    published = PUBLISHED.get((args.model, args.harness))
    runtime.print(f"{line}; published {published}" if published else line)
    runtime.close()


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_arguments(argv))
    except UserError as error:
        print(f"hellaswag.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nhellaswag.py: stopped")


if __name__ == "__main__":
    main()
