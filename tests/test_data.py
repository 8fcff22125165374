"""The order of the data, a pure function of (seed, step), and what the steps of a run are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import write_bin

from support.shards import decode, list_shards, open_data, open_shard
from train_gpt2 import DataLoaderLite, TrainConfig, count_steps

T = 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four shards of consecutive numbers, so that a token tells where it stood; with tails."""
    folder = tmp_path_factory.mktemp("numbers")
    np.save(folder / "a_train_0.npy", np.arange(0, 7 * T + 1 + 5, dtype=np.uint16))  # 7 and 5 over
    write_bin(folder / "a_train_1.bin", np.arange(1000, 1000 + 4 * T + 1))  # 4 and nothing over
    np.save(folder / "a_train_2.npy", np.arange(2000, 2000 + 6 * T, dtype=np.uint16))  # 5, T - 1
    np.save(folder / "a_train_3.npy", np.arange(3000, 3000 + T, dtype=np.uint16))  # 0, T
    opened = [open_shard(path) for path in list_shards(folder, "train")]
    assert all(isinstance(shard, np.memmap) for shard in opened)  # only the batch is read
    return opened


ALL = sorted([i * T for i in range(7)] + [1000 + i * T for i in range(4)])
ALL += [2000 + i * T for i in range(5)]  # where every sequence of `shards` begins


def test_every_sequence_once_an_epoch(shards):
    """Promise 4: all but tails shorter than a sequence, once an epoch, in an order of its own."""
    loader = DataLoaderLite(shards, T, seed=1)
    assert loader.epoch_sequences == len(ALL) == 16
    rows = loader.sequences(range(3 * 16))
    assert (np.diff(rows, axis=1) == 1).all()  # T + 1 neighbours of one shard
    epochs = rows[:, 0].reshape(3, 16).tolist()
    assert [sorted(epoch) for epoch in epochs] == [ALL] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != ALL
    inside = [[i for i in epoch if i < 1000] for epoch in epochs]
    assert inside[0] != inside[1] != inside[2]  # not only the shards change places
    assert (DataLoaderLite(shards, T, seed=2).sequences(range(16)) != rows[:16]).any()


@pytest.mark.parametrize("world, micro_batch", [(1, 8), (1, 2), (2, 4), (2, 1)])
def test_batches_for_any_number_of_processes(shards, world, micro_batch):
    """Promise 3: the same sequences in each step, two epochs long, each by one process; y = x + 1.

    The steps are asked for as in a run, and once more out of order, as after resuming.
    """
    config = TrainConfig(seq_len=T, batch_tokens=8 * T)
    expected = DataLoaderLite(shards, T, seed=3).sequences(range(32)).reshape(4, 8, T + 1)
    for order in (range(4), (2, 3, 0)):
        loaders = [DataLoaderLite(shards, T, seed=3) for _ in range(world)]
        for step in order:
            seen = []
            for rank, loader in enumerate(loaders):
                runtime = SimpleNamespace(rank=rank, world=world, micro_batch=micro_batch)
                batch = loader.batch(step, config, runtime)
                assert batch.shape == (8 // world // micro_batch, micro_batch, T + 1)
                assert batch.dtype == torch.int64
                assert torch.equal(batch[..., 1:], batch[..., :-1] + 1)
                seen += batch.reshape(-1, T + 1).tolist()
            assert sorted(seen) == sorted(expected[step].tolist())


def test_the_last_tenth_of_a_text_is_validation(tmp_path):
    """Both parts together are the text, and not a character is in both."""
    text = "".join(f"Line {i}, naïve café.\n" for i in range(1000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    (train,), (val,) = open_data(str(tmp_path / "text.txt"), 16)
    first, last = (decode(part.tolist()) for part in (train, val))
    assert first + last == text
    assert len(last) == pytest.approx(0.1 * len(text), abs=1)


def test_steps_of_epochs():
    """A run ends with the last whole batch of its epochs, or of a part of one; or by max_steps."""
    for steps, changes in (
        (4, dict()),
        (9, dict(epochs=2)),
        (2, dict(epochs=0.5)),
        (3, dict(max_steps=3)),
        (6, dict(max_steps=6, epochs=0.5)),
    ):
        config = TrainConfig(seq_len=10, batch_tokens=40, **changes)  # 4 sequences a step
        assert count_steps(config, 18) == steps
