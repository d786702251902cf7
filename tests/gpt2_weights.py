"""Give the tests the same random weights of GPT-2 under every transformers.

Releases draw the weights in different orders. What a test samples and which steps swap q depend on them.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.pytorch_utils import Conv1D

_theirs = gpt2.GPT2PreTrainedModel._init_weights


def _init_weights(self, module):
    with torch.random.fork_rng([]):
        _theirs(self, module)  # this fills buffers too
    std = self.config.initializer_range
    if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
        init.normal_(module.weight, mean=0.0, std=std)
    elif isinstance(module, (gpt2.GPT2Attention, gpt2.GPT2MLP)):
        init.normal_(module.c_proj.weight, mean=0.0, std=std / math.sqrt(2 * self.config.n_layer))


gpt2.GPT2PreTrainedModel._init_weights = _init_weights
