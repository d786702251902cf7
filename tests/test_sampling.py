"""Test samplers: what they are loaded from, what is refused, and whose draws they say theirs are.

An OfflineProposal whose sequences another engine draws gives that engine q and never pi.
"""

from __future__ import annotations

import copy
import inspect
import io

import peft
import pytest
import torch
from test_models import PROMPTS, Table, V, build, close, lm, same, tok

from dmfast import LanguageModel, OfflineProposal
from dmfast.adapters import PROPOSAL
from dmfast.models import AdapterView
from dmfast.sampling import Mixture, Prompted, Sampler
from dmfast.tensors import all_tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore:.*past_key_values", "ignore:.*tie_word", "ignore:.*forms all logits"
)
PEFT = ["", "lora", "lora, embedding too", "lora, new tokens"]


def moved(policy, by=0.1, seed=0):
    """Return the same policy after what training may do to it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for p in policy.model.parameters() if p.requires_grad):
            p.add_(by * torch.randn(p.shape, generator=generator))
    return policy


def view():
    """Return a second adapter of a model as a sampler."""
    policy = lm(how="lora")
    return OfflineProposal(policy, adapter=True).snapshot


SAMPLERS = {
    "LanguageModel": lm,
    "AdapterView": view,
    "base": lambda: lm(how="lora").base(),
    "Prompted": lambda: Prompted(lm(), "w1 w2"),
    "Mixture": lambda: Mixture([lm(), Prompted(lm(), "w1")]),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_a_sampler(name):
    sampler = SAMPLERS[name]()
    assert isinstance(sampler, Sampler)
    sampler.version = 7
    how = {"max_new_tokens": 4, "temperature": 1.3, "batch_size": 2}
    x = sampler.sample(["w3"], 5, seed=1, first_row=3, **how)
    assert x.version.tolist() == [7] * 5 and x.temperature == 1.3
    assert (sampler.log_prob(x, batch_size=2) - x.log_prob).abs().max() < 1e-4
    assert same(x, sampler.sample(["w3"], 5, seed=1, first_row=3, **how))
    other = sampler.sample(["w3"], 5, seed=1, first_row=8, **how)
    assert x.tokens.shape != other.tokens.shape or not torch.equal(x.tokens, other.tokens)


@pytest.mark.parametrize("kind", [LanguageModel, Prompted, Mixture])
@pytest.mark.parametrize("method", ["sample", "log_prob", "load"])
def test_samplers_take_what_the_protocol_says(kind, method):
    asked, given = (inspect.signature(getattr(each, method)).parameters for each in (Sampler, kind))
    assert [(p.name, p.kind, p.default) for p in given.values()] == [
        (p.name, p.kind, p.default) for p in asked.values()
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama tied"])
@pytest.mark.parametrize("how", PEFT)
@pytest.mark.parametrize("source", ["policy", "module", "folder"])
def test_a_model_becomes_what_it_is_loaded_from(name, how, source, tmp_path):
    policy, sampler = moved(lm(name, how=how)), lm(name, how=how)
    x = policy.sample(PROMPTS, 4, max_new_tokens=6, seed=0)
    assert (sampler.log_prob(x) - x.log_prob).abs().max() > 0.01
    requires_grad = [p.requires_grad for p in sampler.model.parameters()]
    if source == "folder":
        policy.model.save_pretrained(tmp_path)
    sampler.load({"policy": policy, "module": policy.model, "folder": tmp_path}[source])
    assert same(x, sampler.sample(PROMPTS, 4, max_new_tokens=6, seed=0))
    assert [p.requires_grad for p in sampler.model.parameters()] == requires_grad
    moved(policy, seed=1)  # the sampler holds a copy, so this changes nothing
    assert (sampler.log_prob(x) - x.log_prob).abs().max() < 1e-4


def test_what_is_loaded_keeps_device_and_dtype_and_the_names_of_its_own_adapter():
    policy = moved(lm(how="lora"))
    # this gives the policy a second adapter, which the sampler does not have
    OfflineProposal(policy, adapter=True)
    model = build(how="lora")
    model.add_adapter("mine", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("mine")
    model.delete_adapter("default")
    sampler = LanguageModel(model.double(), tok())
    sampler.load(policy)
    assert list(model.peft_config) == ["mine"]
    assert {t.dtype for t in all_tensors(model).values() if t.is_floating_point()} == {torch.float64}
    x = policy.sample(PROMPTS, 4, max_new_tokens=6, seed=0)
    assert (sampler.log_prob(x) - x.log_prob).abs().max() < 1e-4


def test_a_wrapped_policy_is_loaded_as_what_is_within():
    policy, sampler = moved(lm()), lm()
    sampler.load(policy.around(torch.compile(policy.model)))
    x = policy.sample(PROMPTS, 3, max_new_tokens=5, seed=0)
    assert same(x, sampler.sample(PROMPTS, 3, max_new_tokens=5, seed=0))


def test_a_view_of_another_model_is_loaded_as_the_adapter_that_it_shows():
    policy = lm(how="lora")
    q = OfflineProposal(policy, adapter=True).snapshot
    x = q.sample(PROMPTS, 4, max_new_tokens=6, seed=0)
    moved(policy)
    sampler = moved(lm(how="lora"), seed=2)
    sampler.load(q)
    assert (sampler.log_prob(x) - x.log_prob).abs().max() < 1e-4
    sampler.load(policy)
    assert (sampler.log_prob(x) - x.log_prob).abs().max() > 0.01
    plain = lm()
    with pytest.raises(RuntimeError, match="do not fit"):
        plain.load(q)
    with pytest.raises(RuntimeError, match="do not fit"):
        sampler.load(policy.base())


def test_an_adapter_view_loads_the_policy_and_folders(tmp_path):
    policy = lm(how="lora")
    q = OfflineProposal(policy, adapter=True).snapshot
    before = {k: v.clone() for k, v in all_tensors(policy.model).items() if PROPOSAL not in k}
    x = policy.sample(PROMPTS, 4, max_new_tokens=6, seed=0)
    policy.model.save_pretrained(tmp_path, selected_adapters=["default"])
    moved(policy)
    now = {k: v.clone() for k, v in all_tensors(policy.model).items() if PROPOSAL not in k}
    q.load(policy)
    close(q.log_prob(x), policy.log_prob(x).detach())
    assert (q.log_prob(x) - x.log_prob).abs().max() > 0.01
    q.load(tmp_path)
    assert (q.log_prob(x) - x.log_prob).abs().max() < 1e-4
    after = {k: v for k, v in all_tensors(policy.model).items() if PROPOSAL not in k}
    # neither load changes the policy or the base
    assert all(torch.equal(after[k], now[k]) for k in after)
    assert any(not torch.equal(before[k], now[k]) for k in now)


def other_rank():
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["c_attn", "c_proj"], r=3)
    return LanguageModel(peft.get_peft_model(build(), config), tok())


REFUSED = {
    "another size": (lm, lambda: lm("llama"), RuntimeError, "do not fit: the source lacks"),
    "an adapter into none": (lm, lambda: lm(how="lora"), RuntimeError, "do not fit: the source lacks"),
    "none into an adapter": (lambda: lm(how="lora"), lm, RuntimeError, "do not fit: the source lacks"),
    "another rank": (lambda: lm(how="lora"), other_rank, RuntimeError, r"is \(3, 16\) in the source, and \(8, 16\)"),
    "no folder": (lm, lambda: "no/such/folder", FileNotFoundError, "there is no folder 'no/such/folder'"),
    "no model": (lm, lambda: 5, TypeError, "a LanguageModel, its module or a folder, got a int"),
    "the base": (lambda: lm(how="lora").base(), lm, TypeError, "the base, without an adapter"),
    "a view of another": (view, lambda: lm(how="lora"), TypeError, "is another model, whose base may be another"),
    "a mixture": (SAMPLERS["Mixture"], lm, TypeError, "a Mixture has no parameters of its own"),
    "prompted": (SAMPLERS["Prompted"], lambda: lm("llama"), RuntimeError, "do not fit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_loaded_leaves_the_sampler(case):
    make, source, error, match = REFUSED[case]
    sampler = make()
    x = sampler.sample(["w3"], 6, max_new_tokens=4, seed=0)
    with pytest.raises(error, match=match):
        sampler.load(source())
    assert same(x, sampler.sample(["w3"], 6, max_new_tokens=4, seed=0))


@pytest.mark.parametrize("how", ["", "lora"])
def test_a_model_is_not_loaded_from_itself(how):
    policy = lm(how=how)
    for source in (policy, policy.model, policy.around(torch.compile(policy.model))):
        with pytest.raises(ValueError, match="from its own module"):
            policy.load(source)


def test_a_prompted_model_loads_and_stays_prompted():
    policy = moved(lm())
    sampler = Prompted(lm(), "w1 w2")
    sampler.load(policy)
    wanted = Prompted(policy, "w1 w2").sample(None, 6, max_new_tokens=5, seed=0)
    assert same(wanted, sampler.sample(None, 6, max_new_tokens=5, seed=0))
    assert sampler.prompt == "w1 w2"


def test_the_parts_of_a_mixture_draw_numbers_of_their_own():
    """With one seed, the parts of a mixture draw no sequence twice, and none that their model alone draws."""
    table = torch.full((V, V), -torch.inf)
    table[:, :4] = 0.0  # four words are equally likely and nothing ends a sequence, so there are 4^20 of them
    policy = LanguageModel(Table(table), tok())

    def rows(sampler, n, seed):
        return [tuple(row) for row in sampler.sample(n=n, max_new_tokens=20, seed=seed).tokens.tolist()]

    drawn = [row for seed in (5, 5 + 7919) for row in rows(Mixture([policy, policy]), 40, seed)]
    alone = rows(policy, 40, 5)
    assert len({*drawn, *alone}) == 120


@pytest.mark.parametrize("how", ["plain", "explicit"])
def test_from_pretrained(how, tmp_path):
    policy = lm()
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    if how == "plain":
        loaded = LanguageModel.from_pretrained(tmp_path)
        assert loaded.eos_token_ids == policy.eos_token_ids
        x = policy.sample(PROMPTS, 3, max_new_tokens=5, seed=0)
        assert same(x, loaded.sample(PROMPTS, 3, max_new_tokens=5, seed=0))
    else:
        loaded = LanguageModel.from_pretrained(
            str(tmp_path), dtype=torch.float64, device="cpu", eos_token_id=[2, 3], local_files_only=True,
            attn_implementation="eager",
        )  # fmt: skip
        assert loaded.eos_token_ids == [2, 3]
        assert next(loaded.model.parameters()).dtype == torch.float64
        assert loaded.model.config._attn_implementation == "eager"


def test_the_model_that_ships_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # a folder of this name must not hide it
    (tmp_path / "tiny-bios").mkdir()
    policy = LanguageModel.from_pretrained("tiny-bios")
    assert "born" in " ".join(policy.sample(n=16, max_new_tokens=24, seed=0).text)


# --- an offline proposal whose sequences another engine draws -----------------------------------------------------


class Engine:
    """Be a sampler with parameters of its own, which counts what it is asked and may fail to load."""

    def __init__(self, name="gpt2", how=""):
        self.model, self.version, self.loaded, self.fails = moved(lm(name, how=how), seed=9), 0, [], False

    def sample(self, prompts=None, n=1, **options):
        self.model.version = self.version
        return self.model.sample(prompts, n, **options)

    def log_prob(self, samples, *, batch_size=None):
        return self.model.log_prob(samples, batch_size=batch_size)

    def load(self, source):
        self.loaded.append(source)
        if self.fails:
            raise OSError("the engine is gone")
        self.model.load(source)


def draw(sampler, seed=0):
    return sampler.sample(PROMPTS, 4, max_new_tokens=6, seed=seed)


def step_of(proposal):
    x = draw(proposal)
    with torch.no_grad():
        return proposal.policy.loss(x, log_target=x.log_prob + 0.1, log_proposal=x.log_prob, log_z=0.0)


WAYS = [("", {}), ("lora", {}), ("lora", {"adapter": True})]


@pytest.mark.parametrize(("how", "options"), WAYS, ids=["model", "lora", "adapter"])
def test_an_engine_holds_q_from_the_start_and_from_each_swap(how, options):
    policy, engine = lm(how=how), Engine(how=how)
    proposal = OfflineProposal(policy, interval=1, sampler=engine, **options)
    assert proposal.sampler is engine and engine.loaded == [policy]
    x = draw(proposal)
    assert same(x, draw(policy)) and x.version.tolist() == [0] * len(x)
    for version in (1, 2):
        moved(policy, seed=version)
        assert same(x, draw(proposal))  # pi moves, q does not
        proposal.swap()
        assert engine.loaded == [policy] * (1 + version)
        x = draw(proposal)
        close(x.log_prob, policy.log_prob(x).detach())
        # the snapshot has q's parameters, too, and gives the same
        close(x.log_prob, proposal.snapshot.log_prob(x).detach())
        assert proposal.version == engine.version == version and x.version.tolist() == [version] * len(x)


@pytest.mark.parametrize(("how", "options"), WAYS, ids=["model", "lora", "adapter"])
def test_an_engine_that_was_started_anew_gets_q_and_never_pi(how, options):
    policy = lm(how=how)
    proposal = OfflineProposal(policy, interval=1, sampler=Engine(how=how), **options)
    proposal.swap()
    moved(policy)
    proposal.swap()
    x = draw(proposal)
    moved(policy, seed=1)
    buffer = io.BytesIO()
    torch.save(proposal.state_dict(), buffer)
    buffer.seek(0)

    engine, resumed = Engine(how=how), moved(moved(lm(how=how)), seed=1)
    close(resumed.log_prob(x).detach(), policy.log_prob(x).detach())
    again = OfflineProposal(resumed, interval=1, sampler=engine, **options)
    assert not same(x, draw(again))
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert again.version == engine.version == 2
    assert same(x, draw(again)) and (draw(again).version == 2).all()
    assert (resumed.log_prob(x) - x.log_prob).abs().max() > 0.01


@pytest.mark.parametrize(("how", "options"), WAYS, ids=["model", "lora", "adapter"])
def test_an_engine_that_can_t_load_leaves_all_as_it_was(how, options):
    policy, engine = lm(how=how), Engine(how=how)
    proposal = OfflineProposal(policy, "interval", interval=1, sampler=engine, **options)
    moved(policy)
    other = OfflineProposal(lm(how=how), interval=1)
    other.swap()
    proposal.update(step_of(proposal))

    def everything():
        state = proposal.state_dict()
        tensors = [*state.pop("model").values(), *(each for each in state.pop("running")["steps"])]
        return state, tensors, (engine.version, proposal.version), draw(proposal), proposal.snapshot.log_prob(x)

    x = draw(proposal)
    state, tensors, versions, drawn, log_q = everything()
    engine.fails = True
    attempts = [proposal.swap, proposal.maybe_update]
    if not options:
        attempts.append(lambda: proposal.load_state_dict(moved_state))
        moved_state = other.state_dict()
        moved_state["model"] = {k: v + 1 for k, v in moved_state["model"].items()}
    for attempt in attempts:
        with pytest.raises(OSError, match="the engine is gone"):
            attempt()
        state_now, tensors_now, *now = everything()
        assert state_now == state and now[0] == versions == (0, 0)
        assert len(tensors_now) == len(tensors) and all(map(torch.equal, tensors_now, tensors))
        assert same(now[1], drawn) and torch.equal(now[2], log_q)
    engine.fails = False
    assert proposal.maybe_update() and proposal.version == engine.version == 1


def test_a_proposal_of_another_structure_does_not_reach_the_engine():
    policy, engine = lm(), Engine()
    proposal = OfflineProposal(policy, interval=1, sampler=engine)
    policy.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"the policy's parameters are not those.*extra.*q was not replaced"):
        proposal.swap()
    assert len(engine.loaded) == 1 and proposal.version == engine.version == 0


def test_a_sampler_that_is_none_or_moves_with_the_policy():
    policy = lm()
    with pytest.raises(TypeError, match=r"sampler must have what .* lists .*got a GPT2LMHeadModel"):
        OfflineProposal(policy, sampler=policy.model)
    with pytest.raises(ValueError, match="from its own module"):
        OfflineProposal(policy, sampler=policy)
    with pytest.raises(TypeError, match="a Mixture has no parameters"):
        OfflineProposal(policy, sampler=Mixture([lm()]))


def test_a_language_model_or_an_adapter_view_is_an_engine_as_it_is():
    policy, sampler = lm(), lm("gpt2 eager attention")
    proposal = OfflineProposal(policy, interval=1, sampler=sampler)
    moved(policy)
    proposal.swap()
    x = draw(proposal)
    close(x.log_prob, policy.log_prob(x).detach())
    assert (x.version == 1).all()


@pytest.mark.parametrize("adapter", [False, True])
def test_the_snapshot_says_the_version_too(adapter):
    policy = lm(how="lora")
    proposal = OfflineProposal(policy, interval=1, adapter=adapter)
    assert isinstance(proposal.snapshot, AdapterView) == adapter
    before = proposal.state_dict()
    for version in range(3):
        assert proposal.version == version
        for drawn in (draw(proposal), draw(proposal.snapshot)):
            assert drawn.version.tolist() == [version] * len(drawn)
        proposal.swap()
    assert (draw(policy).version == 0).all()
    fresh = OfflineProposal(lm(how="lora"), interval=1, adapter=adapter)
    fresh.load_state_dict(proposal.state_dict())
    assert fresh.version == 3 and (draw(fresh).version == 3).all()
    proposal.load_state_dict(before)
    assert proposal.version == 0 and (draw(proposal.snapshot).version == 0).all()
