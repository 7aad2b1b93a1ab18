"""What a config writes, and what it takes for one of its own."""

import json
import random
import string
from pathlib import Path

import pytest

from s2ft import S2FTConfig, S2FTError


def test_sets_are_written_in_an_order_that_every_process_has(tmp_path: Path) -> None:
    names = ["".join(random.choices(string.ascii_lowercase, k=8)) for _ in range(40)]
    config = S2FTConfig(ratios=0.1, target_modules=set(names), exclude_modules=set(names[:20]))
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(names)
    assert written["exclude_modules"] == sorted(names[:20])
    assert config.target_modules == set(names)
    assert S2FTConfig.from_pretrained(tmp_path).target_modules == set(names)


def test_a_file_without_a_method_is_refused_in_pefts_words_to_those_who_ask_peft(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
    with pytest.raises(TypeError, match=r"missing required keys: \{'peft_type'\}"):
        S2FTConfig.from_pretrained(tmp_path)
    with pytest.raises(S2FTError, match="its peft_type is None"):
        S2FTConfig.from_folder(tmp_path)
