"""HellaSwag: scores like transformers' and the harness's, and downloads from a bad server."""

import dataclasses
import io
import json
import re
import statistics
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers import one_line, run, run_here, their_model, their_tokenizer

import hellaswag
import train_gpt2
from support.command import UserError
from support.shards import END_OF_TEXT, decode

FILE = Path(__file__).parent / "hellaswag_records.jsonl"
CONTENT = FILE.read_bytes()
LINES = CONTENT.splitlines(keepends=True)
RECORDS = [json.loads(line) for line in LINES]


def make_models(folder: Path, seq_len=160):
    """Make our model, whose vocabulary is padded, and transformers' same one, without padding."""
    theirs = their_model(vocab_size=50304, n_positions=seq_len, n_layer=2, n_head=2, n_embd=32)
    theirs.save_pretrained(folder)
    theirs.resize_token_embeddings(50257)
    ours = train_gpt2.GPT.from_pretrained(str(folder))
    return ours.requires_grad_(False), theirs.requires_grad_(False).eval()


def brute_force(theirs, examples: list[hellaswag.Example]):
    """One ending at a time: log-probabilities (N, 4); how many are right by sum, by mean, of N."""
    sums = torch.zeros(len(examples), 4)
    for number, example in enumerate(examples):
        context = list(example.context)
        while len(context) + max(map(len, example.endings)) - 1 > theirs.config.n_positions:
            context.pop(0)
        for i, ending in enumerate(example.endings):
            tokens = torch.tensor(context + ending)
            logits = theirs(tokens[None, :-1]).logits[0].double()
            each = logits.log_softmax(dim=1)[range(len(tokens) - 1), tokens[1:]]
            sums[number, i] = each[-len(ending) :].sum()
    means = sums / torch.tensor([example.lengths for example in examples])
    labels = torch.tensor([example.label for example in examples])
    counts = [int((each.argmax(dim=1) == labels).sum()) for each in (sums, means)]
    return sums, (*counts, len(examples))


def test_render_tokenizes_like_the_lecture():
    encode = their_tokenizer().encode
    for record, example in zip(RECORDS, hellaswag.read_examples(FILE), strict=True):
        assert example.context == encode(record["ctx"])
        assert example.endings == [encode(" " + ending) for ending in record["endings"]]
        assert example.lengths == list(map(len, example.endings))
        assert example.label == record["label"]
    odd = dict(ctx="", endings=["<|endoftext|>", "", "b", "c"], label="2")  # text, as on the hub
    example = hellaswag.render(odd)
    assert (example.context, example.endings[1], example.label) == ([END_OF_TEXT], [220], 2)
    assert END_OF_TEXT not in example.endings[0]  # in a text it is text
    assert decode(example.endings[0]) == " <|endoftext|>"


def test_harness_prompt_by_hand():
    record = dict(
        activity_label="Tea",
        ctx_a="[header] How to make tea [title] Boil it.",
        ctx_b="THEN [substeps]",
        ctx="not used",
        endings=["[step] Pour  it. [title] Wait.", "x", "y é", ""],
        label=1,
    )
    example = hellaswag.render(record, harness=True)
    # Removed marks leave their spaces, and a pair of spaces becomes one. The white space at the
    # end of the context has moved to the endings.
    assert decode(example.context) == "Tea: How to make tea. Boil it. Then"
    assert decode(example.endings[0]) == "   Pour it.. Wait."
    assert decode(example.endings[2]) == "  y é"
    assert example.lengths == [len(" Pour it.. Wait."), 1, 3, 0]  # characters, not bytes


def test_a_file_may_have_blank_lines_but_no_wrong_record(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\r\n".join([LINES[0].strip(), b"", LINES[1].strip()]))
    assert len(hellaswag.read_examples(path)) == 2
    changes = [dict(ctx=None), dict(endings=["a"] * 3), dict(endings=[1, 2, 3, 4]), dict(label=4)]
    wrong = [json.dumps(RECORDS[1] | change).encode() for change in changes]
    for line in (*wrong, LINES[1][:-9], b"\xff\xfe", b"[1, 2]", b"[" * 200_000):
        path.write_bytes(LINES[0] + line)
        with pytest.raises(UserError, match="line 2: no JSON"):
            hellaswag.read_examples(path)


@pytest.mark.parametrize(
    "harness, seq_len, at_once", [(False, 160, 2048), (False, 29, 1), (True, 40, 300)]
)
def test_scores_are_those_of_one_ending_at_a_time(harness, seq_len, at_once, tmp_path, monkeypatch):
    """With 29 tokens most contexts are cropped, one of them to a single token."""
    monkeypatch.setitem(hellaswag.BATCH_TOKENS, "cpu", at_once)
    model, theirs = make_models(tmp_path, seq_len)
    examples = hellaswag.read_examples(FILE, len(RECORDS), harness)
    sums, counts = brute_force(theirs, examples)
    scored = hellaswag.log_probabilities(model, examples)
    torch.testing.assert_close(scored, sums, atol=1e-4, rtol=0)
    assert hellaswag.count_right(model, examples) == counts
    assert 0 < counts[0] < len(RECORDS) and 0 < counts[1] < len(RECORDS)
    longest = max(len(ending) for example in examples for ending in example.endings)
    model.config = dataclasses.replace(model.config, seq_len=longest - 1)
    with pytest.raises(UserError, match=f"^HellaSwag: an ending has {longest} tokens"):
        hellaswag.count_right(model, examples)


def test_the_first_of_equals_is_chosen_and_length_0_never():
    def choose(endings, lengths, sums):
        example = hellaswag.Example([1], endings, lengths, label=0)
        return [choice.item() for choice in hellaswag.choose([example], torch.tensor([sums]))]

    twice = [[5, 6], [7, 8], [5, 6], [7, 8]]  # each ending has the score of its first row
    assert choose(twice, [2, 2, 2, 2], [-3.0, -2.0, -1.0, -2.0 + 1e-6]) == [1, 1]
    assert choose([[5], [6], [7], [8]], [1, 1, 1, 1], [-2.0, -1.0, -1.0, -3.0]) == [1, 1]
    assert choose([[5], [6], [7, 7], [8]], [0, 1, 2, 0], [-1.0, -5.0, -6.0, -9.0]) == [1, 2]


def test_choices_match_the_real_harness(tmp_path):
    pytest.importorskip("lm_eval", reason="optional: pip install lm-eval accelerate")
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM

    tasks = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    sys.path.insert(0, str(tasks))
    import utils as harness_utils

    config = yaml.safe_load((tasks / "hellaswag.yaml").read_text().replace("!function ", ""))
    config.pop("dataset_name")
    config |= dict(dataset_path="json", dataset_kwargs=dict(data_files=dict(validation=str(FILE))))
    config |= dict(process_docs=harness_utils.process_docs, training_split=None)
    model, theirs = make_models(tmp_path)
    lm = HFLM(theirs, tokenizer=their_tokenizer(), batch_size=4, max_length=160)
    results = lm_eval.simple_evaluate(lm, tasks=[config], bootstrap_iters=0)
    samples = sorted(results["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
    examples = hellaswag.read_examples(FILE, harness=True)
    choices = hellaswag.choose(examples, hellaswag.log_probabilities(model, examples))
    for choice, metric in zip(choices, ("acc", "acc_norm"), strict=True):
        right = choice == torch.tensor([example.label for example in examples])
        assert right.tolist() == [sample[metric] for sample in samples]


def test_downloads(monkeypatch, tmp_path):
    """Only a valid answer becomes a file; a file that is here is checked, and not replaced."""
    answers = [OSError("HTTP Error 404: Not Found"), b"<html>Please log in</html>"]
    answers += [b"".join(LINES[1:]), CONTENT[:5000], CONTENT]
    reasons = ["HTTP Error 404", "line 1: no JSON", "41 records instead of 42"]

    def urlopen(url, timeout):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        file = io.BytesIO(answer)
        file.status = 200
        return file

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(hellaswag, "RECORDS", {"val": len(RECORDS)})
    monkeypatch.setattr(hellaswag, "FOLDER", tmp_path / "hellaswag")
    for reason in reasons:
        with pytest.raises(UserError, match=f"^cannot download .*{reason}.*hellaswag_every 0 "):
            hellaswag.download(pauses=())
        assert not hellaswag.FOLDER.exists()
    hellaswag.download(pauses=(0.0,))
    [path] = hellaswag.FOLDER.iterdir()
    assert path.read_bytes() == CONTENT
    assert len(hellaswag.load_examples()) == len(RECORDS)  # without a request
    path.write_bytes(b"".join(LINES[:-1]))
    with pytest.raises(UserError, match=f"^{path} holds 41 records instead of 42$"):
        hellaswag.load_examples()
    assert path.exists()  # it may be the user's


def last_line(right: int, right_norm: int, total: int) -> str:
    hits = [[1] * n + [0] * (total - n) for n in (right, right_norm)]
    errors = [statistics.stdev(each) / total**0.5 for each in hits]
    scores = f"acc {right / total:.4f} acc_norm {right_norm / total:.4f}"
    return f"hellaswag {total} records: {scores}, standard error {errors[0]:.4f} {errors[1]:.4f}"


def test_the_command(tmp_path):
    # A folder with the name of a published model, in the working folder, wins over it.
    _, theirs = make_models(tmp_path / "gpt2")
    flags = ["--model", "gpt2", "--data", FILE, "--device", "cpu"]
    done = run_here(tmp_path, *flags, "--show", 1, script="hellaswag.py")
    examples = hellaswag.read_examples(FILE)
    sums, counts = brute_force(theirs, examples)
    losses = (-sums[0] / torch.tensor(examples[0].lengths)).tolist()
    for ending, loss in zip(RECORDS[0]["endings"], losses, strict=True):
        (shown,) = re.findall(rf"\(loss: (.*)\) {re.escape(ending)}\n", done.stdout)
        assert float(shown) == pytest.approx(loss, abs=2e-4)
    assert f"predicted: {losses.index(min(losses))}, actual: 0\n" in done.stdout
    assert done.stdout.endswith(f"{last_line(*counts)}\n")

    more = ["--limit", 9, "--harness"]
    done = run(tmp_path, *flags, *more, script="hellaswag.py", processes=2)
    _, counts = brute_force(theirs, hellaswag.read_examples(FILE, harness=True)[:9])
    assert done.stdout == f"{last_line(*counts)}\n"
    one_line(run_here(tmp_path, "--data", "no", script="hellaswag.py"), "no cannot.*No such file")
