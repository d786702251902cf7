"""Sample the tiny biography model and write how often each text feature occurs.

    python scripts/tiny_bios/base_rates.py [--show N]

The script writes ``base_rates.json`` beside the checkpoint. With ``--show N`` it prints the first N samples too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

DATA = Path(__file__).resolve().parents[2] / "dmfast" / "data" / "tiny_bios"
MAX_NEW_TOKENS = 48


@torch.no_grad()
def sample(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Draw ``count`` rows of new tokens at temperature 1. After its end a row holds zeros."""
    ids = torch.zeros(count, 1, dtype=torch.long)
    alive = torch.ones(count, 1, dtype=torch.bool)
    cache, rows = DynamicCache(config=model.config), []
    for _ in range(MAX_NEW_TOKENS):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
        ids = torch.multinomial(logits.float().softmax(-1), 1) * alive
        rows.append(ids)
        alive &= ids != 0
    return torch.cat(rows, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=DATA / "base_rates.json")
    parser.add_argument("--batches", type=int, default=40, help="of 256 samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--date", default=str(datetime.date.today()), help="date to record")
    parser.add_argument("--show", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.cat([sample(model, 256) for _ in range(args.batches)])
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    print("\n".join(texts[: args.show]))

    n, tokens = len(texts), [set(text.split()) for text in texts]
    rates = {}
    for name, feature in json.loads((DATA / "features.json").read_text()).items():
        rate = sum(not row.isdisjoint(feature["any_of"]) for row in tokens) / n
        error = math.sqrt(rate * (1 - rate) / n)
        rates[name] = {"rate": round(rate, 5), "standard_error": round(error, 5)}
        print(f"{name:16} {rate:.4f} +- {error:.4f}")
    ended = ids[:, -1] == 0
    result = {
        "features": rates,
        "samples": n,
        "mean_length": round(float(((ids != 0).sum(1) + ended).float().mean()), 3),
        "share_without_end": round(1 - float(ended.float().mean()), 5),
        "max_new_tokens": MAX_NEW_TOKENS,
        "temperature": 1.0,
        "seed": args.seed,
        "torch": torch.__version__,
        "date": args.date,
    }
    print({key: value for key, value in result.items() if key != "features"})
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
