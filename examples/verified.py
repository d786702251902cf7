"""Filter a model by a verifier, in a minute or two on a CPU: p(x|c) proportional to a(x|c) v(x, c).

    python examples/verified.py

The wish is that a biography is about its prompt's field. A row of the data set names the field, and a function of yours
checks it. The base rarely does this for half of the prompts. The policy learns to do it, and pass@k shows whether it
keeps several ways of doing it.
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
from dmfast.estimators import Estimate
from dmfast.shipped import TINY_BIOS

FIELDS = json.loads((TINY_BIOS / "features.json").read_text(encoding="utf-8"))
WORDS = {field: set(FIELDS[f"topic_{field}"]["any_of"]) for field in ("sports", "art", "science")}
ROWS = [{"prompt": name, "field": field} for name in ("Mary", "John") for field in WORDS]


def about_its_field(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return whether each biography has a word of the field that its row names."""
    return [not WORDS[row["field"]].isdisjoint(text.split()) for text, row in zip(texts, rows, strict=True)]


def shown(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return an evaluation's pass@k and distinct right answers in k samples, with standard errors over prompts."""
    names = [name for name in metrics if "@" in name and not name.endswith("_stderr")]
    return {name.removeprefix("eval_"): str(Estimate(metrics[name], metrics[f"{name}_stderr"])) for name in names}


def main() -> dict[str, dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=32, help="n, of each row in a step")
    parser.add_argument("--base-samples", type=int, default=64, help="of each row, for its pass rate under the base")
    parser.add_argument("--eval-samples", type=int, default=128, help="of each row, for the table")
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    options = parser.parse_args()
    k = min(16, options.eval_samples)

    model = AutoModelForCausalLM.from_pretrained(TINY_BIOS)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BIOS)
    base = dmfast.LanguageModel(copy.deepcopy(model), tokenizer)
    verifier = dmfast.Verifier(about_its_field, truncated="judge")
    target = dmfast.EBM(base, [verifier])
    rows = target.fit_z(ROWS, options.base_samples, max_new_tokens=48)  # the run starts each prompt's Z from it
    with tempfile.TemporaryDirectory() as folder:
        args = dmfast.DMConfig(
            folder, max_steps=options.steps, samples_per_context=options.samples,
            per_device_train_batch_size=options.samples * len(ROWS), learning_rate=options.learning_rate,
            max_new_tokens=48, proposal_interval=5, z_from_rows=True, save_strategy="no", logging_steps=10,
            disable_tqdm=True, eval_samples=options.eval_samples * len(ROWS), eval_pass_k=sorted({1, min(4, k), k}),
        )  # fmt: skip
        trainer = dmfast.DMTrainer(model, target, args, train_dataset=rows, processing_class=tokenizer)
        found = {"base": shown(trainer.evaluate())}  # pi is the base yet
        trainer.train()
        found["policy"] = shown(trainer.evaluate())
    found["pass rates"] = {f"{row['prompt']}, {row['field']}": f"{row['pass_rate']:.3g}" for row in rows}
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
