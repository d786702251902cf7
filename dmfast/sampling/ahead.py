"""Sample ahead of training: the batches of coming steps are drawn while the policy is trained.

The main thread queues everything in its own order. It queues requests as a step begins, and a load when q is replaced.
A load waits for the requests before it. So the steps alone decide which q draws which batch, and the time that
something takes does not matter. A batch is fixed at its request. It is never made of the sequences that happened to end
first, because that would favour short sequences.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..models import LanguageModel, Source
from ..samples import Prompt, Samples
from .engine import Engine, EngineError
from .mixture import Mixture
from .prompted import Prompted
from .protocol import Sampler
from .vllm_local import VLLMSampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOST = (ConnectionError, TimeoutError, EOFError)


class _Task:
    """A call of the engine that a thread waits for."""

    def __init__(self, call: Callable[[], Any] | None, value: Any = None) -> None:
        self.call, self.value = call, value
        self.error: BaseException | None = None
        self.failures: list[str] = []
        self.dropped = False  # once nobody needs the job, it need not begin
        self.ended = threading.Event()
        if call is None:
            self.ended.set()

    def run(self, retries: int, pause: float) -> None:
        """Call the engine, and repeat the call with the same arguments where the engine was lost."""
        assert self.call is not None
        for attempt in range(retries + 1):
            try:
                self.value = self.call()
            except _LOST as error:
                if attempt == retries:
                    times = "once" if retries == 0 else f"{retries + 1} times with the same request"
                    self.error = EngineError(
                        f"the engine was lost {times}, at last with {type(error).__name__}: {error}"
                    )
                    self.error.__cause__ = error
                    return
                self.failures.append(f"{type(error).__name__}: {error}")
                time.sleep(pause * 2**attempt)
            except BaseException as error:  # the main thread waits for the job and raises this
                self.error = error
                return
            else:
                return


def _work(jobs: SimpleQueue[_Task | None], retries: int, pause: float) -> None:
    while _serve(jobs, retries, pause):  # _serve's frame holds the job, so that a waiting thread keeps no engine alive
        pass


def _serve(jobs: SimpleQueue[_Task | None], retries: int, pause: float) -> bool:
    job = jobs.get()
    if job is None:
        return False
    if not job.dropped:
        job.run(retries, pause)
    job.call = None
    job.ended.set()
    return True


@dataclass(eq=False)
class _Request:
    """A batch of a coming step.

    Attributes:
        asked: the arguments of ``sample``.
        version: the version of the q that was asked for the batch.
        job: the call of the engine; None until it is queued.
        taken: whether ``sample`` has returned the batch.
    """

    asked: dict[str, Any]
    version: int = 0
    job: _Task | None = None
    taken: bool = False

    @property
    def drawn(self) -> Samples | None:
        """The sequences; None until they are drawn."""
        return self.job.value if self.job is not None and self.job.ended.is_set() else None


class AsyncSampler:
    """A sampler that draws the batches of coming steps while the policy is trained.

    Each sample keeps the log q and the version of the q that drew it, so that training stays exact: Z and the loss
    weigh each sample by its own q, and ``Matcher`` compares pi with q by samples of the newest q only.

    This loop draws two steps ahead:

        sampler = AsyncSampler(engine, ahead=2)
        matcher = dmfast.Matcher(policy, target, dmfast.OfflineProposal(policy, sampler=sampler))
        for step in range(steps):
            coming = [prompts[k] for k in range(step + 1, min(step + 3, steps))]
            batch = matcher.draw(prompts[step], n, max_new_tokens=48, next_prompts=coming)
            ...

    Engine, threads and queue hold the sequences of the current step and of ``ahead`` more, however slow training is.
    The threads only wait for the engine. A ``load`` waits until all requests are drawn. So every batch comes from one
    q, and the batches that are still to be drawn come from the newest one.

    Args:
        sampler: an engine that draws outside of this process, such as ``ProcessSampler`` or a server's client. Where
            the connection to it is lost (``ConnectionError``, ``TimeoutError``, ``EOFError``) the same request is
            repeated, so an engine that has died should start again at the next call, with the q that it had.
        ahead: the number of steps beyond the current one whose batches are drawn. The loop has to say from which
            prompts they are drawn.
        max_lag: the most swaps of q between the draw of a batch and its use. A batch that a swap makes older is drawn
            again from the new q, with the same seed. With 0 the sequences are those of a sampler that does not run
            ahead. Default: ``ahead`` is the only bound.
        threads: the number of requests that the engine gets at a time, where it takes several.
        retries: how often a lost request is repeated. ``EngineError`` is then raised at the step of the batch.
        pause: seconds before the first repetition. The pause doubles before each further one.

    Raises:
        TypeError: ``sampler`` is not a sampler, or its forwards run in this process, as those of a ``LanguageModel``
            do: a thread would run the model while the main thread trains.
        ValueError: a number is out of range.
    """

    def __init__(
        self, sampler: Sampler, ahead: int = 2, *, max_lag: int | None = None, threads: int = 1, retries: int = 3,
        pause: float = 1.0,
    ) -> None:  # fmt: skip
        if not isinstance(sampler, Sampler):
            raise TypeError(
                "sampler must have what dmfast.sampling.Sampler lists (sample, log_prob, load, version), got a "
                f"{type(sampler).__name__}"
            )
        if isinstance(sampler, (LanguageModel, Mixture, Prompted, AsyncSampler, VLLMSampler)):
            raise TypeError(
                f"a {type(sampler).__name__} runs in this process, and its forwards belong to the main thread, which "
                "trains meanwhile; take an engine in another process, such as dmfast.sampling.ProcessSampler(policy)"
            )
        least = {"ahead": (ahead, 1), "max_lag": (max_lag, 0), "threads": (threads, 1), "retries": (retries, 0)}
        for name, (number, lowest) in least.items():
            integer = isinstance(number, int) and not isinstance(number, bool) and number >= lowest
            if not integer and not (name == "max_lag" and number is None):
                raise ValueError(f"{name} must be an integer, {lowest} or more, got {number!r}")
        if not (isinstance(pause, (int, float)) and 0 <= pause < math.inf):
            raise ValueError(f"pause must be a number of seconds, 0 or more, got {pause!r}")
        self.sampler, self.ahead, self.max_lag = sampler, ahead, max_lag
        self._requests: list[_Request] = []
        self._jobs: SimpleQueue[_Task | None] = SimpleQueue()
        self._under_way: list[_Task] = []  # includes the tasks of dropped requests, for which a load must wait, too
        self._open = True
        for _ in range(threads):
            # The threads are daemons because an engine that never answers must not keep the interpreter from ending.
            threading.Thread(target=_work, args=(self._jobs, retries, pause), daemon=True).start()
        self._close = weakref.finalize(self, _end, self._jobs, threads)

    # ---- requests

    def request(self, coming: Sequence[Mapping[str, Any]]) -> None:
        """Say from which prompts the next batches are drawn, and queue in order those that are not queued yet.

        ``OfflineProposal.request`` calls this for ``Matcher.draw``.

        Args:
            coming: the arguments of ``sample`` for the current step and for the steps after it, of which ``ahead`` are
                taken. Each has a seed of its own. Earlier requests that are not among them are dropped.

        Raises:
            ValueError: a batch was asked for with the same seed and other arguments, a batch has no seed, or the engine
                draws for several ranks together.
        """
        self._check_open()
        if isinstance(self.sampler, Engine) and self.sampler.ranks.size > 1:
            raise ValueError(
                f"the {self.sampler.ranks.size} ranks of this engine agree on what each of them drew, in one order and "
                "in their main threads, so it can't run ahead; take it without AsyncSampler"
            )
        wanted = []
        for given in coming[: self.ahead + 1]:
            asked = _as_asked(**given)
            if asked["seed"] is None:
                raise ValueError("a batch that is drawn ahead needs a seed, so that it can be drawn again; got None")
            wanted.append(self._asked_before(asked) or _Request(asked))
        for request in self._requests:
            if request not in wanted and request.job is not None:
                request.job.dropped = True
        self._requests = wanted
        self._queue()

    @property
    def ready(self) -> int:
        """The number of requested batches that are drawn: the current step's and those ahead of it."""
        return sum(request.drawn is not None for request in self._requests)

    def _asked_before(self, asked: dict[str, Any]) -> _Request | None:
        for request in self._requests:
            if request.asked == asked:
                return request
            if request.asked["seed"] == asked["seed"]:
                differs = [name for name in asked if asked[name] != request.asked[name]]
                raise ValueError(
                    f"this step's batch was asked for ahead with other {' and '.join(differs)} than now: "
                    + "; ".join(f"{name} {request.asked[name]!r:.100}, now {asked[name]!r:.100}" for name in differs)
                    + ". A batch is fixed at its request: next_prompts must be what the next steps draw from"
                )
        return None

    def _queue(self) -> None:
        for request in self._requests:
            if request.job is None:
                request.version, request.job = self.version, self._put(self._call(request.asked))

    def _call(self, asked: dict[str, Any]) -> Callable[[], Samples]:
        prompts: Any = asked["prompts"]
        wrong: Exception | None = None
        if isinstance(self.sampler, Engine):  # a thread may not use the tokenizer of the main thread
            try:
                prompts = self.sampler.token_ids(prompts)
            except Exception as error:
                wrong = error  # it is raised at the step of these prompts, as any other error of a request

        def call() -> Samples:
            if wrong is not None:
                raise wrong
            options = {name: value for name, value in asked.items() if name not in ("prompts", "n")}
            drawn: Samples = self_.sample(prompts, asked["n"], **options)
            found = sorted(set(drawn.version.tolist()))
            if found != [version]:
                raise RuntimeError(
                    f"the engine answered with sequences of the versions {found} of q, and was asked for version "
                    f"{version}: it holds another q, or does not write its version into Samples.version"
                )
            return drawn

        self_, version = self.sampler, self.version  # a thread that held self would keep it alive after its last user
        return call

    def _put(self, call: Callable[[], Any]) -> _Task:
        job = _Task(call)
        self._under_way = [*(each for each in self._under_way if not each.ended.is_set()), job]
        self._jobs.put(job)
        return job

    def _result(self, job: _Task) -> Any:
        job.ended.wait()
        if job.failures:
            times = len(job.failures)
            warnings.warn(
                f"the engine was lost {times} time{'s' if times > 1 else ''} and the same request was repeated; at "
                f"last {job.failures[-1]}",
                stacklevel=4,
            )
            job.failures = []
        if job.error is not None:
            raise job.error
        return job.value

    def _drain(self) -> None:
        for job in self._under_way:
            job.ended.wait()

    # ---- a sampler

    def sample(
        self, prompts: Sequence[Prompt] | None = None, n: int = 1, *, max_new_tokens: int, temperature: float = 1.0,
        seed: int | None = None, batch_size: int | None = None, first_row: int = 0,
    ) -> Samples:  # fmt: skip
        """Return the batch that was requested with these arguments.

        The batch can be taken again until the next ``request``. Sequences that were not requested are drawn now, after
        the requests that are under way.

        Args:
            prompts, n, max_new_tokens, temperature, seed, batch_size, first_row: as in ``LanguageModel.sample``.

        Raises:
            ValueError: a batch was asked for with the same seed and other arguments.
            RuntimeError: the engine answered with sequences of another q.
            EngineError: the engine was lost, and repeating the request did not help.
            Exception: whatever the engine has raised. A further call after any of these repeats the same request.
        """
        self._check_open()
        asked = _as_asked(prompts, n, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                          batch_size=batch_size, first_row=first_row)  # fmt: skip
        request = None if seed is None else self._asked_before(asked)
        self._queue()
        if request is None:
            drawn: Samples = self._result(self._put(self._call(asked)))
            return drawn
        assert request.job is not None
        try:
            drawn = self._result(request.job)
        except BaseException:
            if request.job.ended.is_set():  # Ctrl-C ends the waiting and leaves the job under way
                request.job = None
            raise
        request.taken = True
        return drawn

    def log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """Return (N,) fp64, log q(x) in nats by the engine, once the requests that are under way have ended."""
        self._check_open()
        engine = self.sampler
        scores: Tensor = self._result(self._put(lambda: engine.log_prob(samples, batch_size=batch_size)))
        return scores

    def load(self, source: Source) -> None:
        """Replace q once all requests of the old q are drawn. The engine loads in the thread that calls this.

        Args:
            source: the new parameters, in a form that the engine takes.

        Raises:
            Exception: whatever the engine raised. q and the requests are as they were.
        """
        self._check_open()
        too_old = self._older_than(self.version + 1)
        for request in too_old:
            if request.job is not None:
                request.job.dropped = True
        self._drain()
        for request in too_old:
            if request.job is not None and request.job.value is None and request.job.error is None:
                request.job = None  # the dropped job had not begun, so that nothing was drawn
        try:
            self.sampler.load(source)
        except BaseException:
            self._queue()
            raise

    @property
    def version(self) -> int:
        """The version of the q that the engine holds."""
        return self.sampler.version

    @version.setter
    def version(self, version: int) -> None:
        if version != self.sampler.version:
            self._drain()
        self.sampler.version = version
        too_old = self._older_than(version)
        # a step already has a taken batch, so that it is not drawn again
        self._requests = [each for each in self._requests if not (each in too_old and each.taken)]
        for request in too_old:
            request.job = None
        self._queue()

    def _older_than(self, version: int) -> list[_Request]:
        """Return the requests that are of no use once q has this version."""
        if self.max_lag is None:
            return []
        return [request for request in self._requests if version - request.version > self.max_lag]

    # ---- state, end

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the batches that are drawn. Those under way are left out: q draws the same ones again on request."""
        return [
            {"asked": request.asked, "version": request.version, "samples": request.drawn.state_dict()}
            for request in self._requests
            if request.drawn is not None
        ]

    def load_state_dict(self, state: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
        """Replace the requests by the batches of ``state_dict``. Call it once the engine holds the q of that state.

        Args:
            state: what ``state_dict`` returned.
            tokenizer: the tokenizer of the samples.

        Raises:
            ValueError: ``state`` is not a state of a sampler that draws ahead. Nothing has changed then.
        """
        self._requests, before = _requests_of(state, tokenizer), self._requests
        for request in before:
            if request.job is not None:
                request.job.dropped = True

    @staticmethod
    def check_state_dict(state: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check what ``load_state_dict`` would load.

        Raises:
            ValueError: ``state`` did not come from ``state_dict``.
        """
        _requests_of(state, tokenizer)

    def close(self) -> None:
        """End the threads, once each has the answer that it waits for. The caller ends the engine."""
        self._open = False
        for request in self._requests:
            if request.job is not None:
                request.job.dropped = True
        self._close()

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("this AsyncSampler is closed; make another one around the engine")


def _end(jobs: SimpleQueue[_Task | None], threads: int) -> None:
    for _ in range(threads):
        jobs.put(None)


def _requests_of(state: Any, tokenizer: PreTrainedTokenizerBase) -> list[_Request]:
    try:
        found = []
        for each in state:
            samples = Samples(**each["samples"], tokenizer=tokenizer)
            found.append(_Request(_as_asked(**each["asked"]), int(each["version"]), _Task(None, samples)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"this is not a state of AsyncSampler.state_dict: {type(error).__name__}: {error}") from error
    return found


def _as_asked(
    prompts: Sequence[Prompt] | None = None, n: int = 1, *, max_new_tokens: int, temperature: float = 1.0,
    seed: int | None = None, batch_size: int | None = None, first_row: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of ``sample`` as values that can be compared and written into a checkpoint."""
    return {
        "prompts": None if prompts is None else [_plain(prompt) for prompt in prompts],
        "n": n, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "batch_size": batch_size,
        "first_row": first_row,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value
