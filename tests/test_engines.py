"""Test samplers around an engine, against a stand-in that answers as vLLM's server does (``engine_stand_in.py``).

The engine draws q, and log q is the engine's own. A load is whole or refused. What can go wrong with a server is found
before a run, is retried within bounds, or ends a run with a checkpoint from which nothing is lost. ``make vllm`` runs
the same tests on the real vLLM.
"""

from __future__ import annotations

import dataclasses
import http.client
import inspect
import json
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_stand_in import EXCHANGES, Refused, StandIn
from test_models import EOS, PAD, PROMPTS, V, check_layout, ids_of, lm, tok
from test_sampling import moved
from trainer_job import digest, job
from trainer_tools import (
    one_thread,  # noqa: F401
)
from transformers import GPT2Config, GPT2LMHeadModel

import dmfast
from dmfast import LanguageModel, OfflineProposal, cli
from dmfast.sampling import (
    AsyncSampler,
    EngineError,
    HTTPSampler,
    Sampler,
    VLLMSampler,
    check_options,
    serve,
    vllm_worker,
    weights,
)
from dmfast.training import checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*past_key_values", "ignore:fan_in_fan_out", "ignore:.*gives no checksums"
)
QUICK = {"patience": 0.0, "retries": 1, "timeout": 20.0}


@pytest.fixture
def server():
    with StandIn(lm().model, tok()) as server:
        yield server


def connected(server, policy=None, **options):
    return HTTPSampler(server.url, lm() if policy is None else policy, **(QUICK | options))


def loaded(server, policy, **options):
    sampler = connected(server, policy, **options)
    sampler.load(policy)
    return sampler


# ---- what it draws


@pytest.mark.parametrize("kind", [HTTPSampler, VLLMSampler])
@pytest.mark.parametrize("method", ["sample", "log_prob", "load"])
def test_engines_take_what_the_protocol_says(kind, method):
    asked, given = (inspect.signature(getattr(each, method)).parameters for each in (Sampler, kind))
    assert [(p.name, p.kind, p.default) for p in given.values()] == [
        (p.name, p.kind, p.default) for p in asked.values()
    ]


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_what_is_drawn_is_q_with_its_log_probability(server, temperature):
    policy = moved(lm())
    sampler = loaded(server, policy)
    assert isinstance(sampler, Sampler)
    sampler.version = 3
    x = sampler.sample(PROMPTS, 5, max_new_tokens=6, seed=1, temperature=temperature)
    check_layout(x, ids_of(PROMPTS, "own pad"), 5, 6, PAD)
    assert x.version.tolist() == [3] * 20 and x.temperature == temperature
    assert x.eos_token_ids == tuple(policy.eos_token_ids)
    assert (x.log_prob - policy.log_prob(x)).abs().max() < 1e-4
    # The scores are not those of the weights that the server was started with.
    assert (x.log_prob - lm().log_prob(x)).abs().max() > 0.01
    ended = (x.tokens == EOS) & x.score_mask
    assert 0 < int(ended.any(1).sum()) < len(x)
    if temperature == 1.0:
        assert (sampler.log_prob(x) - x.log_prob).abs().max() < 1e-4
        among = x.score_mask & (torch.arange(x.tokens.shape[1]) % 2 == 0)  # every other token is context here
        context = dataclasses.replace(x, score_mask=among)
        assert (sampler.log_prob(context) - policy.log_prob(context)).abs().max() < 1e-4
    else:
        with pytest.raises(ValueError, match="scores sequences at temperature 1 only"):
            sampler.log_prob(x)


def test_a_sequence_is_a_function_of_the_seed_and_its_place(server):
    sampler = loaded(server, lm())
    x = sampler.sample(PROMPTS, 4, max_new_tokens=8, seed=1)
    again, other = (sampler.sample(PROMPTS, 4, max_new_tokens=8, seed=seed) for seed in (1, 2))
    assert torch.equal(x.tokens, again.tokens) and torch.equal(x.log_prob, again.log_prob)
    assert not torch.equal(x.log_prob, other.log_prob)
    share = sampler.sample(PROMPTS[2:], 4, max_new_tokens=8, seed=1, first_row=8)
    assert torch.equal(share.log_prob, x.log_prob[8:])
    seeds = [body["seed"] + i for path, body in server.asked if "completions" in path and "seed" in body
             for i in range(body["n"])][-32:]  # fmt: skip
    assert len(set(seeds[:16])) == 16  # prompts of a step share no random numbers
    torch.manual_seed(0)
    drawn = [sampler.sample(None, 3, max_new_tokens=8).log_prob for _ in range(2)]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("ends", [[EOS], [EOS, 2, 3], [4]])
def test_a_sequence_ends_where_dmfast_ends_it(server, ends):
    """Only dmfast's EOS tokens end a sequence. With [4] the server's own EOS is not one of them."""
    policy = LanguageModel(lm().model, tok(), eos_token_id=ends)
    x = loaded(server, policy).sample(["w1"], 40, max_new_tokens=6, seed=0)
    check_layout(x, [[1]], 40, 6, PAD, eos=tuple(ends))
    assert all(body["ignore_eos"] for path, body in server.asked if "completions" in path and "logprobs" in body)


def test_long_requests_are_cut_and_draw_the_same(server, monkeypatch):
    sampler = loaded(server, lm())
    x = sampler.sample(["w1", "w2 w3"], 5, max_new_tokens=3, seed=4)
    monkeypatch.setattr("dmfast.sampling.engine._AT_ONCE", 2)
    assert torch.equal(sampler.sample(["w1", "w2 w3"], 5, max_new_tokens=3, seed=4).tokens, x.tokens)
    assert max(body["n"] for path, body in server.asked[-8:] if "completions" in path) == 2


def test_several_threads_draw_what_one_does(server):
    sampler = loaded(server, lm())
    wanted = [sampler.sample(PROMPTS, 2, max_new_tokens=4, seed=seed) for seed in range(4)]
    found = {}

    def draw(seed):
        found[seed] = sampler.sample(PROMPTS, 2, max_new_tokens=4, seed=seed)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed].log_prob, wanted[seed].log_prob) for seed in range(4))


def test_a_load_waits_for_what_is_being_drawn(server):
    """No batch mixes two versions of q, whatever the threads do."""
    policy = lm()
    sampler = loaded(server, policy)
    x = sampler.sample(["w1"], 30, max_new_tokens=6, seed=0)
    drawn, server.faults.slow = [], 0.1
    thread = threading.Thread(target=lambda: drawn.append(sampler.sample(["w1"], 30, max_new_tokens=6, seed=0)))
    thread.start()
    while not server.faults.slow or server.asked[-1][0] != "/v1/completions":
        pass
    server.faults.slow = 0.0
    sampler.load(moved(policy))
    thread.join()
    assert torch.equal(drawn[0].log_prob, x.log_prob)
    assert (sampler.sample(["w1"], 30, max_new_tokens=6, seed=0).log_prob - x.log_prob).abs().max() > 0.01


def shape(value):
    """Return the names and kinds of values in an answer; of a list those of its first value that is not None."""
    if isinstance(value, dict):
        words = [key for key in value if not any(c.isdigit() for c in key) and "." not in key]
        return {key: shape(value[key]) for key in words} or {"names": shape(next(iter(value.values())))}
    if isinstance(value, list):
        return [shape(next((each for each in value if each is not None), None))]
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def alike(mine, theirs):
    """Return whether two shapes are the same. What has a value in only one of them may be anything."""
    if "NoneType" in (mine, theirs):
        return True
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(alike(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list) and isinstance(theirs, list):
        return alike(mine[0], theirs[0])
    return mine == theirs


@pytest.mark.parametrize("name", EXCHANGES)
def test_the_stand_in_answers_as_vllm_did(server, name):
    recorded = json.loads((Path(__file__).parent / "vllm_answers.json").read_text())["answers"][name]
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]))
    method, path, body = EXCHANGES[name]
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    found = {"status": answer.status, "answer": json.loads(answer.read() or b"null")}
    connection.close()
    assert found["status"] == recorded["status"]
    assert alike(shape(found["answer"]), shape(recorded["answer"]))


def test_what_is_read_of_the_server_s_options_is_what_vllm_told(server):
    recorded = json.loads((Path(__file__).parent / "vllm_answers.json").read_text())["server_info"]
    told = server._server_info(None)["vllm_config"]
    assert told.keys() <= set(recorded["vllm_config"])
    for part in ("model_config", "device_config", "scheduler_config"):
        assert told[part].keys() <= set(recorded[part])


def test_a_large_q_is_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD", "4KB")
    weights.write(lm().model, tmp_path / "q")
    assert len(list((tmp_path / "q").glob("model-*.safetensors"))) > 1
    again = type(lm().model).from_pretrained(tmp_path / "q").state_dict()
    assert all(torch.equal(again[name], value) for name, value in lm().model.state_dict().items())


# ---- what is compared at the start

LONG = {"n_positions": 48}


def other_words():
    words = tok()
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = sorted(words.get_vocab(), reverse=True)
    other = Tokenizer(models.WordLevel({word: i for i, word in enumerate(named)}, unk_token="w0"))
    other.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<e>", pad_token="<p>", bos_token="<s>")


def larger():
    model = lm().model
    model.resize_token_embeddings(V + 3)
    return model


def of_sizes(**sizes):
    """Return a model like the policy's of other sizes."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**(lm().model.config.to_dict() | sizes)))


#: Models of other sizes: what makes them, what the comparison of sizes says, and what the first load says without it.
OTHER_SIZES = {
    "one layer more": (
        {"n_layer": 3},
        "another model than the policy: num_hidden_layers 3, and the policy's is 2",
        "of its 40 tensors, .* or it serves another model",
    ),
    "one layer less": (
        {"n_layer": 1},
        "num_hidden_layers 1, and the policy's is 2",
        "did not take its first weights, as where it serves another model than the policy",
    ),
    "wider": (
        {"n_embd": 32},
        "hidden_size 32, and the policy's is 16",
        "did not take its first weights, as where it serves another model than the policy",
    ),
}

UNFIT = {
    "another tokenizer": ({"tokenizer": other_words}, "has another tokenizer than the policy"),
    "a larger vocabulary": ({"model": larger}, rf"another vocabulary than the policy: it takes token {V}"),
    "a longer context": ({"context": 48}, "takes 48 tokens of context and the policy 24"),
    "top-p": ({"config": {"override_generation_config": {"top_p": 0.9}}}, "was started with {'top_p': 0.9}"),
    "top-k": ({"config": {"override_generation_config": {"top_k": 20}}}, "was started with {'top_k': 20}"),
    "a logits processor": ({"config": {"logits_processors": ["mine"]}}, "was started with {'logits_processors'"),
    "prompts in parts": (
        {"config": {"scheduler_config": {"enable_chunked_prefill": True}}}, "start it with --no-enable-chunked-prefill"
    ),
    "quantised": ({"config": {"quantization": "fp8"}}, "was started with {'quantization': 'fp8'}"),
    "logits": ({"config": {"logprobs_mode": "raw_logits"}}, "--logprobs-mode raw_logits"),
    "repetition": ({"config": {"override_generation_config": {"repetition_penalty": 2}}}, "{'repetition_penalty': 2}"),
    "presence": ({"config": {"override_generation_config": {"presence_penalty": 1}}}, "{'presence_penalty': 1}"),
    "speculative": ({"config": {"speculative_config": {"method": "ngram"}}}, "with {'speculative_config': {'method'"),
    "another kind of model": ({"model": lambda: lm("llama").model}, "model_type llama, and the policy's is gpt2"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_an_engine_that_does_not_fit_is_refused_when_it_is_connected(case):
    options, match = UNFIT[case]
    options = {key: value() if callable(value) else value for key, value in options.items()}
    with (
        StandIn(options.pop("model", None) or lm().model, options.pop("tokenizer", None) or tok(), **options) as server,
        pytest.raises(ValueError, match=match),
    ):
        connected(server)


@pytest.mark.parametrize("case", OTHER_SIZES)
def test_an_engine_with_a_model_of_other_sizes_is_refused(case):
    sizes, at_start, at_load = OTHER_SIZES[case]
    with StandIn(of_sizes(**sizes), tok()) as server:
        with pytest.raises(ValueError, match=at_start):
            connected(server)
        server.sums = False  # without dmfast's extension of its workers a server says nothing of its model
        sampler = connected(server)
        with pytest.raises(EngineError, match=at_load):
            sampler.load(lm())
        assert sampler._tag is None


def test_a_server_without_its_development_endpoints_is_refused(server):
    for path in ("/server_info", "/weight_info"):
        server.faults.missing = {path}
        with pytest.raises(ValueError, match=r"has no /server_info and /weight_info.*VLLM_SERVER_DEV_MODE=1"):
            connected(server)
    server.faults.missing = {"/tokenize"}  # a server needs no tokenizer, because only token ids go in and out
    connected(server)


def test_an_address_without_an_engine(server):
    with pytest.raises(EngineError, match=r"there is no engine at http://127.0.0.1:9 .*dmfast serve-proposal"):
        HTTPSampler("http://127.0.0.1:9", lm())
    with pytest.raises(ValueError, match="model= must name one of them, got 'mine'"):
        connected(server, model="mine")


def test_an_engine_with_a_shorter_context_draws_what_fits():
    with StandIn(lm().model, tok(), context=8) as server:
        sampler = loaded(server, lm())
        assert sampler.context == 8
        sampler.check(max_new_tokens=6, temperature=1.0, prompts=["w1 w2"])
        for call in (sampler.check, sampler.sample):
            with pytest.raises(ValueError, match="prompt has 3 tokens; with max_new_tokens=6 that is beyond"):
                call(max_new_tokens=6, temperature=1.0, prompts=["w1", "w1 w2 w3"])


def test_an_engine_that_knows_temperature_1_only_refuses_others():
    with StandIn(lm().model, tok(), config={"logprobs_mode": "raw_logprobs"}) as server:
        sampler = loaded(server, lm())
        sampler.sample(["w1"], 2, max_new_tokens=2)
        with pytest.raises(ValueError, match=r"at temperature 1 only, and the temperature is 0\.7"):
            sampler.sample(["w1"], 2, max_new_tokens=2, temperature=0.7)


BAD_OPTIONS = {
    "no such sampler": ("vlm", None, "sampler must be 'model', 'vllm' or the address of a vLLM server"),
    "no address": ("http://", None, "must be http://host:port"),
    "no port": ("http://host:port", None, "must be http://host:port"),
    "an unknown option": (
        "http://h:1",
        {"time": 3},
        "has time, which sampler=.* does not take; it takes folder",
    ),
    "options of none": ("model", {"timeout": 3}, "sampler='model' has no options"),
    "no mapping": ("vllm", [1], "must be a mapping"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_is_reached(case):
    sampler, options, match = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=match):
        check_options(sampler, options)
    with pytest.raises(ValueError, match=match):
        dmfast.DMConfig("out", use_cpu=True, sampler=sampler, sampler_options=options)


def test_a_key_is_sent_from_an_option_or_a_variable(server, monkeypatch):
    assert "Authorization" not in connected(server)._server._headers
    monkeypatch.setenv("DMFAST_ENGINE_KEY", "from a variable")
    assert connected(server)._server._headers["Authorization"] == "Bearer from a variable"
    assert connected(server, api_key="mine")._server._headers["Authorization"] == "Bearer mine"


def test_numbers_out_of_range_are_refused(server):
    for name, value, match in (
        ("timeout", -1, "a number of seconds, above 0, got -1"), ("timeout", 0, "a number of seconds, above 0, got 0"),
        ("patience", -1, "a number of seconds, 0 or more, got -1"),
        ("retries", -1, "a number of times, 0 or more, got -1"), ("retries", "2", "a number of times, .* got '2'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be {match}"):
            connected(server, **{name: value})
    with pytest.raises(ValueError, match="concurrency must be an integer, 1 or more"):
        connected(server, concurrency=0)
    sampler = loaded(server, lm())
    for name, value, match in (
        ("n", 0, "an integer, 1 or more"), ("max_new_tokens", -1, "an integer, 1 or more"), ("n", 2.0, "an integer"),
        ("temperature", 0.0, "a number, positive and finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be {match}"):
            sampler.sample(["w1"], **({"n": 1, "max_new_tokens": 2} | {name: value}))


def test_what_is_not_handed_over_is_refused(server, tmp_path):
    sampler = connected(server)
    lm(how="lora").model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter alone"):
        sampler.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder 'no/such'"):
        sampler.load("no/such")
    with pytest.raises(TypeError, match="a LanguageModel, its module or a folder, got a int"):
        sampler.load(5)
    with pytest.raises(RuntimeError, match="holds no q yet"):
        sampler.sample(["w1"], 1, max_new_tokens=1)


# ---- loads


@pytest.mark.parametrize("source", ["policy", "module", "folder"])
def test_an_engine_becomes_what_it_is_loaded_from(server, source, tmp_path):
    policy = moved(lm())
    weights.write(policy.model, tmp_path / "saved")
    sampler = connected(server)
    sampler.load({"policy": policy, "module": policy.model, "folder": tmp_path / "saved"}[source])
    x = sampler.sample(PROMPTS, 3, max_new_tokens=5, seed=0)
    assert (x.log_prob - policy.log_prob(x)).abs().max() < 1e-4
    assert not server.paused


def test_an_adapter_that_is_another_model_once_it_is_merged_is_refused(server):
    """The adapter is on the embedding, which is the head too."""
    policy = lm(how="lora, embedding too")
    with pytest.raises(ValueError, match="merged into its base the adapter gives other log-probabilities"):
        connected(server, policy).load(policy)


@pytest.mark.parametrize("adapter", [False, True], ids=["copy", "adapter"])
def test_an_adapter_arrives_merged(server, adapter):
    """The engine gets pi at a swap, and q from a second adapter if a state is loaded. The policy stays as it is."""
    policy = moved(lm(how="lora"))
    proposal = OfflineProposal(policy, interval=1, adapter=adapter, sampler=connected(server, policy))
    x = proposal.sample(PROMPTS, 4, max_new_tokens=5, seed=0)
    with torch.no_grad():
        assert (x.log_prob - policy.log_prob(x)).abs().max() < 1e-4
        assert (x.log_prob - policy.base().log_prob(x)).abs().max() > 0.01
    state = proposal.state_dict()
    before = digest(moved(policy, seed=1).model)
    proposal.load_state_dict(state)
    assert torch.equal(proposal.sample(PROMPTS, 4, max_new_tokens=5, seed=0).log_prob, x.log_prob)
    proposal.swap()
    y = proposal.sample(PROMPTS, 4, max_new_tokens=5, seed=0)
    with torch.no_grad():
        assert (y.log_prob - policy.log_prob(y)).abs().max() < 1e-4
    assert adapter or digest(policy.model) == before


# ---- adapters alone


@pytest.fixture
def adapting():
    """Return a server that takes adapters of rank 8 or less."""
    with StandIn(lm().model, tok(), rank=8) as server:
        yield server


def adapted(**config):
    """Return a policy with an adapter that has moved and whose scale is not 1."""
    import peft

    config = {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} | config
    torch.manual_seed(1)
    return moved(LanguageModel(peft.get_peft_model(lm().model, peft.LoraConfig(**config)), tok()))


@pytest.mark.parametrize("adapter", [False, True], ids=["copy", "one backbone"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "r": 8}], ids=["lora", "rslora"])
def test_an_engine_that_takes_adapters_gets_nothing_else(adapting, adapter, config, tmp_path):
    policy = adapted(**config)
    sampler = connected(adapting, policy, folder=tmp_path)
    proposal = OfflineProposal(policy, interval=1, adapter=adapter, sampler=sampler)
    x = proposal.sample(PROMPTS, 4, max_new_tokens=5, seed=0)
    with torch.no_grad():
        assert (x.log_prob - policy.log_prob(x)).abs().max() < 1e-4
        assert (x.log_prob - policy.base().log_prob(x)).abs().max() > 0.01
    state = proposal.state_dict()
    moved(policy, seed=1)
    proposal.load_state_dict(state)
    assert torch.equal(proposal.sample(PROMPTS, 4, max_new_tokens=5, seed=0).log_prob, x.log_prob)
    proposal.swap()
    y = proposal.sample(PROMPTS, 4, max_new_tokens=5, seed=0)
    with torch.no_grad():
        assert (y.log_prob - policy.log_prob(y)).abs().max() < 1e-4 < (y.log_prob - x.log_prob).abs().max()
    assert adapting.loads == 0 and sampler._comparable and len(adapting.adapters) == 1
    (folder,) = tmp_path.iterdir()
    assert {each.name for each in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_policy_without_an_adapter_arrives_whole_where_adapters_are_taken(adapting):
    policy = moved(lm())
    x = loaded(adapting, policy).sample(PROMPTS, 3, max_new_tokens=5, seed=0)
    assert (x.log_prob - policy.log_prob(x)).abs().max() < 1e-4 and adapting.loads == 2


@pytest.mark.parametrize("sums", [True, False], ids=["with checksums", "by scores"])
@pytest.mark.parametrize("stale", ["lora_A", "lora_B", "h.0.", "c_proj"])
def test_a_half_load_of_an_adapter_is_found_at_the_start(adapting, stale, sums):
    adapting.sums, adapting.faults.stale = sums, (stale,)
    policy = adapted()
    with pytest.raises(EngineError, match="a copy that differs in every parameter"):
        connected(adapting, policy).load(policy)


def test_a_swap_that_loads_a_part_of_an_adapter_is_found_however_small_the_move(adapting):
    policy = adapted()
    sampler = loaded(adapting, policy)
    x = sampler.sample(["w1"], 10, max_new_tokens=5, seed=0)
    adapting.faults.stale = ("h.1.attn.c_attn.lora_B",)
    with pytest.raises(EngineError, match="does not take all parameters"):
        sampler.load(moved(policy, by=1e-6))
    adapting.faults.stale = ()
    # The engine still holds q.
    assert torch.equal(sampler.sample(["w1"], 10, max_new_tokens=5, seed=0).log_prob, x.log_prob)
    sampler.load(policy)


def test_an_adapter_on_another_base_is_refused(adapting):
    policy = adapted()
    other = policy.around(policy.model)
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(EngineError, match="serves another model than the base of the policy's adapter"):
        connected(adapting, other).load(other)
    assert not adapting.adapters


@pytest.mark.parametrize("when", ["before", "while"])
def test_an_adapter_that_a_restart_lost_is_given_again(adapting, when):
    policy = adapted()
    sampler = loaded(adapting, policy)
    x = sampler.sample(["w1"], 10, max_new_tokens=5, seed=0)
    answer, asked = adapting._v1_completions, []

    def restarting(body):
        asked.append(body)
        if len(asked) == 1:
            adapting.restart()
        return answer(body)

    if when == "before":
        adapting.restart()
    else:
        adapting._v1_completions = restarting
    with pytest.warns(UserWarning, match="given q again"):
        again = sampler.sample(["w1"], 10, max_new_tokens=5, seed=0)
    assert torch.equal(again.log_prob, x.log_prob) and adapting.loads == 0


def test_several_ranks_draw_from_one_adapter_that_rank_0_loads(adapting, tmp_path):
    policies = [adapted() for _ in range(2)]
    samplers = [connected(adapting, policy, folder=tmp_path) for policy in policies]
    assert together(samplers, lambda rank, sampler: sampler.load(policies[rank])) == [None, None]
    how = {"max_new_tokens": 6, "seed": 3}
    for rank, x in enumerate(together(samplers, lambda rank, sampler: sampler.sample(["w1"], 8, **how))):
        with torch.no_grad():
            assert (x.log_prob - policies[rank].log_prob(x)).abs().max() < 1e-4
    assert adapting.loads == 0 and len(adapting.adapters) == 1


UNFIT_ADAPTERS = {
    "rank": ({"r": 16}, "its rank is 16, and the engine takes at most 8"),
    "rank of a layer": ({"rank_pattern": {"c_proj": 12}}, "its rank is 12"),
    "dora": ({"use_dora": True}, "it has use_dora=True"),
    "bias": ({"bias": "lora_only"}, "it has bias='lora_only'"),
    "a module saved whole": ({"modules_to_save": ["ln_f"]}, "it has modules_to_save="),
    "another module": ({"target_modules": ["c_fc"]}, "c_fc, and the engine takes adapters on c_attn, c_proj alone"),
    "the embedding": ({"target_modules": ["wte", "c_attn"]}, "wte, and dmfast's checks need scores"),
}


@pytest.mark.parametrize("case", UNFIT_ADAPTERS)
def test_an_adapter_that_an_engine_can_not_take_is_refused_when_it_is_connected(adapting, case):
    config, match = UNFIT_ADAPTERS[case]
    with pytest.raises(ValueError, match=rf"{match}.*start it without --enable-lora"):
        connected(adapting, adapted(**config))


def test_a_server_that_can_not_change_its_adapters_is_refused(adapting):
    adapting.faults.missing = {"/v1/load_lora_adapter"}
    with pytest.raises(ValueError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        connected(adapting, adapted())
    connected(adapting, lm())  # a policy without an adapter does not need this
    adapting.faults.missing, adapting.lora["target_modules"] = set(), None
    with pytest.raises(ValueError, match="or with --lora-target-modules c_attn c_proj"):
        connected(adapting, adapted())
    adapting.lora["max_loras"] = 2
    with pytest.raises(ValueError, match="--max-loras 2"):
        connected(adapting, adapted())


def test_a_model_without_the_adapter_can_not_be_loaded(adapting):
    sampler = loaded(adapting, adapted())
    with pytest.raises(ValueError, match="the model to load has 0 active adapters"):
        sampler.load(lm())


def test_only_q_stays_on_disk(server, tmp_path):
    policy = lm()
    sampler = loaded(server, policy, folder=tmp_path)
    for seed in range(2):
        sampler.load(moved(policy, seed=seed))
        assert len(list(tmp_path.iterdir())) == 1
    again = LanguageModel(type(policy.model).from_pretrained(next(tmp_path.iterdir())), tok())
    x = policy.sample(PROMPTS, 3, max_new_tokens=5, seed=0)
    assert (again.log_prob(x) - x.log_prob).abs().max() < 1e-4


TENSORS = ["wte.weight", "wpe.weight", "h.0.ln_1.bias", "h.1.attn.c_attn.bias", "h.1.mlp.c_proj.weight", "ln_f.weight"]


@pytest.mark.parametrize("sums", [True, False], ids=["with checksums", "by scores"])
@pytest.mark.parametrize("stale", [("c_attn", "c_proj", "c_fc"), ("wte",)], ids=["linears", "embedding"])
def test_a_half_load_is_found_at_the_start(stale, sums):
    with StandIn(lm().model, tok(), sums=sums) as server:
        server.faults.stale = stale
        if not sums:
            server.faults.missing = {"/weight_checker"}
        with pytest.raises(EngineError, match=r"other log-prob|does not take all parameters.*stay as they were"):
            connected(server).load(lm())


@pytest.mark.parametrize("name", TENSORS)
def test_one_stale_tensor_is_found_at_the_start(server, name):
    server.faults.stale, server.faults.missing = (name,), set()
    with pytest.raises(EngineError, match=f"1 of its 28 tensors, .*{name}, stay as they were"):
        connected(server).load(lm())


@pytest.mark.parametrize("how", ["checksums", "digests"])
def test_a_swap_that_loads_a_part_is_found_however_small_the_move(how):
    """A tensor that differs by a millionth is found, although no score shows it."""
    policy = lm()
    with StandIn(lm().model, tok(), sums=how == "checksums") as server:
        sampler = loaded(server, policy)
        x = sampler.sample(PROMPTS, 3, max_new_tokens=5, seed=0)
        moved(policy, by=1e-6)
        server.faults.stale = ("h.1.mlp.c_fc.weight",)
        with pytest.raises(EngineError, match="does not take all parameters"):
            sampler.load(policy)
        # The engine still holds q.
        assert torch.equal(sampler.sample(PROMPTS, 3, max_new_tokens=5, seed=0).log_prob, x.log_prob)
        server.faults.stale = ()
        sampler.load(policy)
        drawn = sampler.sample(PROMPTS, 3, max_new_tokens=5, seed=0)
        assert (drawn.log_prob - policy.log_prob(drawn)).abs().max() < 1e-4


def test_a_swap_that_loads_a_part_is_found_by_scores_where_there_is_nothing_else():
    policy = lm()
    with StandIn(lm().model, tok(), sums=False) as server:
        server.faults.missing = {"/weight_checker"}
        with pytest.warns(UserWarning, match="gives no checksums .* compared by a few scores only"):
            sampler = loaded(server, policy)
        server.faults.stale = ("mlp", "attn")
        with pytest.raises(EngineError, match="gives 8 sequences other log-probabilities than the model"):
            sampler.load(moved(policy))


def test_tensors_that_an_engine_keeps_elsewhere_are_left_to_scores():
    """vLLM on a CPU does so with o_proj in bf16, whose parameter is empty."""
    policy = lm()
    with StandIn(lm().model, tok(), packed="c_proj") as server:
        with pytest.warns(UserWarning, match="gives no checksums that are the policy's"):
            sampler = loaded(server, policy)
        sampler.load(moved(policy, by=1e-6))
        server.faults.stale = ("c_fc",)
        with pytest.raises(EngineError, match="does not take all parameters"):
            sampler.load(moved(policy, by=1e-6))
        server.faults.stale = ("c_proj",)
        with pytest.raises(EngineError, match="other log-probabilities"):
            connected(server).load(policy)


def test_frozen_parameters_do_not_count_as_stale():
    """Without checksums, digests are compared, and a tensor that has not changed keeps its digest."""
    policy = lm()
    with StandIn(lm().model, tok(), sums=False) as server:
        with pytest.warns(UserWarning, match="compared by a few scores and by which tensors change"):
            sampler = loaded(server, policy)
        with torch.no_grad():
            policy.model.transformer.h[0].mlp.c_fc.weight.add_(0.01)
        sampler.load(policy)


def test_an_engine_that_truncates_is_refused(server):
    server.faults.truncates = True
    with pytest.raises(EngineError, match=r"other log-probabilities.*draws from another distribution \(truncated"):
        connected(server).load(lm())


def test_a_sum_of_bits_does_not_depend_on_layout():
    tensors = [torch.randn(3, 5, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    for tensor in tensors:
        whole = weights.checksum(tensor)
        assert whole == weights.checksum(tensor.T) == weights.checksum(tensor.flip(0))
        assert whole == weights.checksum(torch.cat([tensor, torch.zeros(2, 5, dtype=tensor.dtype)]))
        assert (weights.checksum(tensor[:1]) + weights.checksum(tensor[1:]) - whole) % 2**64 == 0
        other = tensor.clone()
        other[1, 2] *= 1 + 2 * torch.finfo(tensor.dtype).eps
        assert weights.checksum(other) != whole


def test_a_perturbed_copy_differs_in_every_parameter_in_16_bits_too():
    model = lm().model
    before = digest(model)
    other = weights.perturbed(model)
    assert digest(model) == before
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert float((a.bfloat16() != b.bfloat16()).double().mean()) > 0.8, name


# ---- a server that fails


def test_a_request_that_fails_is_made_again_with_the_same_result(server):
    sampler = loaded(server, lm(), retries=3)
    x = sampler.sample(PROMPTS, 2, max_new_tokens=4, seed=0)
    for name, value in (("broken", 1), ("aborts", 1), ("status", {"/v1/completions": [500, 503, None]})):
        setattr(server.faults, name, value)
        again = sampler.sample(PROMPTS, 2, max_new_tokens=4, seed=0)
        assert torch.equal(again.log_prob, x.log_prob)
        assert not getattr(server.faults, name) or name == "status"


def answers(*status):
    return lambda server: server.faults.status.update({"/v1/completions": list(status)})


GONE = {
    "dead engine": (answers(500), "failed 2 times in .*answered 500: the engine is dead"),
    "refused": (answers(400), "refused POST /v1/completions: it answered 400"),
    "timeout": (lambda server: setattr(server.faults, "slow", 0.4), "failed 2 times in .*[Tt]ime"),
    "broken": (lambda server: setattr(server.faults, "broken", 99), "failed 2 times in .*IncompleteRead"),
    "gone": (lambda server: server.__exit__(), "failed 2 times in .*refused"),
}


@pytest.mark.parametrize("case", GONE)
def test_a_server_that_fails_for_good_is_an_error_after_bounded_tries(case):
    harm, match = GONE[case]
    server = StandIn(lm().model, tok()).__enter__()
    sampler = loaded(server, lm())
    sampler._server._timeout = 0.2 if case == "timeout" else 20.0
    harm(server)
    with pytest.raises(EngineError, match=match):
        sampler.sample(["w1"], 1, max_new_tokens=1)
    if case != "gone":
        server.__exit__()


def test_a_server_that_comes_back_in_time_is_waited_for():
    server = StandIn(lm().model, tok()).__enter__()
    policy = moved(lm())
    sampler = loaded(server, policy, patience=20.0)
    x = sampler.sample(PROMPTS, 2, max_new_tokens=4, seed=0)
    server.__exit__()
    server.restart()  # the server now holds the weights that it was started with
    threading.Timer(0.3, server.__enter__).start()
    with pytest.warns(UserWarning, match="held other weights than q's, as after a restart; it was given q again"):
        again = sampler.sample(PROMPTS, 2, max_new_tokens=4, seed=0)
    server.__exit__()
    assert torch.equal(again.log_prob, x.log_prob)


def test_a_restart_while_it_draws_is_found(server):
    policy = moved(lm())
    sampler = loaded(server, policy)
    x = sampler.sample(["w1"], 20, max_new_tokens=6, seed=0)
    answer, times = server._v1_completions, []

    def restarting(body):
        if not times:
            server.restart()
        times.extend([1] if "seed" in body else [])  # other requests check the server anew
        return answer(body)

    server._v1_completions = restarting
    with pytest.warns(UserWarning, match="given q again"):
        again = sampler.sample(["w1"], 20, max_new_tokens=6, seed=0)
    assert len(times) == 2 and torch.equal(again.log_prob, x.log_prob)
    server._v1_completions = lambda body: (server.restart(), answer(body))[1]
    again = pytest.warns(UserWarning, match="given q again")
    with again, pytest.raises(EngineError, match="lost the weights of q 3 times while it drew"):
        sampler.sample(["w1"], 20, max_new_tokens=6, seed=0)


def test_weights_that_are_given_back_in_part_are_no_q(server):
    sampler = loaded(server, moved(lm()))
    server.restart()
    server.faults.stale = ("ln_f",)
    with pytest.raises(EngineError, match="was given q again, and did not take all of its parameters"):
        sampler.sample(["w1"], 1, max_new_tokens=1)
    server.faults.stale = ()
    with pytest.warns(UserWarning, match="given q again"):
        sampler.sample(["w1"], 1, max_new_tokens=1)


OTHERWISE = {
    "top-k": ({"override_generation_config": {"top_k": 20}}, "no longer fits the policy: .* with {'top_k': 20}"),
    "raw": ({"logprobs_mode": "raw_logprobs"}, r"with other options \(any_temperature was True and is False\)"),
    "dtype": ({"dtype": "torch.bfloat16"}, r"\(dtype was torch.float32 and is torch.bfloat16\)"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_a_server_that_is_started_anew_with_other_options_gets_no_q(server, case):
    policy = moved(lm())
    sampler, (config, match), right = loaded(server, policy), OTHERWISE[case], server.config
    x = sampler.sample(["w1"], 4, max_new_tokens=4, seed=0)
    server.restart()
    server.config, loads = right | config, server.loads
    for call in (lambda: sampler.sample(["w1"], 1, max_new_tokens=1), lambda: sampler.load(policy)):
        with pytest.raises(EngineError, match=f"was started anew.*{match}"):
            call()
    assert server.loads == loads and sampler.facts.dtype == torch.float32
    server.config = right
    with pytest.warns(UserWarning, match="given q again"):
        assert torch.equal(sampler.sample(["w1"], 4, max_new_tokens=4, seed=0).log_prob, x.log_prob)


def test_another_server_at_the_address_gets_no_q(server):
    sampler = loaded(server, lm())
    server.restart()
    server.tokenizer = other_words()
    with pytest.raises(EngineError, match=r"was started anew.* has another tokenizer than the policy"):
        sampler.sample(["w1"], 1, max_new_tokens=1)


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"])
def test_a_load_that_fails_leaves_q(server, path):
    policy = lm()
    sampler = loaded(server, policy)
    x = sampler.sample(PROMPTS, 2, max_new_tokens=4, seed=0)
    server.faults.status[path] = [500]
    with pytest.raises(EngineError, match=path):
        sampler.load(moved(policy))
    server.faults.status.clear()
    # The version is changed first, and if that fails, no weight was touched yet.
    spoiled = path != "/update_weight_version"
    with pytest.warns(UserWarning, match="given q again") if spoiled else nullcontext():
        again = sampler.sample(PROMPTS, 2, max_new_tokens=4, seed=0)
    assert torch.equal(again.log_prob, x.log_prob) and not server.paused


def test_tokens_that_end_elsewhere_are_an_error(server):
    sampler = loaded(server, lm())
    answer = server._v1_completions
    server._v1_completions = lambda body: answer(body | {"max_tokens": 2})
    with pytest.raises(EngineError, match=r"gave . tokens .* something else ends it"):
        sampler.sample(["w1"], 30, max_new_tokens=6, seed=0)


# ---- several ranks


class Threads:
    """Stand for the ranks of a group, as threads that meet at every gather."""

    def __init__(self, rank, meeting, given):
        self.rank, self.size, self._meeting, self._given = rank, len(given), meeting, given

    def gather(self, values):
        self._given[self.rank] = values
        self._meeting.wait(60)
        found = torch.cat(self._given)
        self._meeting.wait(60)
        return found

    def agree(self, mine):
        return bool(self.gather(torch.tensor([mine]))[0])


def together(samplers, call):
    """Return what each rank's call gives, or its error."""
    meeting, given, found = threading.Barrier(len(samplers)), [None] * len(samplers), [None] * len(samplers)

    def run(rank):
        samplers[rank].ranks = Threads(rank, meeting, given)
        try:
            found[rank] = call(rank, samplers[rank])
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(samplers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_several_ranks_draw_from_one_engine_that_rank_0_loads(server, tmp_path):
    policies = [moved(lm()) for _ in range(2)]
    samplers = [connected(server, policy, folder=tmp_path) for policy in policies]
    assert together(samplers, lambda rank, sampler: sampler.load(policies[rank])) == [None, None]
    assert server.loads == 2 and len(list(tmp_path.iterdir())) == 1
    how = {"max_new_tokens": 6, "seed": 3}
    drawn = together(samplers, lambda rank, sampler: sampler.sample(["w1"], 8, first_row=8 * rank, **how))
    alone = loaded(server, policies[0]).sample(["w1"], 16, **how)
    for rank, x in enumerate(drawn):
        assert (x.log_prob - policies[rank].log_prob(x)).abs().max() < 1e-4
        assert (x.log_prob - alone.log_prob[8 * rank :][:8]).abs().max() < 1e-4
    server.restart()  # rank 0 gives q again and proves it whole, while the others wait
    loads = server.loads
    with pytest.warns(UserWarning, match="given q again"):
        again = together(samplers, lambda rank, sampler: sampler.sample(["w1"], 8, first_row=8 * rank, **how))
    assert server.loads == loads + 1
    assert all(torch.equal(x.log_prob, y.log_prob) for x, y in zip(again, drawn, strict=True))
    server.restart()
    with pytest.warns(UserWarning, match="given q again"):
        scores = together(samplers, lambda rank, sampler: sampler.log_prob(drawn[rank]))
    assert server.loads == loads + 2
    assert all((found - x.log_prob).abs().max() < 1e-4 for found, x in zip(scores, drawn, strict=True))


def test_an_engine_that_loses_q_for_one_rank_gets_it_again_from_rank_0(server, tmp_path):
    policies = [moved(lm()) for _ in range(2)]
    samplers = [connected(server, policy, folder=tmp_path) for policy in policies]
    together(samplers, lambda rank, sampler: sampler.load(policies[rank]))
    how = {"max_new_tokens": 6, "seed": 3}
    drawn = together(samplers, lambda rank, sampler: sampler.sample(["w1"], 8, first_row=8 * rank, **how))
    answer, loads, asked = server._v1_completions, server.loads, []

    def restarting(body):
        found = answer(body)
        if "seed" not in body:  # the request checks the server anew
            return found
        asked.append(body)
        if len(asked) == 2:  # the rank that is done first may have looked at the weights before the restart
            server.restart()
        return found

    server._v1_completions = restarting
    with pytest.warns(UserWarning, match="given q again"):
        again = together(samplers, lambda rank, sampler: sampler.sample(["w1"], 8, first_row=8 * rank, **how))
    assert server.loads == loads + 1 and len(asked) in (3, 4)
    for x, y in zip(drawn, again, strict=True):
        assert torch.equal(x.log_prob, y.log_prob)


def test_what_fails_for_one_rank_fails_for_all(server, tmp_path):
    policies = [lm(), lm()]
    samplers = [connected(server, policy, folder=tmp_path) for policy in policies]
    together(samplers, lambda rank, sampler: sampler.load(policies[rank]))
    answer, times = server._v1_completions, []

    def failing(body):
        times.append(body)
        if len(times) == 1:
            raise Refused(400, "this one")
        return answer(body)

    server._v1_completions = failing
    errors = together(samplers, lambda rank, sampler: sampler.sample(["w1"], 8, max_new_tokens=6, seed=3))
    assert sorted("failed for another rank" in str(each) for each in errors) == [False, True]
    server._v1_completions = answer
    x = together(samplers, lambda rank, sampler: sampler.sample(["w1"], 8, max_new_tokens=6, seed=3))[0]
    server.faults.stale = ("wte",)
    moved(policies[0])
    errors = together(samplers, lambda rank, sampler: sampler.load(policies[0]))
    assert "does not take all parameters" in str(errors[0]) and "rank 0 says why" in str(errors[1])
    server.faults.stale = ()
    for each in together(samplers, lambda rank, sampler: sampler.sample(["w1"], 8, max_new_tokens=6, seed=3)):
        assert torch.equal(each.log_prob, x.log_prob)  # the engine still holds q


# ---- training

SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 100, "proposal_criterion": "interval"}


def trained(out, server, callbacks=(), **settings):
    """Return a run whose q is in the server, which was started with other weights."""
    options = QUICK | settings.pop("sampler_options", {})
    return job(out, callbacks=callbacks, sampler=server.url, sampler_options=options, **(SETTINGS | settings))


@pytest.fixture
def other():
    """Return a server for the trainer's job that was started with weights of its own."""
    from trainer_job import gpt2, tokenizer

    with StandIn(gpt2(seed=7), tokenizer()) as server:
        yield server


def test_a_run_with_q_in_an_engine(other, tmp_path):
    trainer = trained(tmp_path, other)
    assert isinstance(trainer.proposal.sampler, HTTPSampler)
    trainer.train()
    assert trainer.proposal.swaps == trainer.proposal.sampler.version == 3
    x = trainer.proposal.sample(["w1"], 20, max_new_tokens=6, seed=0)
    assert x.version.tolist() == [3] * 20
    assert (x.log_prob - trainer.proposal.snapshot.log_prob(x)).abs().max() < 1e-4
    assert all(h["swaps"] for h in trainer.state.log_history[2:] if "swaps" in h)
    assert len(list((tmp_path / "_q").iterdir())) == 1


def test_an_adapter_on_one_backbone_is_trained_with_q_in_an_engine(other, tmp_path):
    lora = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    trainer = trained(tmp_path, other, lora=lora, max_steps=2)
    trainer.train()
    assert trainer.proposal.swaps == 1
    x = trainer.proposal.sample(["w1"], 20, max_new_tokens=6, seed=0)
    assert (x.log_prob - trainer.proposal.snapshot.log_prob(x)).abs().max() < 1e-4


def test_a_resumed_run_gives_the_engine_q_and_is_the_unbroken_one(other, tmp_path):
    straight = trained(tmp_path / "straight", other)
    straight.train()
    from trainer_job import StopAt

    broken = trained(tmp_path / "broken", other, callbacks=[StopAt(3)])
    broken.train()
    other.restart()
    resumed = trained(tmp_path / "broken", other)
    resumed.train(resume_from_checkpoint=True)
    assert digest(resumed.model) == digest(straight.model)
    assert resumed.proposal.version == straight.proposal.version == 3


@pytest.mark.parametrize("when", ["draw", "swap"])
def test_a_run_whose_engine_fails_ends_with_a_checkpoint_and_goes_on(other, tmp_path, when):
    """The server fails at the draw of step 4 or at the swap after it. Nothing is lost or trained twice."""
    from transformers import TrainerCallback

    class Harm(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if when == "swap" and state.global_step == 3:
                other.faults.status["/collective_rpc"] = [500]

        def on_step_end(self, args, state, control, **kwargs):
            if when == "draw" and state.global_step == 3:
                other.faults.status["/v1/completions"] = [500]

    last = 3 if when == "draw" else 4
    trainer = trained(tmp_path / "broken", other, callbacks=[Harm()])
    with pytest.raises(EngineError, match=rf"The run ends after step {last}, and .*checkpoint-{last} holds all of it"):
        trainer.train()
    assert checkpoint.fault(tmp_path / "broken" / f"checkpoint-{last}") is None
    assert trainer.state.global_step == last and trainer.proposal.swaps == 1
    other.faults.status.clear()
    other.restart()
    resumed = trained(tmp_path / "broken", other)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert [h["step"] for h in resumed.state.log_history if "kl_policy" in h][-2:] == [5, 6]
    if when == "draw":  # after the failed swap, the resumed run swaps only at its next check
        straight = trained(tmp_path / "straight", other)
        straight.train()
        assert digest(resumed.model) == digest(straight.model)


def test_a_run_whose_engine_fails_before_the_first_step(other, tmp_path):
    trainer = trained(tmp_path, other)
    other.faults.status["/v1/completions"] = [500]
    with pytest.raises(EngineError, match="The run has not taken a step yet"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


REFUSED = {
    "on-policy": ({"on_policy": True, "objective": "dpg"}, "differ by its rounding; leave on_policy out"),
    "too long": ({"max_new_tokens": 24, "prompts": ["w1 w2"]}, "beyond the model's context"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_with_an_engine_is_refused_before_a_run(other, tmp_path, case):
    settings, match = REFUSED[case]
    with pytest.raises(ValueError, match=match):
        trained(tmp_path, other, **settings)


def test_a_config_takes_options_as_json():
    args = dmfast.DMConfig("out", use_cpu=True, sampler="http://h:1", sampler_options='{"timeout": 5}')
    assert args.sampler_options == {"timeout": 5}
    with pytest.raises(ValueError, match="must be JSON of a mapping"):
        dmfast.DMConfig("out", use_cpu=True, sampler="http://h:1", sampler_options="{timeout")


def test_serve_proposal_starts_vllm_with_what_the_sampler_needs():
    line = serve.command("m", ["--max-model-len", "9"], host="h", port=5, dtype="float32")
    assert line[1:] == [
        "-m", "vllm.entrypoints.openai.api_server", "--model", "m", "--host", "h", "--port", "5", "--dtype", "float32",
        "--generation-config", "vllm", "--logprobs-mode", "processed_logprobs",
        "--worker-extension-cls", f"{vllm_worker.__name__}.{vllm_worker.Worker.__name__}", "--max-model-len", "9",
    ]  # fmt: skip
    assert serve.environment({"A": "b"}) == {
        "A": "b", "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"
    }  # fmt: skip
    for option in (
        "--generation-config=auto", "--logprobs-mode", "--quantization",
        "--config=my.yaml", "--logprobs-mo", "--override-gen={}", "--logprobs_mode=raw_logits", "-q", "-qfp8",
        "-sc.model", "--override_generation_config.temperature", "--speculative-config.model=m",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="serve-proposal can't take"):
            serve.command("m", [option], host="h", port=5, dtype="auto")


def test_serve_proposal_on_a_cpu_reads_prompts_whole():
    """Check that prompts are not read in parts on a CPU, where vLLM crashes if such a request has a seed."""
    how = {"host": "h", "port": 5, "dtype": "auto", "on_cpu": True}
    assert "--no-enable-chunked-prefill" in serve.command("m", [], **how)
    for spelled in ("--enable-chunked-prefill", "--enable_chunked_prefill"):
        with pytest.raises(ValueError, match="can't take --enable-chunked-prefill on a CPU"):
            serve.command("m", [spelled], **how)


def test_serve_proposal_without_vllm_is_an_error_with_a_reason(capsys):
    assert cli.main(["serve-proposal", "tiny-bios", "--port", "8001", "--", "--max-model-len", "9"]) == 1
    assert "vLLM is not installed in this environment" in capsys.readouterr().err


def test_vllm_in_this_process_says_what_is_missing():
    with pytest.raises(ImportError, match="sampler='vllm' needs vLLM in this environment"):
        VLLMSampler(lm())
    with pytest.raises(ValueError, match="engine can't hold logprobs_mode"):
        VLLMSampler(lm(), engine={"logprobs_mode": "raw_logits"})


def test_an_engine_of_several_ranks_does_not_run_ahead(server):
    engine = connected(server, lm())
    engine.ranks = SimpleNamespace(size=2)
    sampler = AsyncSampler(engine, 1)
    with pytest.raises(ValueError, match="the 2 ranks of this engine agree on what each of them drew"):
        sampler.request([{"prompts": None, "n": 2, "max_new_tokens": 3, "seed": 1}])


def test_a_proposal_whose_engine_is_here_is_loaded_once_at_the_start(server):
    policy = lm()
    proposal = OfflineProposal(policy, interval=1, sampler=connected(server, policy))
    assert server.loads == 2  # a copy that differs in every parameter was loaded first, and then q
    proposal.swap()
    assert server.loads == 3
