"""Train the tiny biography model on the text that ``generate.py`` wrote.

    python scripts/tiny_bios/train.py

The model is a GPT-2 of 2 layers x 128 over whole words, trained from scratch on one core in a few
minutes. The folder that the script writes loads with ``AutoModelForCausalLM`` and ``AutoTokenizer``.
Weights are stored as fp16 and ``config.json`` says float32: the rounded weights, in fp32, are the model.

The text is made from names 0.3.0 (MIT) and WordNet 3.0 (WordNet licence). See ``generate.py``.
The model is released under Apache-2.0.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

REPO = Path(__file__).resolve().parents[2]
TEXT = Path.home() / ".cache" / "dmfast" / "tiny_bios" / "biographies.txt"
OUT = REPO / "dmfast" / "data" / "tiny_bios"
EOS = "<|endoftext|>"  # id 0 begins a text, ends it and pads it


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, the commonest first. An unknown word is an error."""
    counts = Counter(word for text in texts for word in text.split())
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate([EOS, *ordered])}))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def encode(texts: list[str], vocabulary: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``EOS words EOS`` padded on the right, and the labels with padding as -100."""
    rows = [[0, *(vocabulary[word] for word in text.split()), 0] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row[1:] + [-100] * (width - len(row)) for row in rows])
    return ids, labels


def loss_of(model: GPT2LMHeadModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean loss per predicted token, with the columns of padding alone left out."""
    width = int((labels != -100).sum(1).max())
    ids = ids[:, :width]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return cross_entropy(logits.flatten(0, 1), labels[:, :width].flatten(), ignore_index=-100)


@torch.no_grad()
def validate(model: GPT2LMHeadModel, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the loss per token over the whole validation set."""
    total = 0.0
    for x, y in zip(ids.split(250), labels.split(250), strict=True):
        total += float(loss_of(model, x, y)) * int((y != -100).sum())
    return total / int((labels != -100).sum())


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Store the weights as fp16, and a config that makes them load as fp32."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)  # config.json has the same ids
    path = out / "config.json"
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, default=TEXT, help="one biography a line")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the checkpoint")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    texts = args.text.read_text().splitlines()
    tokenizer = build_tokenizer(texts)
    ids, labels = encode(texts, tokenizer.get_vocab())
    held_out = len(texts) // 20
    val_ids, val_labels = ids[:held_out], labels[:held_out]
    ids, labels = ids[held_out:], labels[held_out:]

    size = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 128, "n_layer": 2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    no_dropout["summary_first_dropout"] = 0.0  # the model has no such head
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**size, n_head=4, **no_dropout, **special))
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} words, {len(ids)} texts")

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, fused=True)
    steps = args.epochs * math.ceil(len(ids) / args.batch)

    def schedule(step: int) -> float:
        warm = min(1.0, (step + 1) / 200)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    start = time.monotonic()
    for epoch in range(1, args.epochs + 1):
        for pick in torch.randperm(len(ids)).split(args.batch):
            loss = loss_of(model, ids[pick], labels[pick])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        val = validate(model, val_ids, val_labels)
        seconds = time.monotonic() - start
        print(f"epoch {epoch} train {loss.item():.4f} val {val:.4f} {seconds:.0f} s", flush=True)

    save(model, tokenizer, args.out)
    stored = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32)
    print(f"val loss of the stored model {validate(stored, val_ids, val_labels):.4f}")


if __name__ == "__main__":
    main()
