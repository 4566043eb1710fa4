"""`halve serve` speaks the OpenAI API with a packed model."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

import halve
from tests.tables import BUNDLED

PROMPT = "def main("
TIMEOUT = 60  # seconds; generous, for a busy machine
MESSAGES = [{"role": "user", "content": "hi"}]
# Path, request, and a word of the answer.
REFUSED = [
    ("chat/completions", {"messages": MESSAGES}, "chat template"),
    ("responses", {"input": "hi"}, "chat template"),
    ("completions", {"prompt": "word " * 400}, "256"),
    ("completions", {"prompt": "word", "max_tokens": 256}, "max_tokens"),
    ("completions", {"prompt": "word", "n": 2}, "n=2"),
    ("completions", {"prompt": "word", "logprobs": 1}, "logprobs"),
]


@pytest.fixture
def server(tmp_path):
    halve.prune(BUNDLED, tmp_path / "model", solver="magnitude", packed=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "halve", "serve", tmp_path / "model"]
    process = subprocess.Popen([*command, "--port", str(port)])
    try:
        yield tmp_path / "model", f"http://localhost:{port}"
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return json.load(answer)


def ask_for_text(url, body):
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return answer.read().decode()


def refusal(url, body):
    """Return the sentence with which a request is refused."""
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(url, body)
    assert error.value.code == 400
    return json.load(error.value)["error"]["message"]


def wait_for(url):
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        try:
            return ask(url)
        except urllib.error.URLError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not answer")


def test_server_completes_a_prompt_as_generate_does(server):
    folder, url = server
    assert wait_for(f"{url}/health") == {"status": "ok"}
    body = {"model": str(folder), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    answer = ask(f"{url}/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == 12
    whole = halve.generate(folder, PROMPT, max_new_tokens=12)
    assert PROMPT + answer["choices"][0]["text"] == whole
    (model,) = ask(f"{url}/v1/models")["data"]
    assert model["id"] == str(folder)
    for path, change, word in REFUSED:
        message = refusal(f"{url}/v1/{path}", {"model": model["id"], **change})
        assert word in message, (path, change)
    streamed = ask_for_text(f"{url}/v1/completions", body | {"stream": True})
    assert streamed.startswith("data: ")
