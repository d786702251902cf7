"""End a rank of several in the tests' jobs."""

from __future__ import annotations

import os
import sys

import torch


def end():
    """End a rank of several.

    torch's DDP keeps gloo's threads alive. One that still holds a tensor when the interpreter is gone aborts the
    process, which torchrun takes for a failure.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
