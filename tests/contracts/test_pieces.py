"""Tokenized in pieces, a text has the tokens that it has as a whole."""

import random
import re

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from halve.calibration import pieces
from halve.calibration.pieces import cutter_for
from halve.calibration.tokens import TextEncoder
from tests.tables import BUNDLED

# The patterns of GPT-4's, Llama 3's, GPT-4o's and BLOOM's tokenizers.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001
SPACE = "▁"


def by_pattern(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level(pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False
    )


def sentencepiece(normalizer, pre_tokenizer=None):
    """As Llama 2 and Gemma: the model sees the whole text, spaces replaced."""
    tokenizer = Tokenizer(models.BPE(fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    # Trained on words, so that no token has a space within.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return tokenizer, trainers.BpeTrainer(vocab_size=600, show_progress=False)


def unigram(pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=["<unk>"], show_progress=False
    )


LLAMA2 = normalizers.Sequence(
    [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
)
GEMMA = normalizers.Replace(" ", SPACE)
# Row -> tokenizer and trainer, and what replaces its pre-tokenizer after training.
TOKENIZERS = {
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "roberta": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "smollm2": lambda: byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    ),
    "qwen": lambda: byte_level(by_pattern(LLAMA3), normalizers.NFC()),
    "llama3": lambda: byte_level(by_pattern(LLAMA3)),
    "gpt-4o": lambda: byte_level(by_pattern(GPT4O)),
    "bloom": lambda: byte_level(by_pattern(BLOOM)),
    "llama2": lambda: sentencepiece(LLAMA2),
    "gemma": lambda: sentencepiece(GEMMA),
    "t5": lambda: unigram(pre_tokenizers.Metaspace()),
    "xlm-r": lambda: unigram(
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        normalizers.Replace(Regex(" {2,}"), " "),
    ),
    "bert": wordpiece,
}
# What stands in for the pre-tokenizer once the tokenizer is trained.
AFTERWARDS = {
    "llama2": None,
    "gemma": pre_tokenizers.Split(" ", "merged_with_previous"),
}


@pytest.fixture(scope="module")
def trained(text):
    """Return a function from a row to its tokenizer, trained on a part of the text."""
    made = {}

    def tokenizer(row):
        if row not in made:
            backend, trainer = TOKENIZERS[row]()
            lines = text.read_text()[:120_000].splitlines(keepends=True)
            backend.train_from_iterator([*lines, ODD], trainer)
            if row in AFTERWARDS:
                backend.pre_tokenizer = AFTERWARDS[row]
            made[row] = backend
        return made[row]

    return tokenizer


ODD = (
    "naïve cafe\u0301 ﬁ Ω \U0001f469\u200d\U0001f4bb 中文。\n下一行 "
    "x\u00a0y  z\t\tw \r\nwin\r\n\n\n   deep\n"
    " \n = Title = \n , 1 234 567.89 'll don't "
    "<mask> a<mask> b</s> c </s>d\ne\u3000f … x ▁ y▁z "
)


def odd_text(seed):
    """Return words and odd parts in an order that is drawn."""
    rng = random.Random(seed)
    words = [*ODD.split(" "), "word", "of", "12", "\n", "  ", "", ".\n", "Ünder"]
    return "".join(
        rng.choice(words) + rng.choice(["", " ", " ", "\n"]) for _ in range(4000)
    )


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "_SIZE", 400)
    monkeypatch.setattr(pieces, "_CONTEXT", 60)


def parts_of(text, seed=0):
    rng = random.Random(seed)
    while text:
        size = rng.randint(1, 900)
        yield text[:size]
        text = text[size:]


def check_pieces(backend, text):
    """Compare the tokens of pieces with those of the whole; return the pieces."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    cutter = cutter_for(tokenizer)
    assert cutter is not None
    whole = TextEncoder(tokenizer)(text)
    assert TextEncoder(tokenizer, cutter=cutter)(text) == whole
    found = list(TextEncoder(tokenizer, cutter=cutter).stream(parts_of(text)))
    assert [token for ids in found for token in ids] == whole
    return list(cutter.pieces(parts_of(text)))


@pytest.mark.parametrize("row", TOKENIZERS)
def test_pieces_have_the_tokens_of_the_whole(row, trained, text):
    backend = trained(row)
    source = text.read_text()[150_000:170_000]
    prose = re.sub(r"\s+", " ", source)
    for sample in (source, prose, odd_text(0), odd_text(1)):
        found = check_pieces(backend, sample)
        assert len(found) > len(sample) / 1500
        assert max(map(len, found)) < 3000


@pytest.mark.parametrize("row", ["llama2", "gpt2", "t5"])
def test_special_tokens_are_where_they_are_in_the_whole(row, trained, text):
    backend = Tokenizer.from_str(trained(row).to_str())
    backend.add_special_tokens(
        ["<s>", "</s>", AddedToken("<mask>", lstrip=True, rstrip=True, special=True)]
    )
    backend.add_tokens(["def main", AddedToken("  ", normalized=False)])
    ids = {name: backend.token_to_id(name) for name in ("<s>", "</s>")}
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=list(ids.items())
    )
    marked = text.read_text()[:20_000].replace("return", "<mask> </s> x")
    rng = random.Random(3)
    near = ["a b</s> c ", "d\n</s>e ", "fghij ", "k lm "]
    dense = "".join(rng.choice(near) for _ in range(3000))
    assert len(check_pieces(backend, marked + odd_text(2) + dense)) > 10


def test_a_merge_across_spaces_forbids_the_cut(trained):
    """A byte-pair encoding that sees the whole text, with a token `a▁b`."""
    words = ["a", "b", SPACE, f"a{SPACE}", f"a{SPACE}b"]
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [("a", SPACE), (f"a{SPACE}", "b")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.normalizer = GEMMA
    cutter = pieces.Cutter(backend)
    text = "b b b a b a b " * 200
    assert {piece[-1] for piece in cutter.pieces([text])} <= {"b", " "}
    assert cutter.last_cut("a " * 500, 500) is None
    assert list(cutter.pieces(["a " * 500])) == ["a " * 500]


UNKNOWN = {
    "look-behind": by_pattern(r"(?<=a) b|\s+|\S+"),
    "anchor": by_pattern(r"^a|\s+|\S+"),
    "word boundary": by_pattern(r"\b\w+|\s+|."),
    "scripts": pre_tokenizers.UnicodeScripts(),
}


@pytest.mark.parametrize("row", UNKNOWN)
def test_what_may_look_elsewhere_is_not_cut(row, trained):
    backend = Tokenizer.from_str(trained("gpt2").to_str())
    backend.pre_tokenizer = UNKNOWN[row]
    assert cutter_for(PreTrainedTokenizerFast(tokenizer_object=backend)) is None


def test_a_unigram_model_that_sees_the_whole_text_is_not_cut(trained):
    """Rounding of the scores summed before a word may decide between its ties."""
    backend = Tokenizer.from_str(trained("t5").to_str())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    assert cutter_for(PreTrainedTokenizerFast(tokenizer_object=backend)) is None


def test_a_text_without_a_place_to_cut_is_one_piece():
    cutter = cutter_for(AutoTokenizer.from_pretrained(BUNDLED))
    assert cutter is not None
    assert list(cutter.pieces(["x" * 5000])) == ["x" * 5000]
    assert list(cutter.pieces([])) == [""]


def test_no_piece_is_much_longer_than_asked_for(text):
    cutter = cutter_for(AutoTokenizer.from_pretrained(BUNDLED))
    assert cutter is not None
    source = text.read_text()[:100_000]
    found = list(cutter.pieces([source]))
    assert "".join(found) == source
    assert max(map(len, found)) <= 4 * pieces._SIZE
