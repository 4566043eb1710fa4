"""The chat template of a model, by which conversations become text."""

from functools import cached_property
from pathlib import Path
from typing import Any

from halve.calibration.documents import Messages
from halve.calibration.tokens import load_tokenizer
from halve.errors import CalibrationError


class ChatTemplate:
    """Renders conversations as the model was trained to see them.

    The tokenizer is loaded when the first one is rendered: most texts have none.

    Attributes:
        folder: Folder of the model.
        trust_remote_code: Allow Python code that comes with the model to run.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.trust_remote_code = trust_remote_code

    def __call__(self, messages: Messages) -> str:
        """Return the text of a conversation, without a BOS that is added to any text.

        Raises:
            CalibrationError: The model has no chat template, or it refuses these
                messages.
        """
        tokenizer = self._tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise CalibrationError(
                f"The tokenizer in {self.folder} has no chat template for "
                "conversations.",
                "Name a column of texts (DATA:CONFIG:SPLIT:COLUMN), or put a "
                "chat_template.jinja into the folder.",
            )
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates are code that comes with the model
            raise CalibrationError(
                f"The chat template of {self.folder} cannot render it "
                f"({type(error).__name__}: {' '.join(str(error).split())[:160]}).",
                "Correct or remove that conversation, or name another column.",
            ) from error
        return text.removeprefix(self._automatic_bos)

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401
        return load_tokenizer(self.folder, self.trust_remote_code)

    @cached_property
    def _automatic_bos(self) -> str:
        """The BOS token, if the tokenizer puts one before any text; else nothing.

        Many templates begin with it, too.
        """
        tokenizer = self._tokenizer
        first = list(tokenizer("", verbose=False)["input_ids"][:1])
        bos = tokenizer.bos_token
        return bos if bos and first == [tokenizer.bos_token_id] else ""
