"""Tokenization and the vocabulary."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabulary import END, PAD, SPECIAL_TOKENS, START, UNK, Vocabulary, tokenize

CAPTIONS = ["A dog runs.", "A dog sleeps!", "a cat", "The dog's ball"]


@pytest.mark.parametrize(
    "caption, words",
    [
        ("A dog runs.", "a dog runs"),
        ("A dog.It runs", "a dog it runs"),
        ("the dog runs. it barks", "the dog runs it barks"),
        ('a sign that says "stop"', "a sign that says stop"),
        ("a sign that says \u201cstop\u201d", "a sign that says stop"),
        ("a sign that says 'stop'", "a sign that says stop"),
        ("a sign that says \u2018stop\u2019", "a sign that says stop"),
        ("a dog -- a big one -- runs", "a dog a big one runs"),
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
        ("they don't", "they don't"),
        ("they don\u2019t", "they don't"),
        ("rock 'n' roll", "rock n roll"),
        ("a cafe\u0301", "a caf\u00e9"),
        ("CAF\u00c9 \u00d1and\u00fa", "caf\u00e9 \u00f1and\u00fa"),
        ("a dog_house", "a dog house"),
        ("a  dog\n\truns ", "a dog runs"),
        ("<start> a dog <end>", "start a dog end"),
        ("हिन्दी, i̇stanbul, naïve. собака", "हिन्दी i̇stanbul naïve собака"),
        ("... - ' \u2014\n", ""),
    ],
)
def test_punctuation(caption, words):
    """Words are lower case and contain inner hyphens and apostrophes; all else separates them."""
    assert " ".join(tokenize(caption)) == words


@given(st.text())
def test_any_text(caption):
    """The words of any text are lower case, without spaces, and none is a special token."""
    for word in tokenize(caption):
        assert word == word.lower() != ""
        assert not any(letter.isspace() for letter in word)
        assert word not in SPECIAL_TOKENS


@given(st.text())
def test_composed_and_decomposed_accents(caption):
    """The words do not depend on whether accents are composed or combining characters."""
    composed, decomposed = (unicodedata.normalize(form, caption) for form in ("NFC", "NFD"))
    assert tokenize(composed) == tokenize(decomposed)


@given(st.text())
def test_tokenize_twice(caption):
    """Tokenizing the joined words again gives the same words."""
    words = tokenize(caption)
    assert tokenize(" ".join(words)) == words


def test_special_tokens_come_first():
    """`<pad>`, `<start>`, `<end>`, `<unk>` have the indices 0, 1, 2, 3."""
    assert (PAD, START, END, UNK) == (0, 1, 2, 3)
    vocab = Vocabulary.build(CAPTIONS, threshold=1)
    assert vocab.words[:4] == ["<pad>", "<start>", "<end>", "<unk>"]
    assert [vocab(word) for word in vocab.words] == list(range(len(vocab)))


def test_build_orders_by_count_then_alphabet():
    """Words are sorted by descending count, then alphabetically."""
    vocab = Vocabulary.build(CAPTIONS, threshold=1)
    assert vocab.words[4:] == ["a", "dog", "'s", "ball", "cat", "runs", "sleeps", "the"]


@given(st.permutations(CAPTIONS))
def test_build_ignores_the_order_of_captions(captions):
    """The vocabulary does not depend on the order of the captions."""
    assert Vocabulary.build(captions, 1).words == Vocabulary.build(CAPTIONS, 1).words


def test_threshold():
    """A word belongs to the vocabulary if it occurs `threshold` times or more; others are <unk>."""
    vocab = Vocabulary.build(CAPTIONS, threshold=3)
    assert vocab.words[4:] == ["a", "dog"] and vocab.threshold == 3
    assert vocab.encode("a giraffe") == [START, vocab("a"), UNK, END]


def test_threshold_too_high():
    """A threshold that leaves no word is an error that says so."""
    with pytest.raises(ValueError, match="empty.*lower the minimum word frequency"):
        Vocabulary.build(CAPTIONS, threshold=1000)


def test_encode_frames_a_caption():
    """An encoded caption is `<start>`, one index per word, and `<end>`."""
    vocab = Vocabulary.build(CAPTIONS, threshold=1)
    assert vocab.encode("A dog runs.") == [1, 4, 5, 9, 2]
    assert vocab.encode("") == [1, 2]


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


@given(st.lists(st.sampled_from(["a", "dog", "runs", "sleeps", "cat", "the", "ball"])))
def test_round_trip(words):
    """Decoding inverts encoding for captions of known words."""
    vocab = Vocabulary.build(CAPTIONS, threshold=1)
    assert vocab.decode(vocab.encode(" ".join(words))) == " ".join(words)


def test_save_and_load(tmp_path):
    """A loaded vocabulary has the words, order and threshold of the saved one, in any script."""
    vocab = Vocabulary.build(
        ["caf\u00e9 \u0441\u043e\u0431\u0430\u043a\u0430 \u72ac"] * 3, threshold=3
    )
    vocab.save(tmp_path / "v.json")
    loaded = Vocabulary.load(tmp_path / "v.json")
    assert (loaded.words, loaded.threshold) == (vocab.words, 3)


def test_extended():
    """Old words keep their indices; new ones follow, by count and alphabet, if frequent enough."""
    vocab = Vocabulary([*SPECIAL_TOKENS, "dog", "a"])
    extended = vocab.extended({"a": 9, "cat": 2, "bus": 2, "red": 5, "old": 1}, threshold=2)
    assert extended.words == [*SPECIAL_TOKENS, "dog", "a", "red", "bus", "cat"]
    assert vocab.extended({"dog": 9, "old": 1}, threshold=2).words == vocab.words


def test_load_without_a_file(tmp_path):
    """A missing vocabulary is an error that names the file."""
    with pytest.raises(FileNotFoundError, match="no vocabulary at .*v.json"):
        Vocabulary.load(tmp_path / "v.json")


GOOD = [*SPECIAL_TOKENS, "a"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"words",
        b"[" * 100_000,
        None,
        [],
        GOOD,
        {"words": GOOD},
        {"threshold": 1},
        {"threshold": "many", "words": GOOD},
        {"threshold": float("inf"), "words": GOOD},
        {"threshold": 1, "words": "<pad><start><end><unk>"},
        {"threshold": 1, "words": dict.fromkeys(GOOD, 1)},
        {"threshold": 1, "words": []},
        {"threshold": 1, "words": ["a", "dog"]},
        {"threshold": 1, "words": ["<pad>", "<start>", "<end>", "a", "<unk>"]},
        *({"threshold": 1, "words": [*GOOD, bad]} for bad in ("a", "<pad>", 7, "", None, ["b"])),
    ],
    ids=lambda content: str(content)[:60],
)
def test_load_damaged_file(tmp_path, content):
    """A file that is not JSON, or not a vocabulary, is an error that names it."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(ValueError, match="v.json is not a vocabulary"):
        Vocabulary.load(tmp_path / "v.json")
