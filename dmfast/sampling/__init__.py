"""What draws sequences: the ``Sampler`` protocol, and samplers that are made of other samplers.

``LanguageModel`` and ``AdapterView`` are samplers, too.
"""

from .mixture import Mixture
from .prompted import Prompted
from .protocol import Sampler

__all__ = ["Mixture", "Prompted", "Sampler"]
