"""The losses of fixed runs, as the first edition of this project computed them in float32.

Sizes, batch and seed are on the command line, so no preset and no default can change them. They are
the safety net under every change of the code: the same batches and the same arithmetic.
"""

import json
import shlex

import numpy as np
import pytest
from helpers import ROOT, TINY, losses, make_shards, records, train

FIXED = json.loads((ROOT / "tests" / "fixed_losses.json").read_text())
TEXT = shlex.split(
    "--preset demo --n_layer 2 --n_head 2 --n_embd 32 --seq_len 32 --batch_tokens 1024"
    " --micro_batch 8 --max_steps 12 --learning_rate 4e-3 --warmup_tokens 3072 --min_lr_ratio 0.1"
    " --optimizer adamw --weight_decay 0.1 --grad_clip 1.0 --seed 1337 --dtype float32"
    " --device cpu --no-compile --val_every 6 --val_tokens 2048 --sample_every 0"
)
SHARDS = [*TINY, "--data", "shards", "--max_steps", 14, "--learning_rate", 3e-3, "--seed", 5]
SHARDS += ["--warmup_tokens", 1280, "--weight_decay", 0.3, "--grad_clip", 0.5, "--micro_batch", 2]
SHARDS += ["--val_every", 7, "--val_tokens", 200]
RUNS = {"text": TEXT, "shards": SHARDS, "muon": [*SHARDS, "--optimizer", "muon"]}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_first_editions(name, tmp_path):
    make_shards(tmp_path / "shards")
    train(tmp_path, "log", *RUNS[name])
    folder, fixed = tmp_path / "log", FIXED[name]
    norms = [record["grad_norm"] for record in records(folder, "train")]
    tolerance = 1e-3 if name == "muon" else 1e-5  # of Muon, in bfloat16
    np.testing.assert_allclose(losses(folder), fixed["train"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(losses(folder, "val"), fixed["val"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(norms, fixed["grad_norm"], rtol=max(1e-3, 5 * tolerance))
