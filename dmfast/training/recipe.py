"""Run ``dmfast train recipe.yaml``: a whole job in one file, from the constraints to the report.

    model: tiny-bios                # it may also be a folder, or a name on the hub
    prompts: null                   # null: the empty context; a list of strings or of chats (lists of messages); a
                                    # .txt (one a line), .jsonl, .csv or .parquet file with a column prompt; or
                                    # {dataset: name on the hub or folder, name: ..., split: train, column: prompt}
    stop: null                      # a sequence ends in EOS; with stop: "\\n" also in a token that has a newline
    chat_template_kwargs: null      # what the chat template gets besides the messages: {enable_thinking: false}
    constraints:                    # pointwise ones, and moments
      - moment: {contains: {any_of: [she, her], name: women}, value: 0.5}
      - contains: {word: amazing}
      - scorer: {function: my_module:my_function}   # or my_file.py:my_function, relative to where the command runs
      - verifier: {function: my_file.py:is_right}   # and other arguments of dmfast.Verifier, such as workers,
                                    # time_limit, truncated, and answer, which is a function too
      - classifier: {model: folder or name, label: POSITIVE, output: binary}
      - reward: {scorer: {...}, beta: 0.5}      # b(x) = exp(R(x)/beta)
    monitor: []                     # features that are measured and constrain nothing
    reward: null                    # for reinforce and kl_control: a feature, such as {scorer: {...}}, or a list
                                    # of them, whose sum is weighted by train.reward_weights
    fit: {n: 10240, seed: 0}        # lambda is fitted from at most n samples of the base
    lora: null                      # or the arguments of peft.LoraConfig: a, pi and q then share one backbone
    train: {max_steps: 60, ...}     # the arguments of DMConfig; with preset: alpha_dpg, those of DMConfig.preset
    evaluate: {samples: 2048}       # the samples of the model before training, and after it

The command writes into ``train.output_dir``: the model, ``log.json`` (machine, recipe, before, after, every step) and
``report.png``. After its tables it says whether the run came to its target, and by which criterion.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import set_seed

from .. import __version__, adapters, presets
from ..estimators import Estimate
from ..models import LanguageModel
from ..reading import of_yaml
from ..samples import Samples
from ..shipped import TINY_BIOS as TINY_BIOS  # noqa: PLC0414  # for those who import it from here
from ..shipped import located
from ..targets import EBM, Classifier, Contains, Feature, Moment, Reward, Scorer, Verifier
from ..targets.functions import function_at
from ..targets.rewards import AnyReward
from . import checkpoint, report
from .checks import check_alike, check_environment, refuse_arguments
from .config import DMConfig
from .data import Contexts
from .evaluation import evaluate
from .hub import prompts_of
from .prompt_files import read_prompts
from .ranges import numbers_of
from .trainer import DMTrainer
from .verdict import constrained, ideal, verdict

#: How many texts of before and after training a log keeps.
SHOWN = 20
_KEYS = (
    "model", "dtype", "prompts", "stop", "chat_template_kwargs", "constraints", "monitor", "reward", "fit", "lora",
    "train", "evaluate",
)  # fmt: skip
_FOLDER = "dmfast_output"
_OF_SCRIPTS = ("resume_from_checkpoint", "do_predict")  # TrainingArguments has them, and its Trainer does not read them


class RecipeError(ValueError):
    """A recipe can't be run; the message names the place in it."""


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where} must be a mapping, got {given!r}")
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it takes {', '.join(known)}"
            raise RecipeError(f"{where} has an unknown entry {key!r}{hint}")


def read(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a recipe from a YAML file and check it.

    Args:
        path: the file. Relative paths in it start from the working directory of the command.
        overrides: values by dotted keys, such as ``{"train.max_steps": 5}``. They take the place of the recipe's.

    Raises:
        RecipeError: there is no such file, it is not YAML, an entry is unknown, or there is no constraint.
    """
    import yaml

    try:
        recipe = of_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"can't read the recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} must hold a mapping with the entries {', '.join(_KEYS)}")
    for dotted, value in (overrides or {}).items():
        *way, last = dotted.split(".")
        place = recipe
        for key in way:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise RecipeError(f"can't set {dotted}: {key} is not a mapping")
        place[last] = value
    _check_keys(recipe, _KEYS, str(path))
    for key in ("model", "constraints", "train"):
        if not recipe.get(key):
            raise RecipeError(f"{path} has no {key}")
    _check_keys(recipe["train"], ("preset", *(f.name for f in fields(DMConfig) if f.init)), "train")
    if recipe["train"].get("preset") is not None:
        try:
            presets.named(recipe["train"]["preset"])
        except ValueError as error:
            raise RecipeError(f"train: {error}") from error
    for name in _OF_SCRIPTS:
        if recipe["train"].get(name):
            hint = "give dmfast train the option --resume" if name == "resume_from_checkpoint" else "leave it out"
            raise RecipeError(f"train.{name} has no effect, because only scripts of transformers read it: {hint}")
    for name, kind in numbers_of(DMConfig).items():
        if kind == "float" and isinstance(recipe["train"].get(name), str):
            recipe["train"][name] = _number(recipe["train"][name], f"train.{name}")
    _check_keys(recipe.get("fit") or {}, ("n", "seed", "batch_size", "max_stderr"), "fit")
    _check_keys(recipe.get("evaluate") or {}, ("samples", "seed", "batch_size"), "evaluate")
    _check_sizes(recipe)
    for each in recipe["constraints"]:
        constraint(each)
    for each in recipe.get("monitor") or []:
        feature(each, "monitor")
    if recipe.get("reward"):
        rewards(recipe["reward"])
    if recipe.get("lora"):
        _lora_config(recipe["lora"])
    return recipe


def _check_sizes(recipe: Mapping[str, Any]) -> None:
    """Check the numbers of samples of the fit and the evaluation.

    Raises:
        RecipeError: one is not a positive integer.
    """
    for where in ("fit", "evaluate"):
        for key, value in (recipe.get(where) or {}).items():
            if (
                key in ("n", "samples", "batch_size")
                and value is not None
                and not (isinstance(value, int) and value > 0)
            ):
                raise RecipeError(f"{where}.{key} must be a positive integer, got {value!r}")


def _lora_config(arguments: Any) -> Any:
    try:
        import peft

        return peft.LoraConfig(**arguments)
    except (ImportError, TypeError, ValueError) as error:
        raise RecipeError(f"lora must hold arguments of peft.LoraConfig, got {arguments!r}: {error}") from error


def _number(text: str, where: str) -> float:
    try:
        return float(text)  # YAML 1.1 reads 1e-4, which has no point, as a string
    except ValueError:
        raise RecipeError(f"{where} must be a number, got {text!r}") from None


def feature(entry: Any, where: str) -> Feature:
    """Build a feature from its entry.

    The entry is ``{contains: {...}}``, ``{scorer: {function: "module:name"}}``, ``{verifier: {function: "file.py:name",
    workers: ..., time_limit: ..., truncated: ...}}`` or ``{classifier: {model: ..., label: ...}}``.

    Raises:
        RecipeError: the entry has another form; the message names the place.
    """
    kind, arguments = next(iter(entry.items())) if isinstance(entry, Mapping) and len(entry) == 1 else (None, None)
    if not isinstance(arguments, Mapping) or kind not in ("contains", "scorer", "verifier", "classifier"):
        raise RecipeError(
            f"{where} must be one of contains, scorer, verifier and classifier with its arguments, got {entry!r}"
        )
    options = dict(arguments)
    try:
        if kind == "contains":
            return Contains(**options)
        if kind == "scorer":
            return Scorer(function_at(options.pop("function", None)), **options)
        if kind == "verifier":
            if options.get("answer") is not None:
                options["answer"] = function_at(options["answer"])
            return Verifier(function_at(options.pop("function", None)), **options)
        return _classifier(**options)
    except (OSError, TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {kind} {dict(arguments)!r}: {error}") from error


def _classifier(model: str, **options: Any) -> Classifier:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = str(Path(model).expanduser())
    return Classifier(
        AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path), **options
    )


def rewards(entry: Any) -> Feature | list[Feature]:
    """Build the reward of an entry, or the list of rewards of an entry that is a list."""
    if not isinstance(entry, list):
        return feature(entry, "reward")
    return [feature(each, f"reward {i}") for i, each in enumerate(entry, 1)]


def constraint(entry: Any) -> Feature | Moment:
    """Build a constraint from its entry.

    The entry is a feature, ``{moment: {contains or scorer: {...}, value: mu}}`` or ``{reward: {...}, beta: beta}``.

    Raises:
        RecipeError: the entry has another form; the message names the place.
    """
    if isinstance(entry, Mapping) and list(entry) == ["reward"]:
        arguments = entry["reward"]
        if not isinstance(arguments, Mapping) or "beta" not in arguments:
            raise RecipeError(f"constraints: a reward needs a feature and a beta, got {arguments!r}")
        rewarded = feature({k: v for k, v in arguments.items() if k != "beta"}, "constraints: reward")
        try:
            return Reward(rewarded, arguments["beta"])
        except (TypeError, ValueError) as error:
            raise RecipeError(f"constraints: reward: {error}") from error
    if isinstance(entry, Mapping) and list(entry) == ["moment"]:
        arguments = entry["moment"]
        if not isinstance(arguments, Mapping) or "value" not in arguments:
            raise RecipeError(f"constraints: a moment needs a feature and a value, got {arguments!r}")
        phi = feature({k: v for k, v in arguments.items() if k not in ("value", "name")}, "constraints: moment")
        try:
            return Moment(phi, arguments["value"], arguments.get("name"))
        except (TypeError, ValueError) as error:
            raise RecipeError(f"constraints: {error}") from error
    return feature(entry, "constraints")


def _prompts(prompts: Any) -> Any:
    if isinstance(prompts, Mapping):
        try:
            return prompts_of(prompts)
        except (ValueError, ImportError) as error:
            raise RecipeError(f"prompts: {error}") from error
    if not isinstance(prompts, str):
        return prompts
    path = Path(prompts).expanduser()
    try:
        return read_prompts(path)
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"prompts: can't read {path}: {error}") from error


def load(
    name: str, *, dtype: str = "float32", stop: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> LanguageModel:  # fmt: skip
    """Load a causal model and its tokenizer.

    Args:
        name: ``tiny-bios`` (ships with dmfast), a folder, or a name on the hub.
        stop: a string. Every token whose text contains it ends a sequence, as EOS does.
        chat_template_kwargs: as in ``LanguageModel``.

    Raises:
        RecipeError: there is no such model or dtype, or no token has ``stop`` in its text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in ("float32", "bfloat16", "float16"):
        raise RecipeError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    path = str(located(str(Path(name).expanduser())))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        hint = "; python scripts/fetch_smollm2.py writes it" if "smollm2" in path else ""
        raise RecipeError(f"model: can't load {name!r}{hint}: {error}") from error
    policy = LanguageModel(model, tokenizer, chat_template_kwargs=chat_template_kwargs)
    if not stop:
        return policy
    if not isinstance(stop, str):
        raise RecipeError(f"stop must be a string, got {stop!r}")
    found = [i for i in range(len(tokenizer)) if stop in tokenizer.decode([i])]
    if not found:
        raise RecipeError(
            f"stop: no token of {name!r} has {stop!r} in its text, so that it would never end a sequence: leave it "
            "out, or give a text that lies within one token"
        )
    ends = [*policy.eos_token_ids, *found]
    return LanguageModel(model, tokenizer, eos_token_id=ends, chat_template_kwargs=chat_template_kwargs)


def _model_and_base(
    policy: LanguageModel, lora: dict[str, Any] | None, say: Callable[[Any], None]
) -> tuple[torch.nn.Module, LanguageModel]:
    """Return the module to train, and the base a.

    If an adapter is trained that can be switched off, a shares its backbone. Otherwise a is a copy of the model, and if
    there is an adapter, ``say`` reports why.
    """
    if not lora:
        return policy.model, policy.around(copy.deepcopy(policy.model).requires_grad_(False))
    import peft

    config = _lora_config(lora)
    try:
        adapters.check_config(config)
    except ValueError as error:
        say(f"three models are kept in memory instead of one: {error}")
        base = policy.around(copy.deepcopy(policy.model).requires_grad_(False))
        return peft.get_peft_model(policy.model, config), base
    model = peft.get_peft_model(policy.model, config)
    of_adapter = LanguageModel(
        model, policy.tokenizer, eos_token_id=policy.eos_token_ids, chat_template_kwargs=policy.chat_template_kwargs
    )
    return model, of_adapter.base()


def prepare(
    recipe: dict[str, Any], *, fitted: Mapping[str, Any] | None = None,
    reward: AnyReward | None = None, resume: str | bool = False, say: Callable[[Any], None] = print,
) -> DMTrainer:  # fmt: skip
    """Build the trainer of a recipe that ``read`` has checked, with its policy, its base and its fitted target.

    Everything that can be refused is refused before the first sample is drawn.

    Args:
        fitted: the ``state_dict`` of an ``EBM`` with these constraints, whose lambda is taken. Default: lambda is
            fitted.
        resume: as in ``run``. Lambda is then the checkpoint's.
        reward: one reward or several, in place of the recipe's.
        say: prints a line.

    Raises:
        RecipeError, ValueError: as ``read``, ``EBM.fit``, ``DMTrainer``.
    """
    return _prepared(recipe, fitted, reward, resume, say, command=False)[0]


def _prepared(
    recipe: dict[str, Any], fitted: Mapping[str, Any] | None, reward: AnyReward | None, resume: str | bool,
    say: Callable[[Any], None], *, command: bool,
) -> tuple[DMTrainer, Path | None, Contexts]:  # fmt: skip
    """Return the trainer of ``prepare``, the checkpoint from which it goes on, and the prompts.

    Args:
        command: whether messages advise options of the command line.
    """
    args = _config(recipe)
    refuse_arguments(args)
    check_environment(args)
    folder = None if not resume else checkpoint.to_resume(resume, Path(args.output_dir), command=command)
    set_seed(args.seed)  # the adapter's initial weights depend on it
    policy = _load_policy(recipe)
    model, base = _model_and_base(policy, recipe.get("lora"), say)
    rows = _prompts(recipe.get("prompts"))
    target = _target(recipe, base)
    if reward is None and recipe.get("reward"):
        reward = rewards(recipe["reward"])
    for scorer in (*target.scorers.values(), *(reward if isinstance(reward, list) else [reward])):
        if isinstance(scorer, Classifier):
            scorer.model.to(args.device)
    say(f"dmfast {__version__}: {target}, {args.objective}, {args.max_steps} steps, model {recipe['model']}")
    if not target.fitted:
        target.lambda_ = [0.0] * len(target.moment_names)  # a placeholder, so that the trainer can check all else first
    data = Contexts(rows, _name_of(recipe))
    trainer = DMTrainer(
        model, target, args, train_dataset=None if rows is None else data, processing_class=policy.tokenizer,
        reward=reward,
    )  # fmt: skip
    trainer.by_command = command
    if folder is not None:
        state = checkpoint.upgraded(trainer.resumable_state(folder))
        fitted = state["matcher"]["target"]
        without = ", so that the entry fit has no effect" if recipe.get("fit") else ""
        say(f"the run goes on from {folder}, with its lambda{without}")
        nothing = trainer.nothing_left(folder)
        if nothing and command:
            say(nothing)
    _try_features(trainer, data)
    if fitted is None:
        fit = {"batch_size": args.sampling_batch_size, **(recipe.get("fit") or {})}
        prompts = None if rows is None else [prompt for _, prompt in data]
        target.fit(
            contexts=prompts,
            rows=data.whole(list(data)),
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            **fit,
        )
        check_alike(trainer._ranks.processes, trainer.policy, target, args, data.digest, weights=False)
        assert target.report is not None
        say(str(dataclasses.replace(target.report, warnings=[])))  # the fit itself has given its warnings
    else:
        target.load_state_dict(dict(fitted))
        say(str(target.report))
    return trainer, folder, data


def _name_of(recipe: Mapping[str, Any]) -> str:
    """Return the name of a recipe's prompts in messages, with that of their file."""
    prompts = recipe.get("prompts")
    return f"prompts ({prompts})" if isinstance(prompts, str) else "prompts"


def _try_features(trainer: DMTrainer, data: Contexts) -> None:
    """Call each feature and the reward on two texts of the base, to find before lambda is fitted whether one fails."""
    some = list(itertools.islice(data, 2))
    x = trainer.target.base.sample(
        [prompt for _, prompt in some], 2 // len(some), max_new_tokens=trainer.args.max_new_tokens,
        temperature=trainer.args.temperature, seed=0,
    ).with_rows(data.whole(some))  # fmt: skip
    trainer.target.score(x, x.log_prob)
    if trainer.reward is not None:
        trainer.reward(x)


def _target(recipe: Mapping[str, Any], base: LanguageModel) -> EBM:
    """Return the target of a recipe around a base. It is not fitted yet."""
    return EBM(
        base,
        [constraint(each) for each in recipe["constraints"]],
        monitor=[feature(each, "monitor") for each in recipe.get("monitor") or []],
    )


def _load_policy(recipe: Mapping[str, Any]) -> LanguageModel:
    return load(
        recipe["model"], dtype=recipe.get("dtype") or "float32", stop=recipe.get("stop"),
        chat_template_kwargs=recipe.get("chat_template_kwargs"),
    )  # fmt: skip


def fit_z(
    recipe: dict[str, Any], out: str | Path, *, n: int = 64, seed: int = 0, drop_zero: bool = False,
    say: Callable[[Any], None] = print,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the prompts of a recipe that ``read`` has checked with the pass rate of each (``EBM.fit_z``).

    A recipe takes the file as its ``prompts``, and ``train.z_from_rows: true`` starts Z from it.

    Args:
        out: the .jsonl file to write, which must not exist yet.
        n, seed, drop_zero: as in ``EBM.fit_z``.
        say: prints a line.

    Returns:
        The rows of the file.

    Raises:
        RecipeError: ``out`` is not a .jsonl file or exists already; ``n`` is not positive; the recipe has no prompts,
            or a row that can't be written as JSON.
        ValueError: as ``EBM.fit_z``.
        OSError: ``out`` can't be written.
    """
    out = Path(out)
    if out.suffix != ".jsonl":
        raise RecipeError(f"the file of pass rates must be .jsonl, got {out}")
    if out.exists():
        raise RecipeError(f"{out} is there already: give another name, or remove it")
    if n < 1:
        raise RecipeError(f"n must be a positive integer, the completions of each prompt, got {n}")
    if recipe.get("prompts") is None:
        raise RecipeError("the recipe has no prompts: the empty context has one Z, which the run itself estimates well")
    args = _config(recipe)
    data = Contexts(_prompts(recipe["prompts"]), _name_of(recipe))
    policy = _load_policy(recipe)
    policy.model.to(args.device)
    data.check(policy, args.max_new_tokens, args.max_prompt_length)
    rows: list[Any] = data.whole(list(data)) or [prompt for _, prompt in data]
    try:
        json.dumps(rows)
    except TypeError as error:
        raise RecipeError(f"the rows of the prompts can't be written as JSON: {error}") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.new")
    beside.touch()
    try:
        found: list[dict[str, Any]] = _target(recipe, policy).fit_z(
            rows, n, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=seed,
            batch_size=args.sampling_batch_size, drop_zero=drop_zero,
        )  # fmt: skip
        beside.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
    rates = sorted(row["pass_rate"] for row in found)
    say(f"wrote {out}: {len(found)} prompts, {n} completions of each; pass rates from {rates[0]:.3g} to "
        f"{rates[-1]:.3g}, median {rates[len(rates) // 2]:.3g}, {rates.count(0.0)} of them 0")  # fmt: skip
    return found


def _config(recipe: Mapping[str, Any]) -> DMConfig:
    """Return the arguments of the training."""
    train = _train_of(recipe)
    return DMConfig(**train) if train.get("preset") is None else DMConfig.preset(train.pop("preset"), **train)


def _train_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry ``train`` with a folder to write into."""
    return {**recipe["train"], "output_dir": recipe["train"].get("output_dir") or _FOLDER}


@contextlib.contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """On an error, remove a folder that was made inside and is empty, and its parents of that kind."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for each in made:
                each.rmdir()
        raise


def run(recipe: dict[str, Any], *, resume: str | bool = False, say: Callable[[Any], None] = print) -> dict[str, Any]:
    """Run a recipe that ``read`` has checked.

    Args:
        resume: a checkpoint's folder, or its name in ``train.output_dir``, or True for the newest one there.
        say: prints a line or a rich table.

    Returns:
        The contents of ``log.json``.

    Raises:
        RecipeError, ValueError, ImportError: as ``read``, ``EBM.fit``, ``DMTrainer``.
        OSError: as ``DMTrainer``. Also if the model, the log or the picture could not be written; the message names
            them. The results and the verdict have been said then, and everything else is written.
    """
    start = time.perf_counter()
    with _no_empty_folder(Path(_train_of(recipe)["output_dir"]).expanduser()):
        trainer, folder, data = _prepared(recipe, None, None, resume, say, command=True)
    args, target = trainer.args, trainer.target
    out = Path(args.output_dir)
    has_prompts = recipe.get("prompts") is not None
    settings = {"samples": args.eval_samples, "seed": args.seed + 10**6, "batch_size": args.sampling_batch_size}
    settings |= recipe.get("evaluate") or {}

    def now(model: LanguageModel, whose: str) -> tuple[Samples, dict[str, Estimate]]:
        some = list(itertools.islice(data, settings["samples"]))
        return evaluate(
            model, target, [prompt for _, prompt in some] if has_prompts else None,
            math.ceil(settings["samples"] / len(some)), max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, seed=settings["seed"], batch_size=settings["batch_size"],
            texts=args.eval_diversity, rows=data.whole(some), judge=trainer.judge, whose=whose,
        )  # fmt: skip

    x_before, before = now(target.base, "the base")
    training = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if folder is None else str(folder))
    training = time.perf_counter() - training
    failed: dict[str, OSError | SafetensorError] = {}  # raised at the end, after all else has been written
    try:
        trainer.save_model()
    except (OSError, SafetensorError) as error:
        failed["the model"] = error
    x_after, after = now(trainer.policy, "the policy")
    wanted = ideal(target, x_before)
    log: dict[str, Any] = {
        "machine": report.machine(),
        "recipe": recipe,
        "target": target.describe(),
        "before": before,
        "after": after,
        "ideal": wanted,
        "swaps": trainer.proposal.swaps if trainer.proposal else 0,
        "steps": trainer.state.global_step,
        "seconds_training": training,
        "seconds_all": time.perf_counter() - start,
        "verdict": verdict(before, after, wanted, constrained(target)),
        **_shown(x_before, x_after, [data[i][1] for i in range(len(data))] if has_prompts else None),
        "history": [h for h in trainer.state.log_history if "train_runtime" not in h],
    }
    if trainer.is_world_process_zero():
        # the terminal has the results before anything is written, because a full disk may take the files
        say(report.table(log))
        say(report.samples_table(log["samples_before"][:6], log["samples_after"][:6]))
        swaps = f"{log['swaps']} swap{'s' * (log['swaps'] != 1)} of q"
        say(f"{swaps}, training {training:.0f} s, all {log['seconds_all']:.0f} s")
        nothing = None if folder is None else trainer.nothing_left(folder)
        say(f"{nothing}. {log['verdict']}" if nothing else log["verdict"])
        try:
            report.write(log, out)
        except OSError as error:
            failed["log.json"] = error
        try:
            report.plot(log["history"], out / "report.png", title=_title(recipe, log),
                        wanted={m["name"]: m["value"] for m in log["target"]["moments"]})  # fmt: skip
        except OSError as error:
            failed["report.png"] = error
        written = [what for what in ("log.json", "report.png", "the model") if what not in failed]
        if written:
            say(f"wrote {', '.join(written)} into {out}")
    if failed:
        reasons = "; ".join(f"{what} could not be written into {out}: {error}" for what, error in failed.items())
        raise OSError(
            f"{reasons}. All else of the run has been written; free some space, and where there is a checkpoint, go on "
            "from it with --resume"
        ) from next(iter(failed.values()))
    return log


def _shown(before: Samples, after: Samples, prompts: Sequence[Any] | None) -> dict[str, Any]:
    """Return the texts that the log keeps, and their prompts."""
    places = before.across_contexts(SHOWN)
    texts = {"samples_before": before[places].text, "samples_after": after[places].text}
    if prompts is None:
        return texts
    return {**texts, "samples_prompts": [prompts[i] for i in before.context_id[places].tolist()]}


def _title(recipe: Mapping[str, Any], log: Mapping[str, Any]) -> str:
    names = [name for name in log["after"] if name.startswith("phi/")]
    change = ", ".join(f"{name[4:]} {log['before'][name]} → {log['after'][name]}" for name in names)
    objective = recipe["train"].get("objective") or recipe["train"].get("preset") or "gdc++"
    return f"{objective} on {Path(recipe['model']).name}: {change}"
