"""An adapter's config without PEFT is the same as PEFT's: the same fields, the same checks, the same file."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from peft import PeftConfig, TaskType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES

from exported import save_adapter, save_base
from s2ft import S2FTConfig, S2FTError, read_adapter
from s2ft.format.folder import CONFIG_FILE, WEIGHTS_FILE
from s2ft.format.names import EMBEDDINGS
from s2ft.format.saved import SavedConfig
from s2ft.format.terms import TASK_TYPES

BY_FILES = """
import sys
import s2ft_command
import s2ft.adapters.fusion, s2ft.adapters.inspection, s2ft.adapters.merge
from s2ft.adapters.file import read_adapter
s2ft.adapters.inspection.summary(read_adapter(sys.argv[1]))
s2ft.adapters.fusion.fuse([sys.argv[1]], output=sys.argv[2])
s2ft.adapters.merge.merge(sys.argv[1], sys.argv[3])
from s2ft.exports.export import export
for to, name in (("lora", "lora"), ("vllm", "vllm"), ("patch", "patch.safetensors")):
    export(sys.argv[1], to, f"{sys.argv[4]}/{name}")
print(*{"peft", "transformers", "trl", "accelerate"} & set(sys.modules))
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    return save_adapter(folder / "adapter", save_base(folder / "base", "llama"), {"o_proj": 0.5})


def test_names_are_pefts():
    assert (CONFIG_FILE, WEIGHTS_FILE) == (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    assert set(EMBEDDINGS) == set(EMBEDDING_LAYER_NAMES)
    assert set(TASK_TYPES) == set(TaskType)
    own = {field.name for field in fields(SavedConfig)}
    assert {field.name for field in fields(S2FTConfig)} == own | {"peft_type"}
    assert {field.name for field in fields(PeftConfig)} <= own | {"peft_type"}


def test_it_writes_what_peft_writes(adapter, tmp_path):
    saved, ours = SavedConfig.from_folder(adapter), S2FTConfig.from_folder(adapter)
    for name, config in (("saved", saved), ("ours", ours)):
        (tmp_path / name).mkdir()
        config.save_pretrained(str(tmp_path / name))
    assert (tmp_path / "saved" / CONFIG_FILE).read_bytes() == (tmp_path / "ours" / CONFIG_FILE).read_bytes()
    read = read_adapter(adapter)
    assert isinstance(read.config, S2FTConfig)
    assert read.config == S2FTConfig.from_folder(adapter)
    assert read.saved == SavedConfig.from_folder(adapter)


@pytest.mark.parametrize(
    ("values", "message"), [({"ratios": 2}, "ratios=2"), ({"task_type": "POETRY"}, "Invalid task type: 'POETRY'")]
)
def test_it_refuses_what_the_config_refuses(values, message):
    with pytest.raises(S2FTError, match=message):
        SavedConfig(**values)


def test_inspecting_fusing_merging_and_exporting_files_needs_neither_peft_nor_transformers(adapter, tmp_path):
    places = [adapter, tmp_path / "fused", tmp_path / "merged", tmp_path]
    words = [sys.executable, "-c", BY_FILES, *map(str, places)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert S2FTConfig.from_folder(tmp_path / "fused").slices == S2FTConfig.from_folder(adapter).slices
