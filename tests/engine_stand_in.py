"""Stand in for a vLLM server: a small model of transformers behind the same HTTP answers.

It answers as vLLM 0.32.0 does. ``scripts/ci/engines.py --record`` wrote the answers of the real one into
``vllm_answers.json``, and ``test_engines.py`` compares their shapes. Of the answer of /server_info only the names of
its fields were recorded. The answers to loads that succeed were written after vLLM's source. A test can ask for what
may go wrong with a server: see ``Faults``.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from dmfast.sampling import HTTPSampler, weights

CONFIG = {
    "dtype": "torch.float32", "logprobs_mode": "processed_logprobs", "generation_config": "vllm",
    "override_generation_config": {}, "logits_processors": None, "quantization": None,
    "device_config": {"device": "cpu"}, "scheduler_config": {"enable_chunked_prefill": False},
}  # fmt: skip
BESIDE = ("speculative_config", "device_config", "scheduler_config")

#: The recorded answers answer this request.
REQUEST = {"model": "q", "prompt": [1, 2], "n": 2, "seed": 5, "max_tokens": 3, "logprobs": 0, "prompt_logprobs": 0,
           "return_token_ids": True, "return_tokens_as_token_ids": True, "stop_token_ids": [5]}  # fmt: skip
EXCHANGES = {
    "models": ("GET", "/v1/models", None),
    "weight_info": ("GET", "/weight_info", None),
    "completions": ("POST", "/v1/completions", REQUEST),
    "beyond the vocabulary": ("POST", "/v1/completions", {"model": "q", "prompt": [10**6], "max_tokens": 1}),
    "tokenize": ("POST", "/tokenize", {"model": "q", "prompt": "w1", "add_special_tokens": False}),
    "pause": ("POST", "/pause", None),
    "reset_prefix_cache": ("POST", "/reset_prefix_cache", None),
    "resume": ("POST", "/resume", None),
    "update_weight_version": ("POST", "/update_weight_version", {"new_version": "7"}),
    "weight_checker": ("POST", "/weight_checker", {"action": "checksum"}),
    "architecture": ("POST", "/collective_rpc", {"method": "dmfast_architecture"}),
    "checksums": ("POST", "/collective_rpc", {"method": "dmfast_checksums"}),
    "load_lora_adapter": ("POST", "/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""}),
    "unload_lora_adapter": ("POST", "/v1/unload_lora_adapter", {"lora_name": "nothing"}),
    "no adapter": ("POST", "/v1/completions", {"model": "nothing", "prompt": [1], "max_tokens": 1}),
    "no method": ("POST", "/collective_rpc", {"method": "nothing"}),
}


@dataclass
class Faults:
    """Say what a server does wrong.

    Attributes:
        status: the answers of a path from now on, one after the other, where None is the right one. The last stays.
        broken: how many of the next answers to completions break off half-way.
        slow: seconds that each completion takes longer.
        stale: parts of the names of tensors that a load leaves as they were.
        truncates: whether the draws are those of top_k = 2, whatever is asked for.
        aborts: how many of the next completions end with the reason "abort".
        missing: the paths that the server does not have.
    """

    status: dict[str, list[int | None]] = field(default_factory=dict)
    broken: int = 0
    slow: float = 0.0
    stale: tuple[str, ...] = ()
    truncates: bool = False
    aborts: int = 0
    missing: set[str] = field(default_factory=set)


class Refused(Exception):
    """Carry the status and message with which the server refuses a request."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class StandIn:
    """Run a server in a thread.

    Args:
        model: the model that it was started with. It is copied.
        tokenizer: the server's own tokenizer.
        context: max_model_len.
        config: values of /server_info, in the place of ``CONFIG``'s. Those in ``BESIDE`` stand beside ``model_config``
            there, and the others in it.
        sums: whether it runs with dmfast's extension of its workers.
        packed: a part of the names of tensors that it empties, since it keeps their values elsewhere.
        rank: the greatest rank of an adapter, if it was started with ``--enable-lora``.
    """

    def __init__(self, model, tokenizer, *, context=24, config=None, sums=True, packed="", rank=None):
        self.started_with = copy.deepcopy(model).eval()
        self.tokenizer, self.context, self.sums, self.packed = tokenizer, context, sums, packed
        self.config, self.faults = CONFIG | {"max_model_len": context} | (config or {}), Faults()
        modules = ["c_attn", "c_proj"]
        self.lora = None if rank is None else {"max_lora_rank": rank, "max_loras": 1, "target_modules": modules}
        self.asked, self.loads = [], 0
        self._lock, self._http = threading.Lock(), None
        self.restart()

    def restart(self):
        """Return to what a server has that was started anew: the weights that it was started with, and their name."""
        self.model, self.weight_version, self.paused = copy.deepcopy(self.started_with), "default", False
        # each name has a model, and the last adapter's tensors are kept
        self.adapters, self.adapter, self.scale = {}, {}, 1.0

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer._serve(self, "GET")

            def do_POST(self):
                outer._serve(self, "POST")

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", getattr(self, "_port", 0)), Handler)
        self._port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}"

    # ---- requests

    def _serve(self, handler, method):
        length = int(handler.headers.get("Content-Length") or 0)
        text = handler.rfile.read(length).decode()
        path = handler.path.split("?")[0]
        body, status = json.loads(text) if text else None, 200
        self.asked.append((path, body))
        try:
            answer = self.answer(method, path, body)
        except Refused as refused:
            status, answer = refused.status, {
                "error": {"message": str(refused), "type": "BadRequestError", "param": None, "code": refused.status}
            }  # fmt: skip
        data = answer.encode() if isinstance(answer, str) else b"" if answer is None else json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if path == "/v1/completions" and self._take("broken"):
            handler.wfile.write(data[: len(data) // 2])
            handler.connection.close()
            return
        # a client whose time limit has passed is gone
        with contextlib.suppress(OSError):
            handler.wfile.write(data)

    def _take(self, name):
        with self._lock:
            left = getattr(self.faults, name)
            setattr(self.faults, name, max(left - 1, 0))
        return left > 0

    def answer(self, method, path, body):
        """Return the JSON of an answer."""
        planned = self.faults.status.get(path)
        if planned:
            status = planned.pop(0) if len(planned) > 1 else planned[0]
            if status is not None:
                raise Refused(status, "the engine is dead")
        wanted = "_" + path.strip("/").replace("/", "_")
        if path in self.faults.missing or not hasattr(self, wanted):
            raise Refused(404, "Not Found")
        with self._lock, torch.no_grad():
            return getattr(self, wanted)(body)

    def _v1_models(self, body):
        served = {
            "id": "q", "object": "model", "created": 0, "owned_by": "vllm", "root": "/q", "parent": None,
            "max_model_len": self.context, "permission": [],
        }  # fmt: skip
        adapters = [served | {"id": name, "parent": "q", "max_model_len": None} for name in self.adapters]
        return {"object": "list", "data": [served, *adapters]}

    def _server_info(self, body):
        beside = {name: self.config[name] for name in self.config if name in BESIDE}
        model = {name: self.config[name] for name in self.config if name not in BESIDE}
        told = {"speculative_config": None, "lora_config": self.lora, "model_config": model} | beside
        return {"vllm_config": told, "vllm_env": {}, "system_env": {}}

    def _weight_info(self, body):
        return {"weight_version": self.weight_version}

    def _tokenize(self, body):
        ids = list(self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"])
        return {"count": len(ids), "max_model_len": self.context, "tokens": ids, "token_strs": None}

    def _pause(self, body):
        self.paused = True
        return {"status": "paused"}

    def _resume(self, body):
        self.paused = False
        return {"status": "resumed"}

    def _reset_prefix_cache(self, body):
        return {"success": True}

    def _update_weight_version(self, body):
        self.weight_version = body["new_version"]
        return {"success": True, "new_version": self.weight_version}

    def _weight_checker(self, body):
        named = self.model.named_parameters()
        values = {n: b"" if self.packed and self.packed in n else p.numpy().tobytes() for n, p in named}
        digests = {f"dp0:pp0:pcp0:tp0:{n}": hashlib.sha256(each).hexdigest() for n, each in values.items()}
        return {"checksums": digests}

    def _collective_rpc(self, body):
        if body["method"] == "reload_weights":
            folder = Path(body["kwargs"]["weights_path"])
            if not (folder / "model.safetensors").is_file():
                raise Refused(500, f"Call to collective_rpc method failed: no weights in {folder}")
            mine = dict(self.model.named_parameters())
            for name, tensor in load_file(folder / "model.safetensors").items():
                if name not in mine or mine[name].shape != tensor.shape:
                    raise Refused(500, f"Call to collective_rpc method failed: {name} of the shape {tensor.shape}")
                if not any(part in name for part in self.faults.stale):
                    mine[name].copy_(tensor)
            self.loads += 1
            return {"results": [None]}
        if body["method"] == "dmfast_architecture" and self.sums:
            config = self.started_with.config
            kinds = [config.get_text_config().model_type, config.model_type]
            return {"results": [{"model_type": kinds} | {name: getattr(config, name) for name in weights.SIZES}]}
        if body["method"] == "dmfast_checksums" and self.sums:
            named = self.model.named_parameters()
            shown = {n: p[:0] if self.packed and self.packed in n else p for n, p in named}
            return {"results": [{name: str(weights.checksum(each)) for name, each in shown.items()}]}
        if body["method"] == "dmfast_adapter_checksums" and self.sums and self.lora:
            held = {n: each * self.scale if "lora_B" in n else each for n, each in self.adapter.items()}
            return {"results": [{name: str(weights.checksum(each)) for name, each in held.items()}]}
        message = f"Worker failed with error ''CPUWorker' object has no attribute '{body['method']}''"
        raise Refused(500, f"Call to collective_rpc method failed: {message}, please check the stack trace above")

    # ---- adapters

    def _v1_load_lora_adapter(self, body):
        name, folder = body["lora_name"], Path(body["lora_path"])
        if not name or not body["lora_path"]:
            raise Refused(400, "Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.adapters and not body.get("load_inplace"):
            raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
        if not (folder / "adapter_model.safetensors").is_file():
            raise Refused(404, f"Loading lora {name} failed: No adapter found for <path>")
        from peft import PeftModel

        config = json.loads((folder / "adapter_config.json").read_text())
        if config["r"] > self.lora["max_lora_rank"]:
            raise Refused(500, f"LoRA rank {config['r']} is greater than max_lora_rank")
        model = PeftModel.from_pretrained(copy.deepcopy(self.model), folder).eval()
        own = {name.replace(".default", ""): tensor for name, tensor in model.named_parameters()}
        held = load_file(folder / "adapter_model.safetensors")
        for each in held:
            if any(part in each for part in self.faults.stale):
                held[each] = self.adapter.get(each, torch.zeros_like(held[each]))
                own[each].copy_(held[each])
        self.adapter, self.adapters[name] = held, model
        self.scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1.0)
        return f"Success: LoRA adapter '{name}' added successfully."

    def _v1_unload_lora_adapter(self, body):
        if body["lora_name"] not in self.adapters:
            raise Refused(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        del self.adapters[body["lora_name"]]
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    # ---- completions

    def _v1_completions(self, body):
        ids = body["prompt"]
        model = self.adapters.get(body["model"], self.model)
        if body["model"] != "q" and model is self.model:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        vocab = self.model.config.vocab_size
        for token in ids:
            if token >= vocab:
                raise Refused(400, f"Token id {token} is out of vocabulary")
        if len(ids) + body["max_tokens"] > self.context:
            raise Refused(400, f"This model's maximum context length is {self.context} tokens")
        time.sleep(self.faults.slow)
        n, aborts = body.get("n", 1), self.faults.aborts > 0
        if aborts:
            self.faults.aborts -= 1
        choices = []
        for i, (drawn, values) in enumerate(self._draw(model, ids, body, n)):
            ended = drawn[-1] in body.get("stop_token_ids", [])
            names = [f"token_id:{token}" for token in drawn]
            choices.append({
                "index": i, "text": self.tokenizer.decode(drawn),
                "logprobs": {
                    "text_offset": [0] * len(drawn), "token_logprobs": values, "tokens": names,
                    "top_logprobs": [{name: value} for name, value in zip(names, values, strict=True)],
                },
                "finish_reason": "abort" if aborts else "stop" if ended else "length",
                "stop_reason": drawn[-1] if ended else None, "token_ids": drawn,
                "prompt_logprobs": None if body.get("prompt_logprobs") is None else self._prompt_logprobs(model, ids),
                "prompt_token_ids": ids, "routed_experts": None,
            })  # fmt: skip
        return {
            "id": "cmpl-0", "object": "text_completion", "created": 0, "model": "q", "choices": choices,
            "service_tier": None, "system_fingerprint": "vllm-0.32.0", "usage": {
                "prompt_tokens": len(ids), "total_tokens": len(ids), "completion_tokens": 0,
                "prompt_tokens_details": None, "completion_tokens_details": None,
            },
            "kv_transfer_params": None, "ec_transfer_params": None, "metrics": None,
        }  # fmt: skip

    def _draw(self, model, ids, body, n):
        """Return tokens and log-probabilities of n continuations, each with random numbers of its own."""
        generators = [torch.Generator().manual_seed(body.get("seed", 0) + i) for i in range(n)]
        drawn, ends = [([], []) for _ in range(n)], set(body.get("stop_token_ids", []))
        for _ in range(body["max_tokens"]):
            going = [i for i, (tokens, _) in enumerate(drawn) if not (tokens and tokens[-1] in ends)]
            if not going:
                break
            logits = model(torch.tensor([ids + drawn[i][0] for i in going])).logits[:, -1].float()
            logits = logits / body.get("temperature", 1.0)
            if self.faults.truncates:
                logits = logits.masked_fill(logits < logits.topk(2).values[:, -1:], -torch.inf)
            for i, log_p in zip(going, logits.log_softmax(-1), strict=True):
                token = int(torch.multinomial(log_p.exp(), 1, generator=generators[i]))
                drawn[i][0].append(token)
                drawn[i][1].append(float(log_p[token]))
        return drawn

    def _prompt_logprobs(self, model, ids):
        log_p = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return [None] + [
            {str(token): {"logprob": float(log_p[place, token]), "rank": 1, "decoded_token": f"token_id:{token}"}}
            for place, token in enumerate(ids[1:])
        ]


def load_spread(policy, other, samples, ranks):
    """Load a policy whose parameters are spread over processes into a server of rank 0's. All processes call it.

    Args:
        policy: a ``LanguageModel``.
        other: a whole model like it, which the server is started with.
        samples: what the engine scores.
        ranks: the processes.

    Returns:
        What ``load`` says before the sampler knows the processes, and log q of the samples.
    """
    started = StandIn(other, policy.tokenizer) if ranks.rank == 0 else None
    with started or contextlib.nullcontext():
        url = [started.url if started else None]
        torch.distributed.broadcast_object_list(url)
        sampler = HTTPSampler(url[0], policy, patience=0.0, retries=1)
        # without this, a rank that refuses would end while another still connects
        torch.distributed.barrier()
        refusal = None
        try:
            sampler.load(policy)
        except ValueError as error:
            refusal = str(error)
        sampler.ranks = ranks
        sampler.load(policy)
        # q and a copy that differs everywhere were loaded
        assert (started.loads if started else 2) == 2
        # all ranks meet at the end of this
        return refusal, sampler.log_prob(samples)
