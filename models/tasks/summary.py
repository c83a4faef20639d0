"""A short news report to one or two sentences with its main facts, scored by ROUGE.

The reports are written by the grammar below: one event told in four or five sentences in changing order and wording,
between sentences on other people, places and numbers that a summary must not name. One token per word.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator

from tokenizers import Tokenizer, models, pre_tokenizers

END, UNKNOWN, ASK = "<|end|>", "<|unknown|>", "summary :"
HELD_OUT_ONE_IN = 8
NUM_ASIDES = 3
METRIC = "rouge"

SLOTS = {
    "first": "ada ben carla david emma frank greta henry irene jonas klara louis",
    "last": "adams baker costa dietrich evans fischer garcia hansen ivanov jensen keller lopez",
    "place": "aachen bergen cadiz delft essen fulda genoa hamar izola jena kiel lucca",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "number": "two three four five six seven eight nine ten eleven twelve twenty",
    "building": "school library station museum hospital theatre bakery factory",
    "team": "lions eagles wolves sharks bears foxes",
    "goods": "wool copper timber coffee paper glass salt cotton",
    "cause": "a broken cable|a gas leak|a forgotten candle|a fallen lamp|an old heater",
    "reason": "low pay|long hours|new rules|bad air|missing parts",
    "weather": "cold warm wet dry windy mild",
}
"""What a slot may hold: words, or phrases with bars between."""

EVENTS = {
    "fire": {
        "lead": ["a fire broke out in the {building} of {place} on {day} .",
                 "on {day} flames rose from the {building} in {place} ."],
        "facts": [["{number} people were hurt and taken to a doctor .", "doctors took care of {number} hurt people ."],
                  ["{first} {last} of the fire brigade spoke of {cause} .",
                   "it began with {cause} , said {first} {last} of the fire brigade ."]],
        "summary": ["a fire in the {building} of {place} on {day} hurt {number} people . "
                    "{first} {last} named {cause} as the cause .",
                    "{number} people were hurt by a fire in {place} on {day} . "
                    "the {building} burned because of {cause} , said {first} {last} ."],
    },
    "strike": {
        "lead": ["the workers of the {building} in {place} laid down their work on {day} .",
                 "on {day} nobody worked at the {building} of {place} ."],
        "facts": [["the strike will last {number} days .", "work will rest for {number} days ."],
                  ["{first} {last} , who leads the union , complained of {reason} .",
                   "the union and its head {first} {last} are angry at {reason} ."]],
        "summary": ["a strike at the {building} in {place} began on {day} and lasts {number} days . "
                    "{first} {last} blames {reason} .",
                    "workers in {place} are on strike for {number} days from {day} . "
                    "{first} {last} of the {building} union blames {reason} ."],
    },
    "match": {
        "lead": ["the {team} of {place} won their match on {day} .",
                 "on {day} the fans in {place} saw a win of the {team} ."],
        "facts": [["they scored {number} points .", "the board showed {number} points for them at the end ."],
                  ["{first} {last} was the best player .", "nobody played better than {first} {last} ."]],
        "summary": ["the {team} won in {place} on {day} with {number} points . {first} {last} played best .",
                    "{first} {last} led the {team} of {place} to a win on {day} . they scored {number} points ."],
    },
    "theft": {
        "lead": ["thieves took {goods} from the {building} in {place} on {day} .",
                 "on {day} the {building} of {place} lost its {goods} to thieves ."],
        "facts": [["the police look for {number} men .", "{number} men were seen as they ran away ."],
                  ["{first} {last} , who was on guard , had fallen asleep .",
                   "the guard , {first} {last} , noticed nothing ."]],
        "summary": ["{number} men stole {goods} from the {building} in {place} on {day} . "
                    "the guard {first} {last} saw nothing .",
                    "{goods} was stolen in {place} on {day} while {first} {last} kept guard . "
                    "police look for {number} men at the {building} ."],
    },
    "opening": {
        "lead": ["a new {building} was opened in {place} on {day} .",
                 "since {day} the people of {place} have a new {building} ."],
        "facts": [["it cost {number} million and was paid by the town .", "the town paid {number} million for it ."],
                  ["{first} {last} , the mayor , cut the ribbon .", "mayor {first} {last} gave a long speech ."]],
        "summary": ["mayor {first} {last} opened a {building} in {place} on {day} . it cost {number} million .",
                    "{place} opened a new {building} for {number} million on {day} . {first} {last} spoke ."],
    },
    "trade": {
        "lead": ["the firm of {first} {last} in {place} sold all of its {goods} on {day} .",
                 "on {day} all {goods} of {first} {last} in {place} found a buyer ."],
        "facts": [["the price was {number} million .", "buyers paid {number} million ."],
                  ["the {team} will get a part of it .", "a part goes to the {team} ."]],
        "summary": ["{first} {last} sold {goods} for {number} million in {place} on {day} . the {team} get a part .",
                    "{goods} of {first} {last} from {place} went for {number} million on {day} . "
                    "a part goes to the {team} ."],
    },
}  # fmt: skip

ASIDES = [
    "last year {first} {last} found {number} coins near the {building} of {place} .",
    "the weather in {place} was {weather} .",
    "meanwhile {first} {last} from {place} left for a holiday .",
    "in {place} the price of {goods} rose again .",
    "a week before , the {team} had lost in {place} .",
    "readers sent {number} letters about the {building} .",
]
"""Sentences that have nothing to do with the event, with slots of their own."""


def fillings(rng: random.Random) -> dict[str, str]:
    """Choose a word or phrase for every slot."""
    return {slot: rng.choice(re.split(r"\|" if "|" in text else " ", text)) for slot, text in SLOTS.items()}


def is_held_out(event: str, facts: dict[str, str]) -> bool:
    """Tell whether training never shows this event with this person at this place."""
    key = " ".join([event, facts["first"], facts["last"], facts["place"]])
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def example(rng: random.Random, wanted_held_out: bool, asides: int) -> tuple[str, str]:
    """A prompt and its reference, for training or held out, with a number of asides."""
    while True:
        event, facts = rng.choice(list(EVENTS)), fillings(rng)
        if is_held_out(event, facts) == wanted_held_out:
            break
    told = EVENTS[event]
    body = [rng.choice(ways).format(**facts) for ways in told["facts"]]
    body += [aside.format(**fillings(rng)) for aside in rng.sample(ASIDES, asides)]
    rng.shuffle(body)
    report = [rng.choice(told["lead"]).format(**facts), *body]
    if rng.random() < 0.3:
        report[:2] = report[1::-1]
    return " ".join([*report, ASK]), rng.choice(told["summary"]).format(**facts)


def tokenizer_object() -> Tokenizer:
    """One token per word that the grammar can write."""
    texts = [*SLOTS.values(), *ASIDES, ASK]
    for told in EVENTS.values():
        texts += [*told["lead"], *told["summary"], *(way for ways in told["facts"] for way in ways)]
    words = sorted({word for text in texts for word in text.replace("|", " ").split() if "{" not in word})
    pieces = [END, UNKNOWN, *words]
    tokenizer = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def training(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield new examples for ever. Those with few asides teach copying, which the others then need."""
    while True:
        yield example(rng, False, asides=rng.randint(0, NUM_ASIDES))


def held_out(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Return examples of events, people and places that training never shows together."""
    return [example(rng, True, NUM_ASIDES) for _ in range(count)]
