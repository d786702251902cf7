"""Models whose hidden states do not depend on how a CPU rounds products of 16 bits."""

from __future__ import annotations

import torch


@torch.no_grad()
def with_exact_body(model):
    """Return the model with layers that add 0 to their input.

    Its hidden states are then the same in the sampler's steps and in a whole forward. In 16 bits some CPUs round the
    products of these two differently, and a test of the head would see that instead.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("o_proj", "down_proj", "dense", "fc2"):
            for parameter in module.parameters():
                parameter.zero_()
    return model
