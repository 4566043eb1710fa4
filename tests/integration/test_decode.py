"""Decoding by Halve's kernels generates what plain `generate` does."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

import halve
from halve.measure.speed import bench_cases, measure_speed
from halve.runtime import decode, generation
from halve.runtime.cpu.attention import ATTENTION, attend
from halve.runtime.cpu.kernels import kernels
from halve.runtime.growing_cache import GrowingCache, GrowingLayer
from halve.runtime.llama_step import LlamaStep
from tests.tables import FAMILIES

# Families whose attention transformers does not let others provide, or whose own is
# not `sdpa`.
PLAIN = ("bloom", "gptj", "codegen", "gemma2", "falcon", "falcon-40b", "mpt")
# Row -> options with which the whole step is one call.
STEPS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load(folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def some_ids(batch=1, length=20):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 4096, (batch, length), generator=generator)


def generate(model, batch=1, padding=0, **options):
    ids = some_ids(batch)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    plain = {
        "max_new_tokens": 60,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return model.generate(ids, attention_mask=mask, **(plain | options))


@pytest.fixture
def packed(pico, tmp_path):
    """Return a function from a row of `tables` to the folder of its packed model."""

    def folder(row, quantize=None, **options):
        source, out = pico(row, **(STEPS.get(row, {}) | options)), tmp_path / row
        halve.prune(source, out, solver="magnitude", quantize=quantize, packed=True)
        return out

    return folder


def prepared(folder) -> Any:
    model = generation.load(folder, "cpu")
    assert decode.prepare(model) is None
    return model


@pytest.mark.parametrize("row", FAMILIES)
@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (2, 0), (2, 5)])
def test_greedy_tokens_are_those_of_plain_generate(row, batch, padding, pico):
    model = load(pico(row))
    expected = generate(model, batch, padding)
    reason = decode.prepare(model)
    assert (reason is not None) == (row in PLAIN), reason
    assert torch.equal(generate(model, batch, padding), expected)


@pytest.mark.parametrize("row", [*STEPS, "opt"])
@pytest.mark.parametrize("quantize", [None, "int4"])
@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (3, 0), (2, 5)])
def test_packed_models_generate_the_same_tokens(row, quantize, batch, padding, packed):
    folder = packed(row, quantize)
    expected = generate(load(folder), batch, padding)
    model = prepared(folder)
    cache = decode.new_cache(model)
    tokens = generate(model, batch, padding, past_key_values=cache)
    assert torch.equal(tokens, expected)
    assert isinstance(cache, GrowingCache)
    assert (cache.step is not None) == (row in STEPS and padding == 0)


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3}])
def test_sampling_and_beams_are_those_of_plain_generate(options, packed):
    folder = packed("llama")
    torch.manual_seed(0)
    expected = generate(load(folder), **options)
    torch.manual_seed(0)
    assert torch.equal(generate(prepared(folder), **options), expected)


def logits_of_each(model, cache, ids):
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        return [
            model(ids[:, i : i + 1], past_key_values=cache).logits for i in (20, 21)
        ]


@pytest.fixture(params=["avx512bf16", "avx512f", "avx2", "neon", "reference"])
def kernel(request):
    loaded = kernels()
    assert loaded is not None
    if request.param not in loaded.available:
        pytest.skip(f"this CPU cannot run {request.param}")
    before = loaded.name
    loaded.select(request.param)
    yield
    loaded.select(before)


# The step rounds where the code of the model does.
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("row", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_computes_what_the_models_code_does(row, dtype, packed):
    model = prepared(packed(row, dtype=dtype))
    by_step, by_code = GrowingCache(model.config), GrowingCache(model.config)
    by_code.obstacle = "to compare"
    found = logits_of_each(model, by_step, some_ids(2, 22))
    expected = logits_of_each(model, by_code, some_ids(2, 22))
    assert isinstance(by_step.step, LlamaStep)
    for mine, theirs in zip(found, expected, strict=True):
        step = torch.finfo(dtype).eps
        assert torch.allclose(mine, theirs, rtol=2 * step, atol=2 * step)


def obstacle(model) -> str | None:
    cache = GrowingCache(model.config)
    logits_of_each(model, cache, some_ids(1, 22))
    return cache.obstacle


def test_what_no_step_supports_runs_the_models_code(packed, pico):
    window = prepared(pico("mistral"))
    assert "window" in obstacle(window)  # type: ignore[operator]
    model = prepared(packed("llama"))
    assert obstacle(model) is None
    model.model.layers[1].register_forward_hook(lambda *_: None)
    assert "hooks" in obstacle(model)  # type: ignore[operator]
    plain = prepared(packed("qwen2"))
    plain.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 128, bias=False)
    assert "Linear" in obstacle(plain)  # type: ignore[operator]


def test_a_step_follows_what_is_done_to_the_cache(packed):
    model = prepared(packed("llama"))
    growing: Any = GrowingCache(model.config)
    plain: Any = DynamicCache(config=model.config)
    changes = [
        lambda cache: cache.crop(-7),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
    ]
    ids = some_ids(2, 22)
    for change in changes:
        found = logits_of_each(model, growing, ids)
        expected = logits_of_each(model, plain, ids)
        assert growing.step is not None
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)
        change(growing)
        change(plain)
        ids = ids[: growing.layers[0].keys.shape[0]]
    assert growing.get_seq_length() == plain.get_seq_length()


def test_a_step_outlives_a_full_buffer(packed):
    folder = packed("llama", max_position_embeddings=1024)
    expected = generate(load(folder), max_new_tokens=400)
    assert torch.equal(generate(prepared(folder), max_new_tokens=400), expected)


def test_without_kernels_a_model_decodes_as_before(pico, monkeypatch):
    monkeypatch.setattr(decode, "kernels", lambda: None)
    model = load(pico("llama"))
    reason = decode.prepare(model)
    assert reason is not None
    assert "kernels" in reason
    assert decode.new_cache(model) is None


def test_prepared_model_still_learns_and_is_saved(pico, tmp_path):
    model = load(pico("llama"))
    ids = torch.tensor([[5]])

    def gradient():
        return torch.autograd.grad(model(ids).logits.sum(), model.lm_head.weight)[0]

    expected = gradient()
    decode.prepare(model)
    assert torch.equal(gradient(), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(ids).logits, load(pico("llama"))(ids).logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 1)])
@pytest.mark.parametrize("width", [16, 80, 128])
def test_attention_is_that_of_torch(dtype, heads, width):
    torch.manual_seed(0)
    kernel = kernels()
    assert kernel is not None
    room = torch.randn(2, 2, heads[1], 50, width).to(dtype)
    keys, values = room[:, :, :, :37]
    query = torch.randn(2, 1, heads[0], width).to(dtype).transpose(1, 2)
    out = attend(kernel, query, keys, values, 0.3)
    wide = query.double(), keys.double(), values.double()
    expected = functional.scaled_dot_product_attention(
        wide[0], wide[1], wide[2], scale=0.3, enable_gqa=True
    )
    step = torch.finfo(dtype).eps
    assert torch.allclose(out.double(), expected.transpose(1, 2), rtol=step, atol=1e-6)


def test_cache_holds_what_transformers_own_does(pico):
    torch.manual_seed(0)
    config = load(pico("llama")).config
    growing: Any = GrowingCache(config)
    plain: Any = DynamicCache(config=config)
    assert type(growing.layers[0]) is GrowingLayer
    for tokens in (3, 1, 300, 1, 1, 500):
        keys, values = torch.randn(2, 2, 2, tokens, 16)
        for cache in (growing, plain):
            cache.update(keys, values, 0)
        if tokens == 300:
            for cache in (growing, plain):
                cache.crop(-100)
                cache.reorder_cache(torch.tensor([1, 0]))
        assert growing.get_seq_length() == plain.get_seq_length()
        assert torch.equal(growing.layers[0].keys, plain.layers[0].keys)
        assert torch.equal(growing.layers[0].values, plain.layers[0].values)
    for cache in (growing, plain):
        cache.reset()
    assert growing.get_seq_length() == plain.get_seq_length() == 0


@pytest.fixture
def steps(monkeypatch):
    """Count the tokens that steps decode."""
    decoded = []
    original = LlamaStep.decode

    def spy(step, ids):
        decoded.append(ids.shape[0])
        return original(step, ids)

    monkeypatch.setattr(LlamaStep, "decode", spy)
    return decoded


def test_generate_and_bench_decode_by_steps(packed, steps):
    folder = packed("llama")
    halve.generate(folder, "def main(", max_new_tokens=5)
    assert steps == [1] * 4  # the first token is that of the prompt
    steps.clear()
    records = measure_speed(folder, bench_cases(0, 3, (1, 2)), 1)
    assert [record.decoding for record in records if record.backend == "torch"] == [
        "transformers"
    ] * 2
    assert {r.decoding for r in records if r.backend != "torch"} == {"halve"}
    # Dense and packed, a round to warm up and one that counts.
    assert sorted(steps) == [1] * 12 + [2] * 12


def test_models_that_are_served_decode_by_steps(packed, steps, monkeypatch):
    # Only here: it fails before transformers has imported its quantizers.
    from halve.integrations.transformers.quantizer import HalveQuantizer  # noqa: PLC0415

    monkeypatch.setattr(HalveQuantizer, "prepares_decoding", True)
    model = load(packed("llama"))
    assert model.config._attn_implementation == ATTENTION
    generate(model)
    assert len(steps) == 59
