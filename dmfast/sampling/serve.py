"""Start a vLLM server that draws from q, with the options that ``HTTPSampler`` needs (``dmfast serve-proposal``)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import util
from typing import NoReturn

from ..shipped import located

_WORKER = "dmfast.sampling.vllm_worker.Worker"
_OWN = ("--model", "--generation-config", "--override-generation-config", "--logprobs-mode", "--worker-extension-cls",
        "--logits-processors", "--speculative-config", "--quantization", "--config")  # fmt: skip
_SHORT = {"-sc": "--speculative-config", "-q": "--quantization"}
_IN_PARTS = "--enable-chunked-prefill"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dmfast serve-proposal``."""
    parser.add_argument("model", help="the model that is trained: tiny-bios, a folder, or a name on the hub")
    parser.add_argument("--host", default="127.0.0.1",
                        help="the address to listen at; every client can run code in vLLM's workers")  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="the port to listen at")
    parser.add_argument("--dtype", default="auto", help="the dtype that vLLM computes in; log q is exact for each")
    parser.epilog = "Options after -- are passed on to vLLM's server, for example -- --tensor-parallel-size 2."
    parser.set_defaults(vllm=[])


def command(model: str, options: Sequence[str], *, host: str, port: int, dtype: str, on_cpu: bool = False) -> list[str]:
    """Return the command that starts the server.

    Args:
        model: a folder or a name on the hub.
        options: further options of vLLM's server.
        host, port, dtype: the options of vLLM's server of these names.
        on_cpu: whether vLLM computes on a CPU. vLLM crashes there when it reads the prompt of a request with a seed in
            parts, so reading in parts is switched off.

    Raises:
        ValueError: dmfast sets one of the options itself, or the server would draw from another distribution with it.
            Or the server would crash on a CPU.
    """
    names = [_name(each) for each in options]
    own = [each for each, name in zip(options, names, strict=True) if any(_means(name, option) for option in _OWN)]
    if own:
        raise ValueError(
            f"serve-proposal can't take {', '.join(own)}: dmfast sets it, or q would not be the model's distribution"
        )
    if on_cpu and any(_means(name, _IN_PARTS) for name in names):
        raise ValueError(
            f"serve-proposal can't take {_IN_PARTS} on a CPU, where vLLM crashes when it reads the prompt of a request "
            "with a seed in parts: leave it out"
        )
    whole = [f"--no-{_IN_PARTS.removeprefix('--')}"] if on_cpu else []
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", host, "--port",
        str(port), "--dtype", dtype, "--generation-config", "vllm", "--logprobs-mode", "processed_logprobs",
        "--worker-extension-cls", _WORKER, *whole, *options,
    ]  # fmt: skip


def _name(option: str) -> str:
    """Return the name of an option as vLLM's parser reads it.

    The parser takes an underscore for a dash, short names, and ``--name.key`` for a key of an option that is a mapping.
    """
    for short, name in _SHORT.items():
        if option.startswith(short):
            return name
    return option.partition("=")[0].partition(".")[0].replace("_", "-")


def _means(name: str, option: str) -> bool:
    """Return whether a name stands for an option of vLLM. Its parser also takes the beginning of an option's name."""
    return name.startswith("--") and len(name) > 2 and option.startswith(name)


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the server's environment, which switches on vLLM's endpoints for weights and for adapters."""
    return {**given, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


def serve(args: argparse.Namespace) -> NoReturn:
    """Replace this process by the server.

    Raises:
        ValueError: vLLM is not installed here, or as in ``command``.
    """
    if util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed in this environment: pip install vllm, and dmfast beside it")
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    line = command(str(located(args.model)), args.vllm, host=args.host, port=args.port, dtype=args.dtype, on_cpu=on_cpu)
    print(f"q will be served at http://{args.host}:{args.port}: train with sampler=http://{args.host}:{args.port}")
    sys.stdout.flush()
    os.execve(sys.executable, line, environment(os.environ))
