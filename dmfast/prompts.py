"""Turn prompts (strings, token ids or chat messages) into token ids, and find the tokens that end a sequence."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .kernels import warn_caller
from .samples import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# PromptEncoder sets these arguments of apply_chat_template itself.
_OWN = (
    "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "add_generation_prompt",
    "continue_final_message", "padding", "truncation", "max_length",
)  # fmt: skip
_PROBE = "dmfast probe"
_KINDS = "a string, a list of token ids or a list of chat messages"
_OTHER_IDS = "these are not token ids of this model; pass those of its own tokenizer, or a string"


class PromptEncoder:
    """A function from prompts to token ids, by a tokenizer and its chat template.

    Args:
        tokenizer: the model's tokenizer.
        eos_token_ids: the tokens that end a sequence.
        vocab_size: the size of the model's vocabulary. Larger ids are refused.
        chat_template_kwargs: the arguments of ``apply_chat_template`` besides the messages.

    Attributes:
        start: the token that stands for an empty prompt: BOS, or else EOS.
        pad_token_id: the padding token, or the first EOS where the tokenizer has none.

    Raises:
        TypeError: ``chat_template_kwargs`` is not a mapping.
        ValueError: ``chat_template_kwargs`` holds an argument that dmfast sets itself; the model does not have the
            padding token or an EOS.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int], vocab_size: int,
        chat_template_kwargs: Mapping[str, Any],
    ) -> None:  # fmt: skip
        if not isinstance(chat_template_kwargs, Mapping):
            raise TypeError(f"chat_template_kwargs must be a mapping, got {chat_template_kwargs!r:.100}")
        own = [name for name in _OWN if name in chat_template_kwargs]
        if own:
            raise ValueError(
                f"chat_template_kwargs can't hold {', '.join(own)}, which dmfast sets itself: a conversation that ends "
                "with a message of the assistant is continued, any other gets the generation prompt"
            )
        self.tokenizer, self.vocab_size, self.chat_template_kwargs = tokenizer, vocab_size, dict(chat_template_kwargs)
        first = eos_token_ids[0]
        self.pad_token_id: int = first if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        for name, token in [("pad", self.pad_token_id), *(("eos", token) for token in eos_token_ids)]:
            self._check([token], f"{name}_token_id is")
        starts = (tokenizer.bos_token_id, tokenizer.eos_token_id, first)
        self.start: int = next(token for token in starts if token is not None)
        self._ends = {*eos_token_ids, tokenizer.eos_token_id}
        # a padding token without another meaning can only be padding at an end of a prompt
        others = {*self._ends, tokenizer.bos_token_id, getattr(tokenizer, "unk_token_id", None)}
        self._pads_only = self.pad_token_id not in others
        self._said = False

    def __call__(self, prompts: Sequence[Prompt] | Tensor | None) -> Iterator[list[int]]:
        """Yield the token ids of each prompt. Each has at least one.

        Args:
            prompts: the prompts in any form that ``LanguageModel.sample`` takes.

        Raises:
            TypeError, ValueError: as in ``LanguageModel.sample``. The message names the prompt by its place.
        """
        for i, prompt in enumerate(_listed(prompts)):
            name = f"prompt {i}"
            ids = self._ids(prompt, name) or [self.start]
            self._check(ids, f"{name}: the tokenizer gave token")
            yield ids

    def completion(self, completion: str | Sequence[int] | Tensor, name: str) -> list[int]:
        """Return the token ids of a continuation. A string gets no special tokens around it.

        Raises:
            TypeError: the continuation is neither a string nor token ids.
            ValueError: it has a token that the model does not have.
        """
        if isinstance(completion, str):
            ids = list(self.tokenizer(completion, add_special_tokens=False)["input_ids"])
            self._check(ids, f"{name}: the tokenizer gave token")
        else:
            ids = token_ids(completion, f"{name} must be a string or a list of token ids", several=True)
            self._check(ids, f"{name} holds token", _OTHER_IDS)
        return ids

    def left_padded(self, rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the prompts, left-padded to one width, and their mask, (P, L) int64 each."""
        width = max(len(ids) for ids in rows)
        tokens = [[self.pad_token_id] * (width - len(ids)) + list(ids) for ids in rows]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
        return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)

    def _check(self, ids: Sequence[int], what: str, why: str = "tokenizer and model don't fit") -> None:
        for token in (min(ids), max(ids)) if ids else ():
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"{what} {token}, but the model has {self.vocab_size} embeddings: {why}")

    def _ids(self, prompt: Prompt, name: str) -> list[int]:
        if isinstance(prompt, str):
            try:
                return self._of_text(prompt)
            except Exception as error:
                if type(error) is not Exception:
                    raise
                # tokenizers raises a plain Exception for a word that a vocabulary without an unknown token lacks
                raise ValueError(f"{name} can't be made token ids, {error}: {prompt!r:.200}") from error
        if isinstance(prompt, Mapping):
            keys: set[Any] = set(prompt)
            hint = "for a datasets.Dataset pass its column, dataset['prompt']"
            if "input_ids" in keys:
                hint = "for a tokenizer's output pass input_ids, without padding"
            elif "role" in keys:
                hint = "a conversation is one prompt: write [messages]"
            raise TypeError(f"{name} must be {_KINDS}, got {prompt!r:.100}; {hint}")
        if not isinstance(prompt, Iterable) or not hasattr(prompt, "__len__"):
            raise TypeError(f"{name} must be {_KINDS}, got {prompt!r:.100}; one prompt of ids is [[1, 2, 3]]")
        if not isinstance(prompt, Tensor) and isinstance(next(iter(prompt), None), Mapping):
            return self._of_chat(cast("Sequence[Mapping[str, Any]]", prompt), name)
        ids = token_ids(prompt, f"{name} must be {_KINDS}", several=True)
        least = 1 if self._pads_only else 2  # one BOS or EOS at an end may be meant as such, two are padding
        pads = [self.pad_token_id] * least
        if len(ids) > least and pads in (ids[:least], ids[-least:]):
            raise ValueError(
                f"{name} has padding (token {self.pad_token_id}) at an end: its tokens would be taken for text; pass "
                "the ids without it, ids[attention_mask.bool()]"
            )
        self._check(ids, f"{name} holds token", _OTHER_IDS)
        return ids

    def _of_text(self, text: str) -> list[int]:
        """Return the ids of a string, with one BOS where the tokenizer adds one, and without an EOS that it adds.

        An EOS after the prompt would end the sequence before its first token.
        """
        ids, bos = list(self.tokenizer(text)["input_ids"]), self.tokenizer.bos_token_id
        two_starts = bos is not None and ids[:2] == [bos, bos]
        if not two_starts and (not ids or ids[-1] not in self._ends):
            return ids
        written = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if two_starts and written[:1] == [bos] and len(ids) > len(written):
            self._say_one_start()
            ids = ids[1:]
        appended = self._ends_at_the_end(ids) - self._ends_at_the_end(written)
        return ids[: len(ids) - max(appended, 0)]

    def _ends_at_the_end(self, ids: list[int]) -> int:
        return next((i for i, token in enumerate(reversed(ids)) if token not in self._ends), len(ids))

    def _say_one_start(self) -> None:
        if not self._said:
            self._said = True
            warn_caller(
                f"a prompt begins with the text of BOS, {self.tokenizer.bos_token!r}, and the tokenizer puts another "
                "before it; one is kept. A chat that was rendered to a string is such a prompt: pass its messages, or "
                "token ids"
            )

    # ---- chat messages

    def _of_chat(self, messages: Sequence[Mapping[str, Any]], name: str) -> list[int]:
        """Return the ids of a conversation, up to where the assistant goes on.

        A last message of the assistant is left open to be continued. After any other the assistant's answer begins.
        """
        if not (self.chat_template_kwargs.get("chat_template") or getattr(self.tokenizer, "chat_template", None)):
            raise ValueError(
                f"{name} is a list of chat messages, but the tokenizer has no chat_template; pass strings, or set one"
            )
        shown = [self._message(message, f"{name}: message {j}") for j, message in enumerate(messages)]
        continued = shown[-1].get("role") == "assistant"
        try:
            ids: Any = self.tokenizer.apply_chat_template(
                cast(Any, shown), add_generation_prompt=not continued, continue_final_message=continued, tokenize=True,
                return_dict=False, **self.chat_template_kwargs,
            )  # fmt: skip
        except ImportError:
            raise  # jinja2 is missing, which is not a fault of the messages
        except Exception as error:  # a template may raise anything
            roles = [message.get("role") for message in shown]
            hint = ""
            if "system" in roles:
                hint = "; a template without a system role takes the text at the start of the first message of the user"
            raise ValueError(
                f"{name}: the chat template failed on messages of the roles {', '.join(map(str, roles))}: "
                f"{type(error).__name__}: {error}{hint}"
            ) from error
        return list(ids)

    def _message(self, message: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return a message whose text has the form that the template prints: a string or a list of parts."""
        if not isinstance(message, Mapping):
            raise TypeError(f"{name} must be a mapping with role and content, got {message!r:.100}")
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            for part in content:
                _check_text(part, name)
        strings, parts = self._printed
        if isinstance(content, (list, tuple)) and strings and not parts:
            content = "".join(part["text"] for part in content)
        elif isinstance(content, str) and parts and not strings:
            content = [{"type": "text", "text": content}]
        return {**message, "content": content} if "content" in message else dict(message)

    @cached_property
    def _printed(self) -> tuple[bool, bool]:
        """Whether the template prints a text that is a string, and one that is a list of parts."""
        return self._prints(_PROBE), self._prints([{"type": "text", "text": _PROBE}])

    def _prints(self, content: Any) -> bool:
        try:
            rendered = str(self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, **self.chat_template_kwargs
            ))  # fmt: skip
        except ImportError:
            raise
        except Exception:  # a template may raise anything at a content that it can't print
            return False
        # a template for strings may print the list as Python or JSON would
        return _PROBE in rendered and f"'{_PROBE}'" not in rendered and f'"{_PROBE}"' not in rendered


def _listed(prompts: Any) -> Any:
    """Return the prompts as a sized iterable. None stands for the one empty prompt.

    Raises:
        TypeError: ``prompts`` is not a list of prompts.
        ValueError: there is no prompt.
    """
    if prompts is None:
        return [""]
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of strings, got the string {prompts!r:.100}")
    if isinstance(prompts, Mapping):
        raise TypeError(
            f"prompts must be a list of prompts, each {_KINDS}, got a {type(prompts).__name__} with "
            f"{', '.join(map(str, prompts))}. For a tokenizer's output pass the strings that it was made of, or its "
            "ids without padding: [ids[mask.bool()] for ids, mask in zip(out.input_ids, out.attention_mask)]"
        )
    if not hasattr(prompts, "__len__") or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a list of prompts, each {_KINDS}, got a {type(prompts).__name__}")
    if len(cast(Any, prompts)) == 0:
        raise ValueError("prompts is empty; pass None for the one empty prompt")
    return prompts


def _check_text(part: Any, name: str) -> None:
    """Check that a part of a message's content is text.

    Raises:
        TypeError: ``part`` is not a mapping.
        ValueError: the part is an image, a video, a sound or something else that is not text.
    """
    if not isinstance(part, Mapping):
        raise TypeError(f"{name}: a part of its content must be {{'type': 'text', 'text': ...}}, got {part!r:.100}")
    kind = part.get("type", "text")
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f"{name} has a part of the type {kind!r} in its content, {dict(part)!r:.100}: dmfast supports text only, "
            "without images, video or sound, even for models that could take them"
        )


def token_ids(given: Any, expected: str, *, several: bool = False) -> list[int]:
    """Return token ids as integers.

    Args:
        given: one or several integers of Python, NumPy or torch.
        expected: the beginning of the error's message, which ends with the value that came instead.
        several: whether a single integer is refused.

    Raises:
        TypeError: ``given`` does not hold integers.
    """
    values = given.tolist() if hasattr(given, "tolist") else given
    one = isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable)
    found = [values] if one else list(values)
    try:
        if (one and several) or any(isinstance(value, bool) for value in found):
            raise TypeError
        return [operator.index(value) for value in found]
    except TypeError:
        raise TypeError(f"{expected}, got {given!r:.100}") from None


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, vocab_size: int, given: Any) -> list[int]:
    """Return the ids of the tokens that end a sequence.

    These are the given ones. By default they are the tokenizer's EOS and those of the model's ``generation_config``, at
    which transformers' generate ends, or those of its config where that has none. Ids of these configs for which the
    model has no embedding are left out, because they are never drawn. A config that was not made for the tokenizer may
    hold such ids.

    Raises:
        TypeError: ``given`` is not one integer or several.
        ValueError: no token ends a sequence.
    """
    if given is not None:
        found = token_ids(given, "eos_token_id must be a token id or a list of them")
    else:
        config: Any = model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        of_model = (getattr(each, "eos_token_id", None) for each in (getattr(model, "generation_config", None), text))
        theirs: Any = next((ids for ids in of_model if ids is not None), [])
        own: Any = [] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        known = [token for token in token_ids(theirs, "eos_token_id of the model's config") if 0 <= token < vocab_size]
        found = token_ids(own, "eos_token_id of the tokenizer") + known
    if not found:
        raise ValueError(
            "no token ends a sequence: neither the tokenizer nor the model's generation_config has an eos_token; pass "
            "eos_token_id"
            if given is None else f"eos_token_id must hold a token id or more, got {given!r}"
        )  # fmt: skip
    return list(dict.fromkeys(found))


def text_part(given: Any, chat_template_kwargs: Mapping[str, Any] | None) -> tuple[Any, Mapping[str, Any]]:
    """Return the tokenizer within a multimodal processor, or the tokenizer given, and the chat template's arguments.

    Where a processor's tokenizer has no chat template, the processor's own is put among the arguments.
    """
    kwargs: Mapping[str, Any] = {} if chat_template_kwargs is None else chat_template_kwargs
    inner = getattr(given, "tokenizer", None)
    if not hasattr(inner, "eos_token_id"):  # some tokenizers hold another library's under this name
        return given, kwargs
    template = getattr(given, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if template is None or getattr(inner, "chat_template", None):
        return inner, kwargs
    return inner, {"chat_template": template, **kwargs}
