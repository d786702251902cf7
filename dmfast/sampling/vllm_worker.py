"""Extend vLLM's workers (``--worker-extension-cls dmfast.sampling.vllm_worker.Worker``).

vLLM imports this module in each worker before the model is loaded, and calls the methods of ``Worker`` by
``collective_rpc``. On a CPU vLLM packs the weights of linear layers by oneDNN, and ``reload_weights`` then silently
leaves the packed copies as they were. So packing is switched off here.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor

from .weights import SIZES, checksum


def no_packed_weights() -> None:
    """Make vLLM on a CPU keep the weights of linear layers where ``reload_weights`` finds them."""
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False


class Worker:
    """The methods that dmfast adds to a worker of vLLM."""

    model_runner: Any

    def dmfast_architecture(self) -> dict[str, Any]:
        """Return the kinds and the sizes of this worker's model, whose configs are those of transformers."""
        config = self.model_runner.model_config
        whole, text = config.hf_config, config.hf_text_config
        kinds = [each.model_type for each in (text, whole) if getattr(each, "model_type", None)]
        return {"model_type": kinds} | {name: getattr(text, name, None) for name in SIZES}

    def dmfast_checksums(self) -> dict[str, str]:
        """Return the checksum of each parameter of this worker, as strings because JSON numbers are exact to 2^53."""
        return {name: str(checksum(parameter)) for name, parameter in self.model_runner.get_model().named_parameters()}

    def dmfast_adapter_checksums(self) -> dict[str, str]:
        """Return the checksum of each matrix of the LoRA adapter with which this worker computes, from its one slot."""
        found = {}
        for name, module in self.model_runner.lora_manager._adapter_manager.modules.items():
            for matrix in ("a", "b"):
                slots = getattr(module, f"lora_{matrix}_stacked")
                for part, each in enumerate([slots] if isinstance(slots, Tensor) else slots):
                    found[f"{name}.{matrix}{part}"] = str(checksum(each[0]))
        return found


with contextlib.suppress(ImportError):  # the documentation, for example, imports this module without vLLM
    no_packed_weights()
