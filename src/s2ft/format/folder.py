"""Is there an adapter in a folder? No library is needed to ask: the command line does so before PEFT is loaded."""

from pathlib import Path

from s2ft.common.errors import S2FTError
from s2ft.common.reading import check_regular

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # as PEFT calls them


def check_folder(folder: Path) -> None:
    """Raises `S2FTError` unless an adapter's config is there."""
    check_regular(folder / CONFIG_FILE)
    if not (folder / CONFIG_FILE).is_file():
        raise S2FTError(f"{folder} holds no adapter: there is no {CONFIG_FILE}")
