"""The embedded base model, its skills, and the quickstart.

skills      the skills of the embedded model, and those that it lacks
pretrain    the script that made it
evaluate    exact match
quickstart  base against tuned
"""

from pathlib import Path


def base_path() -> Path:
    """The folder of the base model, in Hugging Face format: `from_pretrained(s2ft.demo.base_path())`."""
    return Path(__file__).parent / "base"
