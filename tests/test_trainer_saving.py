"""Test what DMTrainer saves: an adapter, a plain folder that needs no dmfast, and what is pushed to the hub."""

from __future__ import annotations

import concurrent.futures
import copy
import fnmatch
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import peft
import pytest
import safetensors.torch
import torch
import transformers.trainer
from test_prompts import Reader
from trainer_job import digest, gpt2, job, tokenizer
from trainer_tools import (
    one_thread,  # noqa: F401
)
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback

import dmfast
from dmfast import EBM, Contains, LanguageModel, Moment
from dmfast.training import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")


def test_lora_trains_the_adapter_alone(tmp_path):
    torch.manual_seed(0)
    base = gpt2()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(
        target_modules=["c_attn", "c_proj"], r=4, lora_dropout=0.3, fan_in_fan_out=True))  # fmt: skip
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    target = EBM(LanguageModel(base, tokenizer()), [Moment(Contains("w3", name="w3"), 0.6)])
    target.lambda_ = [1.5]
    args = job(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, proposal_criterion="interval").args
    trainer = dmfast.DMTrainer(model, target, args, processing_class=tokenizer())
    trainer.train()
    assert trainer.proposal.swaps == 2
    moved = [n for n, p in model.named_parameters() if n in frozen and not torch.equal(p, frozen[n])]
    assert moved == []
    state = torch.load(tmp_path / "checkpoint-2" / "dmfast_state.pt", weights_only=True)
    # the state holds only those parameters of q that training moves
    assert all("lora" in name for name in state["matcher"]["proposal"]["model"])
    trainer.save_model(str(tmp_path / "final"))
    assert "library_name: peft" in (tmp_path / "final" / "README.md").read_text()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "final")
    x = trainer.policy.sample(n=8, max_new_tokens=6, seed=0)
    torch.testing.assert_close(LanguageModel(loaded, tokenizer()).log_prob(x), trainer.policy.log_prob(x))
    again = dmfast.DMTrainer(
        peft.get_peft_model(copy.deepcopy(base), model.peft_config["default"]), target, args,
        processing_class=tokenizer(),
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(again.policy.log_prob(x), trainer.policy.log_prob(x), rtol=0, atol=0)


def test_a_plain_folder_that_needs_no_dmfast(tmp_path):
    trainer = job(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    script = (
        "import sys; sys.modules['dmfast'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'final')!r})\n"
        f"tok = AutoTokenizer.from_pretrained({str(tmp_path / 'final')!r})\n"
        "print(model(**tok('w1 w2', return_tensors='pt')).logits[0, -1].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    wanted = trainer.model(**tokenizer()("w1 w2", return_tensors="pt")).logits[0, -1].tolist()
    assert json.loads(done.stdout) == pytest.approx(wanted, abs=1e-5)
    card = (tmp_path / "final" / "README.md").read_text()
    for text in ("library_name: transformers", '"value": 0.6', '"lambda": 1.5', "| objective | gdc++ |", "phi/w3",
                 "2 optimiser steps of 8 sequences"):  # fmt: skip
        assert text in card, text


@pytest.mark.parametrize("ends", [[5, 3], [3]], ids=["two ends", "one"])
def test_generate_of_a_saved_model_ends_where_training_did(tmp_path, ends):
    """The user's temperature and top_k, which training ignores, stay as they were in memory and on disk.

    transformers refuses to save them by itself, since do_sample is not set.
    """
    model, tok = gpt2(), tokenizer()
    model.generation_config.update(temperature=0.7, top_k=7)
    target = EBM(LanguageModel(gpt2(), tok, eos_token_id=ends), [Contains("w4")])
    args = job(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).args
    with pytest.warns(UserWarning, match="which is ignored"):
        trainer = dmfast.DMTrainer(model, target, args, processing_class=tok)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        config = loaded.generation_config
        assert config.eos_token_id == (ends if len(ends) > 1 else ends[0]), folder
        assert (config.temperature, config.top_k, config.pad_token_id) == (0.7, 7, 7)
    assert (model.generation_config.temperature, model.generation_config.top_k) == (0.7, 7)
    torch.manual_seed(0)
    rows = loaded.generate(
        torch.full((200, 1), 9), do_sample=True, temperature=1.0, top_k=0, max_new_tokens=12
    )[:, 1:].tolist()  # fmt: skip
    last = []
    for row in rows:
        while row[-1] == 7 and len(row) > 1:
            row.pop()
        last.append(row[-1])
        assert not set(row[:-1]) & set(ends), row
    assert set(ends) <= set(last)


def test_a_saved_model_has_all_ends_of_its_generation_config(tmp_path):
    """A saved model also has ends that the tokenizer does not know, as in most chat models. Training ends there too."""
    model, tok = gpt2(), tokenizer()
    model.generation_config.eos_token_id = [5, 3, 8]
    target = EBM(LanguageModel(copy.deepcopy(model), tok), [Contains("w4")])
    trainer = dmfast.DMTrainer(model, target, job(tmp_path, max_steps=1).args, processing_class=tok)
    trainer.train()
    x = trainer.matcher.policy.sample(n=64, max_new_tokens=8, seed=0)
    assert not any(
        set(row[scored].tolist()[:-1]) & {5, 3, 8} for row, scored in zip(x.tokens, x.score_mask, strict=True)
    )
    trainer.save_model(str(tmp_path / "final"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").generation_config.eos_token_id == [5, 3, 8]
    assert LanguageModel.from_pretrained(tmp_path / "final").eos_token_ids == [5, 3, 8]


@pytest.mark.parametrize("one_backbone", [False, True], ids=["a copy", "one backbone"])
def test_the_ends_are_saved_beside_an_adapter(tmp_path, one_backbone):
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.generation_config.update(eos_token_id=[5, 3, 8], top_k=7)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    if one_backbone:
        below = LanguageModel(model, tokenizer()).base()
    else:
        below = LanguageModel(gpt2(), tokenizer(), eos_token_id=[5, 3, 8])
    target = EBM(below, [Contains("w4")])
    args = job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).args
    with pytest.warns(UserWarning, match="which is ignored"):
        trainer = dmfast.DMTrainer(model, target, args, processing_class=tokenizer())
    assert trainer.policy.eos_token_ids == [5, 3, 8]
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-1", tmp_path / "final"):
        saved = GenerationConfig.from_pretrained(folder)
        assert (saved.eos_token_id, saved.top_k) == ([5, 3, 8], 7)
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
        # PEFT reads the base's configuration, as the guide says
        assert loaded.generation_config.eos_token_id == 5
        loaded.get_base_model().generation_config = saved
        assert LanguageModel(loaded, tokenizer()).eos_token_ids == [5, 3, 8]
    assert not (tmp_path / "final" / "config.json").exists()
    assert (base.generation_config.eos_token_id, base.generation_config.top_k) == ([5, 3, 8], 7)


def test_an_adapter_that_was_loaded_for_inference_is_refused_at_once(tmp_path):
    adapted = peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    adapted.save_pretrained(tmp_path / "adapter")
    target = EBM(LanguageModel(gpt2(), tokenizer()), [Contains("w4")])
    args = job(tmp_path).args
    frozen = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"nothing to train; load the adapter by .*is_trainable=True"):
        dmfast.DMTrainer(frozen, target, args)
    going_on = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "adapter", is_trainable=True)
    dmfast.DMTrainer(going_on, target, args)


def test_a_processor_trains_as_its_tokenizer_does_and_is_saved_whole(tmp_path):
    chat = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w6{% endif %}"
    processor = Reader(tokenizer(pad_token=None), chat)
    model, prompts = gpt2(), [[{"role": "user", "content": "w1 w2"}]]
    target = EBM(LanguageModel(gpt2(), processor), [Contains("w4")])
    with pytest.warns(UserWarning, match="no pad token"):
        trainer = dmfast.DMTrainer(model, target, job(tmp_path, max_steps=1).args, train_dataset=prompts,
                                   processing_class=processor)  # fmt: skip
    trainer.train()
    batch = trainer.policy.sample(prompts, 2, max_new_tokens=2, seed=0)
    assert batch.tokens[:, : batch.prompt_len].tolist() == [[1, 2, 8]] * 2
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "chat_template.jinja").read_text() == chat
    assert processor.tokenizer.chat_template is None


class Uploads:
    """Stand in for the hub, and keep what is in a folder when it is pushed, except for what is to be left out."""

    def __init__(self, monkeypatch):
        self.pushed = []
        monkeypatch.setattr(huggingface_hub, "whoami", lambda token=None: {"name": "someone"})
        for name in ("create_repo", "upload_folder"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, getattr(self, name))
            # older releases took the functions over when they were imported
            if hasattr(transformers.trainer, name):
                monkeypatch.setattr(transformers.trainer, name, getattr(self, name))

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def upload_folder(self, *, folder_path, path_in_repo="", ignore_patterns=(), run_as_future=False, **kwargs):
        files = {str(p.relative_to(folder_path)): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}
        files = {
            name: data for name, data in files.items() if not any(fnmatch.fnmatch(name, x) for x in ignore_patterns)
        }
        self.pushed.append((path_in_repo, Path(folder_path), checkpoint.fault(Path(folder_path)), files))
        done = concurrent.futures.Future()
        done.set_result(None)
        return done if run_as_future else None


PLAIN = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json", "training_args.bin"}  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        ("every_save", ["", ""]),
        ("checkpoint", ["", "last-checkpoint", "", "last-checkpoint"]),
        ("all_checkpoints", ["", "checkpoint-2", "", "checkpoint-4"]),
        ("end", []),
    ],
)
def test_what_is_pushed_is_whole(tmp_path, strategy, wanted, monkeypatch):
    uploads = Uploads(monkeypatch)
    trainer = job(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        push_to_hub=True, hub_strategy=strategy,
    )  # fmt: skip
    weights = {}

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights[state.global_step] = {n: p.clone() for n, p in model.state_dict().items()}

    trainer.add_callback(Weights)
    trainer.train()
    assert [place for place, *_ in uploads.pushed] == wanted
    trainer.push_to_hub()
    half = len(wanted) // 2
    for step, (place, folder, fault, files) in zip([2] * half + [4] * (half + 1), uploads.pushed, strict=True):
        if place:  # a checkpoint goes to a place of its own
            assert folder == tmp_path / f"checkpoint-{step}" and fault is None
            assert {"dmfast_state.pt", "dmfast_manifest.json", "optimizer.pt", "trainer_state.json"} <= files.keys()
            assert files.keys() >= PLAIN
        else:
            assert folder == tmp_path and files.keys() == PLAIN
        loaded = safetensors.torch.load(files["model.safetensors"])
        assert all(torch.equal(value, weights[step][name]) for name, value in loaded.items())
        card = files["README.md"].decode()
        assert "# A language model matched to a target distribution" in card
        assert f"{step} optimiser steps of 8 sequences" in card and f"Evaluation at step {step}" in card


@pytest.mark.parametrize("path", [str, Path])
def test_a_model_by_its_path_with_an_adapter_of_a_config(tmp_path, path):
    folder = tmp_path / "model"
    gpt2().to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    given = job(tmp_path)
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    trainers = [
        dmfast.DMTrainer(path(folder), given.target, given.args, peft_config=copy.deepcopy(config)) for _ in range(2)
    ]
    for trainer in trainers:
        assert isinstance(trainer.model, peft.PeftModel)
        assert trainer.model.get_base_model().lm_head.weight.dtype == torch.float32
        trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        assert trained and all("lora" in name for name in trained)
        trainer.train()
    assert digest(trainers[0].model) == digest(trainers[1].model)  # the adapter starts from the run's seed
    plain = dmfast.DMTrainer(path(folder), given.target, given.args)
    assert type(plain.model).__name__ == "GPT2LMHeadModel" and plain.model.lm_head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="the model is a PeftModel already"):
        dmfast.DMTrainer(trainers[0].model, given.target, given.args, peft_config=config)


def test_an_adapter_is_not_put_into_the_base(tmp_path):
    """The error comes before the model is changed."""
    trainer = job(tmp_path)
    base = trainer.target.base.model
    before = digest(base)
    with pytest.raises(ValueError, match="the target would move with it"):
        dmfast.DMTrainer(base, trainer.target, trainer.args, peft_config=peft.LoraConfig(target_modules=["c_attn"]))
    assert digest(base) == before
