"""Data sets by configuration, split and column; conversations; lines in errors."""

import json
import shutil

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from halve.calibration import ChatTemplate, load_corpus
from halve.calibration.corpora import Part
from halve.calibration.documents import as_messages
from halve.errors import CalibrationError, HalveError, SourceError
from tests.tables import BUNDLED

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
RENDERED = "user: Hi\nassistant: Yes\n"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def render(messages):
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_saved(path, rows):
    Dataset.from_list(rows).save_to_disk(path)


def write_saved_splits(path, rows):
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(path)


# Storage -> the name to read, below a folder, and what writes it there.
STORAGES = {
    "a .jsonl": ("a.jsonl", write_jsonl),
    "a .parquet": ("a.parquet", write_parquet),
    "a folder of .jsonl": ("data/train.jsonl", write_jsonl),
    "a folder of .parquet": ("data/train-00000-of-00001.parquet", write_parquet),
    "a saved data set": ("saved", write_saved),
    "saved splits": ("saved", write_saved_splits),
}
over_storages = pytest.mark.parametrize("storage", STORAGES)


@pytest.fixture
def stored(tmp_path):
    """Return a function that stores rows and returns what to pass to read them."""

    def store(storage, rows):
        name, write = STORAGES[storage]
        write(tmp_path / name, rows)
        return str(tmp_path / name.partition("/")[0])

    return store


def documents(name, part: Part = "calibration", render=render):
    return load_corpus(name, part, render).documents


@over_storages
def test_a_column_is_found_by_its_name(storage, stored):
    """As in Wikipedia's rows, the text is neither the first column nor the last."""
    rows = [{"id": str(n), "text": f"words {n}", "url": "u"} for n in range(3)]
    assert documents(stored(storage, rows)) == ("words 0", "words 1", "words 2")


@over_storages
def test_a_column_can_be_named(storage, stored):
    name = stored(storage, [{"text": "a", "body": "b"}])
    assert documents(f"{name}:::body") == ("b",)
    with pytest.raises(CalibrationError, match=r"no column `other` .*`text`, `body`"):
        documents(f"{name}:::other")


@over_storages
def test_no_column_is_guessed(storage, stored):
    name = stored(storage, [{"id": "1", "instruction": "Say hi."}])
    with pytest.raises(CalibrationError, match=r"`text` or .*`id`, `instruction`"):
        documents(name)


@over_storages
def test_rows_without_text_are_left_out(storage, stored):
    assert documents(stored(storage, [{"text": None}, {"text": "a"}])) == ("a",)


@over_storages
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_conversations_are_rendered(storage, column, stored):
    if column == "conversations":
        who = {"user": "human", "assistant": "gpt"}
        chat = [{"from": who[m["role"]], "value": m["content"]} for m in CHAT]
    else:
        chat = CHAT
    name = stored(storage, [{"id": "1", column: chat}, {"id": "2", column: None}])
    assert documents(name) == (RENDERED,)
    with pytest.raises(CalibrationError, match=r"row 1|line 1"):
        documents(name, render=None)


@over_storages
def test_other_values_are_refused_with_their_row(storage, stored):
    name = stored(storage, [{"text": None}, {"text": 7}])
    with pytest.raises(CalibrationError, match=r"`text` of (row|line) 2 .* a int"):
        documents(name)


def test_splits_and_configurations_can_be_named(tmp_path):
    for split in ("train_sft", "test_sft"):
        write_jsonl(tmp_path / f"chat/{split}.jsonl", [{"text": split}])
    (tmp_path / "chat/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: train_sft\n    path: train_sft.jsonl\n"
        "  - split: test_sft\n    path: test_sft.jsonl\n---\n"
    )
    name = str(tmp_path / "chat")
    assert documents(f"{name}:main:test_sft") == ("test_sft",)
    assert documents(f"{name}::train_sft:text", "evaluation") == ("train_sft",)
    with pytest.raises(SourceError, match="no split train, but train_sft, test_sft"):
        documents(name)
    with pytest.raises(SourceError, match="no split test, but"):
        documents(f"{name}:main", "evaluation")
    with pytest.raises(HalveError, match="other"):
        documents(f"{name}:other")


def test_an_evaluation_reads_the_test_split(tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"d/{split}.jsonl", [{"text": split}])
    assert documents(str(tmp_path / "d")) == ("train",)
    assert documents(str(tmp_path / "d"), "evaluation") == ("test",)


NAMES = {
    "too many parts": ("a:b:c:d:e", "too many parts"),
    "configuration of a file": ("a.jsonl:b:c:text", "neither configurations"),
    "column of a .txt": ("a.txt:text", "no columns"),
    "an empty folder": ("empty", "empty"),
}


@pytest.mark.parametrize("row", NAMES)
def test_names_that_mean_nothing(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("words")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    name, match = NAMES[row]
    with pytest.raises(HalveError, match=match) as error:
        documents(name)
    assert "network" not in str(error.value)


def test_a_file_whose_name_has_a_colon(tmp_path):
    write_jsonl(tmp_path / "a:b.jsonl", [{"text": "a", "b": "c"}])
    assert documents(str(tmp_path / "a:b.jsonl")) == ("a",)


LINES = {
    "not JSON": ('{"text": "a"}\n\n{"text', "line 3"),
    "no object": ('{"text": "a"}\n["text"]', "line 2"),
    "no such key": ('{"text": "a"}\n{"txet": "b"}', "line 2"),
    "not text": ('{"text": "a"}\n{"text": [1]}', "line 2"),
    "not UTF-8": (b'{"text": "a"}\n{"text": "\xe9"}', "line 2"),
    "a bad conversation": ('{"text": "a"}\n{"text": [{"speaker": "a"}]}', "line 2"),
}


@pytest.mark.parametrize("row", LINES)
def test_errors_name_the_line(row, tmp_path):
    contents, line = LINES[row]
    data = contents if isinstance(contents, bytes) else contents.encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(CalibrationError, match=line):
        documents(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    text = "words" if name == "a.txt" else '{"text": "words"}'
    (tmp_path / name).write_text(text, "utf-8-sig")
    assert documents(str(tmp_path / name)) == ("words",)


MESSAGES = {
    "nulls of other messages": ([CHAT[0] | {"tool_calls": None}], [CHAT[0]]),
    "an object of lists": ({"role": ["user"], "content": ["Hi"]}, [CHAT[0]]),
    "an unknown role": (
        [{"from": "observer", "value": "x"}],
        [{"role": "observer", "content": "x"}],
    ),
    "none": ([], []),
    "numbers": ([1, 2], None),
    "texts": (["a"], None),
    "unequal lists": ({"role": ["user"], "content": []}, None),
    "an object": ({"role": "user"}, None),
}


@pytest.mark.parametrize("row", MESSAGES)
def test_messages_of_all_forms(row):
    value, expected = MESSAGES[row]
    assert as_messages(value) == expected


@pytest.fixture
def chat_model(tmp_path):
    folder = shutil.copytree(BUNDLED, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("</s>" + TEMPLATE)
    return folder


def test_the_models_template_renders(chat_model, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    (document,) = documents(str(tmp_path / "a.jsonl"), render=ChatTemplate(chat_model))
    assert document == "</s>" + RENDERED  # this tokenizer adds no BOS by itself


def test_a_bos_that_is_added_to_any_text_is_not_doubled(chat_model, monkeypatch):
    template = ChatTemplate(chat_model)
    assert template._tokenizer("")["input_ids"] == []
    template._tokenizer.add_bos_token = True
    monkeypatch.setattr(type(template), "_automatic_bos", "</s>")
    assert template(CHAT) == RENDERED


FAILING = {
    "raises": "{{ raise_exception('roles must alternate') }}",
    "broken": "{% for %}",
    "none": None,
}


@pytest.mark.parametrize("row", FAILING)
def test_templates_that_fail(row, chat_model, tmp_path):
    (chat_model / "chat_template.jinja").unlink()
    if (template := FAILING[row]) is not None:
        (chat_model / "chat_template.jinja").write_text(template)
    write_jsonl(tmp_path / "a.jsonl", [{"text": None}, {"text": CHAT}])
    with pytest.raises(CalibrationError, match=r"line 2 .*: The (chat|tokenizer)"):
        documents(str(tmp_path / "a.jsonl"), render=ChatTemplate(chat_model))


def test_a_conversation_of_a_parquet_that_expands_is_refused(tmp_path):
    """A megabyte that is repeated in a thousand messages takes a megabyte on disk."""
    chat = [{"role": "user", "content": "a" * 2**20}] * 1000
    write_parquet(tmp_path / "a.parquet", [{"messages": chat}])
    with pytest.raises(CalibrationError, match="larger than the file"):
        documents(str(tmp_path / "a.parquet"))
