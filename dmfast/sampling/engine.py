"""Share the work of all samplers around engines: requests become Samples, and loads of weights are checked.

An engine computes with other kernels, often in 16 bits, so its log-probabilities differ from the model's by rounding.
Here log q is the sum of the engine's own log-probabilities of the tokens that it drew. The importance weights then
correct the engine's rounding exactly.

A load must be whole. As long as the policy has moved little, scores can't tell a load of half of the parameters from
rounding. So a copy that differs visibly in every parameter is loaded before the first load. It is compared by scores
and, where the engine gives digests, tensor by tensor. Every later load is compared by scores. Where the engine gives
checksums that do not depend on layout, the load is also compared exactly by these.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import adapters, sharding
from ..copies import whole_copy
from ..families import without_adapters
from ..forwards import module_of
from ..kernels import warn_caller
from ..models import AdapterView, LanguageModel, Source
from ..ranks import OneProcess, Ranks
from ..samples import Prompt, Samples, check_counts, check_temperature
from ..seeds import seed_for
from . import weights

_T = TypeVar("_T")
_AT_ONCE = 256  # the most sequences of one prompt in one request
_PROBES, _PROBE_TOKENS = 8, 16
_LOST = 3  # how often weights that an engine has lost are loaded again within one call


class EngineError(OSError):
    """The error of an engine that is gone, fails, or holds other weights than q's, after all retries."""


class LostWeights(EngineError):
    """The error of a request for an adapter that the engine does not have, as after a restart."""


class Completion(NamedTuple):
    """A continuation as an engine returned it: its token ids and the log-probability of each in nats."""

    token_ids: list[int]
    log_probs: list[float]


class Request(NamedTuple):
    """A request to an engine for n continuations of one prompt. The i-th has the seed ``seed + i``."""

    ids: list[int]
    n: int
    seed: int
    max_new_tokens: int
    temperature: float


class TokenIds(list[list[int]]):
    """The prompts of a request that ``Engine.token_ids`` has made token ids. ``sample`` takes them as they are."""


@dataclass(frozen=True)
class Facts:
    """The facts that an engine gives about itself.

    Attributes:
        name: the engine's name in messages.
        context: the most tokens of prompt and continuation; None: not known.
        dtype: the dtype that it computes in.
        any_temperature: whether its log-probabilities are those at the temperature of a request. Where this is False
            they are those at temperature 1.
        adapter_rank: the greatest rank of a LoRA adapter that it takes beside its weights; None: it takes no adapters.
        adapter_modules: the last names of the modules on which it takes adapters, or None for all modules.
    """

    name: str
    context: int | None
    dtype: torch.dtype
    any_temperature: bool
    adapter_rank: int | None = None
    adapter_modules: tuple[str, ...] | None = None


class Gate:
    """A lock under which requests run together and a load runs alone."""

    def __init__(self) -> None:
        self._free, self._running, self._loading = threading.Condition(), 0, False

    @contextmanager
    def request(self) -> Iterator[None]:
        """Wait until no load runs, and hold back loads within the block."""
        with self._free:
            self._free.wait_for(lambda: not self._loading)
            self._running += 1
        try:
            yield
        finally:
            with self._free:
                self._running -= 1
                self._free.notify_all()

    @contextmanager
    def load(self) -> Iterator[None]:
        """Wait until no request runs, and hold back requests within the block."""
        with self._free:
            self._free.wait_for(lambda: not self._loading)
            self._loading = True
            self._free.wait_for(lambda: not self._running)
        try:
            yield
        finally:
            with self._free:
                self._loading = False
                self._free.notify_all()


class Engine:
    """The part of a ``Sampler`` around an engine that does not depend on how the engine is reached.

    Args:
        like: the policy, or a model with the policy's tokenizer, context and tokens that end a sequence.
        check_load: whether the first load proves that every parameter reaches the engine. A second copy of the model
            takes memory during this proof. Without it loads are still compared by a few scores.

    Attributes:
        version: the number of the q that the engine holds.
        ranks: the processes of a run that draw from one engine. All of them call ``load``, and rank 0 loads.
        facts: the facts that the engine gives about itself.
        context: the most tokens that both the model and the engine take; None: no limit is known.
    """

    facts: Facts

    def __init__(self, like: LanguageModel, *, check_load: bool = True) -> None:
        if not isinstance(like, LanguageModel):
            raise TypeError(f"an engine needs the policy as a LanguageModel, got a {type(like).__name__}")
        self.version = 0
        self.ranks: Ranks = OneProcess()
        self._like, self._check_load = like, check_load
        self._gate = Gate()
        self._tag: str | None = None  # the name under which the engine holds q's weights
        self._comparable = False  # whether the engine's checksums are those of the model
        self._digests_of_load: dict[str, str] | None = None
        self._gets_adapters = False  # whether a load gives the engine an adapter, and not a whole model
        self._sums_of_load: dict[str, int] = {}

    # ---- what a subclass implements

    def _complete(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Return the continuations of each request.

        Raises:
            EngineError: the engine failed, after all retries.
        """
        raise NotImplementedError

    def _prompt_log_probs(self, rows: Sequence[list[int]]) -> list[list[float]]:
        """Return, for each sequence, the log-probability at temperature 1 of each token after the first."""
        raise NotImplementedError

    def _put(self, model: LanguageModel, tag: str) -> None:
        """Replace the engine's parameters by those of a model, and give them this tag.

        The model has no adapter, or ``_gets_adapters`` is True and the engine gets the model's adapter alone.
        """
        raise NotImplementedError

    def _put_back(self, tag: str) -> None:
        """Replace the engine's parameters by those that were kept under this tag."""
        raise NotImplementedError

    def _keep(self, tag: str) -> None:
        """Keep the parameters that were put last, under this tag, as those of q. All ranks call it."""
        raise NotImplementedError

    def _held_tag(self) -> str:
        """Return the tag of the weights that the engine holds now."""
        raise NotImplementedError

    def _digests(self) -> dict[str, str] | None:
        """Return a digest of each tensor of the engine, or None where the engine gives none.

        A tensor that is empty because the engine keeps its values packed elsewhere is left out. Scores check it.
        """
        raise NotImplementedError

    def _checksums(self) -> int | None:
        """Return the sum of ``weights.checksum`` over the engine's parameters, or None where it gives none."""
        raise NotImplementedError

    def _spoil(self) -> None:
        """Give the engine's weights a tag that is not q's."""
        raise NotImplementedError

    def _facts_again(self) -> Facts:
        """Return what an engine says about itself after it was started anew. By default it can't have changed.

        A thread may call this, so it does not use the tokenizer.

        Raises:
            ValueError: the engine no longer fits the policy, or was started with other options.
            EngineError: the engine failed, after all retries.
        """
        return self.facts

    def _take(self, facts: Facts) -> None:
        """Keep what the engine says about itself, which decides whether it gets adapters or whole models.

        Raises:
            ValueError: the engine was started so that it takes adapters, and can't take the policy's.
        """
        self.facts = facts
        self._gets_adapters = facts.adapter_rank is not None and has_adapter(self._like)
        if self._gets_adapters:
            self._adapter(self._like)

    def _adapter(self, model: LanguageModel) -> str:
        """Return the name of the adapter under which a model computes.

        Raises:
            ValueError: no adapter or more than one is active, or the engine can't take it.
        """
        module, facts = module_of(model), self.facts
        active = active_adapters(model) if has_adapter(model) else []
        if len(active) != 1:
            raise ValueError(
                f"{self.facts.name} gets the policy's adapter at each load, and the model to load has {len(active)} "
                "active adapters: load a model that has the adapter"
            )
        modules, hint = facts.adapter_modules, ""
        if modules is None:
            hint = ", or with --lora-target-modules " + " ".join(sorted(weights.lora_modules(module, active[0])))
            why: str | None = "on the head, where it takes adapters by default, it can't score sequences with them"
        else:
            why = weights.why_not_alone(module, active[0], facts.adapter_rank or 0, modules)
        if why is not None:
            raise ValueError(
                f"{self.facts.name} was started to take LoRA adapters, and can't take the adapter {active[0]!r}: "
                f"{why}; start it without --enable-lora (enable_lora), and it gets the adapter merged into its "
                f"base{hint}"
            )
        return active[0]

    def _new_tag(self) -> str:
        """Return a tag that is new among all runs, and the same on all ranks."""
        mine = torch.tensor([uuid.uuid4().int % 2**62], device=self._like.device)
        return f"dmfast-{int(self.ranks.gather(mine)[0]):x}"

    # ---- the protocol of samplers

    @property
    def context(self) -> int | None:
        """The most tokens that both the model and the engine take; None: no limit is known."""
        known = [limit for limit in (self._like._context, self.facts.context) if limit is not None]
        return min(known) if known else None

    def check(self, *, max_new_tokens: int, temperature: float, prompts: Sequence[Prompt] | None = None) -> None:
        """Check, before anything is drawn, that the engine can draw with these arguments.

        Raises:
            ValueError: prompt and continuation exceed the engine's context, or the engine's log-probabilities are not
                those at this temperature.
        """
        self._ids(prompts, max_new_tokens, temperature)

    def token_ids(self, prompts: Sequence[Prompt] | None) -> TokenIds:
        """Return prompts as token ids, with which another thread may call ``sample``.

        A tokenizer keeps its padding and truncation as state, and the main thread may use the policy's tokenizer for
        something else. So a thread that tokenized prompts could get them padded or cut.

        Raises:
            TypeError, ValueError: as in ``LanguageModel.sample``.
        """
        return prompts if isinstance(prompts, TokenIds) else TokenIds(self._like._encoder(prompts))

    def _ids(self, prompts: Any, max_new_tokens: int, temperature: float) -> list[list[int]]:
        if temperature != 1.0 and not self.facts.any_temperature:
            raise ValueError(
                f"{self.facts.name} gives log-probabilities at temperature 1 only, and the temperature is "
                f"{temperature!r}: start it with --logprobs-mode processed_logprobs, as dmfast serve-proposal does"
            )
        ids = self.token_ids(prompts)
        longest, context = max(map(len, ids)), self.context
        if context is not None and longest + max_new_tokens > context:
            raise ValueError(
                f"the longest prompt has {longest} tokens; with max_new_tokens={max_new_tokens} that is beyond the "
                f"context of {context} of {self.facts.name} and the model"
            )
        return ids

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt] | None = None, n: int = 1, *, max_new_tokens: int, temperature: float = 1.0,
        seed: int | None = None, batch_size: int | None = None, first_row: int = 0,
    ) -> Samples:  # fmt: skip
        """Draw n sequences of each prompt with the engine's own log q.

        If ``ranks`` is one process, several threads may call it, with prompts that the main thread has made
        ``token_ids``. Several ranks call it together, each in one thread.

        A sequence depends only on the seed and on its place, as far as the engine's kernels give the same logits in
        batches of other sizes.

        Args:
            prompts, n, max_new_tokens, temperature, seed, first_row: as in ``LanguageModel.sample``.
            batch_size: ignored, because the engine forms its own batches.

        Returns:
            ``Samples`` on the CPU.

        Raises:
            ValueError: as in ``LanguageModel.sample`` and in ``check``.
            EngineError: the engine failed or holds other weights than q's, after all retries.
        """
        check_counts(n=n, max_new_tokens=max_new_tokens)
        check_temperature(temperature)
        ids = self._ids(prompts, max_new_tokens, temperature)
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        first = seed_for(seed, "an engine's sequences") + first_row
        # Each prompt has requests of its own, because prompts that share a request would share its random numbers.
        requests = [
            Request(prompt, min(_AT_ONCE, n - start), first + place * n + start, max_new_tokens, temperature)
            for place, prompt in enumerate(ids) for start in range(0, n, _AT_ONCE)
        ]  # fmt: skip
        drawn, version = self._by_q(lambda: self._checked(requests), "drew")
        return self._samples(ids, n, drawn, temperature, version)

    def _by_q(self, call: Callable[[], _T], did: str) -> tuple[_T, int]:
        """Return what a call to the engine gives while it holds q's weights, and the version of that q.

        All ranks call it together. Only rank 0 restores lost weights, while the others wait: two ranks that load into
        one engine would each take the other's load for another loss.

        Raises:
            EngineError: the engine failed, for this rank or another, or loses q's weights again and again.
        """
        if self._tag is None:
            raise RuntimeError(f"{self.facts.name} holds no q yet: call load(policy), as OfflineProposal does")
        done: tuple[_T, int] | None = None
        for _ in range(_LOST):
            error: EngineError | None = None
            if done is None:
                try:
                    done = self._while_q_is_held(call)
                except EngineError as caught:
                    error = caught
            self._fail_together(error)
            if self._on_all_ranks(done is not None):
                assert done is not None
                return done
            self._restore()
        raise EngineError(
            f"{self.facts.name} lost the weights of q {_LOST} times while it {did}: it was started anew, or something "
            "else loads weights into it. Let one run use one engine"
        )

    def _while_q_is_held(self, call: Callable[[], _T]) -> tuple[_T, int] | None:
        """Return what a call gives and the version of q, or None where the engine did not hold q before or after it."""
        with self._gate.request():
            if self._held_tag() != self._tag:
                return None
            try:
                found = call()
            except LostWeights:
                return None
            return (found, self.version) if self._held_tag() == self._tag else None

    def _on_all_ranks(self, mine: bool) -> bool:
        """Return whether this is so on every rank."""
        return bool(self.ranks.gather(torch.tensor([mine], device=self._like.device)).all())

    def _fail_together(self, error: EngineError | None) -> None:
        """Raise on every rank the error of one, because the others would wait for it in their next collective."""
        if not self._on_all_ranks(error is None):
            raise error or EngineError(f"{self.facts.name} failed for another rank, whose error says how")

    def _checked(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the continuations of all requests, each checked against dmfast's rule for the end of a sequence.

        Raises:
            EngineError: a continuation ends elsewhere or has no log-probabilities, or one is missing.
        """
        ends, found = set(self._like.eos_token_ids), []
        for request, drawn in zip(requests, self._complete(requests), strict=True):
            if len(drawn) != request.n:
                raise EngineError(f"{self.facts.name} gave {len(drawn)} sequences of {request.n}")
            for each in drawn:
                self._check(each, ends, request.max_new_tokens)
            found += drawn
        return found

    def _check(self, each: Completion, ends: set[int], most: int) -> None:
        tokens, values = each
        ended = next((place for place, token in enumerate(tokens) if token in ends), None)
        right = len(tokens) == most if ended is None else ended == len(tokens) - 1 < most
        if not right or len(values) != len(tokens):
            raise EngineError(
                f"{self.facts.name} gave {len(tokens)} tokens with {len(values)} log-probabilities, and dmfast's rule "
                f"ends a sequence at the first of {sorted(ends)} or after {most} tokens: something else ends it, such "
                "as max_new_tokens of a generation_config"
            )
        if not all(-9999.0 < value <= 1e-3 for value in values):  # vLLM gives -9999 for -inf
            raise EngineError(
                f"{self.facts.name} gave values that are not log-probabilities, {min(values)} to {max(values)}: its "
                "weights may hold NaN"
            )

    def _samples(
        self, prompts: Sequence[list[int]], n: int, drawn: Sequence[Completion], temperature: float, version: int
    ) -> Samples:
        like, cpu = self._like, torch.device("cpu")
        left, left_mask = like._encoder.left_padded(prompts, cpu)
        context_id = torch.arange(len(prompts), device=cpu).repeat_interleave(n)
        width, pad = max(len(each.token_ids) for each in drawn), like.pad_token_id
        right = torch.tensor([each.token_ids + [pad] * (width - len(each.token_ids)) for each in drawn], device=cpu)
        ones = [[1] * len(each.token_ids) + [0] * (width - len(each.token_ids)) for each in drawn]
        right_mask = torch.tensor(ones, device=cpu)
        none = torch.zeros(len(drawn), left.shape[1], dtype=torch.int64, device=cpu)
        return Samples(
            tokens=torch.cat([left[context_id], right], 1),
            attention_mask=torch.cat([left_mask[context_id], right_mask], 1),
            score_mask=torch.cat([none, right_mask], 1).bool(),
            prompt_len=left.shape[1],
            log_prob=torch.tensor([math.fsum(each.log_probs) for each in drawn], dtype=torch.float64, device=cpu),
            context_id=context_id,
            temperature=temperature,
            tokenizer=like.tokenizer,
            pad_token_id=pad,
            version=torch.full_like(context_id, version),
            eos_token_ids=tuple(like.eos_token_ids),
        )

    def log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """Return (N,) fp64, log q(x) in nats by the engine, which scores at temperature 1.

        Several ranks call it together.

        Args:
            samples: N sequences, each at least one token shorter than the engine's context.
            batch_size: ignored, because the engine forms its own batches.

        Raises:
            ValueError: the samples have another temperature. ``OfflineProposal.snapshot`` scores them.
            EngineError: as in ``sample``.
        """
        if samples.temperature != 1.0:
            raise ValueError(
                f"{self.facts.name} scores sequences at temperature 1 only, and these have {samples.temperature!r}: "
                "score them by OfflineProposal.snapshot"
            )
        scores, _ = self._by_q(lambda: self._scores(samples), "scored")
        return scores.to(samples.log_prob.device)

    def _scores(self, samples: Samples) -> Tensor:
        rows = [
            (tokens[mask.bool()].tolist(), scored[mask.bool()].tolist())
            for tokens, mask, scored in zip(samples.tokens, samples.attention_mask, samples.score_mask, strict=True)
        ]
        each = self._prompt_log_probs([tokens for tokens, _ in rows])
        sums = [
            math.fsum(value for value, is_scored in zip(values, scored[-len(values) :], strict=True) if is_scored)
            for values, (_, scored) in zip(each, rows, strict=True)
        ]
        return torch.tensor(sums, dtype=torch.float64, device="cpu")

    # ---- loading

    @torch.no_grad()
    def load(self, source: Source) -> None:
        """Replace the engine's parameters by those of a policy or a folder: q <- pi. Running requests end first.

        An engine that was started to take LoRA adapters gets a policy's adapter alone. For any other engine, an adapter
        is merged into a copy of its base, which takes its memory for the time of the load.
        A policy that is sharded by FSDP is made whole in rank 0's memory, tensor by tensor.

        Raises:
            TypeError, FileNotFoundError: the source is neither a model nor a folder.
            ValueError: an adapter can't be merged, or the merged model computes another distribution; an engine that
                takes adapters can't take this one; a folder holds only an adapter; a sharded model has an adapter, or
                lies on processes that ``ranks`` does not name.
            EngineError: the engine failed, or did not take all parameters. It holds q as before, or gets q again before
                it draws.
        """
        with torch.autocast(self._like.device.type, enabled=False):
            self._load(self._model(source))

    def _load(self, model: LanguageModel | None) -> None:
        tag, first = self._new_tag(), self._tag is None
        with self._gate.load():
            error = None if model is None else self._loaded(model, tag)
            if not self.ranks.agree(error is None):
                raise error or EngineError(
                    f"{self.facts.name} could not be loaded with q: the error of rank 0 says why"
                )
            self._comparable = self.ranks.agree(self._comparable)
            self._keep(tag)
            self._tag = tag
        if first and not self._comparable:
            by = "a few scores only" if self._digests_of_load is None else "a few scores and by which tensors change"
            warn_caller(
                f"{self.facts.name} gives no checksums that are the policy's, so its loads are compared by {by}; "
                "dmfast serve-proposal starts one that gives them"
            )

    def _model(self, source: Source) -> LanguageModel | None:
        """Return the model that the engine is to hold, without an adapter, on rank 0, and None on the other ranks."""
        like, first = self._like, self.ranks.rank == 0
        if isinstance(source, LanguageModel):
            model = source
        elif isinstance(source, nn.Module):
            model = like.around(source)
        elif isinstance(source, (str, Path)) or hasattr(source, "__fspath__"):
            if not Path(source).is_dir():
                raise FileNotFoundError(f"there is no folder {str(source)!r} to load a model from")
            if (Path(source) / "adapter_config.json").is_file():
                raise ValueError(f"{str(source)!r} holds an adapter alone: load a model that has it, or a whole one")
            kind: Any = sharding.class_of(without_adapters(module_of(like)))
            model = like.around(kind.from_pretrained(Path(source), local_files_only=True).to(like.device))
        else:
            raise TypeError(f"load takes a LanguageModel, its module or a folder, got a {type(source).__name__}")
        if sharding.is_sharded(model.model):
            gathered = self._gathered(module_of(model))
            return None if gathered is None else self._alone(gathered)
        if self._gets_adapters:
            return self._with_adapter(model)
        whole = plain(model)
        model = model if whole is module_of(model) else self._same(like.around(whole), model)
        if self.ranks.size == 1:
            return model
        return self._alone(module_of(model)) if first else None

    def _with_adapter(self, model: LanguageModel) -> LanguageModel | None:
        """Return a model with the adapter that the engine is to get, on rank 0, and None on the other ranks."""
        name = self._adapter(model)
        if self.ranks.size == 1:
            return model
        if self.ranks.rank != 0:
            return None
        module = module_of(model)
        if isinstance(model, AdapterView):  # a new wrapper could not tell it from the policy
            module = copy.deepcopy(module).requires_grad_(False)
            module.set_adapter(name)
        return self._alone(module)

    def _alone(self, module: nn.Module) -> LanguageModel:
        """Return the model that is loaded, wrapped anew for forwards that only rank 0 runs.

        The ranks of a sharded policy learn together what a first forward finds about the model. So rank 0 must not
        share with the policy what it finds here.
        """
        like = self._like
        return LanguageModel(
            module, like.tokenizer, eos_token_id=like.eos_token_ids, chat_template_kwargs=like.chat_template_kwargs,
            check_scores=like.checks_scores, logits_dtype=like.logits_dtype,
        )  # fmt: skip

    def _gathered(self, module: nn.Module) -> nn.Module | None:
        holders = sharding.holders(module)
        if holders > self.ranks.size:
            raise ValueError(
                f"{holders} processes hold parts of the {sharding.class_of(module).__name__}, and the sampler's ranks "
                f"say {self.ranks.size}, so that each of them would load the engine: set sampler.ranks, as to "
                "AccelerateRanks(accelerator)"
            )
        if without_adapters(module) is not module:
            raise ValueError(
                "an engine gets an adapter merged into its base, which was not tried with a model that is sharded by "
                "FSDP: train the whole model, or without FSDP"
            )
        return whole_copy(module, self.ranks.rank == 0)

    def _same(self, merged: LanguageModel, model: LanguageModel) -> LanguageModel:
        """Return the merged model, once it is found to compute what the model with its adapter computes.

        Raises:
            ValueError: the merged model computes another distribution. This happens where the adapter is on an
                embedding that is also the head.
        """
        x = self._random(model)
        found, wanted = (each.log_prob(x, batch_size=_PROBES).cpu() for each in (merged, model))
        if bool(((found - wanted).abs() > self._allowed(x)).any()):
            raise ValueError(
                f"merged into its base the adapter gives other log-probabilities, {_few(found)} instead of "
                f"{_few(wanted)} nats, as happens where it is on an embedding that is the head, too: an engine can't "
                "draw from it; leave such layers out of target_modules"
            )
        return merged

    def _loaded(self, model: LanguageModel, tag: str) -> Exception | None:
        """Load and compare. Return None, or the error of a failed load after which the engine was given q again."""
        try:
            if self._tag is not None and self._held_tag() != self._tag:
                self._check_again()
        except Exception as error:  # q is not given again to an engine that does not fit; other ranks wait for this one
            return error
        try:
            if self._tag is None and self._check_load:
                self._prove(model)
            self._put(model, tag)
            self._compare(model)
        except BaseException as error:
            self._undo(error)
            if not isinstance(error, Exception):
                raise
            return error
        return None

    def _undo(self, error: BaseException) -> None:
        """Give the engine q again after a failed load. Where that fails, too, ``sample`` tries it again."""
        if self._tag is None:
            return
        try:
            self._put_back(self._tag)
        except OSError as again:  # sample tries it again
            error.__context__ = again

    def _restore(self) -> None:
        """Let rank 0 give q again to an engine that holds other weights, such as those that it was started with.

        Raises:
            EngineError: the engine did not take q, or only a part of it.
        """
        error: EngineError | None = None
        if self.ranks.rank == 0:
            try:
                self._give_again()
            except EngineError as caught:
                error = caught
        self._fail_together(error)

    def _give_again(self) -> None:
        with self._gate.load():
            if self._held_tag() == self._tag:
                return  # another thread was faster
            assert self._tag is not None
            self._check_again()
            self._put_back(self._tag)
            if self._comparable:
                whole = self._checksums() == weights.total(self._sums_of_load)
            else:
                whole = self._digests_of_load is None or self._digests_now() == self._digests_of_load
            if not whole:
                self._spoil()
                raise EngineError(f"{self.facts.name} was given q again, and did not take all of its parameters")
            warn_caller(f"{self.facts.name} held other weights than q's, as after a restart; it was given q again")

    def _check_again(self) -> None:
        """Check an engine that was started anew as when it was connected, and compare what it says about itself.

        Raises:
            EngineError: it no longer fits, was started with other options, or failed.
        """
        try:
            facts = self._facts_again()
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # the last three from an odd answer
            raise EngineError(f"{self.facts.name} was started anew, and no longer fits the policy: {error}") from error
        before, now = dataclasses.asdict(self.facts), dataclasses.asdict(facts)
        differ = [f"{name} was {before[name]} and is {now[name]}" for name in before if before[name] != now[name]]
        if differ:
            raise EngineError(
                f"{self.facts.name} was started anew with other options ({'; '.join(differ)}): start it with the "
                "options that it had when it was connected"
            )

    def _prove(self, model: LanguageModel) -> None:
        """Load a copy that differs in every parameter, and compare the engine with it.

        Raises:
            EngineError: the engine did not take all of its parameters.
        """
        if self._gets_adapters:
            self._compare_base(model)
        before, name = self._digests_now(), self._adapter(model) if self._gets_adapters else None
        other = self._under_policy(model).around(weights.perturbed(module_of(model), name))
        try:
            self._put(other, "dmfast-perturbed")
        except EngineError as error:
            raise EngineError(
                f"{self.facts.name} did not take its first weights, as where it serves another model than the policy "
                f"({error})"
            ) from error
        after, found = self._digests_now(), self._scores(self._random(other))
        if before is not None and after is not None:
            stale = sorted(name for name, digest in after.items() if before.get(name) == digest)
            if stale:
                raise EngineError(self._half(f"{len(stale)} of its {len(after)} tensors, {', '.join(stale[:3])}, stay"))
        wanted = other.log_prob(self._random(other), batch_size=_PROBES).cpu()
        self._refuse_scores("a copy that differs in every parameter", found, wanted, self._random(other))
        self._comparable = self._checksums() == weights.total(self._sums(other))

    def _compare_base(self, model: LanguageModel) -> None:
        """Compare the engine's own weights with the base of the policy's adapter.

        Raises:
            EngineError: they give other scores.
        """
        x = self._random(model)
        with adapters.switched(module_of(model), None):
            wanted = self._under_policy(model).log_prob(x, batch_size=_PROBES).cpu()
        found = self._scores(x)
        if self._differ(found, wanted, x):
            raise EngineError(
                f"{self.facts.name} serves another model than the base of the policy's adapter: it gives {len(x)} "
                f"sequences the log-probabilities {_few(found)}, and the base without its adapter {_few(wanted)} nats. "
                "An engine that takes adapters gets nothing else, so start it with the model that the adapter is on"
            )

    def _under_policy(self, model: LanguageModel) -> LanguageModel:
        """Return a language model that follows the active adapter of its module, which a view does not."""
        return self._like.around(module_of(model)) if isinstance(model, AdapterView) else model

    def _digests_now(self) -> dict[str, str] | None:
        """Return ``_digests``, or None where the engine gets adapters, which are not among its tensors."""
        return None if self._gets_adapters else self._digests()

    def _sums(self, model: LanguageModel) -> dict[str, int]:
        """Return the checksums that the engine has when it holds this model."""
        module, dtype = module_of(model), self.facts.dtype
        if self._gets_adapters:
            return weights.checksums_with(module, self._adapter(model), dtype)
        return weights.checksums(module, dtype)

    def _half(self, what: str) -> str:
        hint = "dmfast serve-proposal starts it so that it does (on a CPU vLLM packs the weights of linear layers away)"
        if self._tag is None:
            hint += ", or it serves another model than the policy"
        return f"{self.facts.name} does not take all parameters when weights are loaded: {what} as they were; {hint}"

    def _refuse_scores(self, what: str, found: Tensor, wanted: Tensor, x: Samples) -> None:
        if self._differ(found, wanted, x):
            rounding = float(self._allowed(x).max())
            raise EngineError(
                f"{self.facts.name} was given {what}, and gives {len(x)} sequences other log-probabilities than the "
                f"model: {_few(found)} instead of {_few(wanted)} nats (rounding: {rounding:.2g}). "
                "It has loaded a part only, serves another model, or draws from another distribution (truncated, "
                "or with a logits processor)"
            )

    def _differ(self, found: Tensor, wanted: Tensor, x: Samples) -> bool:
        """Return whether scores of the engine and of the model differ by more than rounding."""
        return bool(((found - wanted).abs() > self._allowed(x)).any()) or not bool(found.isfinite().all())

    def _compare(self, model: LanguageModel) -> None:
        """Compare what the engine holds with the model that was loaded.

        Raises:
            EngineError: they differ by more than rounding, or in a checksum.
        """
        sums = self._sums(model)
        if self._comparable and self._checksums() != weights.total(sums):
            raise EngineError(self._half("the checksum over all of them is not the model's: some stay"))
        digests = None if self._comparable else self._digests_now()
        old, before = self._digests_of_load, self._sums_of_load
        if digests is not None and old is not None:
            changed = {name.rpartition(":")[2] for name, digest in digests.items() if old.get(name) != digest}
            stale = {name.rpartition(":")[2] for name in digests} - changed  # the worker's name precedes the colon
            same = sum(before.get(name) == each for name, each in sums.items())
            if len(stale) > same:  # each tensor of the engine is made of one or several of the model's
                raise EngineError(self._half(f"{len(stale)} tensors, where {same} of the policy have not moved, stay"))
        x = self._some()
        self._refuse_scores("q", x.log_prob, model.log_prob(x.to(model.device), batch_size=_PROBES).cpu(), x)
        self._digests_of_load, self._sums_of_load = digests, sums

    def _some(self) -> Samples:
        """Return a few sequences that the engine draws now."""
        context, start = self.context, [self._like._encoder.start]
        tokens = _PROBE_TOKENS if context is None else max(min(_PROBE_TOKENS, context - 1), 1)
        drawn = self._checked([Request(start, _PROBES, 0, tokens, 1.0)])
        return self._samples([start], _PROBES, drawn, 1.0, self.version)

    def _random(self, model: LanguageModel) -> Samples:
        """Return a few sequences of random tokens, whose scores depend on much of the model."""
        context = self.context
        length = _PROBE_TOKENS + 1 if context is None else max(min(_PROBE_TOKENS + 1, context - 1), 2)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self._like.vocab_size, (_PROBES, length), generator=generator)
        drawn = [Completion(row[1:], [0.0] * (length - 1)) for row in ids.tolist()]
        x = self._samples([row[:1] for row in ids.tolist()], 1, drawn, 1.0, 0)
        return x.to(model.device)

    def _allowed(self, x: Samples) -> Tensor:
        """Return (N,) fp64, the nats by which rounding may change a score: about .25 per token in bf16.

        In 16 bits the bound grows with the square root of the length, because the signs differ by token.
        """
        own = next(self._like.model.parameters()).dtype
        eps = max(torch.finfo(dtype).eps for dtype in (self.facts.dtype, own))
        n = x.score_mask.sum(1).double().cpu()
        return max(32 * eps, 1e-4) * (n.sqrt() * 2 if eps > 1e-4 else n)


def plain(model: LanguageModel) -> nn.Module:
    """Return a module without adapters that computes what a model does: its own, or a copy with its adapter merged.

    Raises:
        ValueError: the model has an adapter that can't be merged.
    """
    module = module_of(model)
    if not has_adapter(model):
        return cast(nn.Module, module)
    other = copy.deepcopy(module).requires_grad_(False)
    name = next(iter(active_adapters(model)), None)
    try:
        return cast(nn.Module, other.unload() if name is None else other.merge_and_unload(adapter_names=[name]))
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"an engine draws from plain models, and the adapter {name!r} can't be merged into its base: {error}"
        ) from error


def has_adapter(model: LanguageModel) -> bool:
    """Return whether a model is a PEFT model with adapters."""
    module = module_of(model)
    return without_adapters(module) is not module


def active_adapters(model: LanguageModel) -> list[str]:
    """Return the names of the adapters under which a model with adapters computes."""
    if isinstance(model, AdapterView):
        return [] if model.adapter is None else [model.adapter]
    return [str(name) for name in module_of(model).active_adapters]


def _few(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:4].tolist()) + (", ..." if len(values) > 4 else "")
