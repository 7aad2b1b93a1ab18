"""`s2ft quickstart`: fine-tune the embedded model and see what it learned and what it kept."""

import shutil
import sys
from typing import Any

from s2ft.cli.importing import importing
from s2ft.cli.options import JsonFile
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable

SHOWN = 2  # generations of each skill, side by side


def quickstart(json_file: JsonFile = None) -> None:
    """Fine-tune the embedded base model on a skill it lacks; needs no GPU and no download.

    Example: s2ft quickstart
    """
    check_writable(json_file)
    from rich.console import Console

    with importing():
        from s2ft.cli.progress import quiet
        from s2ft.demo.quickstart import NEW_SKILL, fresh_folder
        from s2ft.demo.quickstart import quickstart as run
        from s2ft.demo.skills import SKILLS

    console = Console(highlight=False)
    sample = SKILLS[NEW_SKILL].examples(1, seed=2)[0]
    console.print(f"Teaching the embedded model to answer {sample['prompt']!r} with {sample['completion']!r} ...")
    with quiet():
        result = run(fresh_folder())
    console.print(_scores(result), _generations(result))
    console.print(_files(result), soft_wrap=True)  # commands stay whole, to be copied
    if json_file is not None:
        write_json(json_file, result.accuracies)


def _scores(result: Any) -> Any:
    from rich.table import Table

    table = Table(
        "skill", "base", "tuned", title=f"Exact match on {len(next(iter(result.examples.values())))} test examples"
    )
    for index, (name, score) in enumerate(result.accuracies.items()):
        label = f"{name} (new)" if index == 0 else name
        table.add_row(label, f"{score['base']:.0%}", f"{score['tuned']:.0%}")
    return table


def _generations(result: Any) -> Any:
    from rich.table import Table

    table = Table("prompt", "base", "tuned", "expected", title="Side by side")
    for name, examples in result.examples.items():
        outputs = zip(examples, result.base[name].completions, result.tuned[name].completions, strict=True)
        for example, base, tuned in list(outputs)[:SHOWN]:
            table.add_row(example["prompt"].strip(), base, tuned, example["completion"])
    return table


def _files(result: Any) -> str:
    name = program()
    size, seconds = result.card["adapter"]["bytes"], result.card["training"]["seconds"]
    return (
        f"The adapter is {size / 1e3:.0f} kB, {size / result.base_bytes:.1%} of the model's {result.base_bytes / 1e6:.1f} MB, "
        f"trained in {seconds:.0f} s. It lies in {result.folder}, with its run card run.md.\n\nNext:\n"
        f"  {name} inspect {result.folder} --png channels.png\n"
        f"  {name} train --model Qwen/Qwen3-0.6B --data your-data.jsonl --output your-adapter\n"
        f"  {name} train --help"
    )


def program() -> str:
    """What to type for `s2ft`: its whole path where the environment is not active."""
    return "s2ft" if shutil.which("s2ft") else sys.argv[0]
