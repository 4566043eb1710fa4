"""Plain transformers loads packed models where Halve is installed: no import needed."""

import subprocess
import sys
from functools import partial

import pytest
import torch

import halve

GENERATE = """
import sys
from transformers import AutoModelForCausalLM
import torch
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(5, 17)[None]
    tokens = model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    print(tokens[0].tolist(), len(model.state_dict()))
"""

# GENERATE imports transformers first, test_compat.py Halve.
ORDERS = {
    "torch first": "import torch, transformers; transformers.AutoModelForCausalLM",
    # Imports torch while transformers.quantizers is being imported.
    "quantizers first": "from transformers.quantizers import auto",
}
IS_KNOWN = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
import sys, transformers.modeling_utils
assert "halve" in AUTO_QUANTIZER_MAPPING
assert not [f for f in sys.meta_path if type(f).__module__.startswith("halve.")]
"""

COST = """
import torch, sys, time
before = set(sys.modules)
began = time.process_time()
import halve_autoload
halve_autoload.register()
print(time.process_time() - began, *(set(sys.modules) - before))
"""


@pytest.fixture
def run(installed):
    """Return a function that runs a program in a process without `import halve`."""

    def run(program, *arguments, flags=(), **variables):
        done = subprocess.run(
            [sys.executable, *flags, "-c", program, *map(str, arguments)],
            check=False,
            capture_output=True,
            text=True,
            env={**installed, **variables},
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def folders(pico, text, tmp_path_factory):
    """Return packed folders, of zeros and of codes, each with the unpacked one."""
    home = tmp_path_factory.mktemp("folders")
    dense = pico("llama", dtype=torch.float32)
    prune = partial(halve.prune, dense, packed=True, device="cpu")
    prune(home / "zeros", solver="magnitude")
    options = {"calibration": str(text), "samples": 4, "seq_len": 32}
    prune(home / "codes", solver="sparsegpt", quantize="int4", **options)
    for name in ("zeros", "codes"):
        halve.unpack(home / name, home / f"{name}-dense")
    return [home / name for name in ("zeros", "zeros-dense", "codes", "codes-dense")]


def test_transformers_generates_the_same_packed_and_dense(run, folders):
    lines = run(GENERATE, *folders).stdout.splitlines()
    tokens, tensors = zip(*(line.rsplit(maxsplit=1) for line in lines), strict=True)
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]
    zeros, zeros_dense, codes, codes_dense = map(int, tensors)
    assert zeros > zeros_dense == codes_dense < codes  # a packed matrix has several


@pytest.mark.parametrize("order", ORDERS)
def test_the_format_is_known_whatever_is_imported_first(order, run):
    run(ORDERS[order] + IS_KNOWN)


def test_importing_torch_costs_milliseconds_and_imports_no_library(run):
    seconds, *modules = run(COST, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout.split()
    assert float(seconds) < 0.05
    own = {name for name in modules if name.startswith("halve")}
    assert {name.partition(".")[0] for name in own} == {"halve", "halve_autoload"}
    others = {name.partition(".")[0] for name in modules} - {"halve", "halve_autoload"}
    assert others <= sys.stdlib_module_names


def test_the_entry_point_is_called_and_can_be_switched_off(run):
    program = "import torch, sys; print('halve' in sys.modules)"
    assert run(program).stdout.split() == ["True"]
    off = run(program, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert off.stdout.split() == ["False"]


@pytest.mark.parametrize("flags", [(), ("-W", "error::RuntimeWarning")])
def test_a_broken_installation_leaves_torch_usable(flags, run):
    program = (
        "import sys; sys.modules['halve'] = None; import torch; print(torch.ones(1))"
    )
    done = run(program, flags=flags)
    assert done.stdout == "tensor([1.])\n"
    if not flags:
        assert "Halve cannot be imported (ModuleNotFoundError" in done.stderr


def test_a_quantizer_that_does_not_fit_leaves_transformers_usable(run):
    program = (
        "import sys; sys.modules['halve.integrations.transformers.quantizer'] = None;"
        "import transformers.modeling_utils; print('usable')"
    )
    done = run(program)
    assert done.stdout == "usable\n"
    assert "HalveWarning: Halve could not make its format known" in done.stderr
