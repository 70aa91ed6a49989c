"""How far an inference is, on the screen."""

from __future__ import annotations

import sys

from ignite.engine import Engine, Events
from tqdm import tqdm

from ..processes import rank
from .run_folder import RunFolder

__all__ = ["CaseProgressBar"]


class CaseProgressBar:
    """A bar over the cases of a run folder, those done before included; attach it after the records.

    Args:
        run_folder: knows what is done.
        description: what is going on, such as "classifying".
        enabled: false for none. Of several processes the first has one.
    """

    def __init__(self, run_folder: RunFolder, description: str, enabled: bool = True) -> None:
        self.run_folder, self.description = run_folder, description
        self.enabled = enabled and rank() == 0
        self.bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        if self.enabled:
            engine.add_event_handler(Events.STARTED, self._start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)
            engine.add_event_handler(Events.COMPLETED, self.close)

    def _start(self) -> None:
        done, total = len(self.run_folder.done), len(self.run_folder.cases)
        # A log file is not a terminal: there, a line every half minute is enough.
        interval = 0.5 if sys.stderr.isatty() else 30
        self.bar = tqdm(total=total, initial=done, desc=self.description, mininterval=interval, unit="case")

    def __call__(self) -> None:
        if self.bar is not None:
            self.bar.update(len(self.run_folder.done) - self.bar.n)

    def close(self) -> None:
        """End the bar's line."""
        self()
        if self.bar is not None:
            self.bar.close()
            self.bar = None
