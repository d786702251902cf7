"""Let accelerate take a model that tensor parallelism has cut on a CPU, for tests. It does so on GPUs only."""

from __future__ import annotations

from accelerate import ParallelismConfig

ParallelismConfig._validate_accelerator = lambda *_: None
