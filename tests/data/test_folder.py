"""Files of a folder like LLM-Adapters' are found from each of its levels, and nowhere else."""

import pytest

from s2ft.data.folder import find_file, places


@pytest.mark.parametrize("named", [".", "llm-adapters", "llm-adapters/dataset"])
def test_any_level_may_be_named(named, tmp_path):
    path = tmp_path / "llm-adapters" / "dataset" / "boolq" / "test.json"
    path.parent.mkdir(parents=True)
    path.touch()
    found = find_file(str(tmp_path / named), places("dataset/boolq/test.json"))
    assert found is not None
    assert found.samefile(path)
    assert find_file(str(tmp_path / named), places("dataset/boolq/train.json")) is None
    assert find_file(str(path.parent), places("dataset/boolq/test.json")) is None


def test_a_folder_of_that_name_is_no_file(tmp_path):
    (tmp_path / "ft-training_set" / "math_10k.json").mkdir(parents=True)
    assert find_file(str(tmp_path), places("ft-training_set/math_10k.json")) is None
