"""Take a first tour of dmfast in cells: from a wish to a trained model, with pictures, on a CPU.

    python examples/tutorial.py       # two to three minutes; writes four pictures

The cells begin with ``# %%``. VS Code, Spyder and Jupyter (with jupytext) open the file as a notebook. The page
``docs/tutorial.md`` is made of it by ``scripts/tutorial_page.py``.
"""

# %% [markdown]
# # Tutorial
#
# In this tour you make a small language model write about women as often as about men. You look at the model, state
# the wish, train for a minute on a CPU, and compare the result with what reward maximisation makes of the same model.
# The model ships with dmfast, so you need no network. Install dmfast with `pip install '.[train]'` in a clone first.
#
# The tour is also a notebook: [`examples/tutorial.py`](../examples/tutorial.py) has the same cells.
#
# ## Look at the model
#
# `tiny-bios` is a GPT-2 of two layers that writes short biographies. You could load any other causal model of
# transformers by its name here.

# %%
import json

import matplotlib.pyplot as plt
import torch

import dmfast
from dmfast.shipped import TINY_BIOS

STEPS, SEQUENCES, SAMPLES = 60, 192, 2048
LENGTH = 48  # tokens of a text at most

original = dmfast.LanguageModel.from_pretrained("tiny-bios")
texts = original.sample(n=4, max_new_tokens=LENGTH, seed=1).text
print("\n".join(texts))

# %% [markdown]
# A *feature* is a number for each text. The feature `women` is 1 where a text has the word "she" or "her" and 0
# elsewhere. Its mean over samples says how often the model writes about women. The four topics are features too. You
# will not ask anything of them, but you will watch them.

# %%
women = dmfast.Contains(any_of=["she", "her"], name="women")
words = json.loads((TINY_BIOS / "features.json").read_text(encoding="utf-8"))
topics = [
    dmfast.Contains(any_of=words[f"topic_{t}"]["any_of"], name=t) for t in ("science", "art", "sports", "politics")
]
features = [women, *topics]

x = original.sample(n=SAMPLES, max_new_tokens=LENGTH, seed=0)
rates = {feature.name: float(feature(x).mean()) for feature in features}
print({name: round(rate, 3) for name, rate in rates.items()})

# %% [markdown]
# ## State the wish
#
# The wish is that half of the texts are about women. A `Moment` says that: it is a feature with the mean that you
# want. Many distributions have this mean. dmfast takes the one that is closest to the original model, because nothing
# else was asked for. This distribution is the *target*. It has a simple form: the original's probability of a text,
# times a factor exp(λ) if the text is about women, divided by a constant so that the probabilities sum to 1.
#
# `fit` finds λ from samples of the original. Its report says what the original has, what the target has, and how far
# the target is from the original. The distance is the Kullback-Leibler divergence KL(target‖original), in nats. No
# model that fulfils the wish can be closer.

# %%
target = dmfast.EBM(original, [dmfast.Moment(women, 0.5)]).fit(max_new_tokens=LENGTH)
print(target.report)

# %% [markdown]
# You can see what the target will do before you train: samples of the original, weighted by the factor, are samples of
# the target. The share of women goes to a half. The topics move only as far as the model gives women other topics than
# men. A part of the difference in the picture is noise, because only about 140 of these samples are about women.

# %%
weight = (target.lambda_ * women(x)[:, None]).exp().squeeze(1)
of_target = {feature.name: float((weight * feature(x)).sum() / weight.sum()) for feature in features}


def show_features(axis, columns):
    """Draw a row for each feature and a marker for each model."""
    for (label, values), marker, color in zip(columns.items(), "osD^", ("0.5", "0.1", "C0", "C1"), strict=False):
        axis.plot([values[f.name] for f in features], range(len(features)), marker, color=color, label=label, alpha=0.8)
    axis.set_yticks(range(len(features)), [f.name for f in features])
    axis.set(xlabel="share of the texts", xlim=(-0.02, 1.02))
    axis.invert_yaxis()
    axis.grid(axis="y", alpha=0.3)
    axis.legend()


figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
show_features(axis, {"original": rates, "target": of_target})
axis.set_title("The target changes what was asked for, and little else")
figure.savefig("target.png", dpi=110)

# %% [markdown]
# ## Train
#
# A training step draws texts, compares how likely they are under the target and under the model, and moves the model
# towards the target. The texts come from a *proposal*: a copy of the model that is replaced by the model itself
# whenever the model has come closer to the target. `Matcher` does one step of this, and the loop around it is yours.
#
# Every fifth step, the function `look` measures the model on fresh samples: the share of women, and the distance of
# the model from the original, KL(model‖original).


# %%
@torch.no_grad()
def look(policy, step):
    """Return the share of women and the distance from the original of a model, from fresh samples of it."""
    fresh = policy.sample(n=SAMPLES // 4, max_new_tokens=LENGTH, seed=1000 + step)
    distance = float((fresh.log_prob - original.log_prob(fresh)).mean())
    return {"step": step, "women": float(women(fresh).mean()), "distance": distance}


def train(matcher, learning_rate=1.5e-4):
    """Return what was measured of the model, and the log of each step."""
    policy = matcher.policy
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=learning_rate)
    seen, log = [look(policy, 0)], []
    for step in range(1, STEPS + 1):
        batch = matcher.draw(n=SEQUENCES, max_new_tokens=LENGTH)
        matcher.loss(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append(matcher.commit())
        if step % 5 == 0 or step == STEPS:
            seen.append(look(policy, step))
    return seen, log


matched = dmfast.LanguageModel.from_pretrained("tiny-bios")
matched_seen, log = train(dmfast.Matcher(matched, target, dmfast.OfflineProposal(matched, interval=5)))
print(matched_seen[-1])

# %% [markdown]
# Each step also estimates how far the model is from the target, from the texts that it has drawn anyway. The picture
# shows this estimate with its standard error, and beside it the *effective sample size*, which says how many of the
# texts of a step count. It rises as the proposal comes closer to the target.

# %%
steps = range(1, STEPS + 1)
divergence, error = (torch.tensor([row[name] for row in log]) for name in ("kl_policy", "kl_policy_stderr"))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.plot(steps, divergence)
left.fill_between(steps, divergence - error, divergence + error, alpha=0.25)
left.set(xlabel="step", ylabel="nats", title="Distance of the model from the target", ylim=(0, None))
right.plot(steps, [row["ess"] for row in log])
right.set(xlabel="step", ylabel="texts", title=f"Effective sample size, of {SEQUENCES}", ylim=(0, SEQUENCES))
figure.savefig("training.png", dpi=110)

# %% [markdown]
# ## Compare with reward maximisation
#
# The usual way is to reward texts about women and to maximise the mean reward. REINFORCE does that, and dmfast has it
# for comparison. It starts from the same model, with the same number of texts and the same learning rate. A reward
# can't ask for a half, so the share of women goes on to 1, and the distance from the original goes on growing. In the
# picture the share passes a half at step 25. The distance is already twice what the wish needs there, so stopping
# early does not give you the target.

# %%
maximiser = dmfast.LanguageModel.from_pretrained("tiny-bios")
reinforce = dmfast.Matcher(maximiser, target, objective="reinforce", reward=women, baseline="leave_one_out")
maximised_seen, _ = train(reinforce)
print(maximised_seen[-1])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for label, seen, style in (("dmfast", matched_seen, "C0o-"), ("reward maximisation", maximised_seen, "C1^--")):
    left.plot([row["step"] for row in seen], [row["women"] for row in seen], style, label=label, markersize=4)
    right.plot([row["step"] for row in seen], [row["distance"] for row in seen], style, label=label, markersize=4)
left.axhline(0.5, color="0.3", linestyle=":", label="what was asked for")
right.axhline(target.report.kl.value, color="0.3", linestyle=":", label="the least that the wish needs")
left.set(xlabel="step", title="Share of biographies about women", ylim=(0, 1.03))
right.set(xlabel="step", title="Distance from the original model, in nats", ylim=(0, None))
left.legend()
right.legend()
figure.savefig("comparison.png", dpi=110)

# %% [markdown]
# The last cell shows what became of the topics, which nobody asked about, and a few texts of each model. The diamonds
# of dmfast lie near the squares of the target. The texts of the reward maximiser have lost some of the original's
# grammar.

# %%
columns = {"original": rates, "target": of_target}
for name, model in (("dmfast", matched), ("reward maximisation", maximiser)):
    fresh = model.sample(n=SAMPLES, max_new_tokens=LENGTH, seed=5)
    columns[name] = {feature.name: float(feature(fresh).mean()) for feature in features}
    print(f"{name}:", *fresh.text[:4], sep="\n  ")

figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
show_features(axis, columns)
axis.set_title("What each model writes about, after training")
figure.savefig("features.png", dpi=110)

# %% [markdown]
# ## Where to go next
#
# - [The guide](guide/index.md) shows the same with your own model, wish and prompts, with LoRA and on many GPUs.
# - `DMTrainer` runs the loop under transformers' `Trainer`, with checkpoints, evaluation and logging.
# - [The method](method.md) has the formulas behind `Matcher`.
