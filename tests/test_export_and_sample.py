"""export.py and sample.py: what others load without this project, and text as it is drawn."""

import dataclasses

import pytest
import torch
from helpers import one_line, run, run_here, start
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from sample import show_as_drawn
from support import published, shards
from support.command import UserError
from train_gpt2 import GPT, GPTConfig, generate

PROMPT = "Hello, naïve  world"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """log/ with a checkpoint of a model with strong opinions, and its export in my-gpt2/."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(2)
    model = GPT(GPTConfig(seq_len=24, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    (folder / "log").mkdir()
    sizes, weights = dataclasses.asdict(model.config), model.state_dict()
    content = dict(step=7, network=sizes, settings=dict(prompt=PROMPT), model=weights, source="")
    torch.save(content, folder / "log/checkpoint_0000007.pt")
    done = run(folder, "log", "my-gpt2", script="export.py")
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.fixture
def model(folder):
    return GPT.from_pretrained(str(folder / "log"))


def greedy(model, count: int) -> str:
    tokens = generate(model, shards.encode_prompt(PROMPT), count, samples=1, top_k=1)
    return shards.decode(tokens[0].tolist())


def test_others_load_the_folder(folder, model):
    """Tokenizer, logits, and greedy text of `pipeline`, with the padded rows gone; and back."""
    path = str(folder / "my-gpt2")
    theirs = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert theirs.config.vocab_size == len(tokenizer) == 50257
    for text in (PROMPT, "a<|endoftext|>b", " 12  \n\n"):
        ids = shards.encode(text, end_of_text=True).tolist()
        assert tokenizer(text).input_ids == ids and tokenizer.decode(ids) == text
    back = GPT.from_pretrained(path)
    assert not (model.training or back.training), "dropout, if somebody adds it, is off"
    tokens = torch.randint(50257, (3, 24))
    with torch.no_grad():
        logits = model(tokens)[..., :50257]
        torch.testing.assert_close(theirs(tokens).logits, logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(back(tokens), logits, atol=1e-4, rtol=0)
    write = pipeline("text-generation", path)
    (text,) = write(PROMPT, do_sample=False)  # it ends where the context does
    assert text["generated_text"] == greedy(model, 24 - len(shards.encode_prompt(PROMPT)))
    one_line(run_here(folder, "log", "my-gpt2", script="export.py"), "my-gpt2 has files in it")


def test_a_changed_network_is_not_exported(tmp_path):
    """Its weights may have GPT-2's names and shapes, as with ReLU, or not, as with a new layer."""
    model = GPT(GPTConfig(seq_len=24, n_layer=1, n_head=2, n_embd=32))
    model.transformer.h[0].mlp.gelu = torch.nn.ReLU()
    with pytest.raises(UserError, match="not GPT-2's.*logits are off by"):
        published.write(tmp_path / "relu", model)
    model.transformer.h[0].mlp.gate = torch.nn.Linear(32, 128)
    with pytest.raises(UserError, match="not GPT-2's"):
        published.write(tmp_path / "gate", model)
    assert not list(tmp_path.iterdir())


def test_sample(folder, model):
    """The run's own prompt, from any kind of model, and beyond the context of 24 tokens."""
    flags = ["--temperature", 0, "--max_new_tokens", 40]
    for source in ("log", "my-gpt2"):  # test_eval_only has a file
        done = run_here(folder, "--model", source, "--prompt", PROMPT, *flags, script="sample.py")
        assert (done.returncode, done.stdout) == (0, greedy(model, 40) + "\n"), done.stderr
    done = run(folder, *flags[2:], "--samples", 3, "--seed", 5, script="sample.py")
    texts = done.stdout.removesuffix("\n").split("\n---\n")
    assert "train_gpt2.py has changed since the checkpoint" in done.stderr
    rows = generate(model, shards.encode_prompt(PROMPT), 40, samples=3, seed=5).tolist()
    assert texts == [shards.decode(row) for row in rows] and len(set(texts)) == 3
    done = run_here(folder, "--model", "nothing", script="sample.py")
    one_line(done, "nothing is not a checkpoint.* gpt2-xl")
    one_line(run_here(folder, "--top_k", 0, script="sample.py"), "--top_k 0: it must be at least 1")


def test_text_appears_as_it_is_drawn(folder):
    """The prompt and some text are there while thousands of tokens are still to come."""
    process = start(folder, "--max_new_tokens", 100_000, script="sample.py")
    try:
        assert process.stdout.readline() == "model: log/checkpoint_0000007.pt\n"
        assert "has changed" in process.stdout.readline()
        assert process.stdout.read(len(PROMPT) + 20).startswith(PROMPT)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_characters_of_several_tokens_are_whole(capsys):
    text = "漢字 😀 é \ufffd!"
    tokens = shards.encode(text).tolist()
    assert any(len(shards.decode([token]).strip("\ufffd")) == 0 for token in tokens)
    show = show_as_drawn()
    for token in tokens:
        show(torch.tensor([token]))
    assert capsys.readouterr().out == text
