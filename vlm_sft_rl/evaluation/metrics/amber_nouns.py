"""Nouns of AMBER's vocabulary in a text without a tagger: words that are also verbs or adjectives are told apart by rule."""

import re

from .vocabulary import Mention, Vocabulary, mentions

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_DETERMINERS = frozenset((
    "a", "an", "the", "this", "another", "one", "two", "three", "four", "five", "six", "some", "each",
    "every", "empty", "his", "her", "its", "their", "my", "your", "no"
))  # fmt: skip
# what stands before "can" where it is a thing
_KINDS_OF_CAN = frozenset((
    "trash", "garbage", "tin", "soda", "beer", "metal", "aluminum", "aluminium", "spray", "watering",
    "paint", "recycling", "rubbish", "food", "oil", "cola", "coke", "drink", "soup", "red", "green", "blue",
    "white", "black", "silver", "small", "large"
))  # fmt: skip
_ALSO_VERBS = frozenset((
    "watch", "support", "drink", "lock", "switch", "sound", "file", "spray", "ring", "board", "stage",
    "tie", "note", "bat", "skate", "leave", "paddle", "track", "sled", "ship", "fish", "box", "sink"
))  # fmt: skip
_BEFORE_VERBS = frozenset((
    "to", "can", "could", "may", "might", "will", "would", "shall", "should", "must", "do", "does", "did",
    "not", "people", "persons", "they", "we", "you", "i", "who", "and", "then", "she", "he", "it", "which",
    "men", "women", "children"
))  # fmt: skip
_NEVER = frozenset(("hot", "leave"))  # in the vocabulary because of "hot dog" and "leaves"


def _is_noun(word: str, previous: str) -> bool:
    """Args: the word as written and the one before it, both lower-cased."""
    if word in _NEVER:
        return False
    if word == "can":
        return previous in _DETERMINERS or previous in _KINDS_OF_CAN
    return not (word in _ALSO_VERBS and previous in _BEFORE_VERBS)


def noun_mentions(text: str, vocabulary: Vocabulary) -> list[Mention]:
    """Mentions of the vocabulary in `text` without those that are no nouns there ("people can watch", "hot day")."""
    words = [(match.start(), match.group().lower()) for match in _WORD.finditer(text)]
    before = {start: words[i - 1][1] if i else "" for i, (start, _) in enumerate(words)}
    return [
        mention
        for mention in mentions(text, vocabulary)
        if _is_noun(text[mention.start : mention.end].lower(), before[mention.start])
    ]
