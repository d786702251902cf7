"""Sample from vLLM in this process."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..forwards import module_of
from ..models import LanguageModel
from . import weights
from .engine import Completion, Engine, Facts, Request, has_adapter, plain
from .vllm_http import over_workers

_WORKER = "dmfast.sampling.vllm_worker.Worker"
# dmfast sets these arguments of vllm.LLM itself.
_OWN = ("model", "tokenizer", "dtype", "generation_config", "logprobs_mode", "worker_extension_cls", "max_model_len")


class VLLMSampler(Engine):
    """A sampler whose q lies in a ``vllm.LLM`` of this process, which draws, gives log q and takes new weights.

    vLLM holds a model of its own beside the policy, in ``gpu_memory_utilization`` of the device's memory. New weights
    are handed over in memory. With ``{"enable_lora": True}`` in ``engine`` it gets the adapter of a PEFT model alone,
    from a temporary folder. It was tested with vLLM 0.32.0 on a CPU.

    Args:
        like: the policy, which gives the architecture, tokenizer, context and tokens that end a sequence.
        dtype: the dtype in which vLLM computes: ``auto``, ``float32`` or ``bfloat16``. Default: the policy's.
        max_model_len: the most tokens of prompt and continuation. Default: the model's context.
        engine: further arguments of ``vllm.LLM``, such as ``{"gpu_memory_utilization": 0.4}``.
        check_load: whether the first load proves, by a copy that differs in every parameter, that each of them reaches
            vLLM.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: ``engine`` has an argument that dmfast sets itself, or with which vLLM crashes on a CPU; the policy
            has an adapter that can't be merged or, with ``enable_lora``, that vLLM can't take.
    """

    _folder: Path | None  # that of the adapters, where vLLM gets adapters

    def __init__(
        self, like: LanguageModel, *, dtype: str | None = None, max_model_len: int | None = None,
        engine: Mapping[str, Any] | None = None, check_load: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(like, check_load=check_load)
        own = [name for name in _OWN if name in (engine or {})]
        if own:
            raise ValueError(f"engine can't hold {', '.join(own)}, which dmfast sets itself")
        # Weights are handed over in memory, which an engine in a process of its own would not share.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ImportError(f"sampler='vllm' needs vLLM in this environment (docs/engines.md): {error}") from error
        from .vllm_worker import no_packed_weights

        no_packed_weights()
        engine, self._folder = dict(engine or {}), None
        if current_platform.is_cpu():
            # vLLM crashes on a CPU when it reads the prompt of a request with a seed in parts
            if engine.get("enable_chunked_prefill"):
                raise ValueError(
                    "engine can't hold enable_chunked_prefill=True on a CPU, where vLLM crashes when it reads the "
                    "prompt of a request with a seed in parts: leave it out"
                )
            engine["enable_chunked_prefill"] = False
        if engine.get("enable_lora") and has_adapter(like):
            self._temporary = tempfile.TemporaryDirectory(prefix="dmfast-q-")
            self._folder = Path(self._temporary.name)
            modules = {
                name for each in module_of(like).active_adapters for name in weights.lora_modules(module_of(like), each)
            }
            engine.setdefault("lora_target_modules", sorted(modules))
        policy = next(like.model.parameters()).dtype
        dtype = str(policy).removeprefix("torch.") if dtype is None else dtype
        with tempfile.TemporaryDirectory(prefix="dmfast-vllm-") as folder:
            start = Path(folder) / "policy"
            alone = self._folder is not None  # an adapter is given later, to vLLM with the policy's base
            weights.write(copy.deepcopy(module_of(like)).unload() if alone else plain(like), start)
            like.tokenizer.save_pretrained(start)
            self._llm: Any = LLM(
                str(start), dtype=dtype, generation_config="vllm", logprobs_mode="processed_logprobs",
                worker_extension_cls=_WORKER, max_model_len=max_model_len, **engine,
            )  # fmt: skip
        self._lock = threading.Lock()
        self._own_tag, self._kept, self._last = "", list[tuple[str, Tensor]](), list[tuple[str, Tensor]]()
        self._adapter_given: Any = None  # the LoRARequest of q
        self._adapters_given = 0
        config, adapters = self._llm.llm_engine.model_config, self._llm.llm_engine.vllm_config.lora_config
        self._take(Facts(
            "vLLM in this process", int(config.max_model_len), config.dtype, True,
            *(() if adapters is None else (int(adapters.max_lora_rank), tuple(adapters.target_modules or ()) or None)),
        ))  # fmt: skip

    def _complete(self, requests: Sequence[Request]) -> list[list[Completion]]:
        from vllm import SamplingParams

        prompts, parameters = [], []
        for request in requests:
            for place in range(request.n):
                prompts.append({"prompt_token_ids": request.ids})
                parameters.append(SamplingParams(
                    temperature=request.temperature, top_p=1.0, top_k=-1, min_p=0.0, seed=request.seed + place,
                    max_tokens=request.max_new_tokens, logprobs=0, ignore_eos=True, detokenize=False,
                    stop_token_ids=self._like.eos_token_ids,
                ))  # fmt: skip
        with self._lock:
            outputs = self._llm.generate(prompts, parameters, use_tqdm=False, lora_request=self._adapter_given)
        drawn = []
        for output in outputs:
            each = output.outputs[0]
            ids = list(each.token_ids)
            drawn.append(
                Completion(ids, [values[token].logprob for values, token in zip(each.logprobs, ids, strict=True)])
            )
        rest: Iterator[Completion] = iter(drawn)
        return [[next(rest) for _ in range(request.n)] for request in requests]

    def _prompt_log_probs(self, rows: Sequence[list[int]]) -> list[list[float]]:
        from vllm import SamplingParams

        how = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        with self._lock:
            prompts = [{"prompt_token_ids": ids} for ids in rows]
            outputs = self._llm.generate(prompts, how, use_tqdm=False, lora_request=self._adapter_given)
        return [
            [values[token].logprob for values, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, rows, strict=True)
        ]

    def _put(self, model: LanguageModel, tag: str) -> None:
        if self._folder is not None:
            weights.write_adapter(module_of(model), self._adapter(model), self._folder / tag)
            self._give_adapter(tag)
            return
        self._last = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in _named(module_of(model))]
        self._reload(self._last, tag)

    def _give_adapter(self, tag: str) -> None:
        from vllm.lora.request import LoRARequest

        assert self._folder is not None
        self._spoil()
        self._adapters_given += 1  # vLLM tells adapters apart by this number
        request = LoRARequest(tag, self._adapters_given, str(self._folder / tag))
        with self._lock:
            self._llm.llm_engine.add_lora(request)
            self._llm.reset_prefix_cache()
        self._adapter_given, self._own_tag = request, tag

    def _reload(self, tensors: Sequence[tuple[str, Tensor]], tag: str) -> None:
        self._spoil()
        with self._lock:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
            self._llm.reset_prefix_cache()
        self._own_tag = tag

    def _put_back(self, tag: str) -> None:
        if self._folder is not None:
            self._give_adapter(tag)
        else:
            self._reload(self._kept, tag)

    def _keep(self, tag: str) -> None:
        self._kept, self._last = self._last, []
        if self._folder is not None:
            for each in self._folder.iterdir():
                if each.name != tag:
                    shutil.rmtree(each, ignore_errors=True)

    def _spoil(self) -> None:
        self._own_tag = ""

    def _held_tag(self) -> str:
        return self._own_tag

    def _digests(self) -> dict[str, str] | None:
        return {
            name: each
            for worker in self._llm.collective_rpc("compute_weight_checksums")
            for name, each in worker.items()
        }

    def _checksums(self) -> int | None:
        methods = ["dmfast_checksums", *(["dmfast_adapter_checksums"] if self._gets_adapters else [])]
        return sum(over_workers(self._llm.collective_rpc(method)) for method in methods) % 2**64


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors by their names in its state. Tied ones come once, as ``save_pretrained`` writes them."""
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield name, tensor
