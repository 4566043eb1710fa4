"""A bar for notebooks and scripts: `halve.prune(..., progress=halve.ProgressBar())`."""

from tqdm.auto import tqdm

from halve.records import Progress


class ProgressBar:
    """Shows the blocks, or files, of a call as tqdm's bar.

    Pass an instance as `progress`; it can be used for one call after the other.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, progress: Progress) -> None:
        """Show a step."""
        if self._bar is None or progress.block < self._bar.n:
            self.close()
            self._bar = tqdm(total=progress.blocks, unit="block")
        bar = self._bar
        bar.set_description(progress.phase, refresh=False)
        bar.update(progress.block - bar.n)
        done = progress.finished
        if done is not None:
            error = "" if done.error is None else f"error {100 * done.error:.2f}%"
            bar.set_postfix_str(error)
            bar.update(progress.block + 1 - bar.n)
            if bar.n == bar.total:
                self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
