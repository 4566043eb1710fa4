"""Makes packed checkpoints known wherever torch is imported, without `import halve`.

torch calls `register`, an entry point of the group `torch.backends`, at the end of each
`import torch`, unless TORCH_DEVICE_BACKEND_AUTOLOAD is 0. The group is meant for
devices, and torch turns any exception into a failure of `import torch`. So this is a
package of its own, which imports nothing of Halve until it can catch what goes wrong
there, and torch remains usable beside an installation of Halve that is not.
"""


def register() -> None:
    """Import Halve, which registers its format with transformers. Never raises.

    Cost: some milliseconds. Neither torch nor transformers is imported; transformers is
    waited for (`halve.integrations.transformers.hook`).
    """
    try:
        import halve  # noqa: F401, PLC0415
    except Exception as error:  # noqa: BLE001  (torch must stay importable)
        _warn(error)


def _warn(error: Exception) -> None:
    # Imported here since every `import torch` runs this module.
    import warnings  # noqa: PLC0415
    from contextlib import suppress  # noqa: PLC0415

    # Raises where the user has made errors of warnings.
    with suppress(Exception):
        warnings.warn(
            f"Halve cannot be imported ({type(error).__name__}: {error}), so packed "
            "models cannot be loaded. Reinstall halve, or uninstall it.",
            RuntimeWarning,
            stacklevel=2,
        )
