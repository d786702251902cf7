"""Match a conditional distribution with an encoder-decoder (T5), in under a minute on a CPU.

    python examples/encoder_decoder.py

This is a small version of what Korbak et al. 2022 (arXiv:2112.00791) do with T5. A tiny T5 learns by maximum likelihood
to translate sentences such as "two dogs and cats". It translates a number as a word four times out of five, and as a
digit otherwise. A noun has two synonyms, of which the first comes seven times out of ten. The wish is that numbers are
translated as digits: b(x, c) = 1 if x is a right translation of c with digits for all numbers. So
p(x|c) = a(x|c) b(x, c) / Z_c has four translations of every sentence, in the shares that the base gives them, and Z_c
is about .2 to the power of the number of numbers in c. The target can be summed exactly, and the policy is compared
with it.

The 16 samples of a sentence with two numbers often contain no right one. As long as P = 0 for everything that was seen
of a context, its Z and its weights are 0, and its sequences count in ``out.n_empty``.

The loop does by hand what ``dmfast.Matcher`` does for a ``LanguageModel``, which is decoder-only.
"""

import argparse
import copy
import itertools
import random
import time

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

import dmfast
from dmfast.estimators import PartitionFunctions

NUMBERS = {"two": ("deux", "2"), "three": ("trois", "3"), "four": ("quatre", "4"), "five": ("cinq", "5")}
NOUNS = {
    "dogs": ("chiens", "toutous"), "cats": ("chats", "minous"), "cars": ("voitures", "bagnoles"),
    "books": ("livres", "bouquins"), "houses": ("maisons", "baraques"), "friends": ("amis", "copains"),
}  # fmt: skip
TRANSLATIONS = NUMBERS | NOUNS | {"and": ("et", "et")}
PAD, EOS = 0, 1
WORDS = ["<pad>", "</s>", *TRANSLATIONS, *sorted({word for pair in TRANSLATIONS.values() for word in pair})]


def encode(sentences: list[list[str]], pad: int) -> Tensor:
    """Return token ids with EOS, (N, L), padded on the right."""
    rows = [torch.tensor([*(WORDS.index(word) for word in sentence), EOS]) for sentence in sentences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def inputs_of(contexts: list[list[str]]) -> dict[str, Tensor]:
    """Return the inputs of the encoder."""
    tokens = encode(contexts, PAD)
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}


def sample_plainly(model: PreTrainedModel) -> None:
    """Let generate() draw from the model's own distribution. Without this, transformers sets options such as top_k."""
    ids = {name: getattr(model.config, name) for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id")}
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, **ids)


def draw(model: PreTrainedModel, inputs: dict[str, Tensor], max_new_tokens: int) -> Tensor:
    """Draw a translation for each row, and return labels (N, T) up to the first EOS and with it, then -100."""
    rows = model.generate(**inputs, max_new_tokens=max_new_tokens)[:, 1:]  # the first is decoder_start_token_id
    end = rows == model.config.eos_token_id
    # ``rows == pad_token_id`` would be wrong, since that token may be drawn, and then counts before EOS
    return rows.masked_fill(end.cumsum(1) - end.long() > 0, -100)


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return (N, T, V) logits. ``logits[:, t]`` scores ``labels[:, t]``, as the decoder reads labels shifted right."""
    read = model.prepare_decoder_input_ids_from_labels(labels)
    return model(**inputs, decoder_input_ids=read, use_cache=False).logits


@torch.no_grad()
def log_prob(model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return log pi(x|c), (N,) fp64."""
    return dmfast.sequence_log_prob(logits_of(model, inputs, labels), labels)


def a_context(numbers: int, rng: random.Random) -> list[str]:
    """Return two nouns with ``numbers`` numbers before them."""
    first, second = rng.sample(list(NOUNS), 2)
    one, two = rng.choices(list(NUMBERS), k=2)
    return [*([one] if numbers else []), first, "and", *([two] if numbers == 2 else []), second]


def a_translation(context: list[str], rng: random.Random) -> list[str]:
    """Return a translation as the corpus has it."""
    return [TRANSLATIONS[word][rng.random() < (0.2 if word in NUMBERS else 0.3)] for word in context]


def wished(context: list[str]) -> list[list[str]]:
    """Return all x with b(x, c) = 1."""
    choices = [TRANSLATIONS[word][1:] if word in NUMBERS else dict.fromkeys(TRANSLATIONS[word]) for word in context]
    return [list(words) for words in itertools.product(*choices)]


def pretrained(steps: int, rng: random.Random) -> PreTrainedModel:
    """Return the base model a."""
    config = T5Config(vocab_size=len(WORDS), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
                      pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD)  # fmt: skip
    model = T5ForConditionalGeneration(config)
    sample_plainly(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        contexts = [a_context(rng.randrange(3), rng) for _ in range(64)]
        labels = encode([a_translation(context, rng) for context in contexts], -100)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        model(**inputs_of(contexts), labels=labels).loss.backward()
        optimizer.step()
    return model


class Exact:
    """p(.|c) of each context, from the sum over the x with b = 1."""

    def __init__(self, base: PreTrainedModel, contexts: list[list[str]]) -> None:
        rows = [(row, x) for row, context in enumerate(contexts) for x in wished(context)]
        self.row = torch.tensor([row for row, _ in rows])
        self.inputs, self.labels = inputs_of([contexts[row] for row, _ in rows]), encode([x for _, x in rows], -100)
        self.n, self.log_a = len(contexts), log_prob(base, self.inputs, self.labels)
        self.log_z = self.sum(self.log_a.exp()).log()
        self.log_p = self.log_a - self.log_z[self.row]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums within each context."""
        return torch.zeros(self.n, dtype=torch.float64).index_add_(0, self.row, values)

    def of(self, policy: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """Return E_pi[b] and KL(p||pi) in nats for each context."""
        log_pi = log_prob(policy, self.inputs, self.labels)
        return self.sum(log_pi.exp()), self.sum(self.log_p.exp() * (self.log_p - log_pi))


def main() -> dict[str, Tensor]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining", type=int, default=300, help="steps of 64 sentences")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--contexts", type=int, default=24, help="a multiple of 3: without, with one, with two numbers")
    parser.add_argument("--per-step", type=int, default=12, help="contexts of a step")
    parser.add_argument("--samples", type=int, default=16, help="n, of each context")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    options = parser.parse_args()

    torch.manual_seed(0)
    rng, start = random.Random(0), time.perf_counter()
    policy = pretrained(options.pretraining, rng)
    base = copy.deepcopy(policy).requires_grad_(False)
    contexts = [a_context(i % 3, rng) for i in range(options.contexts)]
    numbers = torch.tensor([sum(word in NUMBERS for word in context) for context in contexts])
    good = [{tuple(x) for x in wished(context)} for context in contexts]
    exact = Exact(base, contexts)
    before = exact.of(policy)
    print(f"pretrained in {time.perf_counter() - start:.0f} s")

    proposal = dmfast.OfflineProposal(policy, criterion="kl", interval=5)
    z = PartitionFunctions()
    optimizer = torch.optim.Adam(policy.parameters(), lr=options.learning_rate)
    for step in range(options.steps):
        rows = [row % len(contexts) for row in range(step * options.per_step, (step + 1) * options.per_step)]
        context_id = torch.tensor(rows).repeat_interleave(options.samples)
        inputs = inputs_of([contexts[row] for row in context_id])
        labels = draw(proposal.snapshot, inputs, max_new_tokens=8)
        log_q, log_a = (log_prob(model, inputs, labels) for model in (proposal.snapshot, base))
        texts = [tuple(WORDS[i] for i in row if i not in (-100, EOS)) for row in labels.tolist()]
        b = torch.tensor([text in good[row] for text, row in zip(texts, context_id.tolist(), strict=True)]).double()
        log_target = log_a + b.log()
        z = z.updated(context_id, log_target, log_q)  # one Z for each context, over all of its visits

        out = dmfast.dm_loss(
            logits_of(policy, inputs, labels), labels, log_target=log_target, log_proposal=log_q,
            log_z=z.log_z(context_id), objective="gdc++", inplace=True,
        )  # fmt: skip
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        proposal.update(out)
        if step == 0 or (step + 1) % max(options.steps // 6, 1) == 0:
            kl = proposal.running.estimates().kl_policy
            print(f"step {step + 1:3d}  share with b = 1 {float(b.mean()):.3f}  KL(p||pi) {kl}  "
                  f"swaps {proposal.swaps}  sequences without a Z {int(out.n_empty)}")  # fmt: skip
        proposal.maybe_update()

    after, found = exact.of(policy), z.log_z(torch.arange(len(contexts)))
    print("numbers  Z: exact, found    E_pi[b]: before, after    KL(p||pi): before, after")
    for n in range(3):
        which = numbers == n
        columns = [exact.log_z.exp(), found.exp(), before[0], after[0], before[1], after[1]]
        print("   {}      {:.3f}  {:.3f}          {:.3f}  {:.3f}             {:.3f}  {:.3f}".format(
            n, *(float(column[which].mean()) for column in columns)))  # fmt: skip
    print(f"{time.perf_counter() - start:.0f} s")
    return {"log_z": exact.log_z, "found": found, "before": before[1], "after": after[1], "share": after[0]}


if __name__ == "__main__":
    main()
