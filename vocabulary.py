"""Words and their numbers: how a caption becomes the integers an LSTM can read, and back.

vocab = Vocabulary.build(training_captions, threshold=5)
vocab.encode("A dog runs.")     # [1, 4, 17, 92, 2]: <start> a dog runs <end>
vocab.decode([4, 17, 92, 2])    # "a dog runs"
vocab.save("vocabulary.json"); vocab = Vocabulary.load("vocabulary.json")
"""

import json
import os
import unicodedata
from collections import Counter
from pathlib import Path

from nltk.tokenize import RegexpTokenizer

PAD, START, END, UNK = "<pad>", "<start>", "<end>", "<unk>"
SPECIALS = (PAD, START, END, UNK)  # their places in this tuple are their indices: 0, 1, 2, 3

# A word is a run of letters and digits, held together by inner hyphens and apostrophes ("t-shirt",
# "don't"); the possessive 's is a word of its own, as in the Penn Treebank, so that "dog's" does
# not need a place beside "dog". Everything else separates: "half.eaten" is two words.
WORD = RegexpTokenizer(r"[^\W_]+(?:['-](?!s\b)[^\W_]+)*|'s\b")
TOKENIZER = "nltk RegexpTokenizer: lower case, no punctuation, possessive 's split off"


def tokenize(caption: str) -> list[str]:
    """Split a caption into lower-case words without punctuation; needs no nltk data download.

    >>> tokenize("A man's T-shirt, half-eaten.Pizza -- 2 cafés!")
    ['a', 'man', "'s", 't-shirt', 'half-eaten', 'pizza', '2', 'cafés']
    """
    # NFC makes one letter of "e" + combining accent; typographic apostrophes and hyphens count too.
    text = unicodedata.normalize("NFC", caption).lower()
    return WORD.tokenize(text.replace("\u2019", "'").replace("\u2010", "-"))


class Vocabulary:
    """A fixed list of words, each known by its index; words outside it share `<unk>`."""

    def __init__(self, words: list[str], threshold: int = 1):
        """`words` starts with the four specials; `threshold` only records how it was built."""
        if tuple(words[: len(SPECIALS)]) != SPECIALS:
            raise ValueError(f"a vocabulary starts with {', '.join(SPECIALS)}, not {words[:4]}")
        if not all(isinstance(word, str) and word for word in words):
            raise ValueError("every word of a vocabulary is a non-empty string")
        if len(set(words)) != len(words):
            raise ValueError("a vocabulary lists every word once, this one repeats some")
        self.words = list(words)
        self.threshold = threshold
        self.index = {word: index for index, word in enumerate(self.words)}

    @classmethod
    def build(cls, captions, threshold: int = 5) -> "Vocabulary":
        """Every word that occurs at least `threshold` times in `captions` (training ones only).

        Words are ordered by falling count, then alphabetically, so that the order of the captions
        does not matter. Raises ValueError if no word is left.
        """
        counts = Counter(word for caption in captions for word in tokenize(caption))
        kept = [word for word, count in counts.items() if count >= threshold]
        if not kept:
            raise ValueError(
                f"the vocabulary is empty: none of {len(counts)} different words occurs "
                f"{threshold} times or more; lower the threshold or add captions"
            )
        kept.sort(key=lambda word: (-counts[word], word))
        return cls([*SPECIALS, *kept], threshold)

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, word: str) -> int:
        """The index of `word`, or that of `<unk>`."""
        return self.index.get(word, 3)

    def encode(self, caption: str) -> list[int]:
        """The indices of a caption's words, from `<start>` to `<end>`."""
        return [1, *(self(word) for word in tokenize(caption)), 2]

    def decode(self, ids) -> str:
        """The words of `ids` (integers or a tensor) up to `<end>`; `<pad>`, `<start>` are left out.

        Raises IndexError for an index outside the vocabulary.
        """
        words = []
        for index in map(int, ids):
            if index == 2:
                break
            if not 0 <= index < len(self):
                raise IndexError(f"no word has index {index}: this vocabulary has {len(self)}")
            if index > 1:
                words.append(self.words[index])
        return " ".join(words)

    def save(self, path) -> None:
        """Write the vocabulary as JSON; the file appears whole or not at all."""
        part = Path(f"{path}.part")
        content = {"threshold": self.threshold, "words": self.words}
        part.write_text(json.dumps(content, ensure_ascii=False, indent=0), encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path) -> "Vocabulary":
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for anything else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(content["words"], int(content["threshold"]))
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no vocabulary at {path}; train first") from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a vocabulary written by Vocabulary.save ({error}); "
                "delete it and build it again from the training captions"
            ) from None
