"""Check the settings of a step of distribution matching in one place, for ``Matcher`` and ``DMConfig``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from . import adapters
from .methods import METHODS
from .models import AdapterView, LanguageModel
from .objectives import KINDS, AdaptiveBeta, Objective, PPOClip, Terms, is_baseline, is_number
from .proposal import NEED_ALL, OfflineProposal
from .targets import EBM
from .tensors import address

#: A name of ``OBJECTIVES`` or ``METHODS``, an ``Objective``, or a function of ``Terms`` that returns (B,) weights A.
AnyObjective: TypeAlias = str | Objective | Callable[[Terms], Tensor]

_BASELINES = ("mean", "leave_one_out", "leave_one_out_context")
_NUMBERS = ("max_weight", "beta_target_kl", "beta_horizon", "entropy_coefficient", "ppo_epochs", "check_samples",
            "refit_ess", "refit_samples", "patience_zero")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The settings of a step. The arguments are those of ``Matcher``.

    Raises:
        ValueError: an objective or a baseline is unknown, a number is out of range, or options contradict each other.
    """

    objective: AnyObjective = "gdc++"
    baseline: float | str | None = None
    normalize: bool = True
    beta: float | None = None
    beta_target_kl: float | None = None
    beta_horizon: float = 10_000
    alpha: float | None = None
    normalize_alpha: bool = True
    max_return: float | None = None
    max_weight: float | None = None
    entropy_coefficient: float = 0.0
    on_policy: bool = False
    partition: str = "running"
    z_floor: float | None = None
    z_from_rows: bool = False
    uniform_groups: str = "keep"
    max_redraws: int = 4
    skip_zero_weight: bool = False
    ppo_epochs: int = 1
    ppo_clip: float = 0.2
    check_samples: int = 0
    refit_ess: float = 0.0
    refit_samples: int = 2048
    patience_zero: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and not hasattr(value, "__float__"):  # a tensor of one number has it too
                raise ValueError(f"{name} must be a number, got {value!r:.100}")
        for name in ("max_weight", "beta_target_kl", "beta_horizon", "ppo_epochs", "refit_samples", "patience_zero"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        for name in ("check_samples", "refit_ess"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)!r}")
        if not abs(self.entropy_coefficient) <= 1e30:
            raise ValueError(f"entropy_coefficient must be from -1e30 to 1e30, got {self.entropy_coefficient!r}")
        if self.entropy_coefficient and self.skip_zero_weight:
            raise ValueError(
                "every sequence has an entropy bonus, and skip_zero_weight=True runs no forward for those of weight 0; "
                f"leave one of them out, got entropy_coefficient={self.entropy_coefficient!r}"
            )
        if self.partition not in ("running", "step"):
            raise ValueError(f"partition must be 'running' or 'step', got {self.partition!r}")
        if self.z_floor is not None and not (is_number(self.z_floor) and 0 < self.z_floor <= 1):
            raise ValueError(
                "z_floor must be above 0 and at most 1, the Z to assume for a prompt while none of its sequences was "
                f"right, or None to leave such prompts out; got {self.z_floor!r}"
            )
        if self.z_from_rows and self.partition == "step":
            raise ValueError(
                "z_from_rows=True starts the running Z from completions of the base, and partition='step' takes Z from "
                "the samples of the step alone: set partition='running', or leave z_from_rows out"
            )
        if not is_baseline(self.baseline, _BASELINES):
            raise ValueError(
                f"baseline must be a number, 'mean', 'leave_one_out' or 'leave_one_out_context', got {self.baseline!r}"
            )
        PPOClip(self.ppo_clip)
        built_in = self.built_in
        got = f"the function {self.name}" if built_in is None else repr(built_in)
        if self.on_policy and self.check_samples:
            raise ValueError(
                "check_samples are drawn from a proposal to see whether the policy is nearer to the target, and "
                f"on-policy there is none; got check_samples={self.check_samples!r}"
            )
        if built_in == "reinforce_p" and self.baseline == "mean":
            raise ValueError(
                "baseline='mean' averages returns over steps, whose scale differs for reinforce_p; use leave_one_out"
            )
        if self.beta_target_kl is not None and not (self.on_policy and built_in == "kl_control"):
            raise ValueError(
                "beta_target_kl steers the beta of kl_control by KL(pi||a) on samples of pi itself: it needs "
                f"objective='kl_control' and on_policy=True, got {got} and on_policy={self.on_policy}"
            )
        if self.ppo_epochs > 1 and not (self.on_policy and built_in in ("reinforce", "kl_control")):
            raise ValueError(
                "ppo_epochs above 1 clips the ratio to the policy that a batch was drawn from: it needs "
                f"on_policy=True and objective 'reinforce' or 'kl_control', got {got} and on_policy={self.on_policy}"
            )
        self._check_uniform_groups()
        if self.weight_known and not self.on_policy and not getattr(self.template, "only_on_policy", False):
            raise ValueError(
                f"{self.name} has weight_known=True, so that its weights are formed before log pi is known, and "
                "on_policy is False: off-policy a weight has the ratio of pi and q in it; set on_policy=True, or leave "
                "the attribute out"
            )
        template = self.template  # making the objective raises its own errors
        if getattr(template, "only_on_policy", False) and not self.on_policy:
            raise ValueError(
                f"{self.name} is its method for sequences of the policy itself only, and on_policy is False: set "
                "on_policy=True. Off-policy the method clips each token, which a weight of a sequence can't do"
            )

    def _check_uniform_groups(self) -> None:
        if self.uniform_groups not in ("keep", "skip", "redraw", "replace"):
            raise ValueError(
                f"uniform_groups must be 'keep', 'skip', 'redraw' or 'replace', got {self.uniform_groups!r}"
            )
        if not isinstance(self.max_redraws, int) or self.max_redraws < 1:
            raise ValueError(f"max_redraws must be an integer of 1 or more, got {self.max_redraws!r}")
        if self.uniform_groups == "keep":
            return
        what = f"uniform_groups={self.uniform_groups!r} leaves out prompts whose sequences all have one value"
        if not self.centred:
            raise ValueError(
                f"{what}, and the weights of {self.name} are not 0 there, so that its gradient would get a bias: keep "
                "them, or take an objective that compares the sequences of a prompt alone (maxrl, grpo, dapo, gspo, "
                "vespo, DrGRPO, or reinforce with baseline='leave_one_out_context')"
            )
        if not self.on_policy:
            raise ValueError(
                f"{what}, and log pi of them is known without a forward only where the policy itself draws: set "
                "on_policy=True, got on_policy=False"
            )
        for name, other in (("entropy_coefficient", 0.0), ("ppo_epochs", 1)):
            if getattr(self, name) != other:
                raise ValueError(
                    f"{what}, and {name}={getattr(self, name)!r} needs every sequence that was drawn: keep them, or "
                    f"leave {name} out"
                )
        if self.uniform_groups in ("redraw", "replace") and self.refit_ess:
            raise ValueError(
                f"uniform_groups={self.uniform_groups!r} selects sequences by their values, and refit_ess fits lambda "
                "from them as if they were all that q draws: leave one of them out, got "
                f"refit_ess={self.refit_ess!r}"
            )

    @property
    def centred(self) -> bool:
        """Whether the weights of a prompt's sequences are all 0 when their values are equal, for q = pi."""
        if isinstance(self.template, Objective):
            return self.template.name == "reinforce" and self.template.baseline == "leave_one_out_context"
        return bool(getattr(self.template, "centred", False))

    @property
    def built_in(self) -> str | None:
        """The name of the built-in objective, or None where a function takes its place, whatever its name is."""
        if isinstance(self.objective, str):
            return None if self.objective in METHODS else self.objective
        return self.objective.name if isinstance(self.objective, Objective) else None

    @property
    def name(self) -> str:
        """The name of the objective or of the function in its place, for messages and cards only."""
        if isinstance(self.objective, str):
            return self.objective
        own: str = getattr(self.objective, "__name__", type(self.objective).__name__)
        return own if self.built_in is None else self.built_in

    @cached_property
    def template(self) -> Objective | Callable[[Terms], Tensor]:
        """The objective, before it gets the values that change during the training."""
        kind = KINDS.get(self.built_in or "")
        fixed = kind is not None and kind.baseline is not None  # Objective refuses any other baseline then
        baseline: Any = None if self.baseline == "mean" and not fixed else self.baseline
        chosen = METHODS.get(self.objective, self.objective) if isinstance(self.objective, str) else self.objective
        if isinstance(chosen, str):
            log_scale = 0.0 if self.objective == "reinforce_p" else None
            own = {name: getattr(self, name) for name in (*_parameters(), "normalize_alpha", "max_return")}
            return Objective(chosen, baseline, self.normalize, log_scale=log_scale, **own)
        named = (*_parameters(), "max_return", "baseline")
        given = [f"{name}={getattr(self, name)!r}" for name in named if getattr(self, name) is not None]
        given += [f"{name}=False" for name in ("normalize", "normalize_alpha") if not getattr(self, name)]
        if not isinstance(chosen, Objective):
            if not callable(chosen):
                raise TypeError(
                    f"objective must be a name, a dmfast.Objective or a function of dmfast.Terms, got {chosen!r}"
                )
            if given:
                raise ValueError(
                    f"an objective that is a function forms its weights itself, so {' and '.join(given)} can't act on "
                    "it; form them in the function"
                )
            return chosen
        if given and (chosen.baseline is not None or any(not each.startswith("baseline") for each in given)):
            raise ValueError(
                f"an Objective has its baseline, beta and other parameters itself; got {chosen} and "
                f"{' and '.join(given)}"
            )
        return replace(chosen, baseline=baseline) if given else chosen

    @property
    def own_alpha(self) -> float | None:
        """The alpha of the objective ``alpha``, or None for any other."""
        return self.template.alpha if isinstance(self.template, Objective) else None

    @property
    def needs(self) -> tuple[str, ...]:
        """The per-sequence inputs that the objective needs.

        A function names them in its attribute ``needs``. Without the attribute it gets log a.
        """
        needs: tuple[str, ...] = getattr(self.template, "needs", ("log_base",))
        return needs

    @property
    def whole_contexts(self) -> bool:
        """Whether the weight of a sequence depends on the others of its context in the same call of the loss."""
        return bool(getattr(self.template, "whole_contexts", False))

    @property
    def least_of_context(self) -> int:
        """The least number of sequences of a prompt that the objective or its baseline compares."""
        if isinstance(self.template, Objective):
            baseline = self.template.baseline
            return 2 if isinstance(baseline, str) and baseline == "leave_one_out_context" else 1
        return int(getattr(self.template, "least_of_context", 1))

    @property
    def comparing(self) -> str:
        """The words by which messages name what compares the sequences of a prompt."""
        of_baseline = f" with the baseline {self.baseline!r}" if isinstance(self.baseline, str) else ""
        return f"the objective {self.name!r}{of_baseline} compares the sequences of a prompt"

    @property
    def weight_known(self) -> bool:
        """Whether a function forms its weights without log pi, so that they are known when a step is drawn."""
        return not isinstance(self.template, Objective) and bool(getattr(self.template, "weight_known", False))

    @property
    def steered(self) -> AdaptiveBeta | None:
        """The initial coefficient of KL-control where it is steered, else None."""
        if self.beta_target_kl is None:
            return None
        return AdaptiveBeta(cast(float, cast(Objective, self.template).beta), self.beta_target_kl, self.beta_horizon)

    def options(self) -> dict[str, Any]:
        """Return the settings by the names of the arguments."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def objective_of(
        self, mean: float, log_scale: float, beta: AdaptiveBeta | None
    ) -> Objective | Callable[[Terms], Tensor]:
        """Return the objective of one step.

        Args:
            mean: the running mean of rho*r, for ``baseline="mean"``.
            log_scale: c of ``reinforce_p``, where the objective was given by name.
            beta: the coefficient of KL-control where it is steered.
        """
        objective = self.template
        if not isinstance(objective, Objective):
            return objective
        if self.baseline == "mean":
            objective = replace(objective, baseline=mean)
        if self.objective == "reinforce_p":
            objective = replace(objective, log_scale=log_scale)
        return objective if beta is None else replace(objective, beta=beta.value)


def _parameters() -> tuple[str, ...]:
    """Return the names of the parameters of objectives that are settings, such as ``alpha`` and ``beta``."""
    of_settings = {each.name for each in fields(Settings)}
    return tuple(
        kind.parameter for kind in KINDS.values() if kind.parameter is not None and kind.parameter in of_settings
    )


def check_trainable(policy: LanguageModel) -> None:
    """Check that a policy has parameters to train.

    Raises:
        ValueError: the policy has none, such as one whose adapter was loaded for inference.
    """
    if isinstance(policy, AdapterView):
        raise ValueError("policy is an AdapterView, which is frozen; pass the LanguageModel that it is a view of")
    model: Any = policy.model
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    hint = "call requires_grad_(True) on the parameters to train"
    if hasattr(model, "peft_config"):
        hint = "load the adapter by PeftModel.from_pretrained(..., is_trainable=True)"
    raise ValueError(
        f"no parameter of the policy's {type(model).__name__} requires a gradient, so there is nothing to train; {hint}"
    )


def check_target(target: EBM, model: nn.Module, settings: Settings, reward: Any) -> None:
    """Check that a model can be trained towards a target, before anything is set up for it.

    Raises:
        TypeError: ``target`` is not an ``EBM``.
        ValueError: the base would move with the model, the target is not fitted, or the objective lacks its reward.
    """
    if not isinstance(target, EBM):
        raise TypeError(f"target must be a dmfast.EBM, got {target!r:.200}; write EBM(base, constraints)")
    check_apart(target, model)
    if not target.fitted:
        raise ValueError(f"{target} is not fitted, so its lambda is not known: call target.fit(...) first")
    for name, given in (("z_floor", settings.z_floor), ("z_from_rows", settings.z_from_rows or None)):
        if given is not None and not target.is_filter:
            raise ValueError(
                f"{name}={given!r} is about a share of the base's sequences, and {target} is not the base filtered by "
                f"constraints that are known to be 1 or less: leave {name} out, or write the constraint as a Verifier "
                "(or as a Scorer with binary=True)"
            )
    if "reward" in settings.needs and reward is None:
        raise ValueError(f"objective {settings.name!r} needs reward=, a callable on Samples that gives R(x)")


def check_apart(target: EBM, model: nn.Module) -> None:
    """Check that the target's base does not move with a model that is trained.

    Raises:
        ValueError: the base shares parameters with the model and is not the view of it without its adapter.
    """
    base = target.base
    theirs = getattr(base, "model", None)
    if isinstance(base, AdapterView) and base.model is model:
        adapters.check(model)
    elif isinstance(theirs, nn.Module) and not {address(p) for p in theirs.parameters()}.isdisjoint(
        address(p) for p in model.parameters()
    ):
        raise ValueError(
            "target.base shares parameters with the model that is to be trained, so the target would move with it "
            "(an adapter put into a model changes that model too); give the EBM a copy from before, "
            "LanguageModel(copy.deepcopy(model), tokenizer), or for a PEFT model the view without its adapter, "
            "LanguageModel(model, tokenizer).base()"
        )


def check_proposal(proposal: OfflineProposal[Any] | None, policy: LanguageModel, settings: Settings) -> None:
    """Check that a proposal belongs to the policy and fits the settings.

    Raises:
        TypeError: ``proposal`` is not an ``OfflineProposal``.
        ValueError: the proposal belongs to another model, or contradicts the settings.
    """
    if proposal is None:
        return
    if not isinstance(proposal, OfflineProposal):
        raise TypeError(
            f"proposal must be an OfflineProposal of the policy, or None, got {proposal!r:.200}; write "
            "OfflineProposal(policy)"
        )
    if getattr(proposal.policy, "model", proposal.policy) is not policy.model:
        raise ValueError("proposal is a copy of another model than policy: write OfflineProposal(policy)")
    if settings.on_policy:
        raise ValueError("on_policy=True says that the policy itself draws, and proposal is what draws: leave one out")
    if settings.skip_zero_weight and proposal.criterion in NEED_ALL and not settings.check_samples:
        raise ValueError(
            f"skip_zero_weight=True leaves log pi unknown where P = 0, and the proposal's criterion "
            f"{proposal.criterion!r} needs it there; use kl or tvd, or fresh samples (check_samples)"
        )
