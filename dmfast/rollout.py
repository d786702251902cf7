"""Draw the sequences of a step from q and score them under the target: the first part of ``Matcher.draw``.

``Rollouts.sample`` draws x ~ q. ``Rollouts.score`` computes log a(x), log P(x) and the target's features, each once.
``Rollouts.step`` does both for a step and adds the rewards. It draws again for prompts whose sequences all have one
value.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from .batch import Prompts, SamplingOptions
from .groups import Scored, are_uniform
from .models import LanguageModel
from .proposal import OfflineProposal
from .ranks import Ranks, share
from .samples import Samples
from .seeds import seed_for
from .settings import Settings
from .targets import EBM, Feature, FeatureValues, Scorer, TargetScores
from .targets.rewards import WeightedSum, parts_of


@dataclass(eq=False)
class Rollout:
    """Hold what a step has drawn on this rank.

    Attributes:
        draws: the draws of the step in their order. All count in Z.
        scored: the N sequences of the step, after some of the first draw were replaced.
        uniform: (N,) bool, whether each is of a prompt whose values are all equal, or None if the objective does not
            compare these values.
        counts: what the scorers and the redraws counted, by name.
        seconds: the seconds that sampling and scoring took, by name.
    """

    draws: list[Scored]
    scored: Scored
    uniform: Tensor | None = None
    counts: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def for_partition(self, partition: str, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        """Return contexts, log P and log q of what was drawn on all ranks and counts in Z.

        Z of a step takes only the first draw of each context. Whether there is another draw depends on the first, so
        that the mean of both would be biased. The sums of a running Z go on and keep no such bias.
        """
        context_id = torch.cat([ranks.gather(each.samples.context_id) for each in self.draws])
        log_target = torch.cat([ranks.gather(each.inputs["log_target"]) for each in self.draws])
        log_q = torch.cat([ranks.gather(each.samples.log_prob) for each in self.draws])
        if partition != "step" or len(self.draws) == 1:
            return context_id, log_target, log_q
        counts, seen = [], torch.zeros(0, dtype=torch.int64, device=context_id.device)
        for part in torch.split(context_id, [len(each.samples) * ranks.size for each in self.draws]):
            counts.append(~torch.isin(part, seen))
            seen = torch.cat([seen, part])
        first = torch.cat(counts)
        return context_id[first], log_target[first], log_q[first]


class Rollouts:
    """Draw and score the sequences of steps. The arguments are those of ``Matcher``, after its checks.

    Attributes:
        q_is_base: whether q still is a. None: not known before the first sequences.
        scorers: the scorers of the target and the reward, by the names that the log uses for their counts.
    """

    def __init__(
        self,
        policy: LanguageModel,
        target: EBM,
        proposal: OfflineProposal[Any] | None,
        reward: Feature | None,
        settings: Settings,
        ranks: Ranks,
        other_contexts: Callable[[int, int, set[int]], Prompts] | None,
    ) -> None:
        self.policy, self.target, self.proposal, self.reward = policy, target, proposal, reward
        self.settings, self.ranks, self.other_contexts = settings, ranks, other_contexts
        self.scorers = _scorers_of(target, reward)
        self.q_is_base: bool | None = None

    # ---- any sequences of q

    def arguments(self, contexts: Prompts, n: int, how: SamplingOptions, seed: int) -> dict[str, Any]:
        """Return the arguments of ``Sampler.sample``."""
        return {
            "prompts": contexts.prompts, "n": n, "max_new_tokens": how.max_new_tokens, "temperature": how.temperature,
            "seed": seed, "batch_size": how.batch_size, "first_row": self.ranks.rank * len(contexts) * n,
        }  # fmt: skip

    def sample(self, contexts: Prompts, n: int, how: SamplingOptions, seed: int) -> Samples:
        """Return n sequences of q for each prompt."""
        sampler: Any = self.policy if self.proposal is None else self.proposal
        drawn: Samples = sampler.sample(**self.arguments(contexts, n, how, seed))
        drawn.check_log_prob("a step")  # an engine that makes samples by samples_of may have left it out
        return contexts.of(drawn)

    def score(
        self, x: Samples, batch_size: int | None, needs_base: bool
    ) -> tuple[TargetScores, FeatureValues, dict[str, Tensor]]:
        """Return the target's scores of the sequences, the values of its features, and the inputs of the loss."""
        log_base = x.log_prob if self.proposal_is_base(x) else None
        if log_base is None and needs_base:
            log_base = self.target.base.log_prob(x, batch_size=batch_size)
        values = FeatureValues(x)
        scores = self.target.score(x, log_base, batch_size=batch_size, values=values)
        inputs = {"log_target": scores.log_target, "log_proposal": x.log_prob}
        if needs_base:
            inputs["log_base"] = cast(Tensor, log_base)
        return scores, values, inputs

    def proposal_is_base(self, x: Samples) -> bool:
        """Return whether q still is a, so that log a(x) = log q(x). The first call compares scores bit for bit."""
        if self.proposal is None or self.proposal.swaps or self.proposal.sampler is not None:
            return False
        if self.q_is_base is None:
            some, q = x[: min(len(x), 8)], self.proposal.snapshot
            of_q, of_base = q.log_prob(some.to(q.device)).to(x.log_prob), self.target.base.log_prob(some)
            same = torch.tensor([torch.equal(of_q, of_base)], device=x.tokens.device)
            self.q_is_base = bool(self.ranks.gather(same).all())  # all ranks must run the base, or none
        return self.q_is_base

    # ---- the sequences of a step

    def step(self, contexts: Prompts, n: int, how: SamplingOptions, seed: int) -> Rollout:
        """Draw and score the sequences of a step, and draw groups of equal values again as ``uniform_groups`` says.

        Raises:
            ValueError: a context has fewer sequences than the objective compares, or has them on several ranks and the
                objective needs them in one call.
        """
        before, seconds = self._scorer_counts(), {"sampling": 0.0, "scoring": 0.0}
        if contexts.context_id is not None:  # else the contexts are known from the tokens that come with the samples
            ids = torch.as_tensor(contexts.context_id, device=self.policy.device)
            self._check_groups(ids.repeat_interleave(n))
        scored = self._drawn(contexts, n, how, seed, seconds)
        found = Rollout([scored], scored, seconds=seconds)
        if contexts.context_id is None:
            self._check_groups(scored.samples.context_id)
        if self.settings.centred:
            self._redraw(found, contexts, n, how, seed)
        found.counts |= {name: value - before[name] for name, value in self._scorer_counts().items()}
        return found

    def _drawn(self, contexts: Prompts, n: int, how: SamplingOptions, seed: int, seconds: dict[str, float]) -> Scored:
        """Draw and score sequences, and add the time that it took to ``seconds``."""
        start = time.perf_counter()
        x = self.sample(contexts, n, how, seed)
        sampled = time.perf_counter()
        needs_base = "log_base" in self.settings.needs or (self.settings.centred and self.reward is None)
        scores, values, inputs = self.score(x, how.batch_size, needs_base=needs_base)
        if self.reward is not None:
            inputs["reward"] = values(self.reward)
        rewards = {} if not isinstance(self.reward, WeightedSum) else {
            name: values(part) for name, part in self.reward.parts.items()
        }  # fmt: skip
        seconds["sampling"] += sampled - start
        seconds["scoring"] += time.perf_counter() - sampled
        return Scored(x, inputs, torch.cat([scores.features, scores.monitored], 1), scores.log_base, rewards)

    def _redraw(self, step: Rollout, contexts: Prompts, n: int, how: SamplingOptions, seed: int) -> None:
        """Find the groups of equal values, and replace them where ``uniform_groups`` asks for it."""
        gather = self.ranks.gather
        step.uniform, step.counts["n_uniform"] = self._uniform(step.scored)
        if self.settings.uniform_groups in ("keep", "skip"):
            return
        step.counts["n_redrawn"] = 0.0
        for k in range(self.settings.max_redraws):
            mine: list[int] = step.uniform[::n].nonzero()[:, 0].tolist()
            most = int(gather(torch.tensor([len(mine)], device=step.uniform.device)).max())
            if not most:
                break
            seed_of_draw = seed_for(seed, f"redraw {k}")
            again = self._instead(contexts, mine, most, step.draws, seed_of_draw)
            if not len(again):  # no other prompts are left
                break
            step.draws.append(self._drawn(again, n, how, seed_of_draw, step.seconds))
            mine = mine[: len(again)]
            step.scored = step.scored.replaced(mine, step.draws[-1], n)
            self._check_groups(step.scored.samples.context_id)
            step.counts["n_redrawn"] += n * float(gather(torch.tensor([len(mine)], device=step.uniform.device)).sum())
            step.uniform, _ = self._uniform(step.scored)

    def _uniform(self, scored: Scored) -> tuple[Tensor, float]:
        """Return for this rank's sequences whether their group has one value, and the number of such groups of all."""
        ids = self.ranks.gather(scored.samples.context_id)
        found = are_uniform(ids, self.ranks.gather(scored.values))
        return share(found, self.ranks), float(len(set(ids[found].tolist())))

    def _instead(self, contexts: Prompts, mine: list[int], most: int, draws: list[Scored], seed: int) -> Prompts:
        """Return the prompts that this rank draws in place of its groups of one value, equally many on all ranks.

        Some prompts only fill up the number. Their sequences count in Z like the rest, and are not used otherwise.

        Args:
            contexts: the contexts of the step.
            mine: the places of this rank's groups of one value.
            most: the largest number of such groups on a rank.
            draws: the draws so far.
            seed: the seed of the draw.
        """
        if self.other_contexts is None:
            rest = [place for place in range(len(contexts)) if place not in set(mine)]
            return contexts.at([*mine, *rest[: most - len(mine)]])
        known: set[int] = set(torch.cat([self.ranks.gather(each.samples.context_id) for each in draws]).tolist())
        others = self.other_contexts(seed, most * self.ranks.size, known)
        each = len(others) // self.ranks.size
        return others.at(range(self.ranks.rank * each, (self.ranks.rank + 1) * each))

    def _check_groups(self, context_id: Tensor) -> None:
        """Check that each context has as many sequences as the objective needs, and on one rank if it needs that.

        Args:
            context_id: (N,) int64, the contexts of this rank's sequences. The n sequences of a prompt lie together.

        Raises:
            ValueError: a context has fewer; or its sequences lie on several ranks and the objective needs them in one
                call.
        """
        least = self.settings.least_of_context
        if least == 1 and not self.settings.whole_contexts:
            return
        context_id = self.ranks.gather(context_id)
        for context, count in Counter(context_id.tolist()).items():
            if count < least:
                raise ValueError(
                    f"{self.settings.comparing}, and context {context} has one: draw n >= {least} of each prompt "
                    "(samples_per_context)"
                )
        if not self.settings.whole_contexts:
            return
        found: dict[int, int] = {}
        for rank, contexts in enumerate(context_id.view(self.ranks.size, -1).tolist()):
            for context in set(contexts):
                if found.setdefault(context, rank) != rank:
                    raise ValueError(
                        f"the objective {self.settings.name!r} needs all sequences of a prompt on one rank, and those "
                        f"of context {context} are on ranks {found[context]} and {rank}: give each its own prompts"
                    )

    def _scorer_counts(self) -> dict[str, float]:
        """Return the ``ScorerCounts`` of all scorers by the names that the log uses."""
        return {
            f"scorer/{name}/{what}": value
            for name, scorer in self.scorers.items() for what, value in vars(scorer.counts).items()
        }  # fmt: skip


def _scorers_of(target: EBM, reward: Feature | None) -> dict[str, Scorer]:
    """Return the scorers of the target and the reward by the names that the log uses for their counts."""
    found = target.scorers
    for name, part in parts_of(reward).items():
        source = part.source
        if isinstance(source, Scorer) and all(source.key != scorer.key for scorer in found.values()):
            found[name if source.name in found else source.name] = source
    return found
