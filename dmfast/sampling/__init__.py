"""What draws sequences: the ``Sampler`` protocol, and samplers that are made of other samplers.

``LanguageModel`` and ``AdapterView`` are samplers, too.
"""

from .ahead import AsyncSampler
from .mixture import Mixture
from .process import ProcessSampler
from .prompted import Prompted
from .protocol import Sampler

__all__ = ["AsyncSampler", "Mixture", "ProcessSampler", "Prompted", "Sampler"]
