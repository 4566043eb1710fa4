"""Private parts of torch and transformers still are what Halve relies on.

One test for each entry of halve._compat. Where one fails after an upgrade, the
docstring of the entry says what to do.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

import halve
from halve._compat.serving import can_serve, chat_messages, ignored_fields
from halve._compat.torch import (
    Store,
    buffer_slots,
    change_class,
    join_store,
    onednn_linear,
    parameter_slots,
    share_state,
    tensor_version,
)
from halve._compat.transformers import (
    ExpertsTraits,
    can_compile,
    causal_classes,
    computes_all_scores,
    describe_merging,
    experts_traits,
    gate_experts,
    has_masked_model,
    ignored_tensors,
    is_rust_panic,
    rename_key,
    weight_conversions,
)

SOURCE = Path(halve.__file__).parent


def tiny(model_type, **options):
    """Return a model of one block on the meta device."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, vocab_size=32, **sizes, **options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


class TestTorch:
    def test_onednn_multiplies_as_torch_does(self):
        if not torch.backends.mkldnn.is_available():
            pytest.skip("this build of torch has no oneDNN")
        x, weight, bias = torch.randn(2, 3, 5), torch.randn(7, 5), torch.randn(7)
        for b in (bias, None):
            expected = functional.linear(x, weight, b)
            assert torch.allclose(onednn_linear(x, weight, b), expected, atol=1e-5)

    def test_a_write_in_place_changes_the_version_of_every_view(self):
        tensor = torch.zeros(4)
        view, before = tensor.view(2, 2), tensor_version(tensor)
        assert tensor_version(view) == before
        tensor.add_(1)
        assert tensor_version(view) == tensor_version(tensor) != before

    def test_slots_hold_a_modules_parameters_and_can_be_assigned_to(self):
        layer = nn.Linear(3, 2, bias=False, device="meta")
        assert parameter_slots(layer).keys() == {"weight", "bias"}  # None included
        value = nn.Parameter(torch.ones(2, 3))
        parameter_slots(layer)["weight"] = value
        assert layer.weight is value
        assert torch.equal(layer(torch.ones(3)), torch.full((2,), 3.0))

    def test_slots_hold_a_modules_buffers_and_can_be_assigned_to(self):
        norm, value = nn.BatchNorm1d(3), torch.ones(3)
        buffer_slots(norm)["running_mean"] = value
        assert norm.running_mean is value

    def test_state_can_be_shared(self):
        source, layer = nn.Linear(3, 2), nn.Linear(1, 1, bias=False)
        share_state(layer, source)
        assert layer.weight is source.weight
        assert layer.bias is source.bias
        assert layer.in_features == source.in_features
        source.weight = nn.Parameter(torch.ones(2, 3))
        assert layer.weight is source.weight  # also what is assigned later

    def test_the_class_can_be_changed_to_a_subclass(self):
        class Doubled(nn.Linear):
            def forward(self, input):
                return 2 * super().forward(input)

        layer, x = nn.Linear(3, 2), torch.ones(3)
        expected = 2 * layer(x)
        change_class(layer, Doubled)
        assert torch.equal(layer(x), expected)

    def test_the_store_of_torchrun_can_be_joined(self, monkeypatch):
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
        }.items():
            monkeypatch.setenv(name, value)
        store, rank, size = join_store()
        assert isinstance(store, Store)
        assert (rank, size) == (0, 1)
        assert not store.check(["word"])
        store.set("word", "bytes")
        assert store.get("word") == b"bytes"
        assert [store.add("count", 1), store.add("count", 1)] == [1, 2]

    def test_a_module_in_the_dict_of_another_is_not_its_submodule(self):
        class Wrapper(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.__dict__["_inner"] = inner

            def __getattr__(self, name):
                try:
                    return super().__getattr__(name)
                except AttributeError:
                    return getattr(self.__dict__["_inner"], name)

        wrapper = Wrapper(nn.Linear(3, 2))
        assert not list(wrapper.parameters())
        assert wrapper.in_features == 3

    def test_an_exception_in_a_registration_hook_stops_a_constructor(self):
        def stop(*_):
            raise ZeroDivisionError

        hook = register_module_module_registration_hook(stop)
        try:
            with pytest.raises(ZeroDivisionError):
                nn.Sequential(nn.Linear(1, 1))
        finally:
            hook.remove()

    @pytest.mark.parametrize(
        ("layer", "function"),
        [(nn.Linear(3, 2), functional.linear), (Conv1D(2, 3), torch.addmm)],
    )
    def test_linear_layers_reach_the_functions_that_are_replaced(self, layer, function):
        seen = []

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        with Watch():
            layer(torch.ones(4, 3))
        assert function in seen


class TestTransformers:
    def test_names_are_converted_as_on_loading(self):
        model = tiny("opt", ffn_dim=32, word_embed_proj_dim=16)
        conversions, state = weight_conversions(model), model.state_dict()
        name = "decoder.layers.0.self_attn.q_proj.weight"  # as on the Hub
        renamed = rename_key(name, conversions, model.base_model_prefix, state)
        assert renamed == (f"model.{name}", None)
        assert renamed[0] in state
        unknown = ("no.such.tensor", None)
        assert rename_key(unknown[0], conversions, "model", state) == unknown

    def test_merged_experts_are_seen(self):
        experts = {"num_local_experts": 2, "intermediate_size": 32}
        model = tiny("mixtral", num_key_value_heads=2, **experts)
        conversions = weight_conversions(model)
        targets = [p for c in conversions.converters for p in c.target_patterns]
        assert any(p in name for p in targets for name in model.state_dict())
        name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
        target, source = rename_key(
            name, conversions, model.base_model_prefix, model.state_dict()
        )
        assert target in model.state_dict()
        merging = next(
            merging
            for merging in map(describe_merging, conversions.converters)
            if source in merging.sources
        )
        assert [p.split(".")[-2] for p in merging.sources] == ["w1", "w3"]
        assert any(pattern in target for pattern in merging.targets)
        assert merging.operations == ("MergeModulelist", "Concatenate")

    def test_modules_of_experts_are_known_by_their_traits(self):
        sizes = {"num_local_experts": 2, "num_key_value_heads": 2}
        model = tiny("mixtral", intermediate_size=32, **sizes)
        experts = model.get_submodule("model.layers.0.mlp.experts")
        assert experts_traits(experts) == ExpertsTraits(True, False, False, False)
        assert experts_traits(model.get_submodule("model.layers.0.mlp")) is None
        gate, up = torch.randn(2, 3, 32)
        gated = gate_experts(experts, torch.cat([gate, up], dim=-1))
        assert torch.equal(gated, experts.act_fn(gate) * up)
        gpt_oss = tiny("gpt_oss", intermediate_size=32, **sizes)
        experts = gpt_oss.get_submodule("model.layers.0.mlp.experts")
        assert experts_traits(experts) == ExpertsTraits(True, True, True, False)

    def test_patterns_of_ignored_tensors_are_a_collection(self):
        patterns = ignored_tensors(tiny("llama", num_key_value_heads=2))
        assert all(isinstance(pattern, str) for pattern in patterns)

    def test_classes_that_support_a_static_cache_are_known(self):
        assert can_compile(tiny("llama", num_key_value_heads=2))
        assert not can_compile(tiny("mpt"))

    @pytest.mark.parametrize("kind", ["eager", "sdpa"])
    def test_the_implementation_of_attention_is_known(self, kind):
        config = AutoConfig.for_model("opt", attn_implementation=kind)
        assert computes_all_scores(config) == (kind == "eager")

    def test_causal_classes_and_their_base_models_are_known(self):
        expected = {"OPTForCausalLM", "OPTModel", "GPT2LMHeadModel", "LlamaModel"}
        assert expected <= causal_classes()
        assert not {"BertForMaskedLM", "T5ForConditionalGeneration"} & causal_classes()

    def test_types_of_encoders_are_known(self):
        assert has_masked_model("bert")
        assert not has_masked_model("llama")

    @pytest.mark.skipif(not can_serve(), reason="halve[serve] is not installed")
    def test_the_server_takes_the_arguments_that_it_is_given(self):
        import inspect  # noqa: PLC0415

        from transformers.cli.serve import Serve  # noqa: PLC0415

        arguments = inspect.signature(Serve).bind(
            "folder", host="localhost", port=1, device="cpu", trust_remote_code=False
        )
        assert next(iter(arguments.arguments.values())) == "folder"

    @pytest.mark.skipif(not can_serve(), reason="halve[serve] is not installed")
    def test_the_server_builds_its_application_by_a_function_of_a_module(self):
        import inspect  # noqa: PLC0415

        from transformers.cli.serve import Serve  # noqa: PLC0415

        source = inspect.getsource(Serve.__init__)
        assert "from .serving.server import build_server" in source

    @pytest.mark.skipif(not can_serve(), reason="halve[serve] is not installed")
    def test_fields_that_the_server_ignores_are_known(self):
        for path, fields in ignored_fields().items():
            assert "user" in fields, path
        assert "n" in ignored_fields()["/v1/chat/completions"]

    @pytest.mark.skipif(not can_serve(), reason="halve[serve] is not installed")
    def test_messages_of_both_kinds_of_chat_are_read(self):
        expected = [{"role": "user", "content": "hi"}]
        body = {"messages": [{"role": "user", "content": "hi"}]}
        assert chat_messages("/v1/chat/completions", body) == expected
        assert chat_messages("/v1/responses", {"input": "hi"}) == expected

    def test_importing_models_imports_the_awaited_module(self):
        """As integrations/transformers/hook.py awaits it, in a fresh process."""
        program = (
            "import halve, sys; from transformers import AutoModelForCausalLM as A;"
            "A.from_pretrained; from transformers.quantizers.auto import *;"
            "assert 'halve' in AUTO_QUANTIZER_MAPPING"
        )
        subprocess.run([sys.executable, "-c", program], check=True)

    def test_the_quantizer_overrides_methods_that_exist(self):
        from halve.integrations.transformers import quantizer  # noqa: PLC0415

        base = HfQuantizer
        for name in (
            "_process_model_before_weight_loading",
            "_process_model_after_weight_loading",
            "_dequantize",
            "is_serializable",
            "is_trainable",
            "is_compileable",
            "validate_environment",
        ):
            assert hasattr(base, name)
            assert name in vars(quantizer.HalveQuantizer)

    def test_a_damaged_tokenizer_panics(self):
        tokenizer = {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Precompiled", "precompiled_charsmap": "////"},
            "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        }
        with pytest.raises(BaseException, match="charsmap") as raised:
            Tokenizer.from_str(json.dumps(tokenizer))
        assert is_rust_panic(raised.value)
        assert not isinstance(raised.value, Exception)
        assert not is_rust_panic(ValueError())


def private_uses(path):
    """Yield accesses of private attributes that are not Halve's, as `file: name`."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE:
            yield f"{path.relative_to(SOURCE)}: {node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module in PRIVATE_MODULES:
            yield f"{path.relative_to(SOURCE)}: {node.module}"


PRIVATE = {
    "_attn_implementation",
    "_buffers",
    "_keys_to_ignore_on_load_unexpected",
    "_linear_pointwise",
    "_modules",
    "_normalize_input",
    "_parameters",
    "_unused_fields",
    "_version",
    "__class__",
}
PRIVATE_MODULES = {
    "torch.distributed.distributed_c10d",
    "torch.distributed.rendezvous",
    "transformers.cli.serve",
    "transformers.cli.serving",
    "transformers.cli.serving.chat_completion",
    "transformers.cli.serving.completion",
    "transformers.cli.serving.response",
    "transformers.cli.serving.utils",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.models.auto.modeling_auto",
    "transformers.utils.import_utils",
}


def test_private_parts_are_used_in_compat_alone():
    paths = [p for p in SOURCE.rglob("*.py") if "_compat" not in p.parts]
    assert not [use for path in paths for use in private_uses(path)]
