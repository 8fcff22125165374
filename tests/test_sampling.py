"""Sampling: the lecture's loop against a plainer one, and what may be drawn."""

import pytest
import torch

from train_gpt2 import GPT, GPTConfig, generate


@pytest.fixture(scope="module")
def model():
    """A network with strong opinions, so that one wrong position shows in its tokens."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(seq_len=16, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("prompt_tokens", [1, 15, 16, 40])
def test_tokens_are_drawn_from_the_models_probabilities(model, prompt_tokens):
    """One row at a time, all probabilities, those of other tokens than the top 50 set to 0."""
    prompt = list(range(100, 100 + prompt_tokens))
    tokens = generate(model, prompt, 20, samples=3, temperature=0.7, seed=7)
    assert tokens.shape == (3, prompt_tokens + 20)
    assert len({tuple(row) for row in tokens.tolist()}) == 3  # samples are no copies of each other
    generator = torch.Generator().manual_seed(7)
    rows = torch.tensor([prompt] * 3)
    for _ in range(20):
        kept = []
        for row in rows:
            with torch.no_grad():
                p = model(row[None, -16:])[0, -1, :50257].double().div(0.7).softmax(0)
            likeliest = p.argsort(descending=True)[:50]
            kept.append((p[likeliest] / p[likeliest].sum(), likeliest))
        choice = torch.multinomial(
            torch.stack([p for p, _ in kept]).float(), 1, generator=generator
        )
        new = torch.stack([ids[c] for (_, ids), c in zip(kept, choice, strict=True)])
        rows = torch.cat([rows, new], dim=1)
    assert torch.equal(tokens, rows)


def test_padded_ids_are_never_drawn():
    """Where the padding's logits are the highest by far, still only text comes out."""
    model = GPT(GPTConfig(seq_len=8, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[50257:] = 100.0
    for top_k in (1, 60_000):
        tokens = generate(model, [50256], 30, top_k=top_k)
        assert tokens.max() < 50257
