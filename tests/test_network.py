"""The network and the published weights, against transformers' GPT-2."""

import numpy as np
import pytest
import torch
import transformers
from helpers import in_their_layout, their_model

import train_gpt2
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig

# name -> sizes, and the batch: (sequences, tokens of each)
SIZES = {
    "full context": (
        dict(vocab_size=50257, n_positions=16, n_embd=32, n_layer=2, n_head=4),
        (3, 16),
    ),
    "a longer batch": (
        dict(vocab_size=50257, n_positions=300, n_embd=24, n_layer=3, n_head=2),
        (2, 250),
    ),
}


def batch(sizes, shape):
    torch.manual_seed(5)
    tokens = torch.randint(sizes["vocab_size"], (shape[0], shape[1] + 1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture
def pair(request, tmp_path):
    """transformers' model and ours with its weights, and a batch for both."""
    sizes, shape = SIZES[request.param]
    theirs = their_model(**sizes)
    theirs.save_pretrained(tmp_path)
    return theirs, GPT.from_pretrained(str(tmp_path)), *batch(sizes, shape)


def assert_same_step(theirs, our_loss, ours, x, y, relative):
    loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    loss.backward()
    our_loss.backward()
    assert our_loss.dtype == torch.float32
    assert our_loss.item() == pytest.approx(loss.item(), rel=relative)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    gradients = in_their_layout(theirs, gradients)
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        error = (gradients[name] - p.grad).norm() / p.grad.norm()
        assert error < relative, name


@pytest.mark.parametrize("pair", SIZES, indirect=True)
def test_loss_and_every_gradient_are_theirs(pair):
    """Promise 1: same weights, same batch: loss and gradients equal to 1e-5 relative."""
    theirs, ours, x, y = pair
    assert_same_step(theirs, ours(x, y), ours, x, y, 1e-5)


@pytest.mark.parametrize("pair", list(SIZES)[:1], indirect=True)
def test_what_is_compiled_has_the_same_loss_and_gradients(pair):
    """Promise 1 for the compiled model; torch.compile's front end runs, no compiler is needed."""
    theirs, ours, x, y = pair
    ours.compile(backend="eager")
    assert_same_step(theirs, ours(x, y), ours, x, y, 1e-5)


@pytest.mark.parametrize("pair", list(SIZES)[1:2], indirect=True)
def test_gradients_under_bf16_autocast_are_near(pair):
    """Under autocast the loss loses bfloat16's precision and no more."""
    theirs, ours, x, y = pair
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(x, y)
    assert_same_step(theirs, loss, ours, x, y, 0.03)


@pytest.mark.parametrize("pair", list(SIZES)[:1], indirect=True)
def test_gradients_accumulate(pair):
    """Two backward passes add up; a loss that is halved has half the gradient."""
    _, ours, x, y = pair
    (ours(x, y) / 2).backward()
    half = [p.grad.clone() for p in ours.parameters()]
    (ours(x, y) / 2).backward()
    for p, h in zip(ours.parameters(), half, strict=True):
        torch.testing.assert_close(p.grad, 2 * h)


def test_published_parameter_counts():
    """124,439,808 parameters, and transformers' counts for the larger three, padding apart."""
    published = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168}
    published |= {"gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    for name, count in published.items():
        config = TrainConfig(**PRESETS[name])
        sizes = dict(seq_len=1024, n_layer=config.n_layer, n_head=config.n_head)
        sizes["n_embd"] = config.n_embd
        with torch.device("meta"):
            model = GPT(GPTConfig(vocab_size=50257, **sizes))
            sizes["n_positions"] = sizes.pop("seq_len")
            theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        assert sum(p.numel() for p in model.parameters()) == count == theirs.num_parameters()
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        expected = in_their_layout(theirs, theirs.state_dict())
        assert shapes == {name: tuple(t.shape) for name, t in expected.items()}
    with torch.device("meta"):
        padded = GPT(GPTConfig())
    assert padded.lm_head.weight is padded.transformer.wte.weight
    assert sum(p.numel() for p in padded.parameters()) == published["gpt2"] + 47 * 768


def test_first_weights():
    """Standard deviation 0.02, of c_proj 0.02 / sqrt(2 L); biases 0, gains 1; by the seed alone."""
    config = GPTConfig(seq_len=256, vocab_size=1000, n_layer=8, n_head=2, n_embd=128)
    torch.manual_seed(1)
    model = GPT(config)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert (p == (1 if "ln_" in name and name.endswith("weight") else 0)).all(), name
        else:
            expected = 0.005 if "c_proj" in name else 0.02  # 0.02 / sqrt(2 * 8)
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(p.mean().item()) < 0.05 * expected, name
    torch.manual_seed(1)
    same = GPT(config)
    assert all(map(torch.equal, model.parameters(), same.parameters()))
    loss = model(*batch(dict(vocab_size=1000), (4, 64))).item()
    assert loss == pytest.approx(np.log(1000), abs=0.2)  # an untrained network knows nothing


def spoil_config(folder, **changes):
    config = transformers.GPT2Config.from_pretrained(folder)
    config.update(changes)
    config.save_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        dict(scale_attn_by_inverse_layer_idx=True),
        dict(n_inner=40),
        dict(n_layer=3),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_network_is_not_taken_for_gpt2(tmp_path, changes):
    """What this file does not compute, or has not all weights for, is refused and not guessed."""
    sizes = dict(vocab_size=50257, n_positions=8, n_embd=8, n_layer=2, n_head=1)
    theirs = their_model(**sizes, **({} if "n_layer" in changes else changes))
    theirs.save_pretrained(tmp_path)
    spoil_config(tmp_path, **changes)
    with pytest.raises(train_gpt2.UserError, match=str(tmp_path)) as error:
        GPT.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)
