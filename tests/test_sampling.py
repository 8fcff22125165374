"""Sampling: cached keys and values change nothing but the time, and training notices nothing."""

import pytest
import torch
from helpers import their_model

import support.shards as fineweb
from train_gpt2 import GPT, GPTConfig, generate


@pytest.fixture(scope="module")
def model():
    """A network with strong opinions, so that one wrong key or position shows in its tokens."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(seq_len=16, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@torch.no_grad()
def plain_loop(model, prompt, max_new_tokens, samples, seed, top_k=50):
    """The lecture's way: the whole window goes through the model for every new token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(prompt).repeat(samples, 1)
    for _ in range(max_new_tokens):
        logits = model(tokens[:, -16:])[:, -1, : fineweb.VOCAB_SIZE]
        values, ids = logits.topk(top_k)
        choice = torch.multinomial(values.softmax(dim=1), 1, generator=generator)
        tokens = torch.cat([tokens, ids.gather(1, choice)], dim=1)
    return tokens


@pytest.mark.parametrize("prompt_tokens", [1, 5, 15, 16, 17, 40])
def test_cached_and_uncached_tokens_are_the_same(model, prompt_tokens):
    """For prompts of any length, below and above the context, and on over its end."""
    prompt = list(range(100, 100 + prompt_tokens))
    cached = generate(model, prompt, 30, samples=3, seed=7)
    assert torch.equal(cached, plain_loop(model, prompt, 30, samples=3, seed=7))
    assert cached.shape == (3, prompt_tokens + 30)
    assert (cached[:, :prompt_tokens] == torch.tensor(prompt)).all()
    assert len({tuple(row) for row in cached.tolist()}) == 3  # samples are no copies of each other


def test_a_long_prompt_is_cropped_to_the_context(model):
    """Only the last `seq_len` tokens count."""
    long = generate(model, [9] * 50 + list(range(16)), 20, samples=2)
    short = generate(model, list(range(16)), 20, samples=2)
    assert torch.equal(long[:, 66:], short[:, 16:])


def test_seeds(model):
    """The same seed gives the same tokens, another seed others."""
    first, again, other = (generate(model, [1], 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_padded_ids_are_never_drawn():
    """Where the padding's logits are the highest by far, still only text comes out."""
    model = GPT(GPTConfig(seq_len=8, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[50257:] = 100.0
    for top_k in (1, 50, 60_000):
        tokens = generate(model, [50256], 30, top_k=top_k)
        assert tokens.max() < 50257
        for row in tokens.tolist():
            fineweb.gpt2_tokenizer().decode(row)


def test_only_the_top_k_are_drawn(model):
    """Every token drawn is among the k likeliest of a full pass over what stands before it."""
    tokens = generate(model, [5, 6], 12, samples=4, top_k=3)
    drawn = set()
    with torch.no_grad():
        logits = model(tokens[:, :-1])[..., :50257]
    for t in range(2, tokens.size(1)):
        likeliest = logits[:, t - 1].argsort(dim=1, descending=True)[:, :3]
        places = (likeliest == tokens[:, t : t + 1]).nonzero()
        assert len(places) == 4
        drawn |= set(places[:, 1].tolist())
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("training", [True, False])
def test_training_notices_nothing(model, training):
    """Neither torch's random numbers, nor the mode, nor gradients and weights change."""
    model.train(training)
    random = torch.get_rng_state()
    weights = [p.clone() for p in model.parameters()]
    tokens = generate(model, [1, 2, 3], 20)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training is training
    assert torch.is_grad_enabled() and not tokens.requires_grad
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(p.grad is None for p in model.parameters())


def test_top_1_is_transformers_greedy(tmp_path):
    """top_k 1 continues as `GPT2LMHeadModel.generate(do_sample=False)` does."""
    theirs = their_model(n_positions=32, n_embd=32, n_layer=2, n_head=4, eos_token_id=None)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    prompt = torch.tensor([[15496, 11, 314, 1101]])
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=28, do_sample=False
    )
    assert expected.size(1) == 32
    assert generate(ours, prompt[0].tolist(), 28, samples=1, top_k=1).tolist() == expected.tolist()
