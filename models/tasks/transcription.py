"""Noisy text to clean text, letter by letter: what a speech recogniser's second pass does, scored by word error rate.

The clean text is prose from Python's standard library (docstrings, comments and the language reference of ``pydoc``),
lower-case words only. A letter may be heard as one that sounds alike or be lost (``*``), and a space be taken for a
letter. A prompt has a fixed length, so the clean letter stands a constant distance behind the noisy one.
"""

from __future__ import annotations

import ast
import collections
import random
import re
import string
from collections.abc import Iterator

from corpus import collect, is_held_out, split
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

END, PAD, SEPARATOR, LOST = "<|end|>", "_", "|", "*"
LETTERS = string.ascii_lowercase
WIDTH, MIN_LETTERS, NUM_WORDS = 48, 24, 1500
ALIKE = ("bp", "dt", "cgkq", "sxz", "fv", "mn", "aou", "eiy", "lrw", "jh")
HEARD_WRONG, LETTER_LOST, SPACE_LOST = 0.14, 0.03, 0.08
WORD = re.compile(r"[A-Za-z][a-z]*[.,;:]?$")
METRIC = "wer"


def tokenizer_object() -> Tokenizer:
    """One token per letter; the vocabulary is filled up to 32."""
    pieces = [END, " ", *LETTERS, PAD, SEPARATOR, LOST, "\n"]
    tokenizer = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token=LOST))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def prose(source: str) -> Iterator[str]:
    """Yield the docstrings and the comment blocks of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    for block in re.finditer(r"(?:^[ \t]*#.*\n)+", source, re.M):
        yield re.sub(r"^[ \t]*#+", "", block[0], flags=re.M)


def word_runs(text: str) -> Iterator[list[str]]:
    """Yield the longest runs of plain words of each paragraph, in lower case."""
    for paragraph in re.split(r"\n\s*\n", text):
        run: list[str] = []
        for word in [*paragraph.split(), ""]:
            if WORD.match(word):
                run.append(word.rstrip(".,;:").lower())
            elif run:
                yield run
                run = []


def phrases(runs: list[list[str]], known: set[str]) -> Iterator[str]:
    """Cut phrases of known words out of the runs, MIN_LETTERS to WIDTH letters long."""
    for run in runs:
        phrase = ""
        for word in [*run, ""]:
            longer = f"{phrase} {word}".strip()
            if word in known and len(longer) <= WIDTH:
                phrase = longer
                continue
            if len(phrase) >= MIN_LETTERS:
                yield phrase
            phrase = word if word in known else ""


def corpora() -> tuple[list[str], list[str]]:
    """Return the phrases for training and those held out: of other files, and none that occurs in training."""
    from pydoc_data.topics import topics

    kept, out = ([text for source in part.values() for text in prose(source)] for part in split(collect()))
    for name, text in sorted(topics.items()):
        (out if is_held_out(f"topic {name}") else kept).append(text)
    runs = [[run for text in texts for run in word_runs(text)] for texts in (kept, out)]
    counts = collections.Counter(word for run in runs[0] for word in run)
    known = {word for word, _ in counts.most_common(NUM_WORDS)}
    train = list(dict.fromkeys(phrases(runs[0], known)))
    seen = set(train)
    return train, [phrase for phrase in dict.fromkeys(phrases(runs[1], known)) if phrase not in seen]


def heard(clean: str, rng: random.Random) -> str:
    """The phrase as it is heard: of the same length, about every sixth letter wrong."""
    alike = {letter: group.replace(letter, "") for group in ALIKE for letter in group}
    found = []
    for letter in clean:
        chance = rng.random()
        if letter == " ":
            found.append(rng.choice("aehs") if chance < SPACE_LOST else letter)
        elif chance < LETTER_LOST:
            found.append(LOST)
        else:
            found.append(rng.choice(alike[letter]) if chance < LETTER_LOST + HEARD_WRONG else letter)
    return "".join(found)


def example(clean: str, rng: random.Random) -> tuple[str, str]:
    """A prompt and its reference."""
    return heard(clean, rng).ljust(WIDTH, PAD) + SEPARATOR, clean


def training(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield examples for ever, the noise new in every pass."""
    train, _ = corpora()
    while True:
        rng.shuffle(train)
        for clean in train:
            yield example(clean, rng)


def held_out(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Return examples of phrases that training never shows."""
    _, out = corpora()
    return [example(clean, rng) for clean in rng.sample(out, count)]
