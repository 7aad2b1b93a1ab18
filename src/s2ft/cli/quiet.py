"""Less noise from the libraries while a command runs: our own lines and the progress bars remain."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler


@contextmanager
def quiet() -> Iterator[None]:
    """Shows what `s2ft` logs; hides the chatter of transformers, TRL and datasets. Their errors still show.

    Of several processes, one is heard.
    """
    import datasets
    import transformers

    from s2ft.runtime.processes import leads

    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    ours = logging.getLogger("s2ft")
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False, show_level=False)
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if leads() else logging.ERROR)
    if not leads():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        ours.removeHandler(handler)
