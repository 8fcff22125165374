"""The order of the data, a pure function of (seed, step), and what the steps of a run are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_shards, some_tokens, write_bin

import fineweb
import train_gpt2
from train_gpt2 import DataLoaderLite, TrainConfig, UserError, step_starts

T = 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of consecutive numbers, so that a token tells where it stood; with tails."""
    folder = tmp_path_factory.mktemp("numbers")
    np.save(folder / "a_train_0.npy", np.arange(0, 7 * T + 1 + 5, dtype=np.uint16))  # 7 and 5 over
    write_bin(folder / "a_train_1.bin", np.arange(1000, 1000 + 4 * T + 1))  # 4 and nothing over
    np.save(folder / "a_train_2.npy", np.arange(2000, 2000 + 6 * T, dtype=np.uint16))  # 5, T - 1
    return [fineweb.open_shard(path) for path in fineweb.list_shards(folder, "train")]


ALL = sorted([i * T for i in range(7)] + [1000 + i * T for i in range(4)])
ALL += [2000 + i * T for i in range(5)]  # where every sequence of `shards` begins


def machine(rank=0, world=1):
    return SimpleNamespace(rank=rank, world=world, kind="cpu", device=torch.device("cpu"))


def test_every_sequence_once_an_epoch(shards):
    """Promise 4: all but tails shorter than a sequence, once an epoch, in an order of its own."""
    loader = DataLoaderLite(shards, T, seed=1)
    assert loader.epoch_sequences == len(ALL) == 16
    rows = loader.sequences(0, 3 * 16)
    assert (np.diff(rows, axis=1) == 1).all()  # T + 1 neighbours of one shard
    epochs = rows[:, 0].reshape(3, 16).tolist()
    assert [sorted(epoch) for epoch in epochs] == [ALL] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != ALL
    inside = [[i for i in epoch if i < 1000] for epoch in epochs]
    assert inside[0] != inside[1] != inside[2]  # not only the shards change places


def test_order_is_the_seeds_and_needs_no_past(shards):
    """The same seed gives the same order, another seed another one; any place can be asked for."""
    rows = DataLoaderLite(shards, T, seed=1).sequences(0, 40)
    again = DataLoaderLite(shards, T, seed=1)
    for first, count in ((33, 7), (0, 5), (14, 4), (5, 28)):
        assert (again.sequences(first, count) == rows[first : first + count]).all()
    other = DataLoaderLite(shards, T, seed=2).sequences(0, 16)
    assert sorted(other[:, 0]) == ALL
    assert (other != rows[:16]).any()


def test_validation_is_read_as_it_stands(shards):
    """Without a seed the sequences come in the order of the shards."""
    assert DataLoaderLite(shards, T, seed=None).sequences(0, 16)[:, 0].tolist() == ALL


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
@pytest.mark.parametrize("world", [1, 2])
def test_batches_for_any_number_of_processes(shards, micro_batch, world):
    """Promise 3: the same sequences in each step, two epochs long, each by one process; y = x + 1.

    The steps are asked for as in a run, and once more out of order, as after resuming.
    """
    if world * micro_batch > 8:
        pytest.skip("more than the batch")
    starts = np.arange(0, 33, 8)
    expected = DataLoaderLite(shards, T, seed=3).sequences(0, 32).reshape(4, 8, T + 1)
    for order in (range(4), (2, 3, 0)):
        loaders = [DataLoaderLite(shards, T, seed=3) for _ in range(world)]
        for step in order:
            seen = []
            for rank, loader in enumerate(loaders):
                x, y = loader.batch(starts, step, micro_batch, machine(rank, world))
                assert x.shape == y.shape == (8 // world // micro_batch, micro_batch, T)
                assert x.dtype == torch.int64 and torch.equal(y, x + 1)
                seen += x.reshape(-1, T).tolist()
            assert sorted(seen) == sorted(expected[step, :, :-1].tolist())


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 16, 48])
@pytest.mark.parametrize("world", [1, 2])
def test_a_growing_batch_is_whole_on_every_process(shards, micro_batch, world):
    """While the batch grows by doublings, no sequence is left out and all have as many turns."""
    sizes = np.array([3, 6, 12, 24, 48]) * world
    starts = np.cumsum([0, *sizes])
    for step, size in enumerate(sizes):
        expected = DataLoaderLite(shards, T, 3).sequences(starts[step], size)[:, :-1].tolist()
        seen, turns = [], set()
        for rank in range(world):
            loader = DataLoaderLite(shards, T, seed=3)
            x, _ = loader.batch(starts, step, micro_batch, machine(rank, world))
            assert x.size(1) <= micro_batch
            turns.add(len(x))
            seen += x.reshape(-1, T).tolist()
        assert len(turns) == 1
        assert sorted(seen) == sorted(expected)


def test_a_shard_without_one_sequence_is_no_gap(shards):
    """A tail that fineweb.py may leave, shorter than a sequence, is passed over."""
    loader = DataLoaderLite([np.zeros(T, np.uint16), *shards], T, seed=1)
    assert sorted(loader.sequences(0, 16)[:, 0]) == ALL


def test_bad_tokens_are_named_when_they_are_met(tmp_path):
    """An id that GPT-2 does not have, and a file cut short during the run, name the shard."""
    tokens = some_tokens(10 * T + 1, 1)
    tokens[100] = 50257
    np.save(tmp_path / "b_train_0.npy", tokens)
    loader = DataLoaderLite([fineweb.open_shard(tmp_path / "b_train_0.npy")], T, None)
    assert (loader.sequences(0, 6) == [tokens[i * T : (i + 1) * T + 1] for i in range(6)]).all()
    with pytest.raises(UserError, match="b_train_0.npy holds id 50257 at token 100,"):
        loader.sequences(6, 1)
    np.save(tmp_path / "c_train_0.npy", some_tokens(20_000, 1))
    loader = DataLoaderLite([fineweb.open_shard(tmp_path / "c_train_0.npy")], T, None)
    (tmp_path / "c_train_0.npy").open("r+").truncate(1000)
    with pytest.raises(UserError, match="c_train_0.npy"):
        loader.sequences(1000, 1)


def test_both_formats_and_splits(tmp_path):
    """A folder's .npy and .bin shards hold what was written, and the split is in the name."""
    folder = make_shards(tmp_path / "shards")
    train, val = train_gpt2.open_data(str(folder), None)
    assert [shard.tolist() for shard in train] == [
        some_tokens(20 * 16 + 10, 1).tolist(),
        some_tokens(30 * 16 + 1, 2).tolist(),
    ]
    assert [shard.tolist() for shard in val] == [some_tokens(13 * 16 + 16, 3).tolist()]
    assert all(isinstance(shard, np.memmap) for shard in train + val)  # only the batch is read


def test_the_last_tenth_of_a_text_is_validation(tmp_path):
    """Both parts together are the text, and not a character is in both."""
    text = "".join(f"Line {i}, naïve café.\n" for i in range(1000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    (train,), (val,) = train_gpt2.open_data(str(tmp_path / "text.txt"), None)
    first, last = (fineweb.gpt2_tokenizer().decode(part.tolist()) for part in (train, val))
    assert first + last == text
    assert len(last) == pytest.approx(0.1 * len(text), abs=1)


def test_steps_of_epochs():
    """A run ends with the last whole batch of its epochs, whatever part of one; or by max_steps."""
    config = dict(seq_len=10, batch_tokens=40)  # 4 sequences a step

    def starts(**changes):
        return step_starts(TrainConfig(**config, **changes), 18).tolist()

    assert starts() == [0, 4, 8, 12, 16]
    assert starts(epochs=2) == list(range(0, 37, 4))
    assert starts(epochs=0.5) == [0, 4, 8]
    assert starts(max_steps=3) == [0, 4, 8, 12]
    assert starts(max_steps=6, epochs=0.5) == [0, 4, 8, 12, 16, 20, 24]


def test_the_batch_grows_by_doublings():
    """--batch_ramp_tokens, by hand: a line from 1/16 to 1 over 960 tokens, rounded down.

    Batch 160 tokens, 16 sequences of 10. At n tokens the line is at 1/16 + 15/16 n / 960 of 160,
    which is 10 + 5 n / 32 tokens: 20 from n = 64 on, 40 from 192, 80 from 448, 160 from 960.
    """
    config = TrainConfig(seq_len=10, batch_tokens=160, batch_ramp_tokens=960, max_steps=30)
    sizes = (np.diff(step_starts(config, 10_000)) * 10).tolist()
    # 7 x 10 end at 70; 7 x 20 at 210; 6 x 40 at 450; 7 x 80 at 1010; then whole ones.
    assert sizes == [10] * 7 + [20] * 7 + [40] * 6 + [80] * 7 + [160] * 3
    every = dict(seq_len=10, batch_tokens=160)
    assert (np.diff(step_starts(TrainConfig(**every, max_steps=5), 10_000)) == 16).all()
