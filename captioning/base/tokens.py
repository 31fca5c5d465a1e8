"""Special tokens, and the tokenizer that splits captions into words."""

import unicodedata

import regex  # of which nltk's tokenizer makes its patterns
from nltk.tokenize import RegexpTokenizer

SPECIAL_TOKENS = ("<pad>", "<start>", "<end>", "<unk>")  # the first words of every vocabulary
PAD, START, END, UNK = range(4)  # their indices

# Scripts that are written without spaces: Chinese, Japanese, Thai, Lao, Khmer, Burmese.
NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\u30FC\uFF70\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"

# A word is a run of letters and digits, with inner hyphens and apostrophes ("t-shirt", "don't").
# The possessive 's is a word of its own, as in the Penn Treebank, so that "dog's" needs no entry
# besides "dog". Everything else separates words: "half.eaten" becomes two. In scripts without
# spaces, each character is a word, with its vowel signs.
RUN = rf"[^\W_{NO_SPACES}]+"
CHARACTER = rf"[{NO_SPACES}]\p{{M}}*"
WORD = RegexpTokenizer(rf"{RUN}(?:['-](?!s\b){RUN})*|'s\b|{CHARACTER}")
PRINTED = RegexpTokenizer(rf"{CHARACTER}|[^\s{NO_SPACES}]+")
SPACE = regex.compile(rf"(?<={CHARACTER}) (?=[{NO_SPACES}])")
TOKENIZER = (
    "nltk RegexpTokenizer: lower case, no punctuation, possessive 's split off, "
    "one word per character in scripts without spaces"
)


def tokenize(caption: str) -> list[str]:
    """Split a caption into lower-case words without punctuation; needs no NLTK data download.

    >>> tokenize("A man's T-shirt, half-eaten.Pizza -- 2 cafés!")
    ['a', 'man', "'s", 't-shirt', 'half-eaten', 'pizza', '2', 'cafés']
    >>> tokenize("一只狗")
    ['一', '只', '狗']
    """
    # NFC composes "e" + combining accent; typographic apostrophes and hyphens become plain ones.
    text = unicodedata.normalize("NFC", caption).lower()
    return WORD.tokenize(text.replace("\u2019", "'").replace("\u2010", "-"))


def join_words(words) -> str:
    """Words as a text: with spaces, unless their script is written without."""
    return SPACE.sub("", " ".join(words))


def split_words(text) -> list[str]:
    """The words of a text from `join_words`, which unlike those of `tokenize` are unchanged."""
    return PRINTED.tokenize(text)
