"""Training text kept clear of what is measured on: documents that share 13 words in a row with it are left out.

After GPT-3 (arXiv 2005.14165, appendix C) and lm-eval's decontamination: n-grams of 13 words, in lower case, without
punctuation. There a 200-character window around a match is cut out of the document; here the whole document goes, since
a document with a hole teaches what follows what does not. There an n-gram that is in more than ten training documents
is no match, which takes a pass over all of them; here one that is in more than ten of the evaluation texts (a system
prompt, a licence) is none. A text of fewer than 13 words is a match only as a whole, with a document of the same words.
Chinese and Japanese characters are a word each, because nothing separates words there.

Only hashes are kept, 8 bytes for each n-gram of the evaluation texts: a word is its CRC-32, an n-gram a sum of those
with random 64-bit factors (multilinear hashing, arXiv 1202.4961), so that a document costs a few operations on arrays.
Two different n-grams meet once in about 2^63 pairs: with 10^7 of one side and 10^9 of the other, once in a thousand
runs, and then one document more is left out.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stillroom.text import Document

GRAM_WORDS = 13

COMMON = 10
"""An n-gram in more evaluation texts than this is their form, not their content."""

MAX_GRAMS = 1 << 26
"""Of all evaluation texts, before they are counted: half a gigabyte. What is beyond is not looked at, and said."""

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")

_FACTORS = np.frombuffer(hashlib.shake_256(b"13-grams").digest(8 * (GRAM_WORDS + 1)), dtype="<u8").astype(np.uint64)
"""One for each word of an n-gram, and one for how many words there are."""

Hashes = NDArray[np.uint64]


@dataclass
class Dropped:
    """What decontamination did to a source, as far as it was read."""

    read_documents: int = 0
    documents: int = 0
    tokens: int = 0


@dataclass
class Contamination:
    """The n-grams that training text must not have, and what was left out for them, by source."""

    hashes: Hashes
    """Sorted."""
    complete: bool = True
    """False where the evaluation texts have more than MAX_GRAMS."""
    dropped: dict[str, Dropped] = field(default_factory=dict)

    def touches(self, document: Document) -> bool:
        """Whether the document has one of the n-grams."""
        found = gram_hashes(plain(document))
        if not len(found) or not len(self.hashes):
            return False
        at = np.searchsorted(self.hashes, found).clip(max=len(self.hashes) - 1)
        return bool((self.hashes[at] == found).any())


def contamination(texts: Iterable[str]) -> Contamination:
    """The n-grams of the evaluation texts, those in more than COMMON different ones left out."""
    seen: set[bytes] = set()
    parts: list[Hashes] = []
    complete, total = True, 0
    for text in texts:
        some = np.unique(gram_hashes(text))
        digest = hashlib.blake2b(some.tobytes(), digest_size=16).digest()
        if digest in seen:  # the same passage before another question
            continue
        if total + len(some) > MAX_GRAMS:
            complete = False
            break
        seen.add(digest)
        parts.append(some)
        total += len(some)
    hashes, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *parts]), return_counts=True)
    return Contamination(hashes[counts <= COMMON], complete)


def plain(document: Document) -> str:
    """What is said in a document: of a conversation the messages without the system's, which many share."""
    if isinstance(document, str):
        return document
    return "\n".join(message["content"] for message in document if message["role"] != "system")


def words(text: str) -> list[str]:
    """Lower case, punctuation as space."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def gram_hashes(text: str) -> Hashes:
    """One for each n-gram in order; one for all of a text that has fewer words; none where it has no word."""
    codes = np.array([zlib.crc32(word.encode()) for word in words(text)], dtype=np.uint64)
    n = min(len(codes), GRAM_WORDS)
    if n == 0:
        return codes
    starts = len(codes) - n + 1
    hashes = np.full(starts, int(_FACTORS[-1]) * n % 2**64, dtype=np.uint64)
    for i in range(n):
        hashes += codes[i : i + starts] * _FACTORS[i]
    return hashes
