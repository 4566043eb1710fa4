"""The C++ tests of the kernels pass with address and undefined-behavior sanitizers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = Path(sys.executable).with_name(
    "cmake"
)  # installed with the development dependencies


PROGRAMS = ("test_kernels", "test_quantized", "test_step")


@pytest.mark.slow  # more than a minute, most of it the compiler's
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_kernels_run_clean_under_the_sanitizers(tmp_path):
    # -Og compiles this fastest: GCC takes a minute at -O1 for one file of AVX-512.
    options = [
        "-DHALVE_SANITIZE=ON",
        "-DHALVE_TESTS=ON",
        "-DCMAKE_CXX_FLAGS_RELEASE=-Og",
    ]
    build = ["--build", tmp_path, "--parallel", "2", "--target", *PROGRAMS]
    for command in (["-S", ROOT, "-B", tmp_path, *options], build):
        subprocess.run([CMAKE, *command], check=True, capture_output=True)
    for program in PROGRAMS:
        done = subprocess.run(
            [tmp_path / program], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
