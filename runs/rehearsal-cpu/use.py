"""Use what the rehearsal trained, and compare our figures with transformers' and lm-eval's.

    python runs/rehearsal-cpu/use.py      # after rehearse.py, in its clone

It exports log/ for transformers and measures the loss on the validation shard with both. If lm-eval
is installed (pip install lm-eval==0.4.13 accelerate), it also scores the first 1,000 records of the
stand-in for HellaSwag with the harness itself and with hellaswag.py.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import export
import hellaswag
import train_gpt2
from support import shards

RECORDS = 1000


def compare_losses(model, theirs, runtime) -> None:
    """Print the perplexity of the whole validation shard, ours and transformers'."""
    config = train_gpt2.TrainConfig(seq_len=model.config.seq_len)
    _, val_shards = shards.open_data("edu_fineweb10B", config.seq_len)
    loader = train_gpt2.DataLoaderLite(val_shards, config.seq_len, None)
    values = train_gpt2.validate(model, loader, config, runtime)
    ours = values["loss"]
    total = 0.0
    with torch.no_grad():
        for i in range(loader.epoch_sequences):
            row = loader.sequences([i])
            logits = theirs(row[:, :-1]).logits[0]
            total += F.cross_entropy(logits, row[0, 1:]).item()
    mean = total / loader.epoch_sequences
    tokens = loader.epoch_sequences * config.seq_len
    bits = values["bits_per_byte"]
    print(f"{tokens:,} tokens of the validation shard: loss {ours:.6f}, {bits:.4f} bits per byte")
    print(f"perplexity {math.exp(ours):.4f}, transformers' {math.exp(mean):.4f}", end=", ")
    print(f"relative difference {math.exp(ours - mean) - 1:.1e}")


def compare_scores(model, theirs, tokenizer) -> None:
    """Print the scores of RECORDS records, ours with --harness and lm-eval's own."""
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM

    file = hellaswag.path_of("val")
    examples = hellaswag.read_examples(file, harness=True)[:RECORDS]
    ours = hellaswag.Scores(*map(float, hellaswag.count_right(model, examples)))
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
    runtime = train_gpt2.Runtime("cpu", "float32")
    model = train_gpt2.GPT.from_pretrained("log")
    export.main(["log", "exported"])
    theirs = transformers.GPT2LMHeadModel.from_pretrained("exported").eval()
    compare_losses(model, theirs, runtime)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        return print("lm-eval is not installed: pip install lm-eval==0.4.13 accelerate")
    tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
    compare_scores(model, theirs, tokenizer)


if __name__ == "__main__":
    main()
