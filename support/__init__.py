"""What the tutorial's reader did not come for.

command      flags, settings, and errors that are one line
files        files that are whole or absent
shards       the tokenizer, and shards of tokens
machine      what a machine can do, and what fits its memory
checkpoint   what a run leaves behind, and how it continues

Imports go down only: the commands import train_gpt2.py, and that imports these.
"""
