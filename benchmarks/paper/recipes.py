"""Write the ten tasks as recipes of ``dmfast train``: ``tasks/`` on tiny-bios, ``smollm2/`` on SmolLM2-135M.

    python benchmarks/paper/recipes.py

The tasks are those of Korbak et al. 2022 (arXiv:2206.00761, section 4.1 and appendix) in kind: two single words, two
word lists, two classifiers, half women, four topics at a quarter each, and two hybrids of half women and one topic
throughout. The words are those of ``dmfast/data/tiny_bios/features.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from dmfast.demo import THREE_SHOTS
from dmfast.training.recipe import TINY_BIOS

HERE = Path(__file__).parent
WORDS = {name: entry["any_of"] for name, entry in json.loads((TINY_BIOS / "features.json").read_text()).items()}
TOPICS = ("science", "art", "sports", "politics")


def word_list(name: str, words: str) -> dict[str, Any]:
    """Return a feature: one of the words occurs, with this case."""
    return {"contains": {"any_of": WORDS[words], "ignore_case": False, "name": name}}


def sentiment(label: str) -> dict[str, Any]:
    """Return a feature: the classifier gives the label at least half of the probability."""
    options = {"label": label, "output": "binary", "name": label.lower()}
    return {"classifier": {"model": "benchmarks/paper/classifier", **options}}


def moment(feature: dict[str, Any], value: float) -> dict[str, Any]:
    """Return a distributional constraint."""
    return {"moment": feature | {"value": value}}


WOMEN = word_list("women", "female")
POINTWISE = {
    "word_amazing": {"contains": {"word": "amazing", "name": "amazing"}},
    "word_restaurant": {"contains": {"word": "restaurant", "name": "restaurant"}},
    "wordlist_war": word_list("war", "wordlist_war"),
    "wordlist_music": word_list("music", "wordlist_music"),
    "classifier_positive": sentiment("POSITIVE"),
    "classifier_negative": sentiment("NEGATIVE"),
}
TASKS: dict[str, list[dict[str, Any]]] = {
    **{name: [feature] for name, feature in POINTWISE.items()},
    "women": [moment(WOMEN, 0.5)],
    "topics": [moment(word_list(topic, f"topic_{topic}"), 0.25) for topic in TOPICS],
    **{f"women_{topic}": [moment(WOMEN, 0.5), word_list(topic, f"topic_{topic}")] for topic in ("science", "sports")},
    # this task lies outside the grid; learning rates are chosen on it
    "tuning": [word_list("politics", "topic_politics")],
}

# these are 20,480 sequences, with a check of q every 2,560
TINY = {
    "objective": "gdc++", "max_steps": 80, "per_device_train_batch_size": 256, "learning_rate": 1.5e-4,
    "warmup_steps": 10, "max_new_tokens": 48, "proposal_interval": 10, "eval_strategy": "steps", "eval_steps": 16,
    "eval_samples": 2048, "save_strategy": "no", "seed": 0,
}  # fmt: skip
# these settings are the paper's: B = 512, 40 tokens, 100 warm-up steps, a check of q every 10 steps, DMConfig's
# learning rate
SMOLLM2 = {
    "objective": "gdc++", "max_steps": 1000, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 8,
    "samples_per_context": 512, "sampling_batch_size": 512, "learning_rate": 1.41e-5, "warmup_steps": 100,
    "max_new_tokens": 40, "proposal_interval": 10, "eval_strategy": "steps", "eval_steps": 200, "eval_samples": 2048,
    "save_strategy": "no", "bf16": True, "seed": 0,
}  # fmt: skip


class _Dumper(yaml.SafeDumper):
    """Dump text of several lines as a block, and never use anchors where two entries are one object."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _style(text: str) -> str | None:
    return "|" if "\n" in text[:-1] else '"' if "\n" in text else None


_Dumper.add_representer(str, lambda d, text: d.represent_scalar("tag:yaml.org,2002:str", text, style=_style(text)))


def write(name: str, folder: str, train: dict[str, Any], **entries: Any) -> None:
    """Write one file."""
    recipe = {**entries, "constraints": TASKS[name], "fit": {"n": 10_240, "seed": 0},
              "train": {"output_dir": f"paper/{folder}/{name}", **train},
              "evaluate": {"samples": 2048, "batch_size": 256}}  # fmt: skip
    path = HERE / folder / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    text = yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True, default_flow_style=None)
    path.write_text("# Written by benchmarks/paper/recipes.py.\n" + text)


def main() -> None:
    for name in TASKS:
        write(name, "tasks", TINY, model="tiny-bios")
        if name != "tuning":
            write(name, "smollm2", SMOLLM2, model="~/.cache/dmfast/smollm2-135m", stop="\n", prompts=[THREE_SHOTS])


if __name__ == "__main__":
    main()
