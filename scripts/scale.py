"""Predict the memory and the traffic of large policies on many GPUs, and write them between the marks of docs/scale.md.

This is a model. No device is involved, and nothing was measured.

    python scripts/scale.py [docs/scale.md]    prints the tables, or updates the page
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

MARKS = "<!-- scale -->\n", "<!-- end of scale -->\n"


class Model(NamedTuple):
    """Describe a causal language model.

    Attributes:
        name: its name in the tables.
        parameters: the number of its parameters.
        layers, width, inner, vocab: the number of layers, D, the width of the MLP, V.
        kv: the width of the keys (and of the values) of a token and layer: heads times their width.
    """

    name: str
    parameters: float
    layers: int
    width: int
    inner: int
    vocab: int
    kv: int


MODELS = [Model("7B", 7.62e9, 28, 3584, 18944, 152064, 512), Model("70B", 70.6e9, 80, 8192, 28672, 128256, 1024)]
GPUS = (8, 64, 512)
#: A GPU has this memory (GB), bandwidth (GB/s), rate of 16-bit products in training (FLOP/s), and bandwidth in each
#: direction to the other GPUs of its machine and to other machines (GB/s). PER_MACHINE is the GPUs of a machine.
MEMORY, BANDWIDTH, RATE, NEAR, FAR, PER_MACHINE = 80, 3350.0, 4e14, 450.0, 50.0, 8
#: In a step each GPU has SEQUENCES sequences, of which TOGETHER go through the policy at once. Each has PROMPT tokens
#: of prompt and NEW tokens of answer.
SEQUENCES, TOGETHER, PROMPT, NEW = 16, 8, 512, 512
HEAD_BUFFER = 1.0  # GB of logits that are held at once
GB = 1e9


class Way(NamedTuple):
    """Describe how pi, q and a are held.

    Attributes:
        name: its name in the tables.
        bytes_: the bytes of a parameter over all GPUs: parameters, gradients, Adam's two moments, q, a.
        trained: the share of the parameters that has a gradient.
        gathered: whether each GPU holds all of q while it samples.
        tensor: the number of GPUs that share a matrix, beside FSDP.
        draws: whether these GPUs sample.
    """

    name: str
    bytes_: float
    trained: float = 1.0
    gathered: bool = True
    tensor: int = 1
    draws: bool = True


WAYS = [
    Way("FSDP2, all parameters", 4 + 4 + 8 + 4 + 2),
    Way("the same, `gather_for_sampling=False`", 4 + 4 + 8 + 4 + 2, gathered=False),
    Way("the same, an engine elsewhere samples", 4 + 4 + 8 + 4 + 2, gathered=False, draws=False),
    Way("FSDP2, LoRA on one backbone", 2.0, trained=0.005),
    Way("FSDP2 × TP 8, all parameters", 4 + 4 + 8 + 4 + 2, tensor=8),
]


def gigabytes(model: Model, way: Way, gpus: int) -> float:
    """Return the largest memory that a GPU needs, in GB."""
    n, each = model.parameters, model.parameters / model.layers / way.tensor
    tokens = TOGETHER * (PROMPT + NEW)
    adapter = way.trained * 16 if way.trained < 1 else 0.0
    state = n * (way.bytes_ + adapter) / gpus
    # the current layer and the next are held in 16 bits, and so is the gradient of one
    layers = 2 * each * 2 + each * 4 * way.trained
    kept = model.layers * tokens * model.width * 2  # checkpointing keeps these activations
    layer = tokens * (10 * model.width + 6 * model.inner) * 2 / way.tensor
    # the head's gradient is summed in fp32
    gradient = model.vocab * model.width * 4 / way.tensor if way.trained == 1 else 0.0
    training = layers + kept + layer + HEAD_BUFFER * GB + gradient
    cache = SEQUENCES * (PROMPT + NEW) * 2 * model.layers * model.kv * 2
    sampling = cache + (n * 2 / way.tensor if way.gathered else 2 * each * 2)
    return (state + max(training, sampling if way.draws else 0.0)) / GB


def seconds(model: Model, way: Way, gpus: int) -> dict[str, float]:
    """Return the seconds that each part of a step would take alone."""
    n, groups = model.parameters / way.tensor, gpus // way.tensor
    # GPUs that share a matrix go through all their sequences together
    sequences = SEQUENCES * way.tensor
    passes, tokens = sequences // TOGETHER, sequences * (PROMPT + NEW)
    near = way.tensor == 1 and gpus <= PER_MACHINE
    # each parameter costs the forward, the backward, and the recomputation of checkpointing
    policy = 8 if way.trained == 1 else 6
    moved = passes * (2 + 2 + 4 * way.trained + 2) + 2 * way.gathered + 2 * NEW * (way.draws and not way.gathered)
    found = {
        "products": (policy + 2) * n * tokens / RATE,
        "traffic": moved * n * (groups - 1) / groups / ((NEAR if near else FAR) * GB),
    }
    if way.draws:
        found["reading q"] = NEW * n * 2 / (BANDWIDTH * GB)
    # each layer sums hidden states eight times, with the recomputation of checkpointing and with the base
    if way.tensor > 1:
        found["sums of TP"] = model.layers * 8 * tokens * model.width * 2 * 2 / (NEAR * GB)
    return found


#: An engine of this many GPUs holds q, by the name of the model. It uses the share USED of their memory.
ENGINE, USED = {"7B": 1, "70B": 8}, 0.9


def engine(model: Model) -> tuple[float, int, float]:
    """Return what q takes on each GPU of an engine in GB, the sequences that it draws at once, and their seconds."""
    gpus, n = ENGINE[model.name], model.parameters
    token = 2 * model.layers * model.kv * 2 / gpus  # the bytes of a token's keys and values on one GPU
    q = n * 2 / gpus
    at_once = int((USED * MEMORY * GB - q) / (token * (PROMPT + NEW)))
    reading = (q + at_once * token * (PROMPT + NEW / 2)) / (BANDWIDTH * GB)
    products = 2 * n * at_once / (RATE * gpus)
    return q / GB, at_once, NEW * max(reading, products) + PROMPT * products


def engines() -> list[str]:
    """Return the lines of the table of engines."""
    head = ["policy", "GPUs of an engine", "q on each of them", "sequences at once", "seconds for them"]
    head += [f"for {gpus} GPUs" for gpus in GPUS]
    lines = ["The table describes an engine that holds q in 16 bits. Its last columns say how many GPUs of engines",
             "draw as fast as the GPUs of a policy train under FSDP2.", ""]  # fmt: skip
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    way = next(way for way in WAYS if not way.draws)
    for model in MODELS:
        of_one, (q, at_once, long) = ENGINE[model.name], engine(model)
        steps = [max(seconds(model, way, gpus).values()) for gpus in GPUS]
        copies = [math.ceil(SEQUENCES * n / step * long / at_once) for n, step in zip(GPUS, steps, strict=True)]
        cells = [model.name, of_one, f"{q:.0f} GB", at_once, f"{long:.0f}", *[of_one * each for each in copies]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def table() -> str:
    """Return the three tables."""
    lines = ["The table gives the largest memory that a GPU needs, in GB. **Bold** figures do not fit one of "
             f"{MEMORY} GB.", ""]  # fmt: skip
    lines += [f"| way | {' | '.join(f'{m.name}, {g} GPUs' for m in MODELS for g in GPUS)} |", f"|---|{'---|' * 6}"]
    for way in WAYS:
        needs = [gigabytes(model, way, gpus) for model in MODELS for gpus in GPUS]
        cells = [f"**{need:.0f}**" if need > MEMORY else f"{need:.0f}" for need in needs]
        lines.append(f"| {way.name} | {' | '.join(cells)} |")
    lines += ["", "The table gives the two longest parts of a step, and the seconds that each would take alone.", ""]
    lines += [f"| model | way | {' | '.join(f'{gpus} GPUs' for gpus in GPUS)} |", "|---|---|---|---|---|"]
    for model in MODELS:
        for way in WAYS:
            cells = []
            for gpus in GPUS:
                parts = sorted(seconds(model, way, gpus).items(), key=lambda part: -part[1])
                cells.append(", ".join(f"{name} {long:.{int(long < 9.5)}f}" for name, long in parts[:2]))
            lines.append(f"| {model.name} | {way.name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *engines()]) + "\n"


def main() -> None:
    """Print the tables, or write them to the page."""
    if not sys.argv[1:]:
        print(table(), end="")
        return
    page = Path(sys.argv[1])
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
