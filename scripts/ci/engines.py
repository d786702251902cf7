"""Compare dmfast's samplers with the real vLLM on a CPU, in process and over HTTP by ``dmfast serve-proposal``.

engines.py             runs the checks in the environment that ``make vllm`` makes
engines.py --record    writes the server's answers to tests/vllm_answers.json, for the tests' stand-in

The environment needs vLLM, dmfast and dmfast's dependencies. The checks take a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
}  # fmt: skip
os.environ.update(ENVIRONMENT)

import torch  # noqa: E402

import dmfast  # noqa: E402
from dmfast import Contains, LanguageModel, Moment  # noqa: E402
from dmfast.sampling import EngineError, HTTPSampler, VLLMSampler, weights  # noqa: E402
from dmfast.training.recipe import TINY_BIOS  # noqa: E402

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", *MODULES)
ANSWERS = ROOT / "tests" / "vllm_answers.json"
READ = ("model_config", "device_config", "scheduler_config")  # parts of /server_info that dmfast reads
CONTEXT = 64  # of tiny-bios
SECONDS = 1800  # a server may take this long to start on a machine with other work


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def server(*options: str, model: Path = TINY_BIOS, plain: bool = False) -> Iterator[str]:
    """Start a server by ``dmfast serve-proposal`` or with vLLM's own defaults, and yield its address."""
    port = free_port()
    line = [sys.executable, "-m", "dmfast", "serve-proposal", str(model), "--port", str(port), "--dtype", "float32"]
    if plain:
        line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        line += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--no-enable-chunked-prefill"]
    more = ["--enforce-eager", "--served-model-name", "q", *options]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
    with tempfile.TemporaryFile() as log:
        started = subprocess.Popen([*line, *([] if plain else ["--"]), *more], env=environment, stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            wait_for(port, started)
            yield f"http://127.0.0.1:{port}"
        except BaseException:
            log.seek(0)
            print(log.read().decode(errors="replace")[-3000:])
            raise
        finally:
            end(started)


def end(started: subprocess.Popen[bytes]) -> None:
    """Stop the server with its workers, which belong to its own process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(started.pid, number)
            started.wait(30)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def wait_for(port: int, started: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if started.poll() is not None:
            raise SystemExit(f"the server ended with {started.returncode}")
        try:
            if ask(port, "GET", "/health", None)["status"] == 200:
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server was not up after {SECONDS} s")


def ask(port: int, method: str, path: str, body: Any) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return {"status": answer.status, "answer": json.loads(text) if text.startswith(("{", "[")) else None}


def policy() -> LanguageModel:
    return LanguageModel.from_pretrained(TINY_BIOS, dtype=torch.float32)


@contextmanager
def llama() -> Iterator[Path]:
    """Yield the folder of a small random Llama with tiny-bios's tokens, because vLLM's GPT-2 takes no adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    like = policy()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=like.vocab_size, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        initializer_range=0.1,
    ))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        like.tokenizer.save_pretrained(folder)
        yield Path(folder)


def with_adapter(folder: Path) -> LanguageModel:
    """Return the model of a folder with a LoRA adapter that has moved."""
    from peft import LoraConfig, get_peft_model

    lm = LanguageModel.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    return moved(lm.around(get_peft_model(lm.model, config)))


def moved(model: LanguageModel, by: float = 0.02, seed: int = 0) -> LanguageModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (each for each in model.model.parameters() if each.requires_grad):
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def apart(sampler: Any, model: LanguageModel, temperature: float = 1.0, n: int = 64) -> float:
    """Return the largest difference between log q as drawn and the model's score, in nats."""
    x = sampler.sample([[0], [3, 4, 5]], n, max_new_tokens=40, seed=1, temperature=temperature)
    again = sampler.sample([[0], [3, 4, 5]], n, max_new_tokens=40, seed=1, temperature=temperature)
    assert torch.equal(x.tokens, again.tokens), "equal seeds draw other sequences"
    assert len({tuple(row) for row in x.tokens.tolist()}) > n, "sequences are drawn twice"
    with torch.no_grad():
        return float((x.log_prob - model.log_prob(x, batch_size=32)).abs().max())


def check_sampler(sampler: Any, lm: LanguageModel) -> None:
    sampler.load(lm)
    for temperature in (1.0, 1.5):
        found = apart(sampler, lm, temperature)
        print(f"  log q and log pi at temperature {temperature}: at most {found:.1e} nats apart")
        assert found < 1e-3
    x = sampler.sample([[0]], 32, max_new_tokens=40, seed=2)
    assert (sampler.log_prob(x) - x.log_prob).abs().max() < 1e-3
    before = copy.deepcopy(lm.model)
    sampler.load(moved(lm))
    assert apart(sampler, lm) < 1e-3 < apart(sampler, lm.around(before))
    sampler.load(moved(lm, by=1e-6))
    assert sampler._comparable, "the checksums of vLLM are not those of the model"
    print("  loads are whole, by checksum")


def check_http() -> None:
    print("over HTTP, started by dmfast serve-proposal, with q in several files")
    weights.SHARD = "300KB"
    lm = policy()
    with server("--max-num-batched-tokens", str(CONTEXT), "--max-num-seqs", str(CONTEXT)) as url:
        sampler = HTTPSampler(url, lm, patience=5)
        check_sampler(sampler, lm)
        check_full_steps(sampler)
        reload = sampler._reload

        def misled(folder: Path, tag: str) -> None:
            reload(folder if tag == sampler._tag else folder.with_name("nothing"), tag)

        sampler._reload = misled  # type: ignore[method-assign]
        try:
            sampler.load(moved(copy.deepcopy(lm)))
            raise SystemExit("a load from no folder went through")
        except EngineError as error:
            print(f"  a load that fails: {str(error)[:100]}...")
        sampler._reload = reload  # type: ignore[method-assign]
        assert apart(sampler, lm) < 1e-3, "after a load that failed it holds another q"
        train(url)
        check_another_model(url, lm)


def check_full_steps(sampler: Any) -> None:
    """Check that prompts are read whole which together have more tokens than a step of vLLM reads.

    vLLM would read one of them in parts, and crashes on a CPU when such a request has a seed.
    """
    x = sampler.sample([[0, *[3] * (CONTEXT * 2 // 3)]] * 4, 2, max_new_tokens=4, seed=4)
    assert len(x.tokens) == 8
    print("  prompts of more tokens than a step reads")


def check_another_model(url: str, lm: LanguageModel) -> None:
    """Check that a server whose model has another size than the policy is refused when the sampler is made."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(cast(Any, lm.model).config)
    config.n_layer += 1
    try:
        HTTPSampler(url, lm.around(AutoModelForCausalLM.from_config(config)))
        raise SystemExit("a model of another size went through")
    except ValueError as error:
        if "num_hidden_layers" not in str(error):
            raise
        print(f"  {str(error)[:150]}...")


def check_half_load() -> None:
    print("a server with vLLM's own options, which loads a half on a CPU")
    lm = policy()
    with server("--generation-config", "vllm", plain=True) as url:
        try:
            HTTPSampler(url, lm, patience=5).load(lm)
            raise SystemExit("a half load was not found")
        except EngineError as error:
            print(f"  {str(error)[:150]}...")


def check_truncated() -> None:
    print("a server that was started with top-p")
    options = ("--generation-config", "vllm", "--override-generation-config", '{"top_p": 0.9}')
    with server(*options, plain=True) as url:
        try:
            HTTPSampler(url, policy())
            raise SystemExit("top-p was not found")
        except ValueError as error:
            print(f"  {str(error)[:150]}...")


def check_local() -> None:
    print("in this process")
    lm = policy()
    options = {"enforce_eager": True, "max_num_seqs": CONTEXT, "max_num_batched_tokens": CONTEXT}
    sampler = VLLMSampler(lm, engine=options)
    check_sampler(sampler, lm)
    check_full_steps(sampler)


def check_adapters() -> None:
    print("adapters over HTTP")
    with llama() as folder, server(*ADAPTERS, model=folder) as url:
        lm = with_adapter(folder)
        other = lm.around(copy.deepcopy(lm.model))
        with torch.no_grad():
            cast(Any, other.model).get_input_embeddings().weight.mul_(1.1)
        try:
            HTTPSampler(url, other, patience=5).load(other)
            raise SystemExit("an adapter on another base went through")
        except EngineError as error:
            print(f"  {str(error)[:150]}...")
        sampler = HTTPSampler(url, lm, patience=5)
        check_sampler(sampler, lm)
        port = int(url.rpartition(":")[2])
        assert len(sampler._adapters_there()) == 1, "adapters of earlier versions of q stay"
        x = sampler.sample([[0]], 16, max_new_tokens=20, seed=3)
        sampler._unload(str(sampler._tag))  # a restart would lose the adapter in the same way
        again = sampler.sample([[0]], 16, max_new_tokens=20, seed=3)
        assert torch.equal(x.tokens, again.tokens)
        assert ask(port, "GET", "/weight_info", None)["answer"]["weight_version"] == "default"
        train(url, with_adapter(folder))


def check_local_adapters() -> None:
    print("adapters in this process")
    with llama() as folder:
        lm = with_adapter(folder)
        options = {"enforce_eager": True, "max_num_seqs": 64, "enable_lora": True, "max_lora_rank": 8}
        check_sampler(VLLMSampler(lm, engine=options), lm)


def train(url: str, model: LanguageModel | None = None) -> None:
    """Take six steps of DMTrainer, on tiny-bios or on one backbone with an adapter."""
    base: Any = None
    if model is None:
        model = policy()
        base = model.around(copy.deepcopy(model.model))
    women = Contains(any_of=["she", "her"], name="women")
    target = dmfast.EBM(model.base() if base is None else base, [Moment(women, 0.5)])
    target.lambda_ = [2.6]
    with tempfile.TemporaryDirectory() as out:
        args = dmfast.DMConfig(
            out, max_steps=6, per_device_train_batch_size=48, learning_rate=1.5e-4, max_new_tokens=40, use_cpu=True,
            save_strategy="no", disable_tqdm=True, proposal_interval=2, proposal_criterion="interval", eval_samples=64,
            sampler=url,
        )  # fmt: skip
        trainer = dmfast.DMTrainer(model.model, target, args, processing_class=model.tokenizer)
        trainer.train()
        assert trainer.proposal is not None and trainer.proposal.swaps == 3
        x = trainer.proposal.sample(None, 32, max_new_tokens=40, seed=0)
        q = trainer.proposal.snapshot
        assert (x.log_prob - q.log_prob(x)).abs().max() < 1e-3 and bool((x.version == 3).all())
    print("  six steps of DMTrainer with q in it")


def record() -> None:
    from importlib.metadata import version

    from engine_stand_in import EXCHANGES  # type: ignore[import-not-found]

    with llama() as folder, server(*ADAPTERS, model=folder) as url:
        port = int(url.rpartition(":")[2])
        words = {"prompt": "He was born"}  # tiny-bios knows only the words of its texts
        answers = {
            name: ask(port, method, path, body | words if name == "tokenize" else body)
            for name, (method, path, body) in EXCHANGES.items()
        }
        info = ask(port, "GET", "/server_info?config_format=json", None)["answer"]["vllm_config"]
        fields = {"vllm_config": sorted(info)} | {name: sorted(info[name]) for name in READ}
        found = {"vllm": version("vllm-cpu"), "server_info": fields, "answers": answers}
        ANSWERS.write_text(json.dumps(found, indent=1).replace(str(folder), "/q") + "\n")


CHECKS = {"http": check_http, "half": check_half_load, "top-p": check_truncated, "local": check_local,
          "adapters": check_adapters, "local adapters": check_local_adapters}  # fmt: skip


def main() -> None:
    # without this, the server would outlive this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", help=f"of {', '.join(CHECKS)}; default: all")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if args.record:
        record()
        return
    for name in args.checks or CHECKS:
        start = time.perf_counter()
        CHECKS[name]()
        print(f"  {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
