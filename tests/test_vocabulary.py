"""Words and their numbers: tokenize and Vocabulary."""

import json
import os
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import model
import vocabulary
from vocabulary import SPECIALS, Vocabulary, pack, tokenize

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
    ],
)
def test_punctuation(caption, words):
    """Words are lower-case; hyphens and apostrophes hold inside them; all else separates."""
    assert " ".join(tokenize(caption)) == words


@pytest.mark.parametrize("caption", ["", " ", "...", "- ' \u2014", "\n"])
def test_no_words(caption):
    """A caption without letters and digits has no words."""
    assert tokenize(caption) == []


@given(st.text())
def test_any_text(caption):
    """Whatever the text, its words are lower-case, without spaces, and none is a special."""
    for word in tokenize(caption):
        assert word == word.lower() != ""
        assert not any(letter.isspace() for letter in word)
        assert word not in SPECIALS


@given(st.text())
def test_composed_and_decomposed_accents(caption):
    """A text gives the same words whether its accents are typed as one character or as two."""
    composed, decomposed = (unicodedata.normalize(form, caption) for form in ("NFC", "NFD"))
    assert tokenize(composed) == tokenize(decomposed)


@pytest.mark.parametrize("word", ["हिन्दी", "i̇stanbul", "naïve", "собака"])
def test_words_of_all_scripts(word):
    """Marks that belong to a letter do not take a word apart."""
    assert tokenize(f"{word}, {word}.") == [word, word]


@given(st.text())
def test_tokenize_twice(caption):
    """The words of a caption, joined and split once more, stay as they are."""
    words = tokenize(caption)
    assert tokenize(" ".join(words)) == words


def test_specials_come_first():
    """`<pad>`, `<start>`, `<end>`, `<unk>` have the indices 0, 1, 2, 3."""
    vocab = Vocabulary.build(CAPTIONS, threshold=1)
    assert vocab.words[:4] == ["<pad>", "<start>", "<end>", "<unk>"]
    assert [vocab(word) for word in vocab.words] == list(range(len(vocab)))


def test_build_orders_by_count_then_alphabet():
    """Frequent words come first, and words of the same count alphabetically."""
    vocab = Vocabulary.build(CAPTIONS, threshold=1)
    assert vocab.words[4:] == ["a", "dog", "'s", "ball", "cat", "runs", "sleeps", "the"]


@given(st.permutations(CAPTIONS))
def test_build_ignores_the_order_of_captions(captions):
    """The same captions in another order give the same vocabulary."""
    assert Vocabulary.build(captions, 1).words == Vocabulary.build(CAPTIONS, 1).words


def test_threshold():
    """A word belongs to the vocabulary if it occurs `threshold` times or more."""
    assert Vocabulary.build(CAPTIONS, threshold=3).words[4:] == ["a", "dog"]


def test_threshold_too_high():
    """A threshold that leaves no word is an error that says so."""
    with pytest.raises(ValueError, match="empty.*lower the threshold"):
        Vocabulary.build(CAPTIONS, threshold=1000)


def test_unknown_words():
    """A word outside the vocabulary is encoded as `<unk>`."""
    vocab = Vocabulary.build(CAPTIONS, threshold=3)
    assert vocab.encode("a giraffe") == [1, vocab("a"), 3, 2]


def test_encode_frames_a_caption():
    """An encoded caption goes from `<start>` to `<end>`, one index per word between them."""
    vocab = Vocabulary.build(CAPTIONS, threshold=1)
    assert vocab.encode("A dog runs.") == [1, 4, 5, 9, 2]
    assert vocab.encode("") == [1, 2]


def test_decode_stops_at_end():
    """Nothing behind the first `<end>` is decoded, and neither `<start>` nor `<pad>` is."""
    vocab = Vocabulary.build(CAPTIONS, threshold=1)
    assert vocab.decode([1, 4, 5, 2, 9, 2]) == "a dog"
    assert vocab.decode([1, 4, 0, 5, 0, 0]) == "a dog"
    assert vocab.decode([1, 4, 3, 2]) == "a <unk>"


@pytest.mark.parametrize("index", [-1, 12])
def test_decode_refuses_foreign_indices(index):
    """An index outside the vocabulary, a negative one too, is an error and not some word."""
    with pytest.raises(IndexError, match=f"no word has index {index}"):
        Vocabulary.build(CAPTIONS, threshold=1).decode([4, index])


@given(st.lists(st.sampled_from(["a", "dog", "runs", "sleeps", "cat", "the", "ball"])))
def test_round_trip(words):
    """A caption of known words survives encoding and decoding."""
    vocab = Vocabulary.build(CAPTIONS, threshold=1)
    assert vocab.decode(vocab.encode(" ".join(words))) == " ".join(words)


def test_save_and_load(tmp_path):
    """A loaded vocabulary has the words, order and threshold of the saved one, in any script."""
    vocab = Vocabulary.build(["caf\u00e9 \u0441\u043e\u0431\u0430\u043a\u0430 \u72ac"], threshold=1)
    vocab.save(tmp_path / "v.json")
    loaded = Vocabulary.load(tmp_path / "v.json")
    assert (loaded.words, loaded.threshold) == (vocab.words, 1)


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    """A save that fails leaves the earlier vocabulary as it was, and nothing beside it."""
    path = tmp_path / "v.json"
    Vocabulary.build(CAPTIONS, threshold=1).save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="v.json.*No space left"):
        Vocabulary.build(CAPTIONS, threshold=3).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["v.json"]


def test_load_without_a_file(tmp_path):
    """A missing vocabulary is an error that names the file."""
    with pytest.raises(FileNotFoundError, match="no vocabulary at .*v.json"):
        Vocabulary.load(tmp_path / "v.json")


GOOD = [*SPECIALS, "a"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"words", b"[" * 100_000])
def test_load_refuses_what_is_not_json(tmp_path, content):
    """A damaged file is refused by name, whatever its bytes."""
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(ValueError, match="v.json is not a vocabulary"):
        Vocabulary.load(tmp_path / "v.json")


@pytest.mark.parametrize(
    "content",
    [
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
        {"threshold": 1, "words": [*GOOD, "a"]},
        {"threshold": 1, "words": [*GOOD, "<pad>"]},
        {"threshold": 1, "words": [*GOOD, 7]},
        {"threshold": 1, "words": [*GOOD, ""]},
        {"threshold": 1, "words": [*GOOD, None]},
        {"threshold": 1, "words": [*GOOD, ["b"]]},
    ],
    ids=str,
)
def test_load_refuses_other_json(tmp_path, content):
    """JSON that is no vocabulary is refused by name, and not half believed."""
    (tmp_path / "v.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="v.json is not a vocabulary"):
        Vocabulary.load(tmp_path / "v.json")


# ---------------------------------------------------------------------------- many at once

MANY = ["A dog runs.", "", "a dog's ball", "?!", "the old red bus"]


@pytest.fixture
def packed_twice(tmp_path, monkeypatch):
    """MANY packed, and packed again by a function that could not tokenise any more."""
    first = pack(MANY, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "tokenize", None)
        return first, pack(MANY, tmp_path)


@pytest.mark.parametrize("where", ["computed", "from the cache"])
def test_pack_and_encode_all(packed_twice, where):
    """Packed captions, computed or from the cache, are encoded as one by one."""
    packed = packed_twice[where == "from the cache"]
    vocab = Vocabulary.build(["a dog", "the dog's bus"], threshold=1)
    ids, lengths = vocab.encode_all(packed)
    expected = [vocab.encode(caption) for caption in MANY]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert ids.tolist() == [index for ids in expected for index in ids]


@pytest.mark.parametrize("threshold", [1, 2])
def test_vocabulary_from_packed(packed_twice, threshold):
    """The counts of packed captions give the same vocabulary as the captions themselves."""
    for packed in packed_twice:
        words = Vocabulary.from_counts(packed.counts(), threshold).words
        assert words == Vocabulary.build(MANY, threshold).words


def test_special_indices():
    """model.py, which imports nothing of the project, has the same special indices."""
    for name, word in zip(("PAD", "START", "END", "UNK"), SPECIALS, strict=True):
        assert getattr(model, name) == getattr(vocabulary, name) == SPECIALS.index(word)


def test_pack_without_words(tmp_path):
    """Captions without a single word can be packed and found again."""
    for _ in range(2):
        packed = pack(["", "?"], tmp_path)
        assert packed.counts() == {} and packed.lengths.tolist() == [0, 0]


def test_other_captions_are_packed_anew(tmp_path):
    """Packed captions are never taken for others."""
    pack(["a dog", "a cat"], tmp_path)
    assert pack(["a dog a", "cat"], tmp_path).lengths.tolist() == [3, 1]


@pytest.mark.parametrize("damage", ["a byte", "cut off", "empty", "text"])
def test_damaged_pack(tmp_path, damage):
    """A damaged file of packed captions is replaced by a right one."""
    right = pack(MANY, tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[content.index(b"NUMPY") + 150] ^= 1
    whole = path.read_bytes()
    damaged = {"a byte": content, "cut off": whole[:-40], "empty": b"", "text": b"words"}
    path.write_bytes(damaged[damage])
    for _ in range(2):
        again = pack(MANY, tmp_path)
        assert again.words == right.words
        np.testing.assert_array_equal(again.ids, right.ids)
        np.testing.assert_array_equal(again.lengths, right.lengths)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
