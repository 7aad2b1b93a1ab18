"""What a config writes."""

import json
import random
import string
from pathlib import Path

from s2ft import S2FTConfig


def test_sets_are_written_in_an_order_that_every_process_has(tmp_path: Path) -> None:
    names = ["".join(random.choices(string.ascii_lowercase, k=8)) for _ in range(40)]
    config = S2FTConfig(ratios=0.1, target_modules=set(names), exclude_modules=set(names[:20]))
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(names)
    assert written["exclude_modules"] == sorted(names[:20])
    assert config.target_modules == set(names)
    assert S2FTConfig.from_pretrained(tmp_path).target_modules == set(names)
