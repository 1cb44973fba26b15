"""The tokenizer without Java against what the Java program answers."""

import json
import random
import shutil
from pathlib import Path

import pytest

from mmgem_jax.evaluation.caption_scores import tokenize_with_jar
from mmgem_jax.evaluation.ptb import PUNCTUATION, tokenize

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ptb.json").read_text())


def differences(captions, expected):
    """[caption, expected, found] of every caption that comes out otherwise."""
    rows = zip(captions, expected, tokenize(captions), strict=True)
    return [row for row in rows if row[1] != row[2]]


def test_every_golden_caption_gives_the_tokens_of_the_java_program():
    captions, tokens = zip(*GOLDEN, strict=True)
    assert len(captions) > 1500
    assert not differences(captions, tokens)


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("You cannot, and you\u2019re gonna!", "you can not and you 're gon na"),
        ("A train (red) [no. 7]", "a train -lrb- red -rrb- -lsb- no. 7 -rsb-"),
        ("What?! Wait... 'no' -- “yes”", "what ?! wait no yes"),
        ("Mr. Smith, U.S. Army, 10 p.m.", "mr. smith u.s. army 10 p.m."),
        ("1 1/2 or ½ a pie: $5.99, 50%", "1\u00a01/2 or 1/2 a pie $ 5.99 50 %"),
        ("a black/white T-shirt, 6'2\"", "a black/white t-shirt 6 2"),
        ("see www.example.com or #tag me@a.com 😀", "see www.example.com or #tag me@a.com"),
        ("a grey colour, a café", "a grey colour a café"),
        (" \t\u00a0", ""),
    ],
)
def test_by_example(caption, tokens):
    assert tokenize([caption]) == [tokens.split(" ") if tokens else []]


def test_no_captions_are_no_lists():
    assert tokenize([]) == []
    assert tokenize(["", "a", ""]) == [[], ["a"], []]


def test_the_next_caption_decides_on_a_letter_and_its_period():
    assert tokenize(["at gate B.", "a bus"])[0] == ["at", "gate", "b."]
    assert tokenize(["at gate B.", "The bus"])[0] == ["at", "gate", "b"]


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r", "\v", "\f", "\x85", "\u2028", "\u2029"])
def test_a_line_break_is_a_space(line_break):
    assert tokenize([f"a{line_break}b", "c"]) == [["a", "b"], ["c"]]


def test_any_text_gives_words_in_lower_case():
    generator = random.Random(0)
    alphabet = [chr(code) for code in range(0x250)] + list("\u2019\u201c\u2026\u4e00\ufe0f😀")
    captions = ["".join(generator.choices(alphabet, k=30)) for _ in range(300)]
    lists = tokenize(captions)
    assert len(lists) == len(captions)
    for token in (token for tokens in lists for token in tokens):
        assert token and token == token.lower() and token not in PUNCTUATION
        assert not set(token) & set(" \t\n\r")


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_random_captions_agree_with_the_java_program():
    pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="needs the extra `caption`")
    generator = random.Random(0)
    pieces = sorted({piece for caption, _ in GOLDEN[:900] for piece in caption.split(" ")})
    captions = [" ".join(generator.choices(pieces, k=12)) for _ in range(2000)]
    assert not differences(captions, tokenize_with_jar(captions))
