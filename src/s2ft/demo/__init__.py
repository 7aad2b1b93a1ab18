"""The embedded default: a small base model, the skills it has and lacks, and the script that made it (docs/demo.md)."""

from pathlib import Path


def base_path() -> Path:
    """The folder of the base model, in Hugging Face format: `from_pretrained(s2ft.demo.base_path())`."""
    return Path(__file__).parent / "base"
