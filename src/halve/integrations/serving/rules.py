"""Which requests are refused: those that would be answered otherwise than asked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from halve._compat.serving import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    chat_messages,
    ignored_fields,
)
from halve.calibration import load_tokenizer
from halve.models import longest_sequence
from halve.runtime.blockwise_model import BlockwiseModel

PATHS = (CHAT, COMPLETIONS, RESPONSES)
# The fields that limit an answer, the first of which is set where none is given.
_LIMITS = {
    CHAT: ("max_completion_tokens", "max_tokens"),
    COMPLETIONS: ("max_tokens",),
    RESPONSES: ("max_output_tokens",),
}
# New tokens where a request names no limit, as in transformers' server.
_NEW_TOKENS = 1024
# Ignored fields that change no answer.
_NO_EFFECT = frozenset(("metadata", "service_tier", "store", "stream_options", "user"))
# Ignored fields -> the value that asks for what is done anyway.
_DEFAULTS = {
    "background": False,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "top_logprobs": 0,
    "truncation": "disabled",
}


class RefusedRequest(Exception):  # noqa: N818  (an answer, no error of the server)
    """A request that is answered with status 400.

    Args:
        message: One sentence or two for the client.
        field: The field of the request that is to blame.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


@dataclass(frozen=True)
class RequestRules:
    """What is known of the model that is served.

    Attributes:
        name: The model's name, as the user gave it.
        folder: Its folder, by which transformers' server knows it.
        tokenizer: One of transformers' tokenizer classes.
        longest: Tokens that the model takes; None if it names no limit.
        generation: The contents of its generation config.
        ignored: Path -> fields that transformers' server ignores.
    """

    name: str
    folder: str
    tokenizer: Any
    longest: int | None
    generation: dict[str, Any]
    ignored: Mapping[str, frozenset[str]]

    def checked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return a request as it is passed on.

        The model's folder takes the place of its name, the limit of new tokens is what
        the context leaves where none is given, and a temperature has an effect.

        Args:
            path: One of `PATHS`.
            body: The request.

        Raises:
            RefusedRequest: The answer would not be what is asked for.
        """
        self._check_ignored(path, body)
        self._check_chats(path)
        named = {"model": self.folder} if body.get("model") == self.name else {}
        return body | named | self._limited(path, body) | self._sampled(body)

    def _check_ignored(self, path: str, body: dict[str, Any]) -> None:
        for name in sorted(body.keys() & (self.ignored[path] - _NO_EFFECT)):
            if not _asks_nothing(name, body[name]):
                raise RefusedRequest(
                    f"This server does not support {name}={json.dumps(body[name])[:80]}"
                    f". Leave {name} out.",
                    name,
                )

    def _check_chats(self, path: str) -> None:
        if path != COMPLETIONS and not getattr(self.tokenizer, "chat_template", None):
            raise RefusedRequest(
                f"{self.name} has no chat template, so it cannot be sent messages. "
                f"Send a prompt to {COMPLETIONS}.",
                "model",
            )

    def _limited(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the limit of new tokens; raise RefusedRequest if it is too high."""
        names = _LIMITS[path]
        given = {name: body[name] for name in names if body.get(name) is not None}
        field, count = next(iter(given.items()), (names[0], None))
        if count is not None and (not isinstance(count, int) or count < 1):
            raise RefusedRequest(f"{field} is not a positive number.", field)
        if self.longest is None:
            return {}
        length = self._length(path, body)
        if length + (count or 1) > self.longest:
            new = "" if count is None else f" and {count} new ones"
            raise RefusedRequest(
                f"The prompt has {length} tokens{new}, but the model takes "
                f"{self.longest} in all. Shorten the prompt, or lower {names[0]}.",
                "prompt" if path == COMPLETIONS else "messages",
            )
        return {field: count or min(self.longest - length, _NEW_TOKENS)}

    def _length(self, path: str, body: dict[str, Any]) -> int:
        """Return the number of tokens of a request's prompt."""
        if path == COMPLETIONS:
            prompt = body.get("prompt", "")
            if not isinstance(prompt, str):
                raise RefusedRequest("The prompt is not a string.", "prompt")
            return len(self.tokenizer(prompt, verbose=False)["input_ids"])
        try:
            messages = chat_messages(path, body)
            text = self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=False,
                tools=body.get("tools"),
            )
        except Exception as error:
            # The template is a program of the model's, which may raise anything.
            raise RefusedRequest(
                f"The messages do not fit the model's chat template "
                f"({type(error).__name__}: {' '.join(str(error).split())[:120]}).",
                "messages",
            ) from error
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _sampled(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a generation config that samples, if the request asks for it.

        By itself the server passes a temperature on to a model that does not sample.
        """
        asked = body.get("temperature"), body.get("top_p")
        if body.get("generation_config") is not None or not any(asked):
            return {}
        if body.get("temperature") == 0:
            return {}
        return {"generation_config": json.dumps(self.generation | {"do_sample": True})}


def rules_for(
    model: str, opened: BlockwiseModel, trust_remote_code: bool
) -> RequestRules:
    """Return the rules for a model.

    Args:
        model: Its name, as the user gave it.
        opened: The same model.
        trust_remote_code: Whether Python code that comes with the model may run.
    """
    folder, config = opened.checkpoint.folder, opened.meta_model.config
    return RequestRules(
        name=model,
        folder=str(folder),
        tokenizer=load_tokenizer(folder, trust_remote_code),
        longest=longest_sequence(config),
        generation=_generation(folder, config),
        ignored=ignored_fields(),
    )


def _generation(folder: Path, config: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the contents of a model's generation config, as transformers loads it."""
    try:
        loaded = GenerationConfig.from_pretrained(folder)
    except OSError:  # there is no generation_config.json
        loaded = GenerationConfig.from_model_config(config)
    return loaded.to_diff_dict()


def _asks_nothing(name: str, value: object) -> bool:
    """Whether the value of an ignored field asks for what is done anyway."""
    default = _DEFAULTS.get(name)
    same_kind = isinstance(value, bool) == isinstance(default, bool)
    return value is None or (same_kind and value == default)
