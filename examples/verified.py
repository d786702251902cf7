"""Filter a model by a verifier, in a minute or two on a CPU: p(x|c) proportional to a(x|c) v(x, c).

    python examples/verified.py

The wish: a biography is about its prompt's field, which a row of the data set names and a function of yours checks.
Half of the prompts are rarely answered so by the base. The policy comes to do it, and pass@k shows whether it keeps
several ways of doing it.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import dmfast
from dmfast.training.recipe import TINY_BIOS
from dmfast.verified import distinct_at_k, pass_at_k

FIELDS = json.loads((TINY_BIOS / "features.json").read_text(encoding="utf-8"))
WORDS = {field: set(FIELDS[f"topic_{field}"]["any_of"]) for field in ("sports", "art", "science")}
ROWS = [{"prompt": name, "field": field} for name in ("Mary", "John") for field in WORDS]


def about_its_field(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return whether each biography has a word of the field that its row names."""
    return [not WORDS[row["field"]].isdisjoint(text.split()) for text, row in zip(texts, rows, strict=True)]


def measured(model: dmfast.LanguageModel, verifier: dmfast.Verifier, n: int, k: int) -> dict[str, str]:
    """Return pass@1, pass@k and the different right answers in k samples, over all rows."""
    x = model.sample([row["prompt"] for row in ROWS], n, max_new_tokens=48, seed=1, batch_size=512)
    x = x.with_rows(ROWS)
    right = verifier(x)
    return {
        "pass@1": str(pass_at_k(right, x.context_id, 1)),
        f"pass@{k}": str(pass_at_k(right, x.context_id, k)),
        f"distinct@{k}": str(distinct_at_k(x.text, right, x.context_id, k)),
    }


def main() -> dict[str, dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=32, help="n, of each row in a step")
    parser.add_argument("--eval-samples", type=int, default=128, help="of each row, for the table")
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(TINY_BIOS)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BIOS)
    base = dmfast.LanguageModel(copy.deepcopy(model), tokenizer)
    verifier = dmfast.Verifier(about_its_field, truncated="judge")
    target = dmfast.EBM(base, [verifier])
    with tempfile.TemporaryDirectory() as folder:
        args = dmfast.DMConfig(
            folder, max_steps=options.steps, samples_per_context=options.samples,
            per_device_train_batch_size=options.samples * len(ROWS), learning_rate=options.learning_rate,
            max_new_tokens=48, proposal_interval=5, save_strategy="no", logging_steps=10, disable_tqdm=True,
        )  # fmt: skip
        trainer = dmfast.DMTrainer(model, target, args, train_dataset=ROWS, processing_class=tokenizer)
        trainer.train()
    found = {
        name: measured(each, verifier, options.eval_samples, min(16, options.eval_samples))
        for name, each in (("base", base), ("policy", trainer.policy))
    }
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
