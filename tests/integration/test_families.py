"""Every model family through the public entry point, and back into transformers."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import halve
from halve.options import PruneOptions
from halve.pruning.plan import make_plan
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.predictions import all_logits
from halve.runtime.stream import Stream
from tests.tables import FAMILIES, SOLVERS


def _tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", FAMILIES)
def test_logits_of_the_blockwise_model_equal_transformers(row, dtype, pico):
    """Both are computed in float32."""
    folder = pico(row, dtype=dtype)
    ids = torch.randint(3, 4096, (3, 40), generator=torch.Generator().manual_seed(0))
    model = BlockwiseModel.open(folder, "cpu")
    stream = Stream.start(model, ids, budget=2**30)
    for index in range(model.depth):
        with model.block(index) as block:
            stream.advance(block, index)
    blockwise = torch.cat([logits for _, logits in all_logits(stream)])
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(ids, use_cache=False).logits
    assert torch.allclose(blockwise, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ["opt", "llama"])  # a tied head, and an untied one
def test_an_embedding_is_not_widened_for_lookups(row, pico):
    model = BlockwiseModel.open(pico(row, dtype=torch.bfloat16), "cpu")
    table, tied = (
        model.meta_model.lookup_embedding,
        model.meta_model.config.tie_word_embeddings,
    )
    assert table is not None
    with model.surroundings(with_head=False):
        assert table.weight.dtype == torch.bfloat16
    with model.surroundings(with_head=True):
        head = model.meta_model.model.get_output_embeddings()
        assert head.weight.dtype == torch.float32
        assert table.weight.dtype == (torch.float32 if tied else torch.bfloat16)
    unread = make_plan(model.checkpoint.folder, PruneOptions()).layout.unread
    assert len(unread) == (1 if tied else 2)


def test_matrices_of_16_bits_are_not_widened_in_a_block(pico):
    model = BlockwiseModel.open(pico("llama", dtype=torch.bfloat16), "cpu")
    with model.block(0) as block:
        for name, parameter in block.named_parameters():
            narrow = parameter.dim() > 1  # the others are norms
            assert parameter.dtype == (torch.bfloat16 if narrow else torch.float32), (
                name
            )


VARIANTS: dict[str, dict[str, Any]] = {
    name: {"solver": name} for name in SOLVERS if name != "sparsegpt"
}
VARIANTS["refined"] = {"solver": "auto", "refine": True, "epochs": 1}


# Every family with one of them in turn, and two families with all; `make test` leaves
# out the other pairs, which meet no code that those do not.
PAIRS = [
    pytest.param(row, variant, marks=() if in_turn else pytest.mark.slow)
    for number, row in enumerate(FAMILIES)
    for place, variant in enumerate(VARIANTS)
    for in_turn in [row in ("opt", "llama") or number % len(VARIANTS) == place]
]


@pytest.mark.parametrize(("row", "variant"), PAIRS)
def test_every_solver_prunes_every_family(row, variant, pico, text, tmp_path):
    options: dict[str, Any] = {"samples": 4, "seq_len": 32, "device": "cpu"} | VARIANTS[
        variant
    ]
    record = halve.prune(
        pico(row), tmp_path / "out", sparsity="2:4", calibration=str(text), **options
    )
    assert record.sparsity == 0.5
    written = _tensors(tmp_path / "out")
    for matrix in record.all_matrices:
        weight = written[matrix.tensor]
        # Packing keeps every bit, so -0.0 takes the space of a nonzero weight.
        assert not weight[weight == 0].signbit().any(), matrix.tensor


@pytest.mark.parametrize("row", FAMILIES)
def test_a_pruned_family_loads_in_transformers(row, pico, text, tmp_path):
    folder, out = pico(row, dtype=torch.bfloat16), tmp_path / "out"
    record = halve.prune(
        folder, out, calibration=str(text), samples=8, seq_len=32, device="cpu"
    )
    before, after = _tensors(folder), _tensors(out)
    pruned = {m.tensor for block in record.blocks for m in block.matrices}

    assert {n: t.dtype for n, t in before.items()} == {
        n: t.dtype for n, t in after.items()
    }
    zeros = {name: int((after[name] == 0).sum()) for name in pruned}
    weights = sum(after[name].numel() for name in pruned)
    assert sum(zeros.values()) == weights // 2
    for matrix in record.all_matrices:
        elements = matrix.rows * matrix.columns
        assert zeros[matrix.tensor] == round(matrix.sparsity * elements)
        assert elements // 4 <= zeros[matrix.tensor] <= 1 + 3 * elements // 4
    for name in after.keys() - pruned:
        assert torch.equal(after[name], before[name]), name
    info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)[1]  # pyright: ignore[reportIndexIssue]
    assert not any(info.values()), info
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    assert halve.inspect(out).sparsity == 0.5
    evaluated = halve.perplexity(out, data=str(text), seq_len=32, segments=16)
    assert evaluated.perplexity > 1


@pytest.mark.parametrize("row", FAMILIES)
def test_every_matrix_of_a_block_is_planned(row, pico):
    """It is pruned, or reported as left dense."""
    plan = make_plan(pico(row), PruneOptions())
    planned = {m.tensor for block in plan.layout.blocks for m in block.matrices}
    blocks = {block.shard for block in plan.layout.blocks}
    large = {
        name
        for file in blocks
        for name in plan.layout.shards[file]
        if len(plan.layout.tensors[name].shape) > 1
    }
    assert large == planned | set(plan.layout.left_dense)
    assert plan.layout.left_dense == ()
