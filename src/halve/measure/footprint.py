"""How much memory it takes to load and run a model, measured in a new process."""

import json
import subprocess
import sys
from pathlib import Path

from halve.records import Footprint
from halve.system import peak_memory


def footprint(
    folder: Path, trust_remote_code: bool = False, device: str = "cpu"
) -> Footprint:
    """Load a model and generate two tokens in a new process.

    Args:
        folder: Folder of a model, dense or packed.
        trust_remote_code: Whether Python code that comes with the model may run.
        device: Where to run it: `cpu` or `cuda`.

    Returns:
        Peaks of resident memory in bytes, mapped files included, and what tensors take
        of the memory of a GPU.
    """
    arguments = f"{str(folder)!r}, {trust_remote_code}, {device!r}"
    program = f"import {__name__} as m; m.main({arguments})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def main(folder: str, trust_remote_code: bool, device: str) -> None:
    """Load and run a model; print memory after each step as JSON."""
    # The first peak is that of the interpreter with its libraries.
    import torch  # noqa: PLC0415
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    from halve.runtime.generation import load  # noqa: PLC0415

    disable_progress_bar()
    interpreter = peak_memory()
    model = load(folder, device, trust_remote_code)
    measured = {"interpreter": interpreter, "loaded": peak_memory()}
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        measured["gpu_loaded"] = torch.cuda.memory_allocated(model.device)
    prompt = torch.tensor([[0]], device=model.device)
    with torch.inference_mode():
        model.generate(prompt, max_new_tokens=2, do_sample=False)
    measured["run"] = peak_memory()
    if on_gpu:
        measured["gpu_peak"] = torch.cuda.max_memory_allocated(model.device)
    print(json.dumps(measured))  # noqa: T201
