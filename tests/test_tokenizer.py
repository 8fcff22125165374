"""The tokenizer: OpenAI's two files by their SHA-256, and transformers' tokenizer on any text."""

import hashlib
import json
import random

import pytest
from helpers import ROOT, their_tokenizer

from support.shards import END_OF_TEXT, encode, gpt2_tokenizer

# As published in tiktoken_ext/openai_public.py.
VOCAB_BPE = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_vocabulary_is_the_published_one():
    """Our ids, written as OpenAI wrote its encoder.json, are that file to the byte."""
    assert sha256((ROOT / "support/vocab.bpe").read_bytes()) == VOCAB_BPE
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable}
    character |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = gpt2_tokenizer()
    tokens = map(tokenizer.decode_single_token_bytes, range(END_OF_TEXT))
    names = ["".join(map(character.get, token)) for token in tokens] + ["<|endoftext|>"]
    vocabulary = {name: i for i, name in enumerate(names)}
    assert sha256(json.dumps(vocabulary).encode()) == ENCODER_JSON
    assert tokenizer.n_vocab == 50257 and tokenizer.eot_token == END_OF_TEXT == 50256


ODD = [
    "",
    " ",
    "don't  stop\r\n\tI'll 'S",
    "naïve café 漢字 😀👩‍👩‍👧 ʼn\u0300",
    "\x00\x1c\x85\xa0\u3000\u200b",
    "123 1234567 ½ ④",
    "a<|endoftext|>b<|endoftext|>",
]
ALPHABET = [*"ab Z9'!\n\t", "\r\n", "  ", "'s", "漢", "é", "\u0301", "\u00a0", "😀", "\x1c", "_"]


def test_any_text_is_tokenized_as_transformers_does():
    theirs = their_tokenizer()
    dice = random.Random(0)
    texts = ODD + ["".join(dice.choices(ALPHABET, k=dice.randrange(60))) for _ in range(500)]
    texts += [(ROOT / "input.txt").read_text()[:50_000]]
    for text in texts:
        expected = theirs._tokenizer.encode(text, add_special_tokens=False).ids
        assert encode(text, end_of_text=True).tolist() == expected, repr(text)
        assert gpt2_tokenizer().decode(expected) == text
    assert END_OF_TEXT not in encode("<|endoftext|>")


@pytest.mark.parametrize("gap", [" ", "\n", "\t \n", "\u3000"])
@pytest.mark.parametrize("rest", ["world", "", "!", "<|endoftext|>a"])
def test_a_million_spaces(gap, rest):
    """tiktoken#245: its own way overflows its stack at 1.1M; up to 200,000 it is the reference."""
    own = gpt2_tokenizer().encode
    for count in (2, 99_999, 100_000, 200_001):
        text = "hello" + gap * (count // len(gap)) + rest
        expected = own(text, allowed_special={"<|endoftext|>"})
        assert encode(text, end_of_text=True).tolist() == expected
    if (gap, rest) == (" ", "world"):
        assert len(encode("hello" + " " * 1_100_000 + "world")) == 1_100_001
    assert len(encode("hello" + gap * 1_100_000 + rest)) > 100_000
