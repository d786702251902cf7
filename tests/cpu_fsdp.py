"""Lets accelerate run FSDP2 on a CPU, for tests: it shards on GPUs only, and runs DDP in their place without a word.

It is imported before any Accelerator is made, and changes what accelerate takes several CPU processes for.
"""

from __future__ import annotations

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def _with_fsdp(self, *args, fsdp_plugin=None, **options):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type in (DistributedType.MULTI_CPU, DistributedType.FSDP):
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = _with_fsdp


def reset():
    """Let the next Accelerator of this process have another FSDP plugin."""
    AcceleratorState._reset_state()
