"""The vocabulary, which maps words to indices.

vocab = Vocabulary.build(training_captions, threshold=5)
vocab.encode("A dog runs.")     # [1, 4, 17, 92, 2]: <start> a dog runs <end>
vocab.decode([4, 17, 92, 2])    # "a dog runs"
vocab.save("vocabulary.json")   # {"threshold": 5, "words": [..]}
"""

import json
import warnings
from collections import Counter

from captioning.base.files import write_text
from captioning.base.tokens import END, PAD, SPECIAL_TOKENS, START, UNK, join_words, tokenize


class Vocabulary:
    """A fixed list of words and their indices; words outside the list map to `<unk>`."""

    def __init__(self, words: list[str], threshold: int = 1):
        """`words` starts with SPECIAL_TOKENS; `threshold` records how the list was built.

        Raises ValueError for a list that is not a vocabulary.
        """
        if tuple(words[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            expected = ", ".join(SPECIAL_TOKENS)
            raise ValueError(f"a vocabulary starts with {expected}, not {words[:4]}")
        if not all(isinstance(word, str) and word for word in words):
            raise ValueError("every word of a vocabulary must be a non-empty string")
        if len(set(words)) != len(words):
            raise ValueError("a vocabulary must not contain duplicate words")
        self.words = list(words)
        self.threshold = threshold
        self.index = {word: index for index, word in enumerate(self.words)}

    @classmethod
    def build(cls, captions, threshold: int = 5) -> "Vocabulary":
        """All words that occur at least `threshold` times in `captions` (the training captions).

        Words are sorted by descending count, then alphabetically, so that the order of the captions
        does not matter. Raises ValueError if no word remains; warns if no caption has two words.
        """
        captions = list(captions)
        if captions and all(len(tokenize(caption)) < 2 for caption in captions):
            warnings.warn(
                f"none of the {len(captions)} captions has more than one word, such as "
                f"{captions[0]!r}: separate the words by spaces",
                stacklevel=2,
            )
        counts = count_words(captions)
        vocab = cls(list(SPECIAL_TOKENS), threshold).extended(counts, threshold)
        if len(vocab) == len(SPECIAL_TOKENS):
            raise ValueError(
                f"the vocabulary is empty: none of {len(counts)} distinct words occurs at least "
                f"{threshold} times; lower the minimum word frequency or add captions"
            )
        return vocab

    def extended(self, counts: dict[str, int], threshold: int = 5) -> "Vocabulary":
        """This vocabulary with further words behind its own: those that occur often enough.

        The words of this vocabulary keep their indices. The further ones, those of `counts` that
        it does not contain and that occur at least `threshold` times, are sorted as by `build`; the
        recorded threshold remains that of its own words.
        """
        new = [word for word, n in counts.items() if n >= threshold and word not in self.index]
        new.sort(key=lambda word: (-counts[word], word))
        return Vocabulary([*self.words, *new], self.threshold)

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, word: str) -> int:
        """The index of `word`, or that of `<unk>`."""
        return self.index.get(word, UNK)

    def encode(self, caption: str) -> list[int]:
        """The indices of `<start>`, the words of the caption, and `<end>`."""
        return [START, *(self(word) for word in tokenize(caption)), END]

    def decode(self, ids) -> str:
        """The words of `ids` (integers or a 1-D tensor) up to `<end>`, without special tokens.

        `<unk>` is kept. Raises IndexError for an index outside the vocabulary.
        """
        words = []
        for index in map(int, ids):
            if index == END:
                break
            if not 0 <= index < len(self):
                raise IndexError(f"no word has index {index}: the vocabulary has {len(self)} words")
            if index not in (PAD, START):
                words.append(self.words[index])
        return join_words(words)

    def save(self, path) -> None:
        """Write the vocabulary as JSON."""
        content = {"threshold": self.threshold, "words": self.words}
        write_text(path, json.dumps(content, ensure_ascii=False, indent=0))


def count_words(captions) -> Counter:
    """How often each word occurs in the captions."""
    return Counter(word for caption in captions for word in tokenize(caption))
