"""Write a model as a folder for transformers: the weights, and GPT-2's tokenizer.

    python export.py log my-gpt2        # the newest checkpoint of the run in log/ (or: log/best)

Then, with no need of this project:

    from transformers import pipeline
    pipeline("text-generation", "my-gpt2")("Once upon a time")
"""

from support import published
from support.command import OneLineParser, run_command, say
from train_gpt2 import GPT


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser("export.py", __doc__)
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="an OUT_DIR, OUT_DIR/best, a checkpoint, a published name",
    )
    add("folder", metavar="FOLDER", help="the folder to write; it must be new or empty")
    args = parser.parse_args(argv)
    published.write(args.folder, GPT.from_pretrained(args.model))
    say(f'wrote {args.folder}; try: pipeline("text-generation", "{args.folder}")("Once")')


if __name__ == "__main__":
    run_command("export.py", main)
