"""Test that one backbone with two adapters is what three models are.

Distributions, steps and swaps are the same to rounding, in a third of the memory. Whatever a switch touches is put
back, also after an error. What can't be switched is refused.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_recipe import SMALL
from trainer_job import PROMPTS, StopAt, gpt2, tokenizer
from trainer_tools import Keep, assert_close, in_process, one_thread, run  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

import dmfast
from dmfast import EBM, Contains, LanguageModel, Moment, OfflineProposal, adapters
from dmfast.models import AdapterView
from dmfast.training import recipe
from dmfast.training.card import model_card

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*forms all logits")


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=24, initializer_range=0.3, bos_token_id=9, eos_token_id=5,
    ))  # fmt: skip


LORA = {"target_modules": ["c_attn", "c_proj"], "r": 4, "lora_dropout": 0.3, "fan_in_fan_out": True}
KINDS = {
    "new lora": lambda: (gpt2(), peft.LoraConfig(**LORA)),  # a new LoRA does not change the model yet
    "lora": lambda: (gpt2(), peft.LoraConfig(init_lora_weights=False, **LORA)),
    "dora": lambda: (gpt2(), peft.LoraConfig(use_dora=True, init_lora_weights=False, **LORA)),
    "lora, embedding too": lambda: (
        gpt2(), peft.LoraConfig(target_modules=["wte", "c_attn"], fan_in_fan_out=True, init_lora_weights=False)),
    "lora, new tokens": lambda: (gpt2(), peft.LoraConfig(trainable_token_indices=[1, 3], **LORA)),
    "ia3": lambda: (gpt2(), peft.IA3Config(target_modules=["c_attn", "mlp.c_fc"], feedforward_modules=["mlp.c_fc"],
                                           fan_in_fan_out=True, init_ia3_weights=False)),
    "loha": lambda: (llama(), peft.LoHaConfig(target_modules=["q_proj", "up_proj"], r=2, init_weights=False)),
    "lokr": lambda: (llama(), peft.LoKrConfig(target_modules=["q_proj", "up_proj"], r=2, init_weights=False)),
}  # fmt: skip


def adapted(kind="lora"):
    """Return the pretrained model alone, and the policy: an adapter in a copy of it."""
    base, config = KINDS[kind]()
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.normal_()
    # The user has frozen this parameter. PEFT's own switching would make it require a gradient again.
    next(p for name, p in model.named_parameters() if p.requires_grad and ".0." in name).requires_grad_(False)
    return base, model


def state(model):
    """Return everything that a switch could leave changed."""
    return {
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "active": model.active_adapters,
        "layers": [(layer.active_adapters, layer.disable_adapters) for layer in adapters._layers(model)],
    }


def nudge(model, scale=0.05):
    """Change the trainable parameters, as an optimiser step does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


# --- views


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "new lora"])
def test_views_are_the_models_that_they_stand_for(kind):
    """The views equal the models that they stand for, to the bit.

    The view of a is the original model, and that of q is the policy at the last swap. Switches leave no trace.
    """
    before, model = adapted(kind)
    alone, policy = LanguageModel(before, tokenizer()), LanguageModel(model, tokenizer())
    model.train()
    # A switch must keep the mode of the embedding, which differs from that of the rest.
    model.base_model.model.get_input_embeddings().eval()
    left, numbers = state(model), torch.get_rng_state()
    proposal = OfflineProposal(policy, "interval", interval=1, adapter=True)
    copied = OfflineProposal(policy, "interval", interval=1)
    views = {"a": (policy.base(), alone), "q": (proposal.snapshot, copied.snapshot)}
    assert torch.equal(torch.get_rng_state(), numbers)

    def old(now):
        return {part: {k: v for k, v in each.items() if adapters.PROPOSAL not in k} if isinstance(each, dict) else each
                for part, each in now.items()}  # fmt: skip

    assert {k: v for k, v in old(state(model)).items() if k != "layers"} == {k: left[k] for k in left if k != "layers"}
    left = state(model)
    assert not any(flag for name, flag in left["requires_grad"].items() if adapters.PROPOSAL in name)
    for i in range(3):
        x = policy.sample(n=24, max_new_tokens=6, seed=i)
        log_pi = policy.log_prob(x)
        for view, other in views.values():
            assert isinstance(view, AdapterView)
            mine, wanted = (each.sample(n=24, max_new_tokens=6, seed=i) for each in (view, other))
            assert torch.equal(mine.tokens, wanted.tokens) and torch.equal(mine.log_prob, wanted.log_prob)
            assert torch.equal(view.logits(x)[0], other.logits(x)[0])
            # A wrapped head goes through logits and a plain one does not, so their sums may round differently.
            torch.testing.assert_close(view.log_prob(x), other.log_prob(x).detach(), atol=1e-6, rtol=0)
            assert not view.log_prob(x).requires_grad
            assert state(model) == left
        assert torch.equal(policy.log_prob(x), log_pi) and log_pi.requires_grad
        assert float((views["a"][0].log_prob(x) - log_pi).abs().max()) > 0.1
        assert torch.equal(views["q"][0].log_prob(x), log_pi) == (i != 1)
        if i:
            proposal.swap(), copied.swap()
        nudge(model) if i == 0 else None
    assert state(model) == left


def test_a_view_has_no_loss():
    _, model = adapted()
    view = LanguageModel(model, tokenizer()).base()
    with pytest.raises(TypeError, match="an AdapterView is frozen"):
        view.loss(view.sample(n=2, max_new_tokens=3, seed=0), log_target=torch.zeros(2), log_z=0.0)


@pytest.mark.parametrize("which", ["a", "q"])
@pytest.mark.parametrize("call", ["sample", "log_prob", "logits"])
def test_an_error_within_a_switch_leaves_no_trace(which, call, monkeypatch):
    _, model = adapted()
    policy = LanguageModel(model, tokenizer())
    q = OfflineProposal(policy, adapter=True).snapshot
    view = policy.base() if which == "a" else q
    x, left = policy.sample(n=4, max_new_tokens=4, seed=0), state(model)
    log_pi = policy.log_prob(x)
    monkeypatch.setattr(model.base_model.model.lm_head, "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        view.sample(n=2, max_new_tokens=2, seed=0) if call == "sample" else getattr(view, call)(x)
    monkeypatch.undo()
    assert state(model) == left and torch.equal(policy.log_prob(x), log_pi)


@pytest.mark.parametrize("how", ["", "checkpointing"])
def test_a_switch_between_forward_and_backward_changes_no_gradient(how):
    """With checkpointing the backward runs the forward again, under the policy's adapter."""
    _, model = adapted()
    if how:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = LanguageModel(model, tokenizer())
    model.train()
    q = OfflineProposal(policy, adapter=True).snapshot
    nudge(model)
    x, found = q.sample(n=8, max_new_tokens=6, seed=0), []
    for between in (lambda: None, lambda: (policy.base().log_prob(x), q.log_prob(x), q.sample(n=2, max_new_tokens=2))):
        model.zero_grad()
        log_prob = policy.log_prob(x)
        between()
        log_prob.sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 11
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


# --- what is refused


def several(model):
    model.add_adapter("other", peft.LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "other"])


def unfrozen(model):
    model.base_model.model.transformer.ln_f.weight.requires_grad_(True)


REFUSED = {
    "no peft": (None, None, "needs a peft.PeftModel, got GPT2LMHeadModel$"),
    "modules_to_save": (
        peft.LoraConfig(modules_to_save=["lm_head"], **LORA),
        None,
        "modules_to_save=.*'lm_head'.*copies",
    ),
    "bias": (peft.LoraConfig(bias="lora_only", **LORA), None, "bias='lora_only', which trains the base's own biases"),
    "pissa": (peft.LoraConfig(init_lora_weights="olora", **LORA), None, "init_lora_weights='olora', which may change"),
    "kind": (peft.VeraConfig(target_modules=["q_proj"], r=2), None, "adapter of type VERA, only through LORA"),
    "merged": (peft.LoraConfig(**LORA), lambda model: model.merge_adapter(), "merged into the base weights"),
    "disabled": (peft.LoraConfig(**LORA), lambda model: model.base_model.disable_adapter_layers(), "is disabled"),
    "several": (peft.LoraConfig(**LORA), several, r"2 are active \(default, other\)"),
    "unfrozen": (peft.LoraConfig(**LORA), unfrozen, r"1 other parameters require a gradient \(.*ln_f.weight\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_switched_is_refused(case):
    config, change, message = REFUSED[case]
    model = llama() if case == "kind" else gpt2()
    if config is not None:
        model = peft.get_peft_model(model, config)
    if change is not None:
        change(model)
    policy, left = LanguageModel(model, tokenizer()), {n: p.requires_grad for n, p in model.named_parameters()}
    for attempt in (policy.base, lambda: OfflineProposal(policy, adapter=True)):
        with pytest.raises(ValueError, match=message):
            attempt()
        assert {n: p.requires_grad for n, p in model.named_parameters()} == left


def test_what_else_is_refused():
    _, model = adapted()
    policy = LanguageModel(model, tokenizer())
    with pytest.raises(ValueError, match="has no adapter 'other', only default"):
        AdapterView(policy, "other")
    with pytest.raises(ValueError, match="'default' is the policy's, which moves"):
        AdapterView(policy, "default")
    with pytest.raises(ValueError, match="can't be on device='cpu'"):
        OfflineProposal(policy, adapter=True, device="cpu")
    with pytest.raises(TypeError, match="adapter=True needs a LanguageModel"):
        OfflineProposal(model, adapter=True)
    hub = gpt2()
    hub._hf_peft_config_loaded = True  # add_adapter of transformers sets this attribute
    with pytest.raises(ValueError, match=r"take peft\.get_peft_model"):
        LanguageModel(hub, tokenizer()).base()


def test_a_newer_proposal_takes_the_place_of_an_older_one():
    _, model = adapted()
    policy = LanguageModel(model, tokenizer())
    older = OfflineProposal(policy, adapter=True)
    nudge(model)
    newer, x = OfflineProposal(policy, adapter=True), policy.sample(n=4, max_new_tokens=4, seed=0)
    assert torch.equal(newer.snapshot.log_prob(x), policy.log_prob(x))
    for call in (older.swap, older.state_dict, lambda: older.snapshot.log_prob(x), lambda: older.sample(n=1)):
        with pytest.raises(RuntimeError, match="'dmfast_proposal' that this is a view of was deleted or replaced"):
            call()
    assert sorted(model.peft_config) == ["default", "dmfast_proposal"]


# --- memory


def parameter_bytes(*models):
    """Return the bytes of all parameters of the models. Shared parameters count once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values())


def test_memory_is_that_of_one_model_and_two_adapters(tmp_path):
    base, model = adapted()
    backbone, adapter = parameter_bytes(base), parameter_bytes(model) - parameter_bytes(base)
    assert 0 < adapter < backbone
    three = trainer(tmp_path, base, model, shared=False)
    assert (
        parameter_bytes(three.target.base.model, three.model, three.proposal.snapshot.model)
        == 3 * backbone + 2 * adapter
    )
    base, model = adapted()
    one = trainer(tmp_path, base, model, shared=True)
    models = one.target.base.model, one.model, one.proposal.snapshot.model
    assert parameter_bytes(*models) == backbone + 2 * adapter


# --- in the trainer


def trainer(out, base, model, *, shared, callbacks=(), prompts=None, reward=None, **args):
    """Return a job that asks for w3 in 60% of the sequences. a and q are models of their own, or views."""
    base = LanguageModel(model, tokenizer()).base() if shared else LanguageModel(base, tokenizer())
    target = EBM(base, [Moment(Contains("w3", name="w3"), 0.6)], monitor=[Contains("w4", name="w4")])
    target.lambda_ = [1.5]
    settings = {
        "output_dir": str(out), "max_steps": 6, "per_device_train_batch_size": 32, "max_new_tokens": 6, "use_cpu": True,
        "learning_rate": 1e-2, "warmup_steps": 0, "proposal_interval": 2, "save_strategy": "no", "disable_tqdm": True,
        "eval_samples": 32, "seed": 3, "enable_jit_checkpoint": False,
    }  # fmt: skip
    return dmfast.DMTrainer(model, target, dmfast.DMConfig(**(settings | args)), train_dataset=prompts,
                            processing_class=tokenizer(), callbacks=list(callbacks), reward=reward)  # fmt: skip


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "proposal_check_samples": 32,
        },
        {
            "prompts": PROMPTS,
            "samples_per_context": 8,
            "objective": "kl_control",
            "beta": 0.3,
            "bf16": True,
            "proposal_criterion": "interval",
            "reward": Contains("w3"),
        },
    ],
    ids=["plain", "checkpointing, fresh checks", "prompts, kl_control, bf16"],
)
def test_one_backbone_trains_as_three_models_do(tmp_path, settings):
    """Both runs agree on log q, log P, Z, weights, swaps, the adapter after each step and the evaluation."""
    runs = []
    for shared in (False, True):
        keep, seen = Keep(), []
        keep.trainer = job = trainer(tmp_path, *adapted("new lora"), shared=shared, callbacks=[keep], **settings)
        loss = LanguageModel.loss

        def noting(self, *args, seen=seen, loss=loss, **options):
            seen.append(loss(self, *args, **options))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LanguageModel, "loss", noting)
            job.train()
        runs.append((job, keep, seen))
    (three, keep, outs), (one, keep_one, outs_one) = runs
    assert one.proposal.swaps == three.proposal.swaps > 0
    assert model_card(one) == model_card(three)
    assert one.model is one.target.base.model is one.proposal.snapshot.model
    for step, step_one in zip(keep.steps, keep_one.steps, strict=True):
        assert torch.equal(step.samples.tokens, step_one.samples.tokens)
        for name, value in step.inputs.items():
            torch.testing.assert_close(step_one.inputs[name], value, rtol=0, atol=1e-6, msg=name)
    for out, out_one in zip(outs, outs_one, strict=True):
        torch.testing.assert_close(out_one.log_prob, out.log_prob, rtol=0, atol=1e-6)
        torch.testing.assert_close(out_one.weight, out.weight, rtol=1e-6, atol=1e-6)
    for mine, other in zip(keep_one.models[1:], keep.models[1:], strict=True):
        assert trained(mine).keys() == trained(other).keys()
        for name, value in trained(other).items():
            torch.testing.assert_close(trained(mine)[name], value, rtol=1e-6, atol=1e-7, msg=name)
    found, wanted = one.evaluate(), three.evaluate()
    assert {k: v for k, v in found.items() if "runtime" not in k} == pytest.approx(
        {k: v for k, v in wanted.items() if "runtime" not in k}, rel=1e-6
    )


def test_what_is_saved_is_the_policy_s_adapter(tmp_path):
    base, model = adapted()
    job = trainer(tmp_path, base, model, shared=True, save_strategy="steps", save_steps=3)
    job.train()
    job.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "checkpoint-6"):
        assert not [path for path in folder.iterdir() if path.is_dir()]
        saved = load_file(folder / "adapter_model.safetensors")
        assert saved.keys() == adapters.weights(model, "default").keys() and len(saved) == 12
    card = (tmp_path / "final" / "README.md").read_text()
    assert "library_name: peft" in card and "dmfast_proposal" not in card
    loaded = LanguageModel(peft.PeftModel.from_pretrained(base, tmp_path / "final"), tokenizer())
    x = job.policy.sample(n=8, max_new_tokens=6, seed=0)
    torch.testing.assert_close(loaded.log_prob(x), job.policy.log_prob(x), rtol=0, atol=1e-6)
    assert list(loaded.model.peft_config) == ["default"]
    assert "save_pretrained" not in vars(model)


def test_resumed_to_the_bit(tmp_path):
    """At this checkpoint q is neither pi nor a."""
    settings = {"shared": True, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", *adapted("new lora"), **settings)
    whole.train()
    trainer(tmp_path / "cut", *adapted("new lora"), callbacks=[StopAt(3)], **settings).train()
    resumed = trainer(tmp_path / "cut", *adapted("new lora"), **settings)
    resumed.train(resume_from_checkpoint=True)
    for name in ("default", adapters.PROPOSAL):
        mine, wanted = (adapters.weights(job.model, name) for job in (resumed, whole))
        assert mine.keys() == wanted.keys() and all(torch.equal(value, wanted[k]) for k, value in mine.items())
    assert resumed.proposal.swaps == whole.proposal.swaps > 1
    history = [[{k: v for k, v in h.items() if "seconds" not in k} for h in job.state.log_history if "kl_policy" in h]
               for job in (resumed, whole)]  # fmt: skip
    assert history[0] == history[1]
    assert {n: p.requires_grad for n, p in resumed.model.named_parameters()} == {
        n: p.requires_grad for n, p in whole.model.named_parameters()
    }
    with pytest.raises(RuntimeError, match="kept in another way"):
        trainer(tmp_path / "cut", *adapted("new lora"), **(settings | {"shared": False})).train(
            resume_from_checkpoint=True
        )


def test_two_processes_train_one_backbone_as_one_does(tmp_path):
    """With DDP, gradients, swaps and adapters are those of one process, and both processes hold the same parameters."""
    common = {"max_steps": 4, "optim": "sgd", "learning_rate": 3e-2, "warmup_steps": 0, "lora": LORA,
              "proposal_check_samples": 32}  # fmt: skip
    one, gradients, _ = run(tmp_path / "one", per_device_train_batch_size=32, **common)
    two = in_process(tmp_path / "two", processes=2, per_device_train_batch_size=16, **common)
    assert all("lora" in name for name in gradients[0])
    assert_close({n: torch.tensor(g).view_as(gradients[0][n]) for n, g in two["gradients"].items()}, gradients[0])
    log = [h for h in one.state.log_history if "kl_policy" in h]
    assert [h["swapped"] for h in two["log"]] == [h["swapped"] for h in log]
    assert 0 < two["swaps"] == one.proposal.swaps
    for key in ("phi/w3", "log_z", "kl_policy", "proposal_check"):
        found, wanted = ([h[key] for h in each if key in h] for each in (two["log"], log))
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4), key


def test_sharing_without_a_view_is_refused(tmp_path):
    _, model = adapted()
    with pytest.raises(ValueError, match=r"LanguageModel\(model, tokenizer\).base\(\)"):
        trainer(tmp_path, model.base_model.model, model, shared=False)
    _, other = adapted()
    view = LanguageModel(other, tokenizer()).base()
    target = EBM(view, [Contains("w3")])
    args = dmfast.DMConfig(str(tmp_path), max_steps=1, use_cpu=True)
    around = peft.PeftModel(LlamaForCausalLM(llama().config), peft.LoraConfig(target_modules=["q_proj"]))
    around.base_model.model = other.get_base_model()
    # This model shares the view's parameters through another wrapper.
    with pytest.raises(ValueError, match="shares parameters"):
        dmfast.DMTrainer(around, target, args)
    unfrozen(other)
    with pytest.raises(ValueError, match="1 other parameters require a gradient"):
        dmfast.DMTrainer(other, target, args)
    assert adapters.PROPOSAL not in other.peft_config


LORA_RECIPE = {"target_modules": ["c_attn"], "r": 2, "fan_in_fan_out": True}


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}], ids=["one backbone", "three models"])
def test_recipes_share_the_backbone_where_that_is_possible(tmp_path, more, monkeypatch):
    """Where that is not possible, the run says so."""
    path, made, said = tmp_path / "recipe.yaml", [], []
    path.write_text(yaml.safe_dump(SMALL | {"lora": LORA_RECIPE | more}))
    init = dmfast.DMTrainer.__init__

    def making(self, *args, **options):
        init(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(dmfast.DMTrainer, "__init__", making)
    log = recipe.run(recipe.read(path, {"train.output_dir": str(tmp_path / "out")}), say=said.append)
    (job,) = made
    shares = not more
    assert (job.target.base.model is job.model) == shares == isinstance(job.proposal.snapshot, AdapterView)
    assert any("three models are kept in memory instead of one: " in str(line) for line in said) == (not shares)
    assert log["before"]["kl_policy_base"].value == pytest.approx(0, abs=1e-4) and log["steps"] == 2
    assert log["target"]["base"].endswith("tiny_bios")


def test_the_example_runs(monkeypatch, capsys):
    import lora

    found = []
    small = ["lora.py", "--steps", "3", "--batch", "8", "--samples", "64", "--check-samples", "16"]
    for more in ([], ["--three-models"]):
        monkeypatch.setattr("sys.argv", small + more)
        found.append(lora.main())
    one, three = found
    assert 2.5 < three.pop("megabytes") / one.pop("megabytes") < 3
    del one["eval_runtime"], three["eval_runtime"]
    assert one == pytest.approx(three, rel=1e-5, abs=1e-6)
    assert "parameters of a, pi and q" in capsys.readouterr().out
