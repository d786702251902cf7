"""Train the sentiment classifier of the two classifier tasks, on sentences that people have rated.

    python benchmarks/paper/classifier.py

The data are the 23,703 sentences (tweets, film and product reviews, editorials) of Hutto and Gilbert (2014), each with
a mean rating from -4 to 4. They are in the source package of vaderSentiment 3.3.2 (MIT licence), which is fetched into
the cache folder. No sentence is kept here. POSITIVE and NEGATIVE are ratings beyond ±0.75, and NEUTRAL is what lies
between. The classifier, a DistilBERT of one layer x 64, has read no biography. Its vocabulary is that of the
biographies and the commonest words of the sentences. A twentieth of the sentences is held out, and
``classifier/training.json`` has the results on it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from dmfast.training.recipe import TINY_BIOS

CACHE = Path.home() / ".cache" / "dmfast" / "sentiment"
OUT = Path(__file__).parent / "classifier"
PACKAGE = "vaderSentiment==3.3.2"
LABELS = ("NEGATIVE", "NEUTRAL", "POSITIVE")
NEUTRAL_BELOW = 0.75
WORDS, MAX_LENGTH = 6000, 64


def sentences(cache: Path) -> list[tuple[str, float]]:
    """Return every rated sentence with its mean rating."""
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob("*.tar.gz")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(cache), PACKAGE], check=True)
    found = []
    with tarfile.open(next(cache.glob("*.tar.gz"))) as package:
        inner = next(m for m in package if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=package.extractfile(inner)) as data:
            for member in data:
                if member.name.endswith("_GroundTruth.txt"):
                    lines = data.extractfile(member).read().decode("latin-1").splitlines()
                    found += [(line.split("\t")[2], float(line.split("\t")[1])) for line in lines if line]
    return found


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of lower-case words: those of the biographies, then the commonest of the sentences."""
    counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower()))
    biographies = {word.lower() for word in AutoTokenizer.from_pretrained(TINY_BIOS).get_vocab()}
    known = sorted(biographies) + [word for word, _ in counts.most_common(WORDS)]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(dict.fromkeys(["[PAD]", "[UNK]", *known]))}, "[UNK]"))
    backend.normalizer, backend.pre_tokenizer = Lowercase(), Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=MAX_LENGTH
    )


def batch(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return texts as a batch that is padded on the right."""
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rated = sentences(args.cache)
    order = torch.randperm(len(rated)).tolist()
    rated = [rated[i] for i in order]
    held_out = len(rated) // 20
    texts, ratings = [text for text, _ in rated], torch.tensor([rating for _, rating in rated])
    labels = 1 + (ratings > NEUTRAL_BELOW).long() - (ratings < -NEUTRAL_BELOW).long()
    tokenizer = tokenizer_of(texts[held_out:])
    rows = [torch.tensor(ids or [1]) for ids in tokenizer(texts, truncation=True)["input_ids"]]
    model = DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH, dim=64, hidden_dim=128, n_layers=1,
            n_heads=2, dropout=0.2, attention_dropout=0.1, seq_classif_dropout=0.2, pad_token_id=0,
            id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)},
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    training = torch.arange(held_out, len(rows))
    steps = args.epochs * math.ceil(len(training) / 64)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.1)
    for epoch in range(args.epochs):
        model.train()
        for pick in training[torch.randperm(len(training))].split(64):
            inputs = batch([rows[i] for i in pick])
            # hidden words keep the classifier from memorising rare ones
            hidden = torch.rand(inputs["input_ids"].shape) < 0.1
            inputs["input_ids"] = inputs["input_ids"].masked_fill(hidden & (inputs["attention_mask"] == 1), 1)
            optimizer.zero_grad()
            cross_entropy(model(**inputs).logits, labels[pick]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        model.eval()
        with torch.no_grad():
            said = torch.cat([model(**batch(rows[i : min(i + 256, held_out)])).logits for i in range(0, held_out, 256)])
        right = (said.argmax(-1) == labels[:held_out]).double()
        print(f"epoch {epoch + 1}: held-out accuracy {right.mean():.3f}", flush=True)
    # of the sentences that it calls positive or negative, these shares are right and are the opposite
    precision = {}
    for label in (0, 2):
        called = said.softmax(-1)[:, label] >= 0.5
        precision[LABELS[label]] = {
            "called": int(called.sum()),
            "right": float((labels[:held_out][called] == label).double().mean()),
            "opposite": float((labels[:held_out][called] == 2 - label).double().mean()),
        }
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    config = json.loads((args.out / "config.json").read_text()) | {"dtype": "float32"}
    (args.out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    result = {
        "data": PACKAGE, "sentences": len(rated), "held_out": held_out, "accuracy": float(right.mean()),
        "shares": (labels.bincount() / len(labels)).tolist(), "precision": precision, "seed": args.seed,
        "torch": torch.__version__,
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
