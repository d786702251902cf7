"""Sample from a copy of the policy in a process of its own, on the same machine."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import adapters
from ..forwards import module_of
from ..models import LanguageModel, Source
from ..samples import Prompt, Samples
from ..tensors import copy_into

_MODEL, _Q = "model.pt", "q.pt"


class ProcessSampler:
    """A copy of a policy that samples in a process of its own, such as on another device or another core.

    With the same seed it draws the same sequences as an ``OfflineProposal``'s own copy, up to the rounding of another
    device. An ``AsyncSampler`` around it draws while the policy is trained.

    If the process dies, the call that was running raises ``ConnectionError``, and the next call starts another process
    with the same q. q lies in a temporary folder for that, which is removed in the end.

    Args:
        policy: the model that is copied, as it is now.
        device: the device of the copy. Default: the policy's.
        threads: the number of torch's threads in the process. Default: torch's own default.
        timeout: seconds after which a call is given up and its process ended. Default: never.

    Attributes:
        version: the value of ``Samples.version`` in its draws. An ``OfflineProposal`` assigns it.

    Raises:
        TypeError: the policy is not a ``LanguageModel``, or it holds something that can't be pickled.
        ValueError: a number is not positive.
        OSError: the process can't be started.
    """

    def __init__(
        self, policy: LanguageModel, *, device: torch.device | str | None = None, threads: int | None = None,
        timeout: float | None = None,
    ) -> None:  # fmt: skip
        if type(policy) is not LanguageModel:
            raise TypeError(f"policy must be a LanguageModel, which is copied, got a {type(policy).__name__}")
        for name, number in {"threads": threads, "timeout": timeout}.items():
            if number is not None and not number > 0:
                raise ValueError(f"{name} must be positive, got {number!r}")
        self.version, self.timeout = policy.version, timeout
        self._tokenizer, self._device, self._threads = policy.tokenizer, str(device or policy.device), threads
        self._lock = threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="dmfast_sampler_"))
        self._children: list[_Child] = []  # holds one child, or none after it has died
        self.close: Callable[[], Any] = weakref.finalize(self, _end, self._children, self._folder)
        try:
            torch.save(policy, self._folder / _MODEL)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self.close()
            raise TypeError(f"the policy can't be copied into another process: {error}") from error
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    # ---- a sampler

    def sample(
        self, prompts: Sequence[Prompt] | None = None, n: int = 1, *, max_new_tokens: int, temperature: float = 1.0,
        seed: int | None = None, batch_size: int | None = None, first_row: int = 0,
    ) -> Samples:  # fmt: skip
        """Draw as ``LanguageModel.sample`` does. The sequences are on the CPU.

        Raises:
            ConnectionError: the process has died.
            TimeoutError: it took longer than ``timeout``.
            Exception: whatever the copy has raised.
        """
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))  # this process's random state decides, as for other samplers
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed,
                   "batch_size": batch_size, "first_row": first_row}  # fmt: skip
        drawn = Samples(**self._ask("sample", prompts, n, **options), tokenizer=self._tokenizer)
        return replace(drawn, version=torch.full_like(drawn.version, self.version))

    def log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """Return (N,) fp64, log q(x) in nats, on the samples' device.

        Raises:
            ConnectionError, TimeoutError: as in ``sample``.
            Exception: whatever the copy has raised.
        """
        scores: Tensor = self._ask("log_prob", samples.to("cpu").state_dict(), batch_size)
        return scores.to(samples.tokens.device)

    def load(self, source: Source) -> None:
        """Replace the copy's parameters, as ``LanguageModel.load`` does.

        Raises:
            ConnectionError, TimeoutError: as in ``sample``.
            TypeError, FileNotFoundError, ValueError, RuntimeError: as in ``LanguageModel.load``. The copy stays as it
                was.
        """
        new, folder = self._folder / f"new-{_Q}", None
        if isinstance(source, (str, os.PathLike)):
            folder = str(source)
        else:
            torch.save(_tensors(source), new)
        try:
            self._ask("load", folder, str(new))  # a process that dies in this call starts again from the old q
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        os.replace(new, self._folder / _Q)

    # ---- the process

    def _start(self) -> None:
        self._children.append(_Child(self._threads))
        q = self._folder / _Q
        _, error = self._children[0].ask("start", str(self._folder / _MODEL), str(q) if q.exists() else None,
                                         self._device, timeout=self.timeout)  # fmt: skip
        if error is not None:
            raise error

    def _stop(self) -> None:
        while self._children:
            self._children.pop().end()

    def _ask(self, what: str, *args: Any, **options: Any) -> Any:
        with self._lock:
            if not cast(Any, self.close).alive:
                raise RuntimeError("this ProcessSampler is closed; make another one")
            try:
                if not self._children:
                    self._start()
                value, error = self._children[0].ask(what, *args, timeout=self.timeout, **options)
            except BaseException:  # after Ctrl-C, for example, another call must not get the answer of this one
                self._stop()
                raise
        if error is not None:
            raise error
        return value


class _Child:
    """A child process and the pipe to it."""

    def __init__(self, threads: int | None) -> None:
        self.pipe, theirs = Pipe()
        # The child imports the same modules as this process, whatever lies in the working directory.
        start = f"import sys; sys.path[:] = {sys.path!r}; from dmfast.sampling.process import serve; "
        start += f"serve({theirs.fileno()}, {threads!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
        theirs.close()

    def ask(self, what: str, *args: Any, timeout: float | None, **options: Any) -> tuple[Any, Exception | None]:
        """Return what a call of the copy returned, or what it raised.

        Raises:
            ConnectionError: the process has died.
            TimeoutError: it takes longer than the timeout, in seconds.
        """
        try:
            # The pipe carries bytes, because torch would send tensors in shared memory that ends with the process.
            self.pipe.send_bytes(pickle.dumps((what, args, options)))
            answered = self.pipe.poll(timeout)
            answer: tuple[Any, Exception | None] = pickle.loads(self.pipe.recv_bytes()) if answered else (None, None)
        except (OSError, EOFError) as died:
            raise ConnectionError(
                f"the sampler's process has died with exit code {self.process.wait()} in {what!r}; the next call "
                "starts another one"
            ) from died
        if not answered:
            raise TimeoutError(f"the sampler's process took longer than timeout={timeout} s for {what!r}")
        return answer

    def end(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait()
        self.pipe.close()


def _end(children: list[_Child], folder: Path) -> None:
    for child in children:
        child.end()
    shutil.rmtree(folder, ignore_errors=True)


def _tensors(source: LanguageModel | nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a policy under the names that they have in the copy."""
    if not isinstance(source, (LanguageModel, nn.Module)):
        raise TypeError(f"load takes a LanguageModel, its module or a folder, got a {type(source).__name__}")
    found = source._tensors() if isinstance(source, LanguageModel) else adapters.tensors(module_of(source))
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


# ---- in the child process


def serve(descriptor: int, threads: int | None) -> None:
    """Answer the calls that come through a pipe, until its other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C ends the training process, and this one ends with it
        signal.signal(number, signal.SIG_IGN)
    if threads is not None:
        torch.set_num_threads(threads)
    pipe, copy = Connection(descriptor), _Copy()
    while True:
        try:
            what, args, options = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        value, error = None, None
        try:
            value = getattr(copy, what)(*args, **options)
        except Exception as raised:
            error = _that_travels(raised)
        pipe.send_bytes(pickle.dumps((value, error)))


def _that_travels(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # the other process lacks the error's class, or can't make it from the pickled arguments
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class _Copy:
    """The copy of the policy, as the child process holds it."""

    model: LanguageModel

    def start(self, model: str, q: str | None, device: str) -> None:
        """Read the policy, and q where there is one."""
        # weights_only can't load a whole object. This run wrote the file into a folder that only its user can write to.
        self.model = torch.load(model, map_location=device, weights_only=False)
        # The copy is frozen as an OfflineProposal's own copy is, so that torch rounds in the same way.
        self.model.model.to(device).requires_grad_(False)
        if q is not None:
            copy_into(self.model._tensors(), torch.load(q, map_location=device, weights_only=True))

    def sample(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Draw, and return the samples as a dictionary of CPU tensors and numbers."""
        return self.model.sample(*args, **options).to("cpu").state_dict()

    @torch.no_grad()
    def log_prob(self, samples: dict[str, Any], batch_size: int | None) -> Tensor:
        """Return (N,) fp64, log q(x) in nats, on the CPU."""
        x = Samples(**samples, tokenizer=self.model.tokenizer).to(self.model.device)
        return self.model.log_prob(x, batch_size=batch_size).cpu()

    def load(self, folder: str | None, tensors: str) -> None:
        """Read q from a file of tensors, or read it from a folder and write that file."""
        if folder is None:
            copy_into(self.model._tensors(), torch.load(tensors, map_location="cpu", weights_only=True))
            return
        self.model.load(folder)
        torch.save({name: tensor.detach().cpu() for name, tensor in self.model._tensors().items()}, tensors)
