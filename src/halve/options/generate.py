"""Options of generating text."""

from dataclasses import dataclass
from typing import Annotated, TypedDict

from halve.errors import HalveError
from halve.option import SAMPLING, Option, check_ranges, documented
from halve.options.choices import ACTIVATION_CHOICES
from halve.options.shared import Activations, Device, TrustRemoteCode, check_device


@documented
@dataclass(frozen=True)
class GenerateOptions:
    """Options of generating text."""

    max_new_tokens: Annotated[
        int | None,
        Option(
            "Maximum number of tokens to generate.",
            unit="tokens",
            unset="64; in a chat 1024, or what the model's context leaves",
            minimum=1,
        ),
    ] = None
    temperature: Annotated[
        float,
        Option(
            "Divides the logits before sampling; 0 takes the most likely token.",
            SAMPLING,
            minimum=0,
        ),
    ] = 0.0
    top_p: Annotated[
        float,
        Option(
            "Sample from the most likely tokens that together have this probability.",
            SAMPLING,
            minimum=0,
            maximum=1,
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        Option(
            "Sample from this many most likely tokens; 0 for all.", SAMPLING, minimum=0
        ),
    ] = 0
    seed: Annotated[int, Option("Seed for sampling.", SAMPLING, minimum=0)] = 0
    device: Device = "auto"
    activations: Activations = "int16"
    trust_remote_code: TrustRemoteCode = False

    def check(self) -> None:
        """Raise HalveError on the first option, or combination, that is invalid."""
        check_device(self.device)
        check_ranges(self)
        if self.activations not in ACTIVATION_CHOICES:
            raise HalveError(
                f"There is no {self.activations!r} for activations.",
                f"Choose one of {', '.join(ACTIVATION_CHOICES)} (--activations).",
            )
        if not self.top_p:
            raise HalveError(
                "top_p is 0, which leaves no token to sample.",
                "Set top_p above 0 (--top-p), or temperature to 0 for the most likely "
                "token (--temperature).",
            )
        self._check_sampling()

    def _check_sampling(self) -> None:
        default = GenerateOptions
        chosen = (self.top_p, self.top_k, self.seed)
        if self.temperature or chosen == (default.top_p, default.top_k, default.seed):
            return
        raise HalveError(
            "top_p, top_k or seed was given, but temperature is 0, so that nothing is "
            "sampled.",
            "Set temperature above 0 (--temperature 0.7).",
        )


class GenerateKeywords(TypedDict, total=False):
    """The fields of `GenerateOptions` as keywords."""

    max_new_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int
    device: str
    activations: str
    trust_remote_code: bool
