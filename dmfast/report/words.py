"""Say what the words and symbols of the page mean."""

from __future__ import annotations

import re
from html import escape

#: Each word of the page's tables and pictures, with its meaning.
WORDS = {
    "a": "The base: the model that training started from.",
    "π": "The policy: the model that is trained.",
    "p, P, Z": (
        "The target p is the distribution that meets the wish and otherwise stays as close as possible to a. It "
        "is known up to a factor: p = P / Z, where P(x) can be computed for any text x and Z is the sum of P over"
        " all texts."
    ),
    "q": "The proposal: a copy of an earlier π that the training samples are drawn from.",
    "swaps of q": (
        "How often q was replaced by π. That happens when samples show that π is closer to p than q is. A small "
        "tick at the bottom of a chart marks such a step (q ← π)."
    ),
    "nats": "The unit of divergences and of log-probabilities: they are natural logarithms.",
    "φ": "A feature: a number for each text, such as 1 for a text about a woman and 0 for any other.",
    "E[φ]": (
        "The mean of a feature. For a feature of 0 and 1 it is the share of the texts that have it. E under q is "
        "the mean of the texts that q drew."
    ),
    "λ": "The coefficients by which the target gives the features the means that are wanted.",
    "KL(p‖π)": (
        "How far the policy is from the target, in nats; 0 means that both are the same. It is estimated from the"
        " weighted samples of a step, or of fresh samples in an evaluation."
    ),
    "KL(p‖q)": "The same for the proposal. Samples from q tell little about p where this is large.",
    "KL(π‖a)": (
        "How far the policy has moved from the base, in nats. At the target it equals KL(p‖a); more than that "
        "means that the policy has changed in ways that nobody asked for."
    ),
    "log Z": "The logarithm of Z, estimated from all sequences so far.",
    "ESS": (
        "The effective sample size of a step: the number of samples of p itself that would give estimates as "
        "precise as the sequences of the step give. It is the number of these sequences when q = p, and 1 when "
        "one weight outweighs all others."
    ),
    "effective sample size": "See ESS.",
    "± and bands": "One standard error. It covers the randomness of the samples of one run, and not how runs differ.",
    "weights": (
        "A is the weight of a sequence in the gradient: positive where training makes the sequence likelier. The "
        "chart shows the standard deviation of A within a step."
    ),
    "gradient variance": "How much the gradients of single sequences differ from their mean.",
    "reward": "The mean reward of the sequences of a step.",
    "β": "How strongly the policy is held to the base when a reward is maximised (KL-control).",
    "Distinct-n": (
        "The number of different sequences of n words in a text, divided by its number of words; less means that "
        "texts repeat themselves."
    ),
    "Self-BLEU-5": "How alike the texts are, from 0 to 1; less is more diverse.",
    "pass@k": "The share of prompts for which at least one of k answers is right.",
    "maj@k": "How often the commonest of k answers is right.",
    "distinct@k": "How many different right answers there are among k.",
    "precision": "pass@1: how often one answer is right.",
    "coverage": "pass@k at a large k: for how many prompts the policy finds a right answer at all.",
    "tokens": "The mean length of a sequence in tokens.",
    "ended in EOS": "The share of the sequences that the model ended itself, before the limit of length.",
    "cut off": "The share of the answers that the limit of length has cut.",
    "sampling": "The part of a step's time in which q draws the sequences.",
    "scoring": "The part of a step's time that the probabilities under the base and the features take.",
    "policy": "The part of a step's time that the policy's forward and backward passes and the optimiser take.",
    "check": "The part of a step's time in which a check decides whether π replaces q.",
}


def word(title: str) -> str:
    """Return the word of ``WORDS`` for the title of a row or a picture."""
    title = title.partition(",")[0].replace("_", " ")
    title = re.sub(r"^E\[.*\]$", "E[φ]", title, flags=re.DOTALL)
    return re.sub(r"^(pass|maj|distinct)@\d+$", r"\1@k", re.sub(r"^Distinct-\d$", "Distinct-n", title))


def glossary() -> str:
    """Return HTML with all of the words."""
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in WORDS.items())
    return f'<details><summary><h2>What the words mean</h2></summary><dl id="words">{entries}</dl></details>'
