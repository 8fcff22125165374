"""The network and the published weights, against transformers' GPT-2."""

import pytest
import torch
import transformers
from helpers import in_their_layout, their_model

from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig


@pytest.mark.parametrize("dtype, relative", [(None, 1e-5), (torch.bfloat16, 0.03)])
def test_loss_and_every_gradient_are_theirs(tmp_path, dtype, relative):
    """Promise 1: same weights, same batch: loss and gradients equal to 1e-5 relative.

    Under autocast they lose bfloat16's precision and no more.
    """
    theirs = their_model(n_positions=250, n_embd=24, n_layer=3, n_head=2)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    torch.manual_seed(5)
    tokens = torch.randint(50257, (2, 251))
    x, y = tokens[:, :-1], tokens[:, 1:]
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
