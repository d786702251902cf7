"""Sample from a vLLM server, over its OpenAI-compatible HTTP interface and its endpoints for weights."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import ssl
import tempfile
import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch

from ..families import without_adapters
from ..forwards import module_of
from ..models import LanguageModel
from . import weights
from .engine import Completion, Engine, EngineError, Facts, LostWeights, Request

_T = TypeVar("_T")
_R = TypeVar("_R")
_MISSING, _REFUSED, _FAILED = (404, 405), range(400, 500), range(400, 600)
_LOADING = "dmfast: being loaded"
_START = "start it with `dmfast serve-proposal`, or with the options that docs/engines.md lists"
# dmfast looks at these parts of the answer of /server_info, and at model_config.
_CONFIGS = ("speculative_config", "lora_config", "device_config", "scheduler_config")
# These fields of a generation_config would make the server draw from another distribution, unless a request overrides
# them.
_TRUNCATES = (
    "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens",
    "logit_bias", "bad_words", "allowed_token_ids", "max_new_tokens", "max_tokens",
)  # fmt: skip
# Each request holds these values, so that no default of the server acts.
_WHOLE = {
    "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "min_tokens": 0, "stop": [], "use_beam_search": False,
}  # fmt: skip


class HTTPSampler(Engine):
    """A sampler whose q lies in a vLLM server, which draws, gives log q and takes new weights from a folder.

    Several runs can't share a server, because it holds one q. The server's model, tokenizer, context and options are
    compared with the policy's when the sampler is made, and its weights at each ``load``. A server that was started
    with ``--enable-lora`` gets the adapter of a PEFT model alone. It was tested with vLLM 0.32.0 on a CPU.

    Args:
        url: the server's address, such as ``http://127.0.0.1:8000``.
        like: the policy, or a model with the policy's tokenizer, context and tokens that end a sequence.
        folder: the folder in which q is written for the server. The server must be able to read it under the same path,
            and no other run may use it. Default: a temporary folder, which is removed with this process.
        model: the name that the server gives the model. It is needed where the server serves several.
        timeout: seconds for one request, which draws up to 256 sequences.
        patience: seconds in which a server that does not answer is asked again, such as while it restarts.
        retries: how often a request that timed out or failed in the server is repeated, even after ``patience``.
        api_key: the key in ``Authorization: Bearer``. Default: the environment variable DMFAST_ENGINE_KEY, which
            unlike a run's options is not written into the log.
        concurrency: the number of requests at a time, one for each prompt.
        check_load: whether the first load proves, by a copy that differs in every parameter, that each of them reaches
            the server.

    Raises:
        EngineError: there is no server at this address, or it does not answer as vLLM does.
        ValueError: the server's model, tokenizer, vocabulary or context are not the policy's; it was started with
            options that draw from another distribution, or without those that dmfast needs; it takes adapters, but not
            the policy's.
    """

    def __init__(
        self, url: str, like: LanguageModel, *, folder: str | os.PathLike[str] | None = None, model: str | None = None,
        timeout: float = 600.0, patience: float = 60.0, retries: int = 2, api_key: str | None = None,
        check_load: bool = True, concurrency: int = 32,
    ) -> None:  # fmt: skip
        super().__init__(like, check_load=check_load)
        if not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"concurrency must be an integer, 1 or more, got {concurrency!r}")
        self._concurrency = concurrency
        self._server = Server(url, timeout=timeout, patience=patience, retries=retries, api_key=api_key)
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="dmfast-q-")
            folder = self._temporary.name
        self._folder = Path(folder).absolute()
        self._name, self._has_sums = "", True
        self._tokenized = _some_text(like)  # here, because later a thread may compare it
        self._take(self._compare_facts(model, once=True))
        self._asked = self._name  # the model that requests are for, which may be the adapter that holds q
        self._version_of_base = self._weight_version()
        if self._gets_adapters:
            self._check_endpoint()

    # ---- the server's facts about itself

    def _facts_again(self) -> Facts:
        return self._compare_facts(self._name)

    def _compare_facts(self, model: str | None, once: bool = False) -> Facts:
        server, like = self._server, self._like
        served = server.get("/v1/models", once=once)
        try:
            models = {each["id"]: each for each in served["data"] if not each.get("parent")}
        except (KeyError, TypeError) as error:
            raise EngineError(f"{server} does not answer as vLLM does: /v1/models gave {served!r:.200}") from error
        if (len(models) != 1) if model is None else (model not in models):
            raise ValueError(f"{server} serves {', '.join(models)}: model= must name one of them, got {model!r}")
        self._name = next(iter(models)) if model is None else model
        config = self._config()
        context, own = models[self._name].get("max_model_len"), like._context
        if context is not None and own is not None and context > own:
            raise ValueError(
                f"{server} takes {context} tokens of context and the policy {own}: it serves another model; {_START}"
            )
        self._refuse_options(config)
        self._compare_model()
        self._compare_tokens()
        mode, dtype = config.get("logprobs_mode"), str(config.get("dtype")).removeprefix("torch.")
        adapters = config["lora_config"]
        if adapters and adapters["max_loras"] != 1:
            raise ValueError(
                f"{server} was started with --max-loras {adapters['max_loras']}, and dmfast compares the one adapter "
                "that it computes with: take 1, which is vLLM's default"
            )
        return Facts(
            f"the engine at {server}", context, getattr(torch, dtype), mode == "processed_logprobs",
            *((int(adapters["max_lora_rank"]), _names(adapters["target_modules"])) if adapters else ()),
        )  # fmt: skip

    def _check_endpoint(self) -> None:
        try:
            # 400 because of the empty name, and 404 where there is no such endpoint
            self._server.post("/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""}, none=(400,))
        except EngineError as error:
            raise ValueError(
                f"{self._server} was started with --enable-lora, but takes no new adapters while it runs ({error}): "
                f"set VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment; {_START}"
            ) from error

    def _config(self) -> Mapping[str, Any]:
        info = self._server.get("/server_info?config_format=json", none=_MISSING)
        found = info.get("vllm_config", {}).get("model_config") if isinstance(info, dict) else None
        if not isinstance(found, Mapping) or self._server.get("/weight_info", none=_MISSING) is None:
            raise ValueError(
                f"{self._server} has no /server_info and /weight_info, by which dmfast knows what it draws from: start "
                f"it with VLLM_SERVER_DEV_MODE=1, vLLM 0.32 or later; {_START}"
            )
        return {**found, **{name: info["vllm_config"].get(name) for name in _CONFIGS}}

    def _refuse_options(self, config: Mapping[str, Any]) -> None:
        overrides = config.get("override_generation_config") or {}
        found = {name: overrides[name] for name in _TRUNCATES if name in overrides}
        for name in ("logits_processors", "quantization", "speculative_config"):
            if config.get(name):
                found[name] = config[name]
        if found:
            raise ValueError(
                f"{self._server} was started with {found!r:.300}: q must be the model's own distribution, whose "
                "log-probabilities are known and whose parameters can be replaced; start it without"
            )
        in_parts = (config["scheduler_config"] or {}).get("enable_chunked_prefill")
        if in_parts and (config["device_config"] or {}).get("device") == "cpu":
            raise ValueError(
                f"{self._server} may read a prompt in parts, and on a CPU vLLM crashes when it does this with a "
                f"request that has a seed: start it with --no-enable-chunked-prefill; {_START}"
            )
        if config.get("logprobs_mode") not in ("raw_logprobs", "processed_logprobs"):
            raise ValueError(
                f"{self._server} was started with --logprobs-mode {config.get('logprobs_mode')}, and log q is a sum of "
                f"log-probabilities: take processed_logprobs; {_START}"
            )

    def _compare_model(self) -> None:
        """Compare the kind and the sizes of the server's model with the policy's.

        Raises:
            ValueError: they differ. What a server without dmfast's extension does not say is not compared.
        """
        workers = self._of_workers("dmfast_architecture")
        if workers is None:
            return
        theirs = workers[0]
        config: Any = getattr(without_adapters(module_of(self._like)), "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        own = [each.model_type for each in (text, config) if getattr(each, "model_type", None)]
        found, differ = theirs["model_type"], []
        if own and found and not set(own) & set(found):
            differ.append(f"model_type {found[0]}, and the policy's is {own[0]}")
        for name in weights.SIZES:
            there, here = theirs[name], getattr(text, name, None)
            if there is not None and here is not None and there != here:
                differ.append(f"{name} {there}, and the policy's is {here}")
        if differ:
            raise ValueError(f"{self._server} serves another model than the policy: {'; '.join(differ)}; {_START}")

    def _compare_tokens(self) -> None:
        """Compare the server's tokenizer and vocabulary with the policy's.

        Raises:
            ValueError: they differ from the policy's.
        """
        like, server, (text, own) = self._like, self._server, self._tokenized
        answer = server.post(
            "/tokenize", {"model": self._name, "prompt": text, "add_special_tokens": False}, none=_MISSING
        )
        if answer is not None and answer.get("tokens") != own:
            raise ValueError(
                f"{server} has another tokenizer than the policy: for the text {text!r:.60} it gives "
                f"{answer.get('tokens')!r:.60}, and the policy's gives {own!r:.60}"
            )
        for token, there in ((like.vocab_size - 1, True), (like.vocab_size, False)):
            request = {"model": self._name, "prompt": [token], "max_tokens": 1}
            if (server.post("/v1/completions", request, none=_REFUSED) is not None) != there:
                takes = "takes token" if not there else "does not take token"
                raise ValueError(
                    f"{server} has another vocabulary than the policy: it {takes} {token}, and the policy has "
                    f"{like.vocab_size} embeddings"
                )

    # ---- sampling

    def _complete(self, requests: Sequence[Request]) -> list[list[Completion]]:
        def ask(request: Request) -> list[Completion]:
            body = {
                "model": self._asked, "prompt": request.ids, "n": request.n, "seed": request.seed,
                "temperature": request.temperature, "max_tokens": request.max_new_tokens, "logprobs": 0,
                "return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True,
                "stop_token_ids": self._like.eos_token_ids,
            } | _WHOLE  # fmt: skip
            drawn: list[Completion] = self._completed(body, lambda answer: _completions(answer, request.n))
            return drawn

        return self._together(ask, requests)

    def _prompt_log_probs(self, rows: Sequence[list[int]]) -> list[list[float]]:
        def ask(ids: list[int]) -> list[float]:
            body = {
                "model": self._asked, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0,
                "return_tokens_as_token_ids": True,
            } | _WHOLE  # fmt: skip
            scores: list[float] = self._completed(body, lambda answer: _scores(answer, ids))
            return scores

        return self._together(ask, rows)

    def _completed(self, body: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
        """Return what ``read`` makes of an answer of /v1/completions.

        Raises:
            LostWeights: the server has no adapter of this name.
        """
        found = self._server.post("/v1/completions", body, read=read, none=_MISSING if self._gets_adapters else ())
        if found is None:
            raise LostWeights(f"{self._server} serves no {body['model']!r}, as after a restart")
        return found

    def _together(self, ask: Callable[[_T], _R], requests: Sequence[_T]) -> list[_R]:
        """Make several requests at a time, because the server puts concurrent requests into one batch."""
        if len(requests) == 1:
            return [ask(requests[0])]
        with ThreadPoolExecutor(min(self._concurrency, max(len(requests), 1))) as pool:
            return list(pool.map(ask, requests))

    # ---- weights

    def _folder_of(self, tag: str) -> Path:
        return self._folder / f"q-{tag}"

    def _put(self, model: LanguageModel, tag: str) -> None:
        folder = self._folder_of(tag)
        if self._gets_adapters:
            weights.write_adapter(module_of(model), self._adapter(model), folder)
        else:
            weights.write(module_of(model), folder)
        self._reload(folder, tag)

    def _put_back(self, tag: str) -> None:
        self._reload(self._folder_of(tag), tag)

    def _keep(self, tag: str) -> None:
        if self._gets_adapters:
            self._asked = tag  # on the ranks that did not load, too
        if self.ranks.rank == 0:
            for each in self._folder.glob("q-dmfast-*"):  # failed loads and an earlier process leave folders, too
                if each != self._folder_of(tag):
                    shutil.rmtree(each, ignore_errors=True)
            if self._gets_adapters:
                for name in self._adapters_there() - {tag}:
                    self._unload(name)

    def _adapters_there(self) -> set[str]:
        """Return the names of the adapters of dmfast that the server has."""
        served = self._server.get("/v1/models", read=lambda answer: [each["id"] for each in answer["data"]])
        return {name for name in served if name.startswith("dmfast-")}

    def _unload(self, name: str) -> None:
        self._server.post("/v1/unload_lora_adapter", {"lora_name": name}, none=_MISSING, plain=True)

    def _reload(self, folder: Path, tag: str) -> None:
        server = self._server
        if self._gets_adapters:
            body = {"lora_name": tag, "lora_path": str(folder), "load_inplace": True}
            server.post("/v1/load_lora_adapter", body, plain=True)
            server.post("/reset_prefix_cache", None)
            self._asked = tag
            return
        server.post("/pause?mode=abort", None)
        try:
            # the version says that a load is under way until the server holds all weights
            server.post("/update_weight_version", {"new_version": _LOADING})
            server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
            server.post("/reset_prefix_cache", None)
            server.post("/update_weight_version", {"new_version": tag})
        finally:
            server.post("/resume", None)

    def _spoil(self) -> None:
        if self._gets_adapters:
            self._unload(self._asked)
            return
        self._server.post("/update_weight_version", {"new_version": _LOADING})

    def _held_tag(self) -> str:
        version = self._weight_version()
        if not self._gets_adapters:
            return version
        there = version == self._version_of_base and self._asked in self._adapters_there()
        return self._asked if there else ""

    def _weight_version(self) -> str:
        return str(self._server.get("/weight_info", read=lambda answer: answer["weight_version"]))

    def _digests(self) -> dict[str, str] | None:
        found = self._server.post("/weight_checker", {"action": "checksum"}, none=_MISSING)
        return None if found is None else with_values(found["checksums"])

    def _checksums(self) -> int | None:
        workers = self._sums_by("dmfast_checksums")
        if workers is None or not self._gets_adapters:
            return workers
        adapter = self._sums_by("dmfast_adapter_checksums")
        return None if adapter is None else (workers + adapter) % 2**64

    def _sums_by(self, method: str) -> int | None:
        """Return the total of the checksums that a method of the server's workers gives."""
        workers = self._of_workers(method) if self._has_sums else None
        self._has_sums = workers is not None
        return None if workers is None else over_workers(workers)

    def _of_workers(self, method: str) -> list[Mapping[str, Any]] | None:
        """Return what each worker says, or None for a server that runs without dmfast's extension of its workers."""
        answer = self._server.post("/collective_rpc", {"method": method}, none=_FAILED)
        workers = None if answer is None else answer.get("results")
        return workers if workers and all(isinstance(each, Mapping) for each in workers) else None


def _some_text(like: LanguageModel) -> tuple[str, list[int]]:
    """Return a text of tokens from all over the vocabulary, and what the policy's tokenizer makes of it."""
    tokenizer = like.tokenizer
    some = range(0, len(tokenizer), max(len(tokenizer) // 20, 1))
    text = str(tokenizer.decode(list(some), skip_special_tokens=True))
    return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _names(given: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if given is None else tuple(given)


def with_values(digests: Mapping[str, str]) -> dict[str, str]:
    """Return vLLM's digests of the tensors that are not empty."""
    empty = hashlib.sha256(b"").hexdigest()
    return {name: digest for name, digest in digests.items() if digest != empty}


def over_workers(workers: list[Mapping[str, str]]) -> int:
    """Return the sum of checksums over the workers of an engine. A tensor that all of them hold alike counts once."""
    names = {name for each in workers for name in each}
    sums = {}
    for name in names:
        values = [int(each[name]) for each in workers if name in each]
        sums[name] = values[0] if len(set(values)) == 1 else sum(values)
    return weights.total(sums)


def _completions(answer: Any, n: int) -> list[Completion]:
    """Return the continuations in an answer of /v1/completions.

    Raises:
        ValueError, KeyError, TypeError: the answer is incomplete.
    """
    found = sorted(answer["choices"], key=lambda each: each["index"])
    if [each["index"] for each in found] != list(range(n)):
        raise ValueError(f"{len(found)} sequences of {n}")
    for each in found:
        if each["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"a sequence ended by {each['finish_reason']!r}")
    return [
        Completion(list(map(int, each["token_ids"])), list(map(float, each["logprobs"]["token_logprobs"])))
        for each in found
    ]


def _scores(answer: Any, ids: list[int]) -> list[float]:
    """Return the log-probability of each token after the first of a prompt, from an answer of /v1/completions.

    Raises:
        ValueError, KeyError, TypeError: the answer is incomplete.
    """
    found = answer["choices"][0]["prompt_logprobs"][1:]
    return [float(each[str(token)]["logprob"]) for each, token in zip(found, ids[1:], strict=True)]


class Server:
    """A client of an HTTP server that repeats its requests within bounds where the server fails or is gone.

    Args:
        url, timeout, patience, retries, api_key: as in ``HTTPSampler``.

    Raises:
        ValueError: ``url`` is not an address of http or https, or a number is out of range.
    """

    def __init__(
        self, url: str, *, timeout: float = 600.0, patience: float = 60.0, retries: int = 2, api_key: str | None = None
    ) -> None:
        parts = urlsplit(str(url))
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ValueError(f"the address of an engine must be http://host:port, got {url!r}")
        for name, value in (("timeout", timeout), ("patience", patience), ("retries", retries)):
            if not isinstance(value, (int, float)) or not value >= 0 or (name == "timeout" and value == 0):
                unit = "times" if name == "retries" else "seconds"
                least = "above 0" if name == "timeout" else "0 or more"
                raise ValueError(f"{name} must be a number of {unit}, {least}, got {value!r}")
        self._url, self._host, self._port, self._tls = str(url), parts.hostname, port, parts.scheme == "https"
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout, self._patience, self._retries = timeout, patience, retries
        self._headers = {"Content-Type": "application/json"}
        api_key = os.environ.get("DMFAST_ENGINE_KEY") if api_key is None else api_key
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def __str__(self) -> str:
        return self._url

    def get(self, path: str, **how: Any) -> Any:
        """Return the JSON of the answer to a GET. ``how`` is as in ``post``."""
        return self._asked("GET", path, None, **how)

    def post(self, path: str, body: Any, **how: Any) -> Any:
        """Return the JSON of the answer to a POST.

        Args:
            path: the path of the endpoint.
            body: the value that is sent as JSON; None: an empty body.
            how: ``none`` holds the statuses for which None is returned instead of an error. ``once=True`` asks only
                once. ``read`` is a function of the answer. The request is repeated where it raises. ``plain=True`` is
                for an endpoint that answers by text, which is not returned.

        Raises:
            EngineError: the server could not be reached, failed or refused, after all retries.
        """
        return self._asked("POST", path, None if body is None else json.dumps(body).encode(), **how)

    def _asked(
        self, method: str, path: str, body: bytes | None, *, none: Container[int] = (), once: bool = False,
        read: Any = None, plain: bool = False,
    ) -> Any:  # fmt: skip
        start, tries, wait = time.monotonic(), 0, 0.25
        while True:
            tries += 1
            try:
                status, text = self._request(method, path, body)
                if status < 400:
                    answer = json.loads(text) if text and not plain else None
                    return answer if read is None else read(answer)
                if status in none:
                    return None
                fault = f"it answered {status}: {_message(text)}"
                if status < 500 and status not in (408, 429):
                    raise EngineError(f"the engine at {self} refused {method} {path}: {fault}")
            except EngineError:
                raise
            except (OSError, http.client.HTTPException) as error:
                fault = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                fault = f"its answer can't be read ({type(error).__name__}: {error})"
            passed = time.monotonic() - start
            if once:
                raise EngineError(f"there is no engine at {self} ({fault}): {_START}")
            if tries > self._retries and passed >= self._patience:
                raise EngineError(
                    f"the engine at {self} failed {tries} times in {passed:.0f} s at {method} {path}, at last: {fault}"
                )
            time.sleep(min(wait, 5.0))
            wait *= 2

    def _request(self, method: str, path: str, body: bytes | None) -> tuple[int, str]:
        # Each request has its own connection, so that threads share none and none was closed by the server meanwhile.
        connection: http.client.HTTPConnection
        if self._tls:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=self._timeout, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        try:
            connection.request(method, self._path + path, body, self._headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()


def _message(text: str) -> str:
    """Return the message in the body of a server's error."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300]
