"""`halve chat`."""

from typing import TYPE_CHECKING, Annotated

from halve.cli.generate import print_piece
from halve.cli.options import Model, with_options
from halve.option import Option
from halve.options import GenerateOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from halve.completion import Completer, Message

EXAMPLES = """
**Examples**

`halve chat ./llama-chat-half`

`halve chat ./llama-chat-half --system "Answer briefly." --temperature 0.7`
"""

_HELP = "Type a message. /new starts again, /exit or Ctrl-D ends."


@with_options(panels=True)
def command(
    model: Model,
    options: GenerateOptions,
    system: Annotated[
        str | None,
        Option("Message of the system before the conversation.", unset="none"),
    ] = None,
) -> None:
    """Talk to a model, dense or pruned, that has a chat template.

    Each line of standard input is a message; the reply appears as it is generated.
    """
    from transformers.utils.logging import disable_progress_bar

    from halve.completion import Completer

    disable_progress_bar()
    completer = Completer.open(model, options)
    completer.check_chats()
    start = [] if system is None else [_message("system", system)]
    messages = start
    for line in _lines():
        messages = start if line == "/new" else _answered(completer, messages, line)


def _lines() -> "Iterator[str]":
    """Yield what the user types, until it is /exit or there is no more."""
    import sys

    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print(_HELP)
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def _answered(
    completer: "Completer", messages: "list[Message]", text: str
) -> "list[Message]":
    """Print the reply to a message; return the conversation with both."""
    asked = [*messages, _message("user", text)]
    reply = completer.reply(asked, on_text=print_piece)
    print()
    return [*asked, _message("assistant", reply)]


def _message(role: str, content: str) -> "Message":
    return {"role": role, "content": content}
