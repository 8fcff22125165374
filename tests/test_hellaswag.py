"""Compare hellaswag.py with a loop that has no cache, batches or padding, and with the real
lm-evaluation-harness (where it is installed); let it download from a server that misbehaves."""

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from helpers import their_tokenizer

import hellaswag
import train_gpt2
from hellaswag import Example
from support import published
from support.command import UserError
from support.shards import END_OF_TEXT, gpt2_tokenizer

FILE = Path(__file__).parent / "hellaswag_records.jsonl"
CONTENT = FILE.read_bytes()
RECORDS = [json.loads(line) for line in CONTENT.splitlines()]
torch.set_num_threads(1)  # the models are small: more threads would only wait
ALONE = SimpleNamespace(
    rank=0,
    world=1,
    device=torch.device("cpu"),
    device_type="cpu",
    autocast=nullcontext,
    sum=lambda *values: [float(value) for value in values],
    to_device=lambda tensor: tensor,
)


def make_model(seq_len=160, vocab_size=50304, n_embd=32):
    torch.manual_seed(1)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(seq_len, vocab_size, 2, 2, n_embd))
    with torch.no_grad():
        for parameter in model.parameters():  # larger weights, so the four scores differ clearly
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model in a transformers folder called gpt2, like a published one."""
    path = tmp_path_factory.mktemp("models") / "gpt2"
    published.write(path, dataclasses.asdict(model.config), model.state_dict())
    return path


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint_0000007.pt"
    sizes = dataclasses.asdict(model.config)
    torch.save(dict(step=7, network=sizes, settings={}, model=model.state_dict()), path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    import transformers

    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@torch.no_grad()
def brute_force(reference, context, endings, seq_len):
    """Compute the four sums from full logits: one ending at a time, without a cache."""
    longest = max(1, *map(len, endings))
    context = context[max(0, len(context) - (seq_len + 1 - longest)) :]
    sums = []
    for ending in endings:
        tokens = context + ending
        logits = reference(torch.tensor([tokens[:-1] or tokens])).logits[0]
        sums.append(0.0)
        for place in range(len(context), len(tokens)):
            sums[-1] += logits[place - 1].double().log_softmax(0)[tokens[place]].item()
    return sums


def by_batches(model, examples, batch_size):
    """Score examples -> [(example, sums)], in evaluate's order."""
    result = []
    for batch in hellaswag.batches(examples, batch_size, model.config.seq_len):
        sums = hellaswag.log_probabilities(model, batch, ALONE)
        result += zip(batch, sums.tolist(), strict=True)
    return result


def choose(example, sums):
    """Choose for one example -> two numbers."""
    choice, choice_norm = hellaswag.choose([example], torch.tensor([sums]), ALONE)
    return choice.item(), choice_norm.item()


def key(example):
    return json.dumps(example.endings)


# --------------------------------------------------------------------------------------------------
# Rendering


def test_records_are_of_both_kinds_and_valid():
    sources = {record["source_id"].split("~")[0] for record in RECORDS}
    assert len(hellaswag.parse(CONTENT, "file")) == len(RECORDS) >= 40
    assert sources == {"activitynet", "wikihow"}


def test_render_tokenizes_like_the_lecture():
    encode = gpt2_tokenizer().encode
    for record in RECORDS:
        example = hellaswag.render(record)
        assert example.context == encode(record["ctx"])
        assert example.endings == [encode(" " + ending) for ending in record["endings"]]
        assert example.lengths == list(map(len, example.endings))
        assert example.label == record["label"]


def test_empty_context_begins_a_document_and_empty_ending_is_a_space():
    record = dict(ctx="", endings=["", "a", "b", "c"], label="2")  # the hub's labels are strings
    example = hellaswag.render(record)
    assert (example.context, example.endings[0], example.label) == ([END_OF_TEXT], [220], 2)


def test_special_token_in_the_text_is_text():
    record = dict(ctx="<|endoftext|>", endings=["<|endoftext|>"] * 4, label=0)
    example = hellaswag.render(record)
    assert END_OF_TEXT not in example.context + example.endings[0]


def test_harness_prompt_by_hand():
    record = dict(
        activity_label="Tea",
        ctx_a="[header] How to make tea [title] Boil it.",
        ctx_b="THEN [substeps]",
        ctx="not used",
        endings=["[step] Pour  it. [title] Wait.", "x", "y é", ""],
        label=1,
    )
    example, decode = hellaswag.render(record, harness=True), gpt2_tokenizer().decode
    # Removed marks leave their spaces, and a pair of spaces becomes one. The white space at the
    # end of the context has moved to the endings.
    assert decode(example.context) == "Tea: How to make tea. Boil it. Then"
    assert decode(example.endings[0]) == "   Pour it.. Wait."
    assert decode(example.endings[2]) == "  y é"
    assert example.lengths == [len(" Pour it.. Wait."), 1, 3, 0]  # characters, not bytes
    with pytest.raises(UserError, match="activity_label"):
        hellaswag.render(dict(ctx="a", endings=["b"] * 4, label=0), harness=True)


# --------------------------------------------------------------------------------------------------
# Scoring


@pytest.mark.parametrize("harness", [False, True])
def test_every_score_equals_one_ending_at_a_time(model, reference, harness):
    examples = [hellaswag.render(record, harness) for record in RECORDS]
    expected = {
        key(e): brute_force(reference, e.context, e.endings, model.config.seq_len) for e in examples
    }
    right = right_norm = 0
    for e in examples:
        means = [s / n for s, n in zip(expected[key(e)], e.lengths, strict=True)]
        right += max(range(4), key=expected[key(e)].__getitem__) == e.label
        right_norm += max(range(4), key=means.__getitem__) == e.label
    assert 0 < right < len(RECORDS) and 0 < right_norm < len(RECORDS)
    for batch_size in (32,) if harness else (1, 32):
        for example, sums in by_batches(model, examples, batch_size):
            assert sums == pytest.approx(expected[key(example)], abs=1e-4, rel=0)
    scores = hellaswag.evaluate(model, examples, ALONE, batch_size=3)
    total = len(RECORDS)
    assert scores == hellaswag.Scores(right / total, right_norm / total, total)


@pytest.mark.parametrize("rows", [1, 5, 32])
def test_every_length_up_to_and_beyond_the_context(rows, monkeypatch):
    monkeypatch.setitem(hellaswag.TOKENS, "cpu", 13 * rows)
    model, draw = make_model(seq_len=12, vocab_size=97), random.Random(2)
    lengths = [(c, e) for c in (1, 2, 5, 11, 12, 13, 14, 30) for e in (0, 1, 2, 7, 11, 12)]
    examples = []
    for c, e in lengths * 2:
        sizes = [e, draw.randint(0, e), draw.randint(0, 12), 1]
        endings = [[draw.randrange(97) for _ in range(n)] for n in sizes]
        context = [draw.randrange(97) for _ in range(c)]
        examples.append(Example(context, endings, sizes, 0))
    whole = {key(example): example.context for example in examples}

    def reference(tokens):  # our own model, without a cache
        return SimpleNamespace(logits=model(tokens))

    for example, sums in by_batches(model, examples, batch_size=8):
        full = whole[key(example)]
        assert example.context == full[-len(example.context) :]  # cropped from the left
        expected = brute_force(reference, full, example.endings, seq_len=12)
        assert sums == pytest.approx(expected, abs=1e-4, rel=0)


def test_an_ending_too_long_for_the_model_is_an_error():
    model = make_model(seq_len=12, vocab_size=97)
    example = Example([1, 2], [[3] * 13, [4], [5], [6]], [13, 1, 1, 1], 0)
    with pytest.raises(UserError, match="13 tokens"):
        hellaswag.evaluate(model, [example], ALONE)


def test_contexts_are_never_padded_and_longest_come_first():
    examples = [hellaswag.render(record) for record in RECORDS]
    made = hellaswag.batches(examples, 4, 1024)
    sizes = [{len(example.context) for example in batch} for batch in made]
    assert all(len(size) == 1 for size in sizes)
    assert sizes == sorted(sizes, key=max, reverse=True)
    assert sorted(key(e) for batch in made for e in batch) == sorted(map(key, examples))


def test_the_first_of_equals_is_chosen_and_length_0_never():
    same = Example([1], [[5, 6], [7, 8], [5, 6], [7, 8]], [2, 2, 2, 2], 0)
    assert choose(same, [-3.0, -2.0, -1.0, -2.0 + 1e-7]) == (1, 1)  # equal ending, score
    equal = Example([1], [[5], [6], [7], [8]], [1, 1, 1, 1], 0)
    assert choose(equal, [-2.0, -1.0, -1.0, -3.0]) == (1, 1)
    silent = Example([1], [[], [6], [7, 7], [8]], [0, 1, 2, 0], 0)
    assert choose(silent, [0.0, -5.0, -6.0, -9.0]) == (1, 2)
    nothing = Example([1], [[], [], [], []], [0, 0, 0, 0], 0)
    assert choose(nothing, [0.0, 0.0, 0.0, 0.0]) == (0, 0)
    model = make_model(seq_len=12, vocab_size=97)
    assert hellaswag.evaluate(model, [same, silent, nothing], ALONE).total == 3


@pytest.mark.parametrize("autocast", [True, False])
def test_softmax_is_float32_in_any_dtype(autocast):
    model = make_model() if autocast else make_model().bfloat16()
    x, targets = torch.randn(50, 32).to(model.lm_head.weight.dtype), torch.arange(50)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model.lm_head(x)
        losses = hellaswag.token_losses(model, x, targets)
    assert (logits.dtype, losses.dtype) == (torch.bfloat16, torch.float32)
    expected = -logits.double()[:, :50257].log_softmax(1)[targets, targets]
    assert losses.double().tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_ranks_share_the_examples(model):
    examples = [hellaswag.render(record) for record in RECORDS[:12]]
    parts = []
    for rank in range(3):
        runtime = SimpleNamespace(**vars(ALONE) | dict(rank=rank, world=3))
        parts.append(hellaswag.evaluate(model, examples, runtime, batch_size=2))
    alone = hellaswag.evaluate(model, examples, ALONE, batch_size=2)
    assert sum(part.total for part in parts) == alone.total == 12
    for name in ("acc", "acc_norm"):
        right = sum(getattr(part, name) * part.total for part in parts)
        assert right == pytest.approx(12 * getattr(alone, name))


def test_a_compiled_model_is_scored_eagerly():
    def refuse(*_):
        raise AssertionError("the compiler was called for one of HellaSwag's many shapes")

    model, examples = make_model(), [hellaswag.render(record) for record in RECORDS[:3]]
    before = hellaswag.evaluate(model, examples, ALONE)
    model.compile(backend=refuse)
    assert hellaswag.evaluate(model, examples, ALONE) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_line_in_the_log():
    scores = hellaswag.Scores(2871 / 10042, 2967 / 10042, 10042)
    assert str(scores) == "hellaswag 10042 records: acc 0.2859 acc_norm 0.2955"


def test_choices_match_the_real_harness(model, reference):
    pytest.importorskip("lm_eval", reason="optional: pip install lm-eval accelerate")
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM

    tokenizer = their_tokenizer()
    tasks = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    text = (tasks / "hellaswag.yaml").read_text().replace("!function ", "")
    config = yaml.safe_load(text) | dict(
        dataset_path="json", dataset_kwargs=dict(data_files=dict(validation=str(FILE)))
    )
    sys.path.insert(0, str(tasks))
    import utils as harness_utils

    config |= dict(process_docs=harness_utils.process_docs, training_split=None)
    config.pop("dataset_name")
    results = lm_eval.simple_evaluate(
        HFLM(reference, tokenizer=tokenizer, batch_size=4, max_length=160),
        tasks=[config],
        bootstrap_iters=0,
    )
    samples = {s["doc_id"]: s for s in results["samples"]["hellaswag"]}
    assert len(samples) == len(RECORDS)
    examples = [hellaswag.render(record, harness=True) for record in RECORDS]
    ours = {key(example): sums for example, sums in by_batches(model, examples, 8)}
    for number, example in enumerate(examples):
        sample, sums = samples[number], ours[key(example)]
        theirs = [response[0][0] for response in sample["resps"]]
        assert sums == pytest.approx(theirs, abs=1e-3, rel=0)
        choice, choice_norm = choose(example, sums)
        means = [s / len(c) for s, c in zip(theirs, sample["doc"]["choices"], strict=True)]
        assert choice == max(range(4), key=theirs.__getitem__)
        assert choice_norm == max(range(4), key=means.__getitem__)
        assert sample["acc"] == (choice == example.label)
        assert sample["acc_norm"] == (choice_norm == example.label)
    scores = hellaswag.evaluate(model, examples, ALONE)
    line = results["results"]["hellaswag"]
    assert (line["acc,none"], line["acc_norm,none"]) == pytest.approx((scores.acc, scores.acc_norm))


# --------------------------------------------------------------------------------------------------
# Downloading


class Server:
    """Answer on the loopback device, each request with the next of the behaviours."""

    def __init__(self):
        self.behaviours, self.requests = [], 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                behaviour = outer.behaviours[min(outer.requests, len(outer.behaviours) - 1)]
                outer.requests += 1
                self.close_connection = True
                behaviour(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        serve = self.http.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/hellaswag_{{split}}.jsonl"


def answers(body, status=200, length=None, **headers):
    def behaviour(request):
        request.send_response(status)
        if length != "none":
            request.send_header("Content-Length", str(length or len(body)))
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return behaviour


def hangs_up(request):
    request.connection.shutdown(socket.SHUT_RDWR)


def cut_chunks(request):
    answers(b"", length="none", **{"Transfer-Encoding": "chunked"})(request)
    request.wfile.write(b"%x\r\n%b\r\n" % (len(CONTENT), CONTENT))  # and no last chunk


GOOD = answers(CONTENT)
LINES = CONTENT.splitlines(keepends=True)


def with_line(**changes):
    """Serve the records with a changed fifth line."""
    line = json.dumps(RECORDS[4] | changes).encode() + b"\n"
    return answers(b"".join([*LINES[:4], line, *LINES[5:]]))


BAD = {
    "404": (answers(b"404: Not Found", 404), "HTTP Error 404"),
    "503": (answers(CONTENT, 503), "HTTP Error 503"),
    "206": (answers(CONTENT, 206), "HTTP status 206"),
    "error page": (answers(b"<html><body>Please log in</body></html>"), "line 1: no JSON"),
    "cut connection": (answers(CONTENT[:5000], length=len(CONTENT)), ""),
    "cut chunks": (cut_chunks, ""),
    "cut, no length": (
        answers(CONTENT[: CONTENT.index(b"\n", 5000) + 1], length="none"),
        "instead",
    ),
    "cut in a line": (answers(CONTENT[:-9], length="none"), f"line {len(LINES)}: no JSON"),
    "hangs up": (hangs_up, ""),
    "empty": (answers(b"", length="none"), "0 records"),
    "not UTF-8": (answers(b"\xff\xfe" + CONTENT), "line 1: no JSON"),
    "a record too few": (answers(b"".join(LINES[1:])), "instead of"),
    "a record too many": (answers(CONTENT + LINES[0]), "instead of"),
    "three endings": (with_line(endings=["a", "b", "c"]), "line 5: no JSON"),
    "an ending is a number": (with_line(endings=["a", "b", "c", 4]), "line 5: no JSON"),
    "endings in one text": (with_line(endings="abcd"), "line 5: no JSON"),
    "no context": (with_line(ctx=None), "line 5: no JSON"),
    "label 4": (with_line(label=4), "line 5: no JSON"),
    "no label": (with_line(label=""), "line 5: no JSON"),
    "a list": (answers(LINES[0] + b"[1, 2]\n" + b"".join(LINES[2:])), "line 2: no JSON"),
    "brackets without end": (answers(b"[" * 200_000), "line 1: no JSON"),
    "gzip": (answers(b"\x1f\x8b broken", **{"Content-Encoding": "gzip"}), ""),
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Server()
    monkeypatch.setattr(hellaswag, "URL", server.url)
    monkeypatch.setattr(hellaswag, "RECORDS", {"val": len(RECORDS)})
    monkeypatch.setattr(hellaswag, "FOLDER", tmp_path / "hellaswag")
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_leaves_no_file_and_one_line(name, server, tmp_path):
    behaviour, reason = BAD[name]
    server.behaviours = [behaviour]
    path = tmp_path / "new" / "hellaswag_val.jsonl"
    with pytest.raises(UserError) as caught:
        hellaswag.download("val", path, pauses=(0.0,))
    message = str(caught.value)
    assert reason in message and "\n" not in message
    assert f"to {path} yourself" in message and "--hellaswag_every 0" in message
    assert server.requests == 2  # it tried again
    assert not path.parent.exists()


def test_a_later_attempt_succeeds_and_the_file_is_downloaded_once(server, tmp_path):
    valid = answers(CONTENT, length="none", **{"Content-Length": "many"})  # only its header is odd
    server.behaviours = [hangs_up, BAD["cut connection"][0], valid]
    path = hellaswag.FOLDER / "hellaswag_val.jsonl"
    hellaswag.download("val", path, pauses=(0.0, 0.0))
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == [path.name]
    assert len(hellaswag.load_examples(ALONE)) == len(RECORDS) and server.requests == 3


def test_a_full_disk_leaves_no_file(server, tmp_path):
    resource = pytest.importorskip("resource", reason="limits on file sizes are Unix's")
    server.behaviours = [GOOD]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # bytes: the write itself fails
    try:
        with pytest.raises(UserError, match="File too large.*yourself"):
            hellaswag.download("val", tmp_path / "hellaswag_val.jsonl", pauses=())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_a_file_that_the_user_put_there_is_used_if_it_is_valid(server):
    hellaswag.FOLDER.mkdir()
    path = hellaswag.FOLDER / "hellaswag_val.jsonl"
    path.write_bytes(CONTENT)
    assert len(hellaswag.load_examples(ALONE)) == len(RECORDS)
    path.write_bytes(b"".join(LINES[:-1]))
    with pytest.raises(UserError, match=f"{path} holds .* instead of") as caught:
        hellaswag.load_examples(ALONE)
    assert "\n" not in str(caught.value)
    assert server.requests == 0 and path.exists()  # the user's file is theirs to delete


def test_data_of_any_number_and_blank_lines(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\r\n".join([LINES[0].strip(), b"", LINES[1].strip()]))
    assert len(hellaswag.load_examples(ALONE, path)) == 2
    path.write_bytes(b"\n")
    with pytest.raises(UserError, match="0 records"):
        hellaswag.load_examples(ALONE, path)
    with pytest.raises(OSError, match="No such file"):
        hellaswag.load_examples(ALONE, tmp_path / "absent")


# --------------------------------------------------------------------------------------------------
# Ranks


def start(code, rank=None, port=0, **options):
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    if rank is not None:
        env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *code], env=env, **pipes, **options)


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), err.splitlines()


WORKER = """
import sys, hellaswag, train_gpt2
from pathlib import Path
url, folder, count, checkpoint = sys.argv[1:]
hellaswag.URL, hellaswag.FOLDER, hellaswag.RECORDS = url, Path(folder), {"val": int(count)}
download = hellaswag.download
hellaswag.download = lambda split, path: download(split, path, pauses=())
runtime = train_gpt2.Runtime(train_gpt2.TrainConfig(device="cpu", dtype="float32"))
try:
    examples = hellaswag.load_examples(runtime)
except hellaswag.UserError as error:
    sys.exit(f"{runtime.rank}: {error}")
print(hellaswag.evaluate(train_gpt2.load_model(checkpoint), examples, runtime))
runtime.close()
"""


def run_two(server, folder, checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["-c", WORKER, server.url, str(folder), str(len(RECORDS)), str(checkpoint)]
    processes = [start(arguments, rank, port) for rank in (0, 1)]
    return [finish(process) for process in processes]


def test_two_ranks_score_as_one_and_one_of_them_downloads(server, model, checkpoint):
    server.behaviours = [GOOD]
    examples = [hellaswag.render(record) for record in RECORDS]
    expected = str(hellaswag.evaluate(model, examples, ALONE))
    ends = run_two(server, hellaswag.FOLDER, checkpoint)
    assert [(status, out[-1]) for status, out, _ in ends] == [(0, expected)] * 2, ends
    assert server.requests == 1


def test_without_the_file_both_ranks_stop(server, checkpoint):
    server.behaviours = [answers(b"", 404)]
    ends = run_two(server, hellaswag.FOLDER, checkpoint)
    assert [status for status, _, _ in ends] == [1, 1]
    assert "HTTP Error 404" in ends[0][2][-1] and "another rank" in ends[1][2][-1]
    assert server.requests == 1 and not hellaswag.FOLDER.exists()


def test_importing_is_light_and_does_nothing():
    code = "import sys, hellaswag; print(sorted({m.split('.')[0] for m in sys.modules}))"
    _, [loaded], _ = finish(start(["-c", code]))
    for name in ("transformers", "datasets", "requests", "train_gpt2", "tiktoken"):
        assert f"'{name}'" not in loaded


# --------------------------------------------------------------------------------------------------
# The command


def test_the_command(model, folder, checkpoint, tmp_path):
    script = str(ROOT / "hellaswag.py")
    data = ["--data", str(FILE), "--device", "cpu"]
    runs = [
        # A folder with the name of a published model, in the working folder, wins over it.
        start([script, "--model", "gpt2", *data, "--show", "2"], cwd=folder.parent),
        start([script, "--model", str(checkpoint), *data, "--limit", "9", "--harness"]),
        start([script, "--model", str(checkpoint), "--data", str(tmp_path / "absent.jsonl")]),
    ]
    ends = [finish(run) for run in runs]

    examples = [hellaswag.render(record) for record in RECORDS]
    scores = hellaswag.evaluate(model, examples, ALONE)
    errors = []
    for share in (scores.acc, scores.acc_norm):
        hits = torch.arange(len(RECORDS)) < round(share * len(RECORDS))
        errors.append(hits.double().std().item() / len(RECORDS) ** 0.5)
    status, out, err = ends[0]
    line = f"{scores}, standard error {errors[0]:.4f} {errors[1]:.4f}"
    assert (status, out[-1]) == (0, f"{line}; published acc 0.2859 acc_norm 0.2955"), ends[0]
    assert "100%" in err[-1] and f"acc {scores.acc:.4f}" in err[-1]  # the bar, with the score
    assert out.count("---") == 2
    [(shown, sums)] = by_batches(model, examples[:1], 1)
    assert out[2] == " " + RECORDS[0]["ctx"]
    for i, ending in enumerate(RECORDS[0]["endings"]):
        head, tail = out[4 + i].split(") ")
        assert tail == ending
        loss = float(head.removeprefix(f"{i} (loss: "))
        assert loss == pytest.approx(-sums[i] / shown.lengths[i], abs=2e-4)
    assert out[8].endswith("actual: 0")

    examples = [hellaswag.render(record, harness=True) for record in RECORDS[:9]]
    status, out, _ = ends[1]
    scores = hellaswag.evaluate(model, examples, ALONE)
    assert status == 0 and len(out) == 1 and out[0].startswith(f"{scores}, standard error")

    status, out, err = ends[2]
    assert status == 2 and out == [] and len(err) == 1 and "absent.jsonl" in err[0]


@pytest.mark.parametrize("flags", [["--limit", "0"], ["--batch_size", "0"], ["--show", "-1"]])
def test_bad_numbers_are_named(flags):
    with pytest.raises(UserError, match=f"^{flags[0]} {flags[1]}: "):
        hellaswag.main(flags)


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("size, hint", [("128", "--batch_size 64"), ("1", "--device cpu")])
def test_the_command_has_no_tf32_and_one_line_if_memory_is_short(
    size, hint, checkpoint, monkeypatch, matmul_precision
):
    def evaluate(*_, **__):
        assert matmul_precision() == "highest"
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2.00 GiB")

    monkeypatch.setattr(hellaswag, "evaluate", evaluate)
    flags = ["--model", str(checkpoint), "--data", str(FILE), "--device", "cpu"]
    with pytest.raises(UserError, match=f"^out of memory; try {hint}$"):
        hellaswag.main([*flags, "--batch_size", size])
