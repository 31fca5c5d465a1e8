"""Special tokens, and the tokenizer that splits captions into words."""

import unicodedata

from nltk.tokenize import RegexpTokenizer

SPECIAL_TOKENS = ("<pad>", "<start>", "<end>", "<unk>")  # the first words of every vocabulary
PAD, START, END, UNK = range(4)  # their indices

# A word is a run of letters and digits, with inner hyphens and apostrophes ("t-shirt", "don't").
# The possessive 's is a word of its own, as in the Penn Treebank, so that "dog's" needs no entry
# besides "dog". Everything else separates words: "half.eaten" becomes two.
WORD = RegexpTokenizer(r"[^\W_]+(?:['-](?!s\b)[^\W_]+)*|'s\b")
TOKENIZER = "nltk RegexpTokenizer: lower case, no punctuation, possessive 's split off"


def tokenize(caption: str) -> list[str]:
    """Split a caption into lower-case words without punctuation; needs no NLTK data download.

    >>> tokenize("A man's T-shirt, half-eaten.Pizza -- 2 cafés!")
    ['a', 'man', "'s", 't-shirt', 'half-eaten', 'pizza', '2', 'cafés']
    """
    # NFC composes "e" + combining accent; typographic apostrophes and hyphens become plain ones.
    text = unicodedata.normalize("NFC", caption).lower()
    return WORD.tokenize(text.replace("\u2019", "'").replace("\u2010", "-"))
