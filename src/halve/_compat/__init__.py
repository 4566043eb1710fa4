"""Every private or undocumented part of torch and transformers that Halve relies on.

Read this package, and run tests/contracts/test_compat.py (one test for each entry),
before the upper bound of a dependency is raised. Each function in `torch.py` and
`transformers.py` names the part that it uses, the releases in which it was tested, and
what to do when it breaks. Nothing outside this package uses such parts, with the
exception of methods that Halve overrides and of behaviour that no call can wrap. Those
are tested there too:

integrations/transformers/hook.py
    Importing anything of transformers that loads checkpoints imports a module of the
    name `transformers.quantizers`; a finder in `sys.meta_path` waits for that, or for
    `transformers.modeling_utils`. transformers has no plug-in discovery. If the modules
    move: change `_QUANTIZERS` and `_MODELS`.
halve_autoload
    Since torch 2.5, `import torch` calls the entry points of the group
    `torch.backends`. If it no longer does: users have to `import halve`.
integrations/transformers/quantizer.py
    `from_pretrained` calls `HfQuantizer._process_model_before_weight_loading` with
    `checkpoint_files`, and `_process_model_after_weight_loading`; `dequantize` calls
    `_dequantize`; `AUTO_QUANTIZER_MAPPING` is the table that `register_quantizer`
    fills. If a method is renamed: rename the override.
models/capture.py
    nn.Module resolves unknown attributes by `__getattr__`, and a module that is put
    into `__dict__` directly is not a submodule. transformers' models index and iterate
    the ModuleList of their blocks on each call. If not: capture by forward pre-hooks.
models/config_limits.py
    `register_module_module_registration_hook` is documented; that an exception raised
    in the hook leaves the constructor of the model is not. If not: count modules after
    the model is built on the meta device, and accept the memory.
numerics/matmul.py
    Under a TorchFunctionMode, nn.Linear reaches `functional.linear`, and transformers'
    Conv1D reaches `torch.addmm`. If not: products are torch's own, correct and slower.
"""
