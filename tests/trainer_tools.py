"""Share what the tests of DMTrainer need: a job in its own process, the steps of a run, and an oracle in fp64."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from launch import launch
from trainer_job import Gradients, StopAt, job
from trainer_job import said as of_job
from transformers import TrainerCallback

import dmfast
from dmfast import Contains, LanguageModel

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_process(out, processes=1, **wanted):
    """Run a job in a fresh process, or in several, and return what it says of itself."""
    out.mkdir(parents=True, exist_ok=True)
    done = launch(HERE / "trainer_job.py", json.dumps({"out": str(out), **wanted}), processes=processes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((out / "result.json").read_text())


def here(out, *, resume=None, stop=None, **wanted):
    """Run a job in this process, and return what it says of itself."""
    gradients = Gradients()
    trainer = job(out, callbacks=[gradients, *([StopAt(stop)] if stop else [])], **wanted)
    trainer.train(resume_from_checkpoint=resume)
    return of_job(trainer, gradients)


class Keep(TrainerCallback):
    """Keep the steps as the trainer drew and scored them, and the policy that each was taken with."""

    def __init__(self):
        self.steps, self.models, self.snapshots = [], [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append(self.trainer.matcher.batch)
        self.models.append(copy.deepcopy(model))
        if self.trainer.proposal:
            self.snapshots.append(copy.deepcopy(self.trainer.proposal.snapshot.model))


def run(out, **wanted):
    """Return a finished job with its gradients and steps."""
    gradients, keep = Gradients(), Keep()
    trainer = job(out, callbacks=[gradients, keep, *wanted.pop("callbacks", [])], **wanted)
    keep.trainer = trainer
    trainer.train()
    return trainer, gradients.steps, keep


def oracle(model, step, inputs=None, **options):
    """Return the gradient of a whole step in fp64 and plain torch, and the output of its loss."""
    if inputs is None:
        inputs = {name: value for name, value in step.inputs.items() if name != "baseline"}
    policy = LanguageModel(copy.deepcopy(model).double(), step.samples.tokenizer)
    logits, labels = policy.logits(step.samples)
    out = dmfast.eager.dm_loss(logits, labels, objective=step.objective, context_id=step.samples.context_id,
                               temperature=step.samples.temperature, **inputs, **options)  # fmt: skip
    out.loss.backward()
    return {n: p.grad for n, p in policy.model.named_parameters()}, out


def inputs_by_hand(trainer, step, objective):
    """Return what the objective needs, from base and features, and the baseline of the whole step."""
    x = step.samples
    log_base = trainer.target.base.log_prob(x)
    inputs = {
        "log_proposal": x.log_prob,
        "log_target": log_base + 1.5 * Contains("w3")(x),
        "log_z": step.inputs["log_z"],
    }
    if objective == "kl_control":
        inputs["log_base"] = log_base
    if objective in ("kl_control", "reinforce"):
        inputs["reward"] = Contains("w3")(x)
    return inputs


def assert_close(found, wanted, tolerance=2e-5):
    assert found.keys() == wanted.keys()
    # gdc++ starts with weights of nearly 0
    scale = max(0.1, *(float(g.abs().max()) for g in wanted.values()))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), wanted[name].double(), rtol=0, atol=tolerance * scale, msg=name)


#: Some sequences of this job have weight 0, which is known before the policy's forward.
SKIP = {"constraints": [Contains("w4")], "objective": "dpg", "max_new_tokens": 3, "proposal_interval": 100}


class Forwards:
    """Record the shapes of the policy's forwards."""

    def __init__(self, model):
        self.shapes = []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        if module.training:
            self.shapes.append(tuple(kwargs["input_ids"].shape))


def said(recorded, part):
    """Return how many of the recorded warnings have this part in their message."""
    return sum(part in str(each.message) for each in recorded)
