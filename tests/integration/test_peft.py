"""LoRA over pruned models: packed layers stay packed, and merging keeps zeros."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import halve
from halve.errors import HalveError
from halve.runtime.cpu.packed_linear import PackedLinear

peft = pytest.importorskip("peft")

# Llama in float32, so that results can be compared closely.
DTYPES = {"llama": torch.float32, "gpt2": torch.bfloat16}
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def folders(pico, tmp_path_factory):
    """Return a function from a family and a form to a folder."""
    made: dict[tuple[str, str], Any] = {}

    def make(family: str, form: str) -> Any:
        if (family, form) not in made:
            parent = tmp_path_factory.mktemp(family)
            dense = pico(family, dtype=DTYPES[family])
            halve.prune(dense, parent / "dense", solver="magnitude")
            halve.pack(parent / "dense", parent / "packed")
            grid: Any = {"quantize": "int4", "group_size": 32, "packed": True}
            halve.prune(dense, parent / "codes", solver="magnitude", **grid)
            for name in ("dense", "packed", "codes"):
                made[family, name] = parent / name
        return made[family, form]

    return make


def adapted(folder: Any, family: str, **options: Any) -> Any:
    """Return a model with an adapter whose B is not zero."""
    from halve.integrations.lora import sparse_lora  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=2, target_modules=TARGETS[family])
    torch.manual_seed(0)
    model = peft.get_peft_model(model, sparse_lora(config, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def zeros_of(model: Any) -> dict[str, torch.Tensor]:
    """Return where each matrix is zero that is adapted or was."""
    zeros: dict[str, torch.Tensor] = {}
    for path, layer in model.named_modules():
        if path.endswith(("q_proj", "down_proj", "c_attn", "c_proj")):
            packed = isinstance(layer, PackedLinear)
            zeros[path] = (layer.packed.unpack() if packed else layer.weight) == 0
    return zeros


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("form", ["dense", "packed", "codes"])
def test_merged_is_unmerged_and_keeps_zeros(family, form, folders):
    folder = folders(family, form)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    before, zeros = logits(plain), zeros_of(plain)
    model = adapted(folder, family)
    after = logits(model)
    assert (after - before).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    merged = model.merge_and_unload()
    exact = DTYPES[family] is torch.float32 and form != "codes"
    tolerance = 1e-5 if exact else 0.02
    torch.testing.assert_close(logits(merged), after, atol=tolerance, rtol=tolerance)
    for path, merged_zeros in zeros_of(merged).items():
        assert merged_zeros[zeros[path]].all(), path


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_unmerging_restores(form, folders):
    model = adapted(folders("llama", form), "llama")
    before = logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert bool(packed) == (form == "packed")


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_adapters_train_while_layers_stay_packed(keep_zeros, folders, tmp_path):
    model = adapted(folders("llama", "packed"), "llama", keep_zeros=keep_zeros)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = IDS[0].tolist()
    rows: Any = [{"input_ids": ids, "labels": ids}] * 2
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == ("lora" not in name), name
    assert any(isinstance(m, PackedLinear) for m in model.modules())


def test_the_gradient_is_that_of_the_dense_model(folders):
    """Of the adapter, over packed layers and over the same layers dense."""
    gradients = []
    for form in ("dense", "packed"):
        model = adapted(folders("llama", form), "llama")
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-3)


def test_what_would_lose_the_zeros_is_refused(folders):
    model = adapted(folders("llama", "packed"), "llama", keep_zeros=False)
    with pytest.raises(HalveError, match="keep_zeros=True"):
        model.merge_and_unload()


def test_a_saved_adapter_is_loaded_over_packed_layers(folders, tmp_path):
    from halve.integrations.lora import sparse_lora  # noqa: PLC0415

    model = adapted(folders("llama", "packed"), "llama")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folders("llama", "packed"))
    config = sparse_lora(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path, config=config)
    assert torch.equal(logits(loaded), expected)


def test_keep_zeros_holds_zeros_under_a_merge_of_peft(folders):
    """PEFT's own LoRA, which knows nothing of zeros."""
    model = AutoModelForCausalLM.from_pretrained(folders("llama", "dense"))
    zeros = zeros_of(model)
    kept = halve.keep_zeros(model)
    config = peft.LoraConfig(
        r=2, target_modules=TARGETS["llama"], init_lora_weights=False
    )
    model = peft.get_peft_model(model, config)
    merged = model.merge_and_unload()
    assert not all(z[zeros[path]].all() for path, z in zeros_of(merged).items())
    kept.apply()
    assert all(z[zeros[path]].all() for path, z in zeros_of(merged).items())
