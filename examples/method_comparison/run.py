"""PEFT's method comparison with S²FT: PEFT's own script, after `import s2ft`, with the training in place.

    python examples/method_comparison/run.py PEFT/method_comparison/MetaMathQA s2ft/llama-3.2-3B-down-0.013 --verbose

PEFT is a checkout of its repository. The experiment is copied from here into its folder `experiments`; what follows its name
goes to PEFT's script. `docs/method_comparison.md` has settings and memory.
"""

import os
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import s2ft

EXPERIMENTS = Path(__file__).parent / "experiments"


def run(folder: Path, experiment: str, *more: str) -> None:
    """PEFT's `run.py` in `folder`, on an experiment such as `s2ft/llama-3.2-3B-down-0.013`."""
    shutil.copytree(EXPERIMENTS / experiment, folder / "experiments" / experiment, dirs_exist_ok=True)
    os.chdir(folder)  # PEFT takes no other path than experiments/METHOD/NAME
    sys.path.insert(0, str(folder))  # as if its script had been started
    sys.argv = ["run.py", *more, f"experiments/{experiment}"]
    utils: Any = import_module("utils")  # PEFT's, beside its script, which takes the function from there
    with ExitStack() as while_it_runs:
        utils.get_model = laid_out(utils.get_model, while_it_runs)
        runpy.run_path("run.py", run_name="__main__")


def laid_out(get_model: Callable[..., Any], until: ExitStack) -> Callable[..., Any]:
    """The function that makes PEFT's model, which is in place until the end; evaluating and saving go on as ever there."""

    def get(**options: Any) -> Any:
        model = get_model(**options)
        until.enter_context(s2ft.in_place(model))
        return model

    return get


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve(), *sys.argv[2:])
