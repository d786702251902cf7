"""Test what a sequence starts from and what ends it.

The tests take strings, token ids and chats through real tokenizers, which are made here and put BOS and EOS around a
text or do not. They try chat templates of several habits, and the ends that a model's own files name.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from test_models import BOS, EOS, PAD, V, build, tok
from tokenizers import processors
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from dmfast import LanguageModel
from dmfast.sampling import Prompted

AROUND = {
    "nothing": "$A",
    "bos": "<s> $A",
    "eos": "$A <e>",
    "both": "<s> $A <e>",
    "one token for both": "<e> $A",
    "one token on both sides": "<e> $A <e>",
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %} {{ 'w1' if m['role'] == 'user' else 'w2' }} {{ m['content'] }} <e>{% endfor %}"
    "{% if add_generation_prompt %} w2{% if think is defined %} {{ think }}{% endif %}{% endif %}"
)
PARTS_ONLY = (
    "{{ bos_token }}{% for m in messages %} w1{% for part in m['content'] %}{% if part['type'] == 'text' %} "
    "{{ part['text'] }}{% endif %}{% endfor %} <e>{% endfor %}{% if add_generation_prompt %} w2{% endif %}"
)
BOTH = PARTS_ONLY.replace(
    "{% for part in m['content'] %}",
    "{% if m['content'] is string %} {{ m['content'] }}{% else %}{% for part in m['content'] %}",
).replace("{% endif %}{% endfor %} <e>", "{% endif %}{% endfor %}{% endif %} <e>")
AS_JSON = CHAT.replace("{{ m['content'] }}", "{{ m['content'] if m['content'] is string else m['content'] | tojson }}")


def around(how, bos=True, template=None):
    """Return a tokenizer that puts special tokens around a text by itself."""
    words = tok().backend_tokenizer
    words.post_processor = processors.TemplateProcessing(
        single=AROUND[how], special_tokens=[("<s>", BOS), ("<e>", EOS)]
    )
    special = {"eos_token": "<e>", "pad_token": "<p>"}
    if bos:
        special["bos_token"] = "<e>" if "one token" in how else "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, **special)


def lm(tokenizer=None, **options):
    return LanguageModel(build(), tok() if tokenizer is None else tokenizer, **options)


def encoded(policy, prompts):
    """Return the ids of prompts without padding, after a check of the left padding."""
    tokens, mask = policy._encode(prompts)
    rows = [row[seen.bool()].tolist() for row, seen in zip(tokens, mask, strict=True)]
    for row, all_of_it in zip(rows, tokens.tolist(), strict=True):
        assert all_of_it == [policy.pad_token_id] * (tokens.shape[1] - len(row)) + row
    return rows


# --- what ends a sequence ---------------------------------------------------------------------------------------


def test_all_ends_of_the_generation_config_end_a_sequence():
    model = build()
    model.generation_config.eos_token_id = [3, EOS, 8]
    policy = LanguageModel(model, tok())
    assert policy.eos_token_ids == [EOS, 3, 8]
    x = policy.sample(None, 64, max_new_tokens=12, seed=0)
    lasts = set()
    for row, scored in zip(x.tokens, x.score_mask, strict=True):
        *before, last = row[scored].tolist()
        assert not {3, EOS, 8} & set(before)
        lasts.add(last)
    assert {3, EOS, 8} <= lasts
    assert (policy.log_prob(x) - x.log_prob).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("of_generation", "of_config", "of_tokenizer", "wanted"),
    [
        (3, EOS, "<e>", [EOS, 3]),
        ([EOS, 3], None, "<e>", [EOS, 3]),
        (None, [3, 4], "<e>", [EOS, 3, 4]),
        ([8, 3], EOS, None, [8, 3]),
        (None, None, "<e>", [EOS]),
        # 50256 is the default of GPT2Config, and this model has no such token
        ([50256, 3], 50256, "<e>", [EOS, 3]),
    ],
)
def test_the_ends_are_the_tokenizers_and_the_models(of_generation, of_config, of_tokenizer, wanted):
    model, words = build(), tok()
    words.eos_token = of_tokenizer
    model.generation_config.eos_token_id, model.config.eos_token_id = of_generation, of_config
    assert LanguageModel(model, words).eos_token_ids == wanted
    assert LanguageModel(model, words, eos_token_id=4).eos_token_ids == [4]
    if of_generation is None:
        model.generation_config = None
        assert LanguageModel(model, words).eos_token_ids == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.int64(3), [3]),
        (torch.tensor(3), [3]),
        (torch.tensor([EOS, 3]), [EOS, 3]),
        (np.array([EOS, 3], dtype=np.int32), [EOS, 3]),
        ([np.int64(EOS), torch.tensor(3), 3], [EOS, 3]),
        ({3}, [3]),
    ],
    ids=["numpy", "tensor", "1-d tensor", "array", "mixed", "set"],
)
def test_eos_token_id_may_be_of_numpy_or_torch(given, wanted):
    policy = lm(eos_token_id=given)
    assert policy.eos_token_ids == wanted and all(type(token) is int for token in policy.eos_token_ids)
    policy.sample(None, 2, max_new_tokens=2, seed=0)


@pytest.mark.parametrize("given", ["<e>", 5.0, True, [[5]], [5, None], torch.tensor([5.0]), {"eos": 5}])
def test_eos_token_id_refuses_what_is_no_integer(given):
    with pytest.raises(TypeError, match="eos_token_id must be a token id or a list of them, got"):
        lm(eos_token_id=given)


# --- strings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False], ids=["", "no bos"])
@pytest.mark.parametrize("how", AROUND)
def test_a_string_starts_once_and_has_no_end_of_the_tokenizers(how, bos):
    words = around(how, bos)
    policy = lm(words)
    start = {"bos": [BOS], "both": [BOS], "nothing": [], "eos": []}.get(how, [EOS])
    for text in ("w1 w2", "w1 <e>", "w1 <e> <e>", "<p> w3", "w1 <s> w2"):
        ids = words(text, add_special_tokens=False)["input_ids"]
        assert encoded(policy, [text]) == [start + ids], text
    empty = start or [BOS if bos and how != "one token for both" else EOS]
    assert encoded(policy, [""]) == encoded(policy, None) == [empty]
    if not start:
        assert encoded(policy, [[]]) == [empty]
    assert encoded(policy, ["w1 w2", "", "w4"]) == [[*start, 1, 2], empty, [*start, 4]]


def test_an_empty_prompt_is_eos_where_there_is_no_bos_whatever_else_ends_a_sequence():
    policy = lm(around("nothing", bos=False), eos_token_id=[3, 4])
    assert encoded(policy, None) == encoded(policy, ["", []])[:1] == encoded(policy, [[]]) == [[EOS]]
    policy.check_prompts(["", []], 23)
    for empty in ("", []):
        with pytest.raises(ValueError, match=r"prompt 0 has 1 tokens; .*context of 24"):
            policy.check_prompts([empty], 24)


@pytest.mark.parametrize("how", ["bos", "both"])
def test_a_chat_rendered_to_a_string_has_one_start_as_its_messages_have(how):
    words = around(how, template=CHAT)
    messages = [{"role": "user", "content": "w3 w4"}]
    policy = lm(words)
    rendered = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<s>") and words(rendered)["input_ids"][:2] == [BOS, BOS]
    with pytest.warns(UserWarning, match="begins with the text of BOS, '<s>'.* one is kept") as said:
        found = encoded(policy, [rendered])
    assert [warning.filename for warning in said] == [__file__]  # the warning points at the user's call
    assert found == encoded(policy, [messages]) == [[BOS, 1, 3, 4, EOS, 2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning comes only once
        assert encoded(policy, [rendered, "<s>"]) == [found[0], [BOS]]
        assert encoded(lm(around("nothing", template=CHAT)), [rendered]) == found


# --- chats ------------------------------------------------------------------------------------------------------


def user(content):
    return {"role": "user", "content": content}


def test_a_last_message_of_the_assistant_is_continued():
    policy = lm(around("both", template=CHAT))
    asked, begun = [user("w3")], [user("w3"), {"role": "assistant", "content": "w4 w5"}]
    assert encoded(policy, [asked, begun, [*begun, user("w3")]]) == [
        [BOS, 1, 3, EOS, 2],
        [BOS, 1, 3, EOS, 2, 4, 6],
        [BOS, 1, 3, EOS, 2, 4, 6, EOS, 1, 3, EOS, 2],
    ]


def test_chat_template_kwargs_reach_the_template_wherever_the_policy_goes():
    policy = lm(around("both", template=CHAT), chat_template_kwargs={"think": "w7"})
    wanted = [[BOS, 1, 3, EOS, 2, 10]]
    assert encoded(policy, [[user("w3")]]) == encoded(policy.around(policy.model), [[user("w3")]]) == wanted
    x = policy.sample([[user("w3")]], 2, max_new_tokens=2, seed=0)
    assert x.tokens[:, : x.prompt_len].tolist() == wanted * 2
    moved = policy.with_prompt(policy.sample(None, 2, max_new_tokens=2, seed=0), [user("w3")])
    assert moved.tokens[:, : moved.prompt_len].tolist() == wanted * 2
    asked = Prompted(policy, [user("w3")]).sample(None, 2, max_new_tokens=2, seed=0)
    assert asked.tokens[:, : asked.prompt_len].tolist() == [[BOS]] * 2
    other = lm(tok(), chat_template_kwargs={"chat_template": PARTS_ONLY})
    assert encoded(other, [[user("w3")]]) == [[BOS, 1, 3, EOS, 2]]


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"tokenize": False}, ValueError, "can't hold tokenize, which dmfast sets"),
        ({"add_generation_prompt": True, "think": 1}, ValueError, "can't hold add_generation_prompt"),
        (["think"], TypeError, "chat_template_kwargs must be a mapping"),
    ],
)
def test_chat_template_kwargs_that_dmfast_sets_itself(given, error, match):
    with pytest.raises(error, match=match):
        lm(around("both", template=CHAT), chat_template_kwargs=given)


@pytest.mark.parametrize("template", [CHAT, PARTS_ONLY, BOTH, AS_JSON], ids=["strings", "parts", "both", "json"])
def test_text_parts_are_text_whatever_form_the_template_prints(template):
    policy = lm(around("bos", template=template))
    parts = [{"type": "text", "text": "w3 "}, {"type": "text", "text": "w4"}]
    rows = encoded(policy, [[user("w3 w4")], [user(parts)], [user(tuple(parts))]])
    assert rows == [[BOS, 1, 3, 4, EOS, 2]] * 3
    assert parts[0] == {"type": "text", "text": "w3 "}


@pytest.mark.parametrize(
    ("part", "error", "match"),
    [
        ({"type": "image", "url": "x.png"}, ValueError, "'image'.*text only"),
        ({"type": "image_url", "image_url": {"url": "x.png"}}, ValueError, "'image_url'.*text only"),
        ({"type": "video", "path": "x.mp4"}, ValueError, "'video'.*text only"),
        ({"type": "input_audio", "text": "w1"}, ValueError, "'input_audio'.*text only"),
        ({"type": "text"}, ValueError, "'text'"),
        ("w3", TypeError, "a part of its content must be .*'w3'"),
    ],
    ids=["image", "url", "video", "audio", "no text", "string"],
)
@pytest.mark.parametrize("template", [CHAT, BOTH], ids=["strings", "both"])
def test_images_in_a_message_are_refused_by_their_place(template, part, error, match):
    policy = lm(around("bos", template=template))
    prompts = ["w1", [user("w3"), user([{"type": "text", "text": "w3"}, part])]]
    for call in (lambda: policy.sample(prompts, max_new_tokens=2), lambda: policy.check_prompts(prompts, 2)):
        with pytest.raises(error, match=f"prompt 1: message 1.*{match}"):
            call()


def test_an_error_of_the_template_names_the_row():
    policy = lm(around("bos", template=CHAT))
    prompts = ["w1", [user("w3")], [{"role": "system", "content": "w4"}, user("w3")]]
    with pytest.raises(ValueError, match=r"prompt 2: .* roles system, user: .*no system role; .*first message"):
        policy.sample(prompts, max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt 0: the chat template failed on messages of the roles assistant"):
        policy.check_prompts([[{"role": "assistant", "content": None}]], 2)
    with pytest.raises(ValueError, match="prompt 1 is a list of chat messages, but the tokenizer has no chat_template"):
        lm().check_prompts(["w1", [user("w3")]], 2)
    with pytest.raises(TypeError, match="prompt 0: message 1 must be a mapping with role and content, got 'w3'"):
        policy.check_prompts([[user("w3"), "w3"]], 2)


class Reader(ProcessorMixin):
    """Be a processor with a tokenizer alone."""

    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer=None, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)


@pytest.mark.parametrize("form", [lambda t: t, lambda t: {"default": t, "tool_use": "w9"}], ids=["one", "several"])
def test_of_a_processor_its_tokenizer_and_its_template(form):
    words = around("both")
    policy = lm(Reader(words, form(CHAT)))
    assert policy.tokenizer is words and words.chat_template is None
    assert encoded(policy, ["w3", [user("w3")]]) == [[BOS, 3], [BOS, 1, 3, EOS, 2]]
    assert policy.sample(["w3"], 2, max_new_tokens=2, seed=0).tokenizer is words
    own = around("both", template=PARTS_ONLY.replace("w1", "w4"))
    assert encoded(lm(Reader(own, CHAT)), [[user("w3")]]) == [[BOS, 4, 3, EOS, 2]]


# --- token ids --------------------------------------------------------------------------------------------------


def test_ids_may_be_tensors_and_arrays():
    rows = [[1, 2, 3], [4, 6, 8]]
    wanted = lm().sample(rows, 2, max_new_tokens=3, seed=0)
    assert wanted.tokens[:, :3].tolist() == [rows[0]] * 2 + [rows[1]] * 2
    for given in (
        torch.tensor(rows), np.array(rows), [torch.tensor(row, dtype=torch.int32) for row in rows],
        [tuple(rows[0]), np.array(rows[1])], [range(1, 4), list(map(np.int64, rows[1]))],
    ):  # fmt: skip
        assert torch.equal(lm().sample(given, 2, max_new_tokens=3, seed=0).tokens, wanted.tokens)


@pytest.mark.parametrize(
    ("prompts", "error", "match"),
    [
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, TypeError, r"dict with input_ids, attention_mask.*mask"),
        ([{"input_ids": [1, 2]}], TypeError, "prompt 0 .*without padding"),
        ([{"prompt": "w1"}], TypeError, r"prompt 0 .*dataset\['prompt'\]"),
        ([{"role": "user", "content": "w1"}], TypeError, r"prompt 0 .*is one prompt: write \[messages\]"),
        ([1, 2, 3], TypeError, r"prompt 0 .*got 1; one prompt of ids is \[\[1, 2, 3\]\]"),
        (torch.tensor([1, 2]), TypeError, "prompt 0 .*got tensor"),
        (7, TypeError, "prompts must be a list of prompts.*got a int"),
        ((text for text in ["w1"]), TypeError, "prompts must be a list of prompts.*got a generator"),
        (["w1", [1.0, 2.0]], TypeError, r"prompt 1 must be .*got \[1.0, 2.0\]"),
        ([torch.tensor([0.5])], TypeError, "prompt 0 must be .*got tensor"),
        ([[True, False]], TypeError, "prompt 0 must be"),
        ([["w1", "w2"]], TypeError, r"prompt 0 must be .*got \['w1', 'w2'\]"),
        ([[[1, 2]]], TypeError, r"prompt 0 must be"),
        ([None], TypeError, "prompt 0 must be .*got None"),
        (["w1", [1, V]], ValueError, "prompt 1 holds token 11, .*token ids of this model"),
        ([torch.tensor([1, -100])], ValueError, "prompt 0 holds token -100, .*token ids of this model"),
        ([[1], [PAD, PAD, 1, 2]], ValueError, "prompt 1 has padding .token 7. at an end"),
        ([[PAD, 1, 2]], ValueError, "prompt 0 has padding"),
        ([[1, 2, PAD]], ValueError, "prompt 0 has padding"),
        (torch.tensor([[1, 2], [PAD, 1]]), ValueError, "prompt 1 has padding"),
    ],
)  # fmt: skip
def test_prompts_that_are_none(prompts, error, match):
    with pytest.raises(error, match=match):
        lm().sample(prompts, max_new_tokens=2)


def test_a_token_of_the_tokenizer_that_the_model_does_not_have_is_laid_to_the_tokenizer():
    words = tok()
    words.add_tokens(["<new>"])
    policy = lm(words)
    said = f"the tokenizer gave token {V}, but the model has {V} embeddings: tokenizer and model don't fit"
    with pytest.raises(ValueError, match=f"prompt 1: {said}"):
        policy.check_prompts(["w1", "w1 <new>"], 2)
    with pytest.raises(ValueError, match=f"completion 0: {said}"):
        policy.samples_of(["w1"], ["<new>"], append_eos=True)


def test_a_tokenizers_output_is_refused_with_the_way_to_pass_it():
    words = tok()
    out = words(["w1", "w2 w3"], padding=True, return_tensors="pt")
    for each in (out, dict(out)):
        with pytest.raises(TypeError, match=r"with input_ids, .*attention_mask.*without padding"):
            lm().sample(each, max_new_tokens=2)
    rows = [ids[mask.bool()] for ids, mask in zip(out.input_ids, out.attention_mask, strict=True)]
    assert encoded(lm(), rows) == [[1], [2, 3]]
    with pytest.raises(ValueError, match="prompt 0 has padding"):
        lm().sample(out.input_ids, max_new_tokens=2)


def test_padding_that_is_eos_is_told_from_an_end_that_is_meant():
    policy = lm(tok("pad = eos"))
    kept = [[EOS, 1, 2], [1, 2, EOS], [EOS], [EOS, EOS], [1, EOS, EOS, 2]]
    assert encoded(policy, kept) == kept
    assert encoded(lm(), [[1, PAD, 2], [PAD]]) == [[1, PAD, 2], [PAD]]
    for ids in ([EOS, EOS, 1], [1, EOS, EOS]):
        with pytest.raises(ValueError, match=r"prompt 0 has padding \(token 5\) at an end"):
            encoded(policy, [ids])
