"""The network and the published weights, against transformers' GPT-2."""

import numpy as np
import pytest
import torch
import transformers
from helpers import in_their_layout, their_model

import train_gpt2
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig


def batch(vocab_size, sequences, length):
    torch.manual_seed(5)
    tokens = torch.randint(vocab_size, (sequences, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("dtype, relative", [(None, 1e-5), (torch.bfloat16, 0.03)])
def test_loss_and_every_gradient_are_theirs(tmp_path, dtype, relative):
    """Promise 1: same weights, same batch: loss and gradients equal to 1e-5 relative.

    Under autocast they lose bfloat16's precision and no more.
    """
    theirs = their_model(n_positions=250, n_embd=24, n_layer=3, n_head=2)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    x, y = batch(50257, 2, 250)
    their_loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    their_loss.backward()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = ours(x, y)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(their_loss.item(), rel=relative)
    gradients = in_their_layout(theirs, {name: p.grad for name, p in ours.named_parameters()})
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        error = (gradients[name] - p.grad).norm() / p.grad.norm()
        assert error < relative, name


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
    loss = model(*batch(1000, 4, 64)).item()
    assert loss == pytest.approx(np.log(1000), abs=0.2)  # an untrained network knows nothing


@pytest.mark.parametrize("changes", [dict(scale_attn_by_inverse_layer_idx=True), dict(n_layer=3)])
def test_another_network_is_not_taken_for_gpt2(tmp_path, changes):
    """What this file does not compute, or has not all weights for, is refused and not guessed."""
    theirs = their_model(n_positions=8, n_embd=8, n_layer=2, n_head=1)
    theirs.save_pretrained(tmp_path)
    theirs.config.update(changes)
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(train_gpt2.UserError, match=str(tmp_path)) as error:
        GPT.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)
