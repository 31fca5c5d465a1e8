"""Tokenization and the vocabulary."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.base.tokens import split_words
from vocabulary import END, SPECIAL_TOKENS, START, UNK, Vocabulary, tokenize

CAPTIONS = ["A dog runs.", "A dog sleeps!", "a cat", "The dog's ball"]


@pytest.mark.parametrize(
    "caption, words",
    [
        ("A dog.It runs", "a dog it runs"),
        ('a sign that says "stop"', "a sign that says stop"),
        ("a sign that says \u201cstop\u201d", "a sign that says stop"),
        ("a sign that says 'stop'", "a sign that says stop"),
        ("a sign that says \u2018stop\u2019", "a sign that says stop"),
        ("a dog--a big one", "a dog a big one"),
        ("a dog\u2014a big one", "a dog a big one"),
        ("a half-eaten t-shirt", "a half-eaten t-shirt"),
        ("a half\u2010eaten cake", "a half-eaten cake"),
        ("-a dog-", "a dog"),
        ("2 dogs and 10,000 cats", "2 dogs and 10 000 cats"),
        ("a 1960s car, no.7", "a 1960s car no 7"),
        ("a man's hat", "a man 's hat"),
        ("a man\u2019s hat", "a man 's hat"),
        ("two men's-room signs", "two men 's room signs"),
        ("the dogs' ball", "the dogs ball"),
        ("they don\u2019t", "they don't"),
        ("rock 'n' roll", "rock n roll"),
        ("a cafe\u0301", "a caf\u00e9"),
        ("CAF\u00c9 \u00d1and\u00fa", "caf\u00e9 \u00f1and\u00fa"),
        ("a dog_house", "a dog house"),
        ("a  dog\n\truns ", "a dog runs"),
        ("<start> a dog <end>", "start a dog end"),
        ("हिन्दी, i̇stanbul, naïve. собака", "हिन्दी i̇stanbul naïve собака"),
        ("... - ' \u2014\n", ""),
        ("一只狗，在草地上。", "一 只 狗 在 草 地 上"),
        ("犬がカーテンを見るT-シャツ2枚", "犬 が カ ー テ ン を 見 る t シ ャ ツ 2 枚"),
        ("สุนัขวิ่ง", "สุ นั ข วิ่ ง"),
        ("개가 달린다", "개가 달린다"),
        ("a 狗's ball", "a 狗 's ball"),
    ],
)
def test_punctuation(caption, words):
    """Words are lower case and contain inner hyphens and apostrophes; all else separates them."""
    assert " ".join(tokenize(caption)) == words


@pytest.mark.parametrize("text", ["a dog 's ball", "一只狗在草地上", "สุนัขวิ่ง", "t シャツ 2 枚", ""])
def test_spaces_of_decoded_captions(text):
    """Decoded words are joined as their script is written, and can be split again."""
    vocab = Vocabulary.build([text, "a cat"], threshold=1)
    assert vocab.decode(vocab.encode(text)) == text
    assert split_words(text) == tokenize(text)


def test_captions_of_one_word():
    """Captions of which none has two words are reported: their words are not separated."""
    with pytest.warns(UserWarning, match="2 captions.*'adog'.*spaces"):
        Vocabulary.build(["adog", "acat"], threshold=1)


@given(st.text())
def test_any_text(caption):
    """The words of any text are lower case, without spaces, and none is a special token.

    They do not depend on whether accents are composed, and, joined, have the same words again.
    """
    words = tokenize(caption)
    for word in words:
        assert word == word.lower() != "" and word not in SPECIAL_TOKENS
        assert not any(letter.isspace() for letter in word)
    assert tokenize(" ".join(words)) == words
    composed, decomposed = (unicodedata.normalize(form, caption) for form in ("NFC", "NFD"))
    assert tokenize(composed) == tokenize(decomposed)


@given(st.permutations(CAPTIONS))
def test_build(captions):
    """Words are sorted by descending count, then alphabetically, behind the special tokens.

    The order of the captions does not matter.
    """
    words = ["a", "dog", "'s", "ball", "cat", "runs", "sleeps", "the"]
    assert Vocabulary.build(captions, threshold=1).words == [*SPECIAL_TOKENS, *words]


def test_threshold():
    """A word belongs to the vocabulary if it occurs `threshold` times or more; others are <unk>."""
    vocab = Vocabulary.build(CAPTIONS, threshold=3)
    assert vocab.words[4:] == ["a", "dog"] and vocab.threshold == 3
    assert vocab.encode("a giraffe") == [START, vocab("a"), UNK, END]


def test_threshold_too_high():
    """A threshold that leaves no word is an error that says so."""
    with pytest.raises(ValueError, match="empty.*lower the minimum word frequency"):
        Vocabulary.build(CAPTIONS, threshold=1000)


def test_encode():
    """An encoded caption is `<start>`, one index per word, and `<end>`; decoding inverts it."""
    vocab = Vocabulary.build(CAPTIONS, threshold=1)
    assert vocab.encode("A dog runs.") == [1, 4, 5, 9, 2]
    assert vocab.encode("") == [1, 2]
    assert vocab.decode(vocab.encode("the cat 's ball a dog")) == "the cat 's ball a dog"


def test_decode_stops_at_end():
    """Decoding stops at the first `<end>`, and leaves out `<start>` and `<pad>`."""
    vocab = Vocabulary.build(CAPTIONS, threshold=1)
    assert vocab.decode([1, 4, 5, 2, 9, 2]) == "a dog"
    assert vocab.decode([1, 4, 0, 5, 0, 0]) == "a dog"
    assert vocab.decode([1, 4, 3, 2]) == "a <unk>"


@pytest.mark.parametrize("index", [-1, 12])
def test_decode_unknown_index(index):
    """An index outside the vocabulary, also a negative one, is an error."""
    with pytest.raises(IndexError, match=f"no word has index {index}"):
        Vocabulary.build(CAPTIONS, threshold=1).decode([4, index])


def test_save(tmp_path):
    """A saved vocabulary is JSON with the threshold and the words in their order, in any script."""
    vocab = Vocabulary.build(["café собака 犬"] * 3, threshold=3)
    vocab.save(tmp_path / "v.json")
    saved = json.loads((tmp_path / "v.json").read_text(encoding="utf-8"))
    assert saved == {"threshold": 3, "words": vocab.words}


def test_extended():
    """Old words keep their indices; new ones follow, by count and alphabet, if frequent enough."""
    vocab = Vocabulary([*SPECIAL_TOKENS, "dog", "a"])
    extended = vocab.extended({"a": 9, "cat": 2, "bus": 2, "red": 5, "old": 1}, threshold=2)
    assert extended.words == [*SPECIAL_TOKENS, "dog", "a", "red", "bus", "cat"]
    assert vocab.extended({"dog": 9, "old": 1}, threshold=2).words == vocab.words


GOOD = [*SPECIAL_TOKENS, "a"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a", "dog"],
        ["<pad>", "<start>", "<end>", "a", "<unk>"],
        *([*GOOD, bad] for bad in ("a", "<pad>", 7, "", None, ["b"])),
    ],
    ids=str,
)
def test_not_a_vocabulary(words):
    """A list without the special tokens in front, with duplicates or without words is refused."""
    with pytest.raises(ValueError, match="a vocabulary|every word"):
        Vocabulary(words)
