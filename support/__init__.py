"""The plumbing: what the tutorial needs, but does not teach.

command      flags, settings, signals, and errors that are one line
files        files that are written whole or not at all, folders with one owner
texts        documents on disk, in any encoding
shards       the tokenizer, and shards of tokens
machine      what a machine can do, and what fits its memory
log          what a run records and prints
report       what it came to: its last lines, and report.md
checkpoint   checkpoints, and how a run continues from one
published    models in transformers' format, both ways
muon         an optimizer beyond the lecture

None of these imports train_gpt2.py: the commands do.
"""
