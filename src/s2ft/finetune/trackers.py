"""Where a run's figures go besides its card: the trackers that people use, through transformers' own callbacks.

    --report-to tensorboard     the folder `runs` of the output
    --report-to wandb,mlflow    to where their own environment variables say, such as WANDB_PROJECT or MLFLOW_TRACKING_URI

Nothing leaves the machine unless a tracker is named that sends it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

from s2ft.common.errors import S2FTError, first_line, raise_together

NONE = "none"
TRACKERS = {  # name in transformers → the packages that it writes with, any of which will do
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}


def known_trackers(names: list[str]) -> list[str]:
    """The names as they are; a `ValueError` for one that is unknown, or for others beside `none`."""
    unknown = [name for name in names if name not in (*TRACKERS, NONE)]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is unknown; choose from {', '.join(TRACKERS)}, {NONE}")
    if NONE in names and len(names) > 1:
        raise ValueError(f"{NONE} stands alone")
    return names


def check_trackers(names: Sequence[str]) -> None:
    """Raises `S2FTError` for trackers that are not installed."""
    raise_together(
        f"report_to={name!r} needs {packages[0]}, which is not installed: pip install {packages[0]}"
        for name, packages in TRACKERS.items()
        if name in names and not any(map(find_spec, packages))
    )


@contextmanager
def tracking(names: Sequence[str]) -> Iterator[None]:
    """Around a run: reports what a tracker itself raises, such as a missing login, as an `S2FTError` that names it."""
    try:
        with _own_run() if "wandb" in names else nullcontext():
            yield
    except Exception as error:
        raiser = type(error).__module__.partition(".")[0]
        name = next((name for name in names if raiser in TRACKERS.get(name, ())), None)
        if name is None:
            raise
        raise S2FTError(f"report_to={name!r} cannot be written to: {first_line(error)}") from error


@contextmanager
def _own_run() -> Iterator[None]:
    """Ends the run of W&B, which transformers leaves open, so that the next one of this process is one of its own."""
    import wandb

    ours = wandb.run is None
    try:
        yield
    finally:
        if ours and wandb.run is not None:
            wandb.finish()
