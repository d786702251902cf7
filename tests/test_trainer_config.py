"""Test what DMTrainer and DMConfig refuse, and what they warn of."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from types import SimpleNamespace

import accelerate
import datasets
import peft
import pytest
import torch
from trainer_job import PROMPTS, gpt2, job, tokenizer
from trainer_tools import (
    one_thread,  # noqa: F401
    run,
    said,
)
from transformers import Trainer, TrainingArguments

import dmfast
from dmfast import EBM, Contains, LanguageModel, Moment, Scorer
from dmfast.training.checks import check_alike, check_environment

# older releases of accelerate than 1.10 do not have it
ParallelismConfig = getattr(accelerate, "ParallelismConfig", SimpleNamespace)

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")

_, of_sgd = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("x", optim="sgd", optim_args="momentum=0.9"))
#: Older releases of transformers pass no optim_args to the optimisers of torch.
torch_reads = pytest.mark.skipif("momentum" not in of_sgd, reason="this transformers passes none to torch's optimisers")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "gdc+"}, "unknown objective"),
        ({"objective": "reinforce"}, "needs reward="),
        ({"objective": "kl_control"}, "needs beta"),
        ({"objective": "alpha"}, "needs alpha"),
        ({"objective": "alpha", "alpha": 0.5, "max_return": -1.0}, "max_return must be a positive finite number"),
        ({"baseline": "median"}, "baseline must be a number"),
        ({"baseline": "mean"}, "gdc\\+\\+.*constant baseline 1"),
        ({"proposal_criterion": "chi2"}, "proposal_criterion must be one of kl, tvd, js, alpha, interval"),
        ({"proposal_criterion": "alpha"}, "compares the divergence that objective 'alpha' .* 'gdc\\+\\+'"),
        ({"partition": "global"}, "'running' or 'step'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"max_steps": -1}, "set max_steps in DMConfig to 1 or more, got max_steps=-1"),
        ({"auto_find_batch_size": True}, "refuses auto_find_batch_size"),
        ({"label_smoothing_factor": 0.1}, "no labels to smooth"),
        ({"neftune_noise_alpha": 5.0}, "noise in the policy"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "under tensor, context or sequence parallelism yet"),
        (
            {
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "save_strategy": "steps",
                "eval_steps": 1,
                "save_steps": 1,
            },
            "need metric_for_best_model, one of",
        ),
        ({"objective": "reinforce_p", "baseline": "mean"}, "whose scale differs"),
        ({"prompts": PROMPTS, "samples_per_context": 1}, "takes 8 contexts of 1 sequences, and the data set has 7"),
    ],
)
def test_what_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        job(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be 0 or more, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be 0 or more, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite, got inf"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1.0"),
        ({"adam_beta1": 2.0}, "adam_beta1 must be from 0 to below 1, got 2.0"),
        ({"adam_epsilon": "small"}, "adam_epsilon must be a number, got 'small'"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be 0 or more, got -1.0"),
        ({"num_train_epochs": -1.0}, "num_train_epochs must be 0 or more, got -1.0"),
        ({"max_steps": 0}, "max_steps must be positive, or -1 where num_train_epochs is to count, got 0"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, .* got -1"),
        ({"data_seed": "x"}, "data_seed must be an integer, got 'x'"),
        ({"per_device_train_batch_size": "16"}, "per_device_train_batch_size must be an integer, got '16'"),
        ({"per_device_train_batch_size": 1.5}, "per_device_train_batch_size must be an integer, got 1.5"),
        ({"per_device_train_batch_size": None}, "per_device_train_batch_size must be an integer, got None"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be positive, got 0"),
        ({"samples_per_context": True}, "samples_per_context must be an integer, got True"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"normalize": "False"}, "normalize must be True or False, got 'False'"),
        ({"objective": "alpha", "alpha": "3"}, "alpha must be a number that is finite, got '3'"),
        ({"alpha": 3}, "objective 'gdc\\+\\+' does not take alpha, got 3"),
        ({"lr_scheduler_type": "nope"}, "lr_scheduler_type must be one of linear, .* got 'nope'"),
        ({"lr_scheduler_kwargs": "nope"}, "lr_scheduler_kwargs must be a mapping, or JSON of one, got 'nope'"),
    ],
)
def test_a_config_refuses_numbers_of_another_type_or_range(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        dmfast.DMConfig(str(tmp_path), use_cpu=True, **settings)


def test_a_config_takes_what_transformers_takes(tmp_path):
    args = dmfast.DMConfig(
        str(tmp_path), use_cpu=True, max_steps=1e3, max_grad_norm=None, learning_rate=0, warmup_steps=0.1,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr_rate": 0.1}', normalize=1,
    )  # fmt: skip
    assert args.max_steps == 1000 and isinstance(args.max_steps, int)
    check_environment(args)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lr_scheduler_kwargs": {"nope": 1}},
            "would be ignored, because lr_scheduler_type='constant_with_warmup' take",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"nope": 1}},
            "lr_scheduler_type='cosine' with lr_scheduler_kwargs={'nope': 1} can't be made: .*'nope'",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "can't be made: One of min_lr or min_lr_rate"),
        pytest.param(
            {"optim": "rmsprop", "optim_args": "alpha=-1"},
            "optim='rmsprop' with optim_args='alpha=-1' can't be made",
            marks=torch_reads,
        ),
        (
            {"optim": "sgd", "optim_args": "momentum=.9, nestrov=1"},
            "optim='sgd' does not read .*nestrov of optim_args=",
        ),
        ({"optim_args": "beta1=0.5"}, "does not read beta1 of .* of Adam are adam_beta1, .*_epsilon and weight_decay"),
        (
            {"optim": "adafactor", "optim_args": "a=1,b=x"},
            "optim='adafactor' does not read a, b of optim_args='a=1,b=x'",
        ),
        ({"optim": "sgd", "optim_args": "weight_decay=.1"}, "group has a weight decay of its own: set DMConfig.weight"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args must be like 'momentum=0.9, .*', got 'momentum'"),
    ],
)
def test_an_optimiser_and_a_scheduler_that_can_not_be_made_are_found_first(tmp_path, settings, message):
    args = dmfast.DMConfig(str(tmp_path), use_cpu=True, **settings)
    with pytest.raises(ValueError, match=message):
        check_environment(args)
    # what the caller brings is not made of the arguments
    check_environment(args, own_optimizer=True, own_scheduler=True)


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        pytest.param("sgd", "momentum=0.9, nesterov=True", marks=torch_reads),
        pytest.param("sgd", "dampening=0, momentum=0", marks=torch_reads),  # the values that they have anyway
        pytest.param("rmsprop", "alpha=0.9,centered=False", marks=torch_reads),
        ("adamw_torch", None),
        ("adagrad", ""),
    ],
)
def test_arguments_that_an_optimiser_reads_are_taken(tmp_path, optim, optim_args):
    check_environment(dmfast.DMConfig(str(tmp_path), use_cpu=True, optim=optim, optim_args=optim_args))


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw", "lomo", "adalomo"])
def test_the_package_of_an_optimiser_that_is_made_of_a_model_is_missed_first(tmp_path, optim):
    args = dmfast.DMConfig(str(tmp_path), use_cpu=True, optim=optim, optim_target_modules=["mlp"])
    with pytest.raises(ImportError, match=f"optim={optim!r} can't be made: You need to install"):
        check_environment(args)
    check_environment(args, own_optimizer=True)


@pytest.mark.parametrize("error", [ValueError, AttributeError])
def test_an_optimiser_that_is_made_of_a_model_waits_for_it(tmp_path, monkeypatch, error):
    def without_model(args, model=None):
        raise error("You need to pass a `model`")

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(without_model))
    check_environment(dmfast.DMConfig(str(tmp_path), use_cpu=True, optim="lomo"))


class OneOfTwo:
    """The ranks of two processes, of which the other gave what an earlier call with ``other=None`` gave."""

    size = 2

    def __init__(self, other=None):
        self.told, self.other = [], None if other is None else list(other.told)

    def gather(self, values):
        self.told.append(values)
        return torch.cat([values, values if self.other is None else self.other.pop(0)])


def is_long(texts):
    return [float(len(text) > 9) for text in texts]


def is_short(texts):
    return [float(len(text) < 9) for text in texts]


EITHER = Contains("w3")


@pytest.mark.parametrize(
    ("one", "other", "differs"),
    [
        (([Contains("w3", name="it")], None), ([Contains("w4", name="it")], None), "what the constraint 'it' is made"),
        (
            ([Contains("w1"), Moment(Scorer(is_long, name="it"), 0.5)], None),
            ([Contains("w1"), Moment(Scorer(is_short, name="it"), 0.5)], None),
            "what the moment 'it' is made of. ",
        ),
        (([Moment(Contains("w3"), 0.5)], None), ([Moment(Contains("w3"), 0.6)], None), "the target's constraints. "),
        (([Contains("w3")], None), ([Contains("w3"), Contains("w4")], None), "the target's constraints. "),
        (
            ([EITHER], Scorer(is_long, name="it")),
            ([EITHER], Scorer(is_short, name="it")),
            "what the reward is made of. ",
        ),
        (([EITHER], None), ([EITHER], Scorer(is_long)), "the rewards. "),
    ],
)
def test_processes_whose_constraints_or_rewards_differ_are_refused(tmp_path, one, other, differs):
    args, lm = dmfast.DMConfig(str(tmp_path), use_cpu=True), LanguageModel(gpt2(), tokenizer())

    def check(ranks, constraints, reward):
        target = EBM(lm, constraints)
        if target.moment_names:
            target.lambda_ = [1.0]
        check_alike(ranks, lm, target, args, "", reward=reward)

    first = OneOfTwo()
    check(first, *one)
    check(OneOfTwo(first), *copy.deepcopy(one))  # a process has objects of its own
    with pytest.raises(ValueError, match=f"the 2 processes do not train the same thing: they differ in {differs}"):
        check(OneOfTwo(first), *other)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("weight_decay", 0.0, 0.1),
        ("optim", "adamw_torch", "sgd"),
        ("max_grad_norm", 1.0, 2.0),
        ("save_steps", 500, 100),
        ("gather_for_sampling", True, False),
        ("skip_zero_weight", False, True),
    ],
)
def test_processes_whose_arguments_differ_are_refused(tmp_path, name, one, other):
    lm = LanguageModel(gpt2(), tokenizer())
    target = EBM(lm, [EITHER])

    def check(ranks, **settings):
        check_alike(ranks, lm, target, dmfast.DMConfig(str(tmp_path), use_cpu=True, **settings), "")

    first = OneOfTwo()
    check(first, **{name: one})
    check(OneOfTwo(first), **{name: one, "disable_tqdm": True})  # what a process shows is its own affair
    with pytest.raises(ValueError, match=f"do not train the same thing: they differ in DMConfig.{name}. "):
        check(OneOfTwo(first), **{name: other})


def test_an_objective_that_is_infinite_at_zero_is_warned_of_on_a_filter(tmp_path):
    settings = {"constraints": [Contains("w3")], "objective": "alpha", "alpha": 3}
    with pytest.warns(UserWarning, match="'alpha' with alpha=3 is infinite where P.* the first one ends the run"):
        job(tmp_path, **settings)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        job(tmp_path, max_weight=10.0, **settings)
        job(tmp_path, objective="alpha", alpha=3)
    assert not said(recorded, "is infinite where")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fsdp", True, "fsdp asks for FSDP, and this is one process"),
        ("parallelism_config", ParallelismConfig(cp_size=2), "context or sequence parallelism yet"),
        ("_n_gpu", 2, r"under DataParallel \(2 GPUs in one process\); start one process per GPU"),
    ],
)
def test_parallelism_that_is_set_after_construction_is_refused(tmp_path, name, value, message):
    trainer = job(tmp_path)
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        dmfast.DMTrainer(gpt2(), trainer.target, trainer.args)


def test_parallelism_that_accelerate_launch_sets_is_refused(tmp_path, monkeypatch):
    args, name = job(tmp_path).args, "PARALLELISM_CONFIG"
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    for make in (lambda: job(tmp_path), lambda: dmfast.DMTrainer(gpt2(), job(tmp_path).target, args)):
        with pytest.raises(
            ValueError, match=f"yet, which ACCELERATE_USE_{name}, which accelerate launch sets, asks for"
        ):
            make()


@pytest.mark.parametrize(("name", "what"), [("pp_size", "pipeline"), ("ep_size", "expert")])
def test_a_model_that_was_spread_in_a_way_that_was_not_tried_is_refused(tmp_path, name, what):
    model = gpt2()
    # from_pretrained(distributed_config=...) leaves a model like this
    model.config.distributed_config = SimpleNamespace(**{name: 2})
    with pytest.raises(
        ValueError, match=rf"DistributedConfig\({name}=2\), and dmfast does not run under {what} parall"
    ):
        dmfast.LanguageModel(model, tokenizer())
    trainer = job(tmp_path)
    with pytest.raises(ValueError, match=f"does not run under {what} parallelism"):
        dmfast.DMTrainer(model, trainer.target, trainer.args)


def test_a_base_that_would_move_is_refused(tmp_path):
    model, tok = gpt2(), tokenizer()
    target = EBM(LanguageModel(model, tok), [Contains("w3")])
    adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for trained in (model, adapter):
        with pytest.raises(ValueError, match="the target would move with it"):
            dmfast.DMTrainer(trained, target, job(tmp_path).args, processing_class=tok)


def test_one_sample_per_context_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="from that sample alone"):
        trainer = job(tmp_path, prompts=PROMPTS, per_device_train_batch_size=4)
    assert trainer.samples_per_context == 1
    assert job(tmp_path, prompts=["w1"]).samples_per_context == 8


def test_sequences_of_a_prompt_without_prompts_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="samples_per_context=5 is ignored, because there are no prompts: all 8 seq"):
        assert job(tmp_path, samples_per_context=5).samples_per_context == 8
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        job(tmp_path, samples_per_context=8)
        job(tmp_path, prompts=["w1", "w2"], samples_per_context=4)
    assert not said(recorded, "is ignored, because")


def test_a_target_that_is_not_fitted_is_refused(tmp_path):
    target = EBM(LanguageModel(gpt2(), tokenizer()), [Moment(Contains("w3"), 0.5)])
    with pytest.raises(ValueError, match="not fitted"):
        dmfast.DMTrainer(gpt2(), target, job(tmp_path).args)


def test_a_fit_on_sequences_of_another_length_is_warned_of(tmp_path):
    target = EBM(LanguageModel(gpt2(), tokenizer()), [Moment(Contains("w3"), 0.5)])
    target.fit(n=256, max_new_tokens=5)
    with pytest.warns(UserWarning, match="fitted on samples of up to 5 new tokens, and DMConfig.max_new_tokens is 6"):
        dmfast.DMTrainer(gpt2(), target, job(tmp_path).args)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    tok = tokenizer()
    tok.add_tokens(["w8", "w9"])
    with pytest.raises(ValueError, match="the tokenizer has 13 tokens, the model 11 embeddings"):
        job(tmp_path, tok=tok)


def test_a_base_of_another_vocabulary_is_refused(tmp_path):
    trainer, model = job(tmp_path), gpt2()
    model.resize_token_embeddings(16)
    with pytest.raises(ValueError, match="the tokenizer has 11 tokens, the model 16 embeddings and the base 11"):
        dmfast.DMTrainer(model, trainer.target, trainer.args)


def test_what_is_said_once_is_said_once(tmp_path):
    """The warning comes once, over steps, evaluations, checkpoints, and trainers with the tokenizer."""
    tok, model = tokenizer(pad_token=None), gpt2()
    model.generation_config.update(top_k=5, temperature=0.5)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        trainer = job(
            tmp_path, tok=tok, model=model, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=1, sampling_batch_size=2, proposal_criterion="interval",
        )  # fmt: skip
        trainer.train()
        trainer.policy.sample(n=2, max_new_tokens=3)
        trainer.save_model()
        assert trainer.proposal.swaps == 2
        assert said(recorded, "no pad token") == 1
        assert said(recorded, "generation_config sets") == 1
        job(tmp_path, tok=tok)
    assert said(recorded, "no pad token") == 1


def test_a_missing_pad_token_is_eos_and_said(tmp_path):
    tok = tokenizer(pad_token=None)
    with pytest.warns(UserWarning, match="no pad token; padding with EOS, '<e>'"):
        trainer = job(tmp_path, tok=tok)
    assert tok.pad_token == "<e>"
    trainer.train()


def test_a_prompt_beyond_the_context_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prompt 2 has 20 tokens; with max_new_tokens=6 that is beyond"):
        job(tmp_path, prompts=["w1", "w2", "w1 " * 20])


def test_a_prompt_to_evaluate_on_beyond_the_context_is_refused(tmp_path):
    trainer = job(tmp_path)
    with pytest.raises(ValueError, match="prompt 1 has 20 tokens; with max_new_tokens=6 that is beyond"):
        dmfast.DMTrainer(gpt2(), trainer.target, trainer.args, eval_dataset=["w1", "w1 " * 20])
    with pytest.raises(ValueError, match="eval_dataset: prompt 0 has 20 tokens"):
        trainer.evaluate(["w1 " * 20])


def test_generation_config_is_ignored_and_said(tmp_path):
    plain = run(tmp_path / "plain", max_steps=1)[2].steps[0].samples
    model = gpt2()
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1)
    with pytest.warns(UserWarning, match=r"generation_config sets .*top_k.*is ignored"):
        _, _, keep = run(tmp_path / "set", model=model, max_steps=1)
    assert torch.equal(keep.steps[0].samples.tokens, plain.tokens)


def test_the_command_line_parses_a_config():
    from transformers import HfArgumentParser

    for text, wanted in (("mean", "mean"), ("0.5", 0.5)):
        line = ["--output_dir", "x", "--objective", "dpg", "--baseline", text, "--report_to", "tensorboard"]
        (args,) = HfArgumentParser(dmfast.DMConfig).parse_args_into_dataclasses(line)
        assert args.baseline == wanted


def test_the_trainer_comes_with_import_dmfast_only_when_asked(tmp_path):
    there = "'transformers' in sys.modules"
    code = f"import dmfast, sys; assert not {there}; dmfast.DMConfig; assert {there}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ("w1", "^eval_dataset must have a length"),
        ([], "^eval_dataset is empty"),
        ([{"text": "w1"}], "^row 0 of eval_dataset has no column 'prompt', only text"),
        (datasets.Dataset.from_dict({"text": ["w1"]}), "^eval_dataset has no column 'prompt', only text"),
        ([3], "^row 0 of eval_dataset has a prompt of type int, and it must be a string or a list of chat messages"),
        (["w1", "w1 " * 20], "^eval_dataset: prompt 1 has 20 tokens"),
        ({"a": ["w1"], "b": []}, r"^eval_dataset\['b'\] is empty"),
        ({"a": ["w1"], "b": ["w1 " * 20]}, r"^eval_dataset\['b'\]: prompt 0 has 20 tokens"),
        ({}, "^eval_dataset is an empty dictionary"),
    ],
)
def test_faults_of_the_eval_dataset_name_it(tmp_path, rows, match):
    with pytest.raises((TypeError, ValueError), match=match):
        job(tmp_path, eval_dataset=rows)
    trainer = job(tmp_path)
    # evaluate() lets sample() refuse prompts that are too long
    if "tokens" not in match:
        with pytest.raises((TypeError, ValueError), match=match):
            trainer.evaluate(rows)


def test_faults_of_the_train_dataset_name_it(tmp_path):
    for rows, match in (([], "^train_dataset is empty"), (["w1 " * 20], "^train_dataset: prompt 0 has 20 tokens")):
        with pytest.raises(ValueError, match=match):
            job(tmp_path, prompts=rows, eval_dataset=["w1"])


@pytest.mark.parametrize("objective", [lambda t: t.log_prob, dmfast.Objective("dpg")])
def test_a_config_takes_names_and_the_trainer_objectives(tmp_path, objective):
    with pytest.raises(TypeError, match=r"objective of DMConfig must be a name.*DMTrainer\(..., objective=...\)"):
        dmfast.DMConfig(str(tmp_path), objective=objective)


def test_a_baseline_of_gdc_is_told_as_it_was_given(tmp_path):
    with pytest.raises(ValueError, match="got baseline='mean'"):
        dmfast.DMConfig(str(tmp_path), baseline="mean")


def test_an_objective_that_needs_whole_contexts_gets_them(tmp_path):
    def own(terms):
        return terms.log_target_ratio.exp().view(-1, 4).mean(1, keepdim=True).expand(-1, 4).flatten()

    own.whole_contexts = True
    settings = {"objective": own, "prompts": PROMPTS, "samples_per_context": 4, "max_steps": 2}
    with pytest.raises(ValueError, match="all 4 sequences of a context in one microbatch: per_device_train_batch_size"):
        job(tmp_path, per_device_train_batch_size=6, gradient_accumulation_steps=2, **settings)
    job(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings).train()
