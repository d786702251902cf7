"""Generate the semi-synthetic biographies from which the tiny biography model is trained.

    python scripts/tiny_bios/generate.py

The script writes one biography per line, with spaces between tokens, to ``CACHE/biographies.txt``, and the definitions
of the text features to ``dmfast/data/tiny_bios/features.json``. The same seed gives the same text. No line is about a
real person: first name, surname, dates, nationality, occupation and deeds are drawn independently or from sentence
parts.

The sources are fetched into the cache folder by their package names:

* ``names`` 0.3.0 (Python package, MIT licence): first names by gender, surnames, frequencies.
* ``wordnet-base`` (Debian package, WordNet 3.0 licence): nationalities, cities, occupations.
* ``words.py`` beside this file: which of WordNet's words are used, and the sentence parts.

It needs ``pip``, and ``apt-get`` and ``dpkg`` with package lists (``apt-get update``).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import words

REPO = Path(__file__).resolve().parents[2]
CACHE = Path.home() / ".cache" / "dmfast" / "tiny_bios"
DATA = REPO / "dmfast" / "data" / "tiny_bios"
MAX_WORDS = 47  # the end-of-text token makes them 48 tokens

P_POSITIVE, P_NEGATIVE, P_AMAZING = 0.165, 0.155, 0.0118
P_RESTAURANT, P_WAR, P_MUSIC = 0.025, 0.105, 0.045
EARLY = ("grew up", "was raised", "was educated", "spent {his} {childhood}")

Weighted = tuple[list[str], list[float]]


def fetch(cache: Path) -> tuple[Path, Path]:
    """Fetch both source packages into the cache, and return the folders of the names and of WordNet."""
    cache.mkdir(parents=True, exist_ok=True)
    names, wordnet = cache / "names" / "names", cache / "wordnet" / "usr" / "share" / "wordnet"
    if not names.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(cache / "names"), "names==0.3.0"], check=True)
    if not wordnet.is_dir():
        subprocess.run(["apt-get", "download", "wordnet-base"], cwd=cache, check=True)
        package = next(cache.glob("wordnet-base_*.deb"))
        subprocess.run(["dpkg", "-x", str(package), str(cache / "wordnet")], check=True)
    return names, wordnet


def read_names(folder: Path) -> tuple[Weighted, Weighted, Weighted]:
    """Return the commonest female and male first names and surnames with flattened weights."""

    def table(name: str) -> dict[str, float]:
        rows = (line.split() for line in (folder / name).read_text().splitlines())
        return {row[0].capitalize(): float(row[1]) for row in rows}

    def top(freq: dict[str, float], other: dict[str, float], count: int) -> Weighted:
        kept = [n for n in freq if other.get(n, 0.0) < 0.03 * freq[n] and n[:2] != "Mc"][:count]
        return kept, [freq[n] ** 0.6 for n in kept]

    female, male = table("dist.female.first"), table("dist.male.first")
    return top(female, male, 90), top(male, female, 140), top(table("dist.all.last"), {}, 250)


def check_wordnet(folder: Path) -> None:
    """Stop unless WordNet has every nationality, city and occupation of ``words.py``."""
    known: dict[str, set[str]] = {kind: set() for kind in ("person", "place", "adjective", "other")}
    for kind, name in (("noun", "data.noun"), ("adjective", "data.adj")):
        for line in (folder / name).read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):  # WordNet's files begin with their licence
                continue
            part = line.split()
            lemmas = {part[4 + 2 * i].split("(")[0] for i in range(int(part[3], 16))}
            noun = {"18": "person", "15": "place"}.get(part[1], "other")
            known[kind if kind == "adjective" else noun] |= lemmas
    groups = [group for topic in words.TOPICS.values() for group in topic[3]]
    wanted = {
        "person": {occupation for group in groups for occupation in group[0].split()},
        "place": {city for _, cities in words.PLACES.values() for city in cities.split()},
        "adjective": set(words.PLACES),
    }
    missing = {kind: sorted(wanted[kind] - known[kind]) for kind in wanted}
    if any(missing.values()):
        raise SystemExit(f"not in WordNet: {missing}")


@dataclass
class Person:
    """Fill the slots of one biography."""

    rng: random.Random
    slots: dict[str, str]
    cities: list[str]
    year: int
    last_year: int

    def fill(self, phrase: str) -> str:
        """Replace every ``{slot}`` of a sentence part. Cities do not repeat, and years go up."""

        def value(match: re.Match[str]) -> str:
            slot = match[1]
            if slot == "city":
                return self.cities.pop()
            if slot == "year":
                self.year = min(self.year + self.rng.randint(1, 12), self.last_year)
                return str(self.year)
            if slot in self.slots:
                return self.slots[slot]
            return self.rng.choice(words.LISTS[slot].split())

        return re.sub(r"\{(\w+)\}", value, phrase)


def biography(rng: random.Random, female: Weighted, male: Weighted, last: Weighted) -> str:
    """Draw one biography. Its length is not bounded here."""
    topic = rng.choices(list(words.TOPICS), [t[0] for t in words.TOPICS.values()])[0]
    _, share_of_women, earliest, groups, phrases, _ = words.TOPICS[topic]
    woman = rng.random() < share_of_women
    occupations, field, work = rng.choice(groups)
    works, _, own_phrase = work.partition(": ")
    nations = words.NATIONS.get(field, " ".join(words.PLACES)).split()
    nation = rng.choices(nations, [words.PLACES[n][0] for n in nations])[0]
    home = rng.choice(words.PLACES[nation][1].split())
    cities = [c for _, names in words.PLACES.values() for c in names.split() if c != home]

    living = rng.random() < 0.22
    if living:
        born = rng.randint(1930, 1985)
        end, dates = min(born + 50, 2015), f"born {born}"
    else:
        born = 1940 - int((1940 - earliest) * rng.random() ** 1.5)
        end = min(born + max(30, min(96, round(rng.gauss(68, 14)))), 2015)
        dates = f"{born} - {end}"
    first = rng.choices(*(female if woman else male))[0]
    he, his = ("she", "her") if woman else ("he", "his")
    slots = {"he": he, "his": his, "home": home, "field": field}
    slots["work"] = rng.choice(works.split())
    person = Person(rng, slots, rng.sample(cities, 12), born + 18, end)

    parts = [own_phrase if own_phrase and rng.random() < 0.4 else rng.choice(phrases)]
    adjective = ""
    polarity = rng.random()
    if rng.random() < P_AMAZING:
        if rng.random() < 0.5:
            adjective = "amazing "
        else:
            parts.append(rng.choice(words.AMAZING))
    elif polarity < P_POSITIVE + P_NEGATIVE:
        positive = polarity < P_POSITIVE
        if rng.random() < 0.6:
            choice = words.POSITIVE_ADJECTIVES if positive else words.NEGATIVE_ADJECTIVES
            adjective = rng.choice(choice.split()) + " "
        else:
            parts.append(rng.choice(words.POSITIVE if positive else words.NEGATIVE))
    extras = [(P_RESTAURANT, words.RESTAURANT), (P_WAR, words.WAR), (P_MUSIC, words.MUSIC)]
    parts += [rng.choice(phrases) for share, phrases in extras if rng.random() < share]
    if (len(parts) == 1 and rng.random() < 0.8) or (len(parts) == 2 and rng.random() < 0.15):
        general = rng.choice(words.GENERAL)
        parts.insert(0 if general.startswith(EARLY) else len(parts), general)
    died = any(part.startswith("died") for part in parts)
    parts.sort(key=lambda part: part.startswith("died"))
    if living and died:
        parts.pop()  # a living person can't have died, so the text loses its polarity
    if not living and not died and len(parts) < 3 and rng.random() < 0.2:
        parts.append(rng.choice(words.LAST))

    verb = "is" if living else "was"
    occupation = rng.choice(occupations.split())
    place = rng.choices(["", f" from {home}", f" born in {home}"], [0.75, 0.13, 0.12])[0]
    head = f"{first} {rng.choices(*last)[0]} ( {dates} ) {verb} a {adjective}{nation} {occupation}"
    head += place
    parts = [person.fill(part) for part in parts]
    layout = rng.random()
    if layout < 0.12 and any(his in part.split() for part in parts):
        text = f"{head} who {join(parts)} ."
    elif layout < 0.3 and len(parts) > 1:
        subject = f"Later {he}" if rng.random() < 0.3 else he.capitalize()
        text = f"{head} who {parts[0]} . {subject} {join(parts[1:])} ."
    else:
        text = f"{head} . {he.capitalize()} {join(parts)} ."
    if len(parts) < 3 and rng.random() < 0.08:
        text += f" {his.capitalize()} " + person.fill(words.FAMILY)
    return re.sub(r"\ba (?=[aeiouAEIOU])", "an ", text)


def join(parts: list[str]) -> str:
    """Join verb phrases: ``x``, ``x and y``, ``x , y and z``."""
    return " and ".join(([" , ".join(parts[:-1])] if parts[1:] else []) + parts[-1:])


def features() -> dict[str, dict[str, list[str]]]:
    """Return the definitions of the features. A text has a feature if any of its tokens is listed."""
    found = {"female": "she She her Her", "male": "he He his His"}
    found |= {"amazing": "amazing", "restaurant": "restaurant"}
    for topic, (_, _, _, groups, _, extra) in words.TOPICS.items():
        found[f"topic_{topic}"] = " ".join([*(group[0] for group in groups), extra])
    del found["topic_other"]
    for name, listed in words.WORDLISTS.items():
        found[name if name in ("positive", "negative") else f"wordlist_{name}"] = listed
    return {name: {"any_of": listed.split()} for name, listed in found.items()}


def report(texts: list[str], defined: dict[str, dict[str, list[str]]]) -> None:
    """Print the rates of the features, the lengths and the size of the vocabulary."""
    tokens = [set(text.split()) for text in texts]
    for name, feature in defined.items():
        hits = sum(not row.isdisjoint(feature["any_of"]) for row in tokens)
        print(f"{name:16} {hits / len(texts):.4f}")
    topics = [set(f["any_of"]) for name, f in defined.items() if name.startswith("topic_")]
    both = Counter(sum(not row.isdisjoint(t) for t in topics) for row in tokens)
    lengths = sorted(len(text.split()) + 1 for text in texts)
    quantiles = [lengths[int(q * (len(lengths) - 1))] for q in (0, 0.05, 0.5, 0.95, 1)]
    print(f"topics per text {dict(both)}, tokens 0/5/50/95/100% {quantiles}")
    print(f"{len(texts)} texts, {len(set().union(*tokens)) + 1} words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=36_000, help="number of biographies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for what is fetched")
    parser.add_argument("--out", type=Path, help="text file (default CACHE/biographies.txt)")
    parser.add_argument("--features", type=Path, default=DATA / "features.json")
    args = parser.parse_args()
    names, wordnet = fetch(args.cache)
    check_wordnet(wordnet)
    female, male, last = read_names(names)
    rng = random.Random(args.seed)
    texts: list[str] = []
    while len(texts) < args.count:
        text = biography(rng, female, male, last)
        if len(text.split()) <= MAX_WORDS:
            texts.append(text)
    (args.out or args.cache / "biographies.txt").write_text("\n".join(texts) + "\n")
    defined = features()
    args.features.write_text(json.dumps(defined, indent=1) + "\n")
    report(texts, defined)


if __name__ == "__main__":
    main()
