"""Run a small training job in this process or, as a script, in one of its own: ``python trainer_job.py JSON``.

The script prints a JSON line of what came out. Under torchrun it is one rank of several.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

import gpt2_weights  # noqa: F401
import peft
import torch
from ending import end
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import dmfast
from dmfast import EBM, Contains, Moment

WORDS = ["w0", "w1", "w2", "w3", "w4", "<e>", "w5", "<p>", "w6", "<s>", "w7"]
PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7", "w0 w0", "w2", "w5 w1"]


def tokenizer(**special):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<e>", "pad_token": "<p>", "bos_token": "<s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=words, **{k: v for k, v in special.items() if v})


def gpt2(seed=0, n_positions=24):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(WORDS), n_positions=n_positions, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
            bos_token_id=9, eos_token_id=5,
        )
    )  # fmt: skip


def llama(seed=0):
    """Return a model whose head is not its embedding."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=24, initializer_range=0.3, bos_token_id=9, eos_token_id=5,
        )
    )  # fmt: skip


def job(out, *, model=None, base=None, constraints=None, prompts=None, tok=None, callbacks=(), lambda_=1.5, reward=None,
        lora=None, eval_dataset=None, objective=None, **args):  # fmt: skip
    """Return a trainer on GPT-2 of 2 layers x 16, whose target has w3 in 60% of the sequences.

    ``lora`` has the arguments of peft.LoraConfig, and policy and base then share one backbone. ``base`` is the model of
    a, in place of a copy.

    With this seed every step has w3 among its samples. Without any, A would be 0 but for its rounding, of which Adam
    would make a step of full size, another one on every machine. At step 4, pi is nearer to p than q by .4 nats.
    """
    model = gpt2() if model is None else model
    tok = tokenizer() if tok is None else tok
    if lora is None:
        base = dmfast.LanguageModel(copy.deepcopy(model) if base is None else base, tok)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(**lora))
        base = dmfast.LanguageModel(model, tok).base()
    if constraints is None:
        constraints = [Moment(Contains("w3", name="w3"), 0.6)]
    target = EBM(base, constraints, monitor=[Contains("w4", name="w4")])
    if target.moment_names:
        target.lambda_ = [lambda_] * len(target.moment_names)
    settings = {
        "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 8, "max_new_tokens": 6, "use_cpu": True,
        "learning_rate": 5e-3, "warmup_steps": 2, "proposal_interval": 2, "save_strategy": "no", "disable_tqdm": True,
        "eval_samples": 32, "seed": 29, "enable_jit_checkpoint": False,
    }  # fmt: skip
    own = {} if objective is None or isinstance(objective, str) else {"objective": objective}
    named = {"objective": objective} if isinstance(objective, str) else {}
    return dmfast.DMTrainer(
        model, target, dmfast.DMConfig(**(settings | args | named)), train_dataset=prompts, processing_class=tok,
        reward=reward, callbacks=list(callbacks), eval_dataset=eval_dataset, **own,
    )  # fmt: skip


class StopAt(TrainerCallback):
    """End training after a step, with a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


class AtOnce(threading.Timer):
    """Leave out the three seconds that transformers waits between SIGTERM and its checkpoint."""

    def start(self):
        self.function()


def whole(tensor):
    """Return the whole of a tensor, of which this rank may have a shard."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Gradients(TrainerCallback):
    """Keep the gradients of each optimiser step, by parameter."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({n.removeprefix("module."): whole(p.grad).clone() for n, p in named if p.grad is not None})


class Kill(TrainerCallback):
    """Send a signal to the own process, by default while a step is running."""

    def __init__(self, number, step, then=lambda: None, event="on_substep_end"):
        self.number, self.step, self.then = number, step, then
        setattr(self, event, self._kill)

    def _kill(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)
            self.then()


def digest(model):
    """Return a digest of all parameters, to the bit."""
    parts = [p.detach().contiguous().numpy().tobytes() for _, p in sorted(model.state_dict().items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main():
    """Run the job that the command line asks for."""
    torch.set_num_threads(1)
    wanted = json.loads(sys.argv[1])
    resume, stop, interrupt, terminate = (wanted.pop(n, None) for n in ("resume", "stop", "interrupt", "terminate"))
    gradients = Gradients()
    callbacks = [gradients, *([StopAt(stop)] if stop else [])]
    if interrupt and os.environ.get("RANK") == "1":
        callbacks.append(Kill(signal.SIGINT, interrupt, event="on_step_end"))
    if terminate and os.environ.get("RANK") == "1":
        threading.Timer = AtOnce
        callbacks.append(Kill(signal.SIGTERM, terminate, event="on_step_begin"))
    trainer = job(callbacks=callbacks, **wanted)
    trainer.train(resume_from_checkpoint=resume)
    result = said(trainer, gradients)
    if trainer.is_world_process_zero():
        Path(wanted["out"], "result.json").write_text(json.dumps(result))
    end()


def said(trainer, gradients):
    """Return what a run that has ended says of itself."""
    return {
        "digest": digest(trainer.model),
        "steps": trainer.state.global_step,
        "swaps": trainer.proposal.swaps,
        "log": [h for h in trainer.state.log_history if "kl_policy" in h],
        "evaluations": [h for h in trainer.state.log_history if "eval_runtime" in h],
        "gradients": {name: g.flatten().tolist() for name, g in gradients.steps[0].items()},
    }


if __name__ == "__main__":
    main()
