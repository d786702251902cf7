"""Draw sequences: the ``Sampler`` protocol, samplers that are made of other samplers, and engines.

``LanguageModel`` and ``AdapterView`` are samplers, too. An engine's library is imported only when an engine is made.
"""

from .ahead import AsyncSampler
from .engine import EngineError
from .making import check_options, make
from .mixture import Mixture
from .process import ProcessSampler
from .prompted import Prompted
from .protocol import Sampler
from .vllm_http import HTTPSampler
from .vllm_local import VLLMSampler

__all__ = [
    "AsyncSampler",
    "EngineError",
    "HTTPSampler",
    "Mixture",
    "ProcessSampler",
    "Prompted",
    "Sampler",
    "VLLMSampler",
    "check_options",
    "make",
]
