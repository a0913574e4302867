"""Names, aliases and captions of the catalogue's models. Standard library and NumPy only: training imports this.

A model is one entry of ``models.json``: see :func:`describe` for its fields.
"""

import math
import re
from collections import Counter, defaultdict

import numpy as np

from .catalogue import Entry
from .colours import COLOURS
from .names import NAMES
from .synonyms import HEADLINE, MASS, PLURALS, POPULAR, SYNONYMS

VIEWS = ("", "front view", "side view", "back view", "overhead view")
TEXTURELESS = "clay"
DEFECTS = frozenset({"BlendSwap-CC-BY#1"})  # a Christmas tree without its texture
_DROPPED = re.compile(
    r"\b(plug|switch|RJ45)\b|^Wall (double )?socket$|^Parking slot|^Pedestrian crossing$|^Arrow |^Concrete sidewalk$"
    r"|^Suit$|^Contemporary living room$|^Card game$"
)
_COLOUR_WORD = re.compile(r"\b(" + "|".join(COLOURS) + r")\b")


def _table(text: str, separator: str) -> dict[str, list[str]]:
    table = {}
    for line in text.strip().splitlines():
        name, _, rest = line.partition(": ")
        table[name.strip()] = [word.strip() for word in rest.split(separator)]
    return table


_NAMES = _table(NAMES, "|")
_SYNONYMS = _table(SYNONYMS, ",")


def is_dropped(entry: Entry) -> bool:
    """Plugs, switches, floor markings and defects, which teach nothing."""
    return bool(_DROPPED.search(entry.name))


def phrases_for(key: str, name: str) -> dict[str, float]:
    """Noun phrases of a model with their weights, the canonical one first (weight 1; synonyms share 0.8, generic
    words, marked ``~`` in the tables, share 0.4)."""
    row = _NAMES.get(key) or _NAMES.get(name.lower()) or [name.lower()]
    noun = row[0]
    own = [word.strip() for word in row[1].split(",")] if len(row) > 1 else []
    words = list(dict.fromkeys(own + _SYNONYMS.get(noun, [])))
    synonyms = [word for word in words if not word.startswith("~") and word != noun]
    generic = [word[1:] for word in words if word.startswith("~") and word[1:] not in (noun, *synonyms)]
    phrases = {noun: 1.0}
    # A model's own descriptions fit it better than the noun's general synonyms do.
    shares = {word: 2.0 if word in own else 1.0 for word in synonyms}
    phrases |= {word: round(0.8 * share / sum(shares.values()), 4) for word, share in shares.items()}
    phrases |= {word: round(0.4 / len(generic), 4) for word in generic}
    return phrases


def describe(entry: Entry) -> dict:
    """The fields of a model that come from the catalogue and from the tables of names."""
    phrases = phrases_for(entry.key, entry.name)
    noun, *aliases = phrases
    return {
        "key": entry.key,
        "name": entry.name,
        "noun": noun,
        "aliases": aliases,
        "phrases": phrases,
        "category": entry.category,
        "creator": entry.creator,
        "licence": entry.licence,
        "library": entry.library,
    }


def split_and_weight(models: list[dict]) -> None:
    """Set ``split`` (one model held out of each of 14 common nouns) and the sampling ``weight``, in place."""
    groups = defaultdict(list)
    for model in models:
        model["split"] = "train"
        groups[model["noun"]].append(model)
    common = sorted((noun for noun in groups if len(groups[noun]) >= 5), key=lambda noun: -len(groups[noun]))
    for noun in [noun for noun in common if noun not in ("cabinet", "man", "woman", "railing", "exterior door")][:14]:
        groups[noun][len(groups[noun]) // 2]["split"] = "held_out"
    counts = Counter(model["noun"] for model in models if model["split"] == "train")
    for model in models:
        noun = model["noun"]
        weight = max(counts[noun], 1) ** -0.5
        if model["category"] == "Doors and windows" or "cabinet" in noun:
            weight *= 0.5
        weight *= 3 if noun in HEADLINE else 2 if noun in POPULAR else 1
        if model["key"] in DEFECTS:
            weight = 0
        model["weight"] = round(weight, 4)


def view_name(azimuth: float, elevation: float) -> str:
    """The view suffix of a camera (radians): overhead above 60 degrees, else front, side or back by azimuth."""
    if elevation > math.radians(60):
        return "overhead view"
    turned = abs((azimuth + math.pi) % (2 * math.pi) - math.pi)
    if turned <= math.pi / 4:
        return "front view"
    return "back view" if turned >= 3 * math.pi / 4 else "side view"


def article(phrase: str) -> str:
    """``phrase`` with "a" or "an" in front where one belongs."""
    head = re.split(r" (?:of|in|with|on|and) ", phrase)[0].split()[-1]
    if head in PLURALS or (phrase.split()[-1] in MASS and len(phrase.split()) == 1):
        return phrase
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "ute", "euro", "uri", "one"))
    return f"{'an' if vowel or re.match('suv|mp3|l-', phrase) else 'a'} {phrase}"


def compose(phrase: str, modifier: str = "", view: str = "") -> str:
    """A caption: article, colour words or "clay", noun phrase, view."""
    text = article(f"{modifier} {phrase}".strip())
    return f"{text}, {view}" if view else text


def modifiers(model: dict) -> list[str]:
    """Colour words that describe a model: "red", or "red and white"; empty when no colour dominates."""
    return [" and ".join(model["colours"])] if model["colours"] else []


def caption_for(
    model: dict,
    view: str,
    rng: np.random.Generator,
    textureless: bool = False,
    colour: str | None = None,
    view_dropout: float = 0.2,
    colour_rate: float = 0.5,
) -> str:
    """A random caption of one view.

    :param view: suffix as :func:`view_name` gives it; left out with probability ``view_dropout``.
    :param textureless: a render without colours: "clay" takes the place of the colour.
    :param colour: colour word of a recoloured model; None means the model's own colours, named at ``colour_rate``.
    """
    names = list(model["phrases"])
    weights = np.array(list(model["phrases"].values()))
    phrase = names[rng.choice(len(names), p=weights / weights.sum())]
    own = modifiers(model)
    modifier = ""
    if textureless:
        modifier = TEXTURELESS
    elif colour is not None:
        modifier = colour
    elif own and rng.random() < colour_rate:
        modifier = own[0]
    if modifier and _COLOUR_WORD.search(phrase):
        phrase = model["noun"]
    return compose(phrase, modifier, "" if rng.random() < view_dropout else view)


def noun_phrases(models: list[dict]) -> list[str]:
    """Every noun phrase of the models once, sorted."""
    return sorted({phrase for model in models for phrase in model["phrases"]})


def all_captions(models: list[dict], single_colours: bool = True) -> list[str]:
    """Every caption that :func:`caption_for` can return (and, with ``single_colours``, all phrases in all colours)."""
    pairs = {(phrase, "") for phrase in noun_phrases(models)} | {(p, TEXTURELESS) for p in noun_phrases(models)}
    if single_colours:
        pairs |= {(phrase, colour) for phrase in noun_phrases(models) for colour in COLOURS}
    for model in models:
        pairs |= {(phrase, own) for phrase in model["phrases"] for own in modifiers(model)}
    return sorted({compose(phrase, modifier, view) for phrase, modifier in pairs for view in VIEWS})
