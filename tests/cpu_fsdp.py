"""Let accelerate run FSDP2 on a CPU, for tests. By itself it shards on GPUs only, and silently runs DDP elsewhere.

Import this module before any Accelerator is made. It changes what accelerate takes several CPU processes for.
"""

from __future__ import annotations

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_init, _bare = AcceleratorState.__init__, False


def _with_fsdp(self, *args, fsdp_plugin=None, **options):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if (
        not _bare
        and fsdp_plugin is not None
        and self.distributed_type in (DistributedType.MULTI_CPU, DistributedType.FSDP)
    ):
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = _with_fsdp


def reset(bare=False):
    """Let the next Accelerator of this process have another FSDP plugin. With bare, it is accelerate's own on a CPU."""
    global _bare
    _bare = bare
    AcceleratorState._reset_state()
    if bare and PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
