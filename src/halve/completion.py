"""Continue a text or a conversation with a whole model in memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, TextStreamer

from halve.calibration import TokenTexts, load_tokenizer
from halve.checkpoint import resolve_model
from halve.errors import HalveError
from halve.models import longest_sequence
from halve.options import GenerateOptions
from halve.records import GeneratedToken
from halve.runtime import decode
from halve.runtime.cuda.greedy import continue_greedily, has_greedy_loop
from halve.runtime.generation import check_context, load, with_plain_decoding

# A message of a conversation: `role` and `content`.
Message = dict[str, str]
OnText = Callable[[str], None]
# New tokens by default, of a text and of a reply.
_NEW_TOKENS, _REPLY_TOKENS = 64, 1024


@dataclass(frozen=True)
class Completer:
    """A loaded model that continues texts.

    Attributes:
        name: The model's name, for errors.
        model: One of transformers' model classes.
        tokenizer: One of transformers' tokenizer classes.
        options: How tokens are chosen, and how many at most.
    """

    name: str
    model: Any
    tokenizer: Any
    options: GenerateOptions

    @classmethod
    def open(cls, model: str | Path, options: GenerateOptions) -> "Completer":
        """Load a model and its tokenizer.

        Raises:
            HalveError: An option is invalid; and whatever `halve.load` raises.
        """
        options.check()
        trusted = options.trust_remote_code
        loaded = load(model, options.device, trusted, options.activations)
        loaded = with_plain_decoding(loaded)
        tokenizer = load_tokenizer(resolve_model(model), trusted)
        decode.prepare(loaded)
        return cls(str(model), loaded, tokenizer, options)

    def complete(self, prompt: str, on_text: OnText | None = None) -> str:
        """Return a prompt with its continuation.

        Args:
            prompt: Text to continue.
            on_text: Called with each piece of the result, prompt included, as soon as
                it is known.

        Raises:
            HalveError: The prompt is empty, or too long for the model.
        """
        inputs = self.tokenizer(prompt, return_tensors="pt", verbose=False)
        count = self.options.max_new_tokens or _NEW_TOKENS
        ids = self._continue(inputs, count, on_text, skip_prompt=False)
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def tokens_after(self, prompt: Tensor) -> tuple[GeneratedToken, ...]:
        """Return the tokens that the model generates after a prompt.

        Args:
            prompt: Token ids, [length], int64.

        Raises:
            HalveError: The prompt is too long for the model.
        """
        length = len(prompt)
        longest = longest_sequence(self.model.config) or length + _NEW_TOKENS
        count = min(self.options.max_new_tokens or _NEW_TOKENS, longest - length)
        inputs = BatchEncoding(
            {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt)[None]}
        )
        ids = self._continue(inputs, count, None, skip_prompt=True).tolist()
        texts = TokenTexts(self.tokenizer)
        return tuple(
            GeneratedToken(ids[place], texts.last(ids[: place + 1]))
            for place in range(length, len(ids))
        )

    def check_chats(self) -> None:
        """Raise HalveError if the tokenizer has no chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise HalveError(
                f"The tokenizer of {self.name} has no chat template, so the model was "
                "probably not trained on conversations.",
                "Continue a text with `halve generate`, or pass a model that was tuned "
                "for chat.",
            )

    def reply(self, messages: Sequence[Message], on_text: OnText | None = None) -> str:
        """Return the model's next message of a conversation.

        Args:
            messages: The conversation, in turns of `user` and `assistant`.
            on_text: Called with each piece of the reply as soon as it is known.

        Raises:
            HalveError: There is no chat template, or the conversation is too long.
        """
        self.check_chats()
        inputs = self.tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        length = inputs["input_ids"].shape[1]
        longest = longest_sequence(self.model.config) or length + _REPLY_TOKENS
        left = max(min(longest - length, _REPLY_TOKENS), 1)
        count = self.options.max_new_tokens or left
        ids = self._continue(inputs, count, on_text, skip_prompt=True)
        new = ids[length:]
        return self.tokenizer.decode(new, skip_special_tokens=True)

    @torch.no_grad()
    def _continue(
        self,
        inputs: Any,  # noqa: ANN401
        count: int,
        on_text: OnText | None,
        skip_prompt: bool,
    ) -> Tensor:
        """Return the tokens of a prompt and of its continuation, [length]."""
        inputs = inputs.to(self.model.device)
        ids = inputs["input_ids"]
        check_context(self.model, ids.shape[1], count)
        if self.options.temperature == 0 and has_greedy_loop(self.model):
            tokens = self._continue_on_gpu(ids, count)
            if on_text is not None:  # the loop reports no token before the last
                shown = tokens[ids.shape[1] * skip_prompt :]
                on_text(self.tokenizer.decode(shown, skip_special_tokens=True))
            return tokens
        streamer = on_text and _Streamer(self.tokenizer, on_text, skip_prompt)
        with _seeded(self.options.seed, self.model.device):
            return self.model.generate(
                ids,
                attention_mask=inputs["attention_mask"],
                max_new_tokens=count,
                streamer=streamer,
                **self._sampling(),
            )[0]

    def _continue_on_gpu(self, ids: Tensor, count: int) -> Tensor:
        end = self.model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [] if end is None else [end]
        return continue_greedily(self.model, ids, count, ends)[0]

    def _sampling(self) -> dict[str, Any]:
        options = self.options
        if not options.temperature:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
        }


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let the generators that sample start from a seed; then restore them."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


class _Streamer(TextStreamer):
    """Passes text on instead of printing it."""

    def __init__(self, tokenizer: Any, on_text: OnText, skip_prompt: bool) -> None:  # noqa: ANN401
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)
