"""Two processes of a test, which talk over gloo; they are forked, so that nothing is imported again."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from io import BytesIO
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def in_two(folder: Path, function: Callable[..., Any], *args: Any, patience: int = 60) -> list[Any]:
    """What `function(*args)` returns in each of two processes; a failure there is one here.

    Args:
        folder: Where the processes may meet.
        function: Finds its rank by `torch.distributed`; what it returns is pickled.
        patience: Seconds until one must have answered.
    """
    context, store = multiprocessing.get_context("fork"), folder / "meeting"
    store.unlink(missing_ok=True)
    started = []
    for rank in range(2):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(there, str(store), rank, function, args), daemon=True)
        process.start()
        started.append((process, here))
    answers: dict[Connection, tuple[bool, Any]] = {}
    while len(answers) < 2 and all(fine for fine, _ in answers.values()):
        ready = wait([here for _, here in started if here not in answers], timeout=patience)
        answers |= {here: here.recv() for here in ready} or {started[0][1]: (False, f"no answer in {patience} s")}
    for process, _ in started:
        process.terminate()
        process.join()
    assert all(fine for fine, _ in answers.values()), "\n".join(
        str(said) for fine, said in answers.values() if not fine
    )
    return [torch.load(BytesIO(answers[here][1]), weights_only=False) for _, here in started]


def _run(answer: Connection, store: str, rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # what the parent's pool of threads was does not exist here
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        result = BytesIO()
        torch.save(function(*args), result)  # a pickle would share tensors with a process that ends
        answer.send((True, result.getvalue()))
    except BaseException:
        answer.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
    distributed.barrier()
