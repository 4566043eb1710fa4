"""Requests that the server would answer otherwise than asked are refused."""

import json

import pytest

from halve._compat.serving import CHAT, COMPLETIONS, RESPONSES, can_serve
from halve.calibration import load_tokenizer
from halve.integrations.serving.rules import (
    RefusedRequest,
    RequestRules,
    rules_for,
)
from halve.runtime.blockwise_model import BlockwiseModel
from tests.tables import BUNDLED

pytestmark = pytest.mark.skipif(not can_serve(), reason="halve[serve] is missing")

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "words"}]
# Path -> a request that is answered.
PLAIN = {
    COMPLETIONS: {"prompt": "words"},
    CHAT: {"messages": MESSAGES},
    RESPONSES: {"input": "words"},
}


@pytest.fixture(scope="module")
def rules():
    """Return the rules for the bundled model, with a chat template."""
    model = BlockwiseModel.open(BUNDLED, "cpu")
    made = rules_for("./model", model, False)
    made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("path", PLAIN)
def test_a_plain_request_is_limited_by_the_context(path, rules):
    body = rules.checked(path, PLAIN[path] | {"model": "./model"})
    assert body["model"] == str(BUNDLED)
    (limit,) = [body[name] for name in body if name.startswith("max_")]
    assert 200 < limit < 256


@pytest.mark.parametrize(
    "change",
    [
        {"n": 1},
        {"logprobs": False},
        {"user": "someone"},
        {"stream_options": {"include_usage": True}},
        {"presence_penalty": 0.0},
        {"n": None},
    ],
    ids=str,
)
def test_fields_that_ask_for_nothing_are_accepted(change, rules):
    rules.checked(CHAT, PLAIN[CHAT] | change)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_tokens": 256}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"messages": [{"content": "words"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "messages"),
    ],
    ids=str,
)
def test_other_requests_are_refused_with_the_field_to_blame(change, field, rules):
    with pytest.raises(RefusedRequest) as refused:
        rules.checked(CHAT, PLAIN[CHAT] | change)
    assert refused.value.field == field
    assert refused.value.message.endswith(".")


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_messages_need_a_chat_template(path, rules):
    bare = RequestRules(
        rules.name, rules.folder, load_tokenizer(BUNDLED), 256, {}, rules.ignored
    )
    with pytest.raises(RefusedRequest, match="chat template"):
        bare.checked(path, PLAIN[path])


def test_a_temperature_lets_the_model_sample(rules):
    body = rules.checked(COMPLETIONS, {"prompt": "words", "temperature": 0.7})
    config = json.loads(body["generation_config"])
    assert config["do_sample"]
    assert config["eos_token_id"] == rules.generation["eos_token_id"]
    greedy = rules.checked(COMPLETIONS, {"prompt": "words", "temperature": 0})
    assert "generation_config" not in greedy
