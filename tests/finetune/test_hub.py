"""The upload of a result, to a stand-in for the Hub: what is uploaded loads, and what cannot be uploaded is said beforehand."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fake_hub import FakeHub, fake_hub
from s2ft import S2FTError
from s2ft.finetune.hub import check_push
from s2ft.finetune.options import parse_options
from tiny_runs import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def hub(monkeypatch):
    with fake_hub(monkeypatch) as found:
        yield found


@pytest.fixture
def run(base, data, tmp_path):
    def call(**options):
        settings = {"max_steps": 2, "gradient_accumulation": 1, "learning_rate": 1e-2, "ratios": 0.25, "save_every": 1}
        settings |= {"model": base, "data": data, "output": str(tmp_path / "out"), "precision": "fp32"}
        return train(parse_options({**settings, "layout": "indexed", **options}))

    return call


def test_what_is_uploaded_is_the_result_with_a_card_that_the_hub_reads(run, hub: FakeHub, base, tmp_path):
    result = run(push_to_hub="me/sums", holdout=4, validate_every=1)
    assert any(result.output.glob("checkpoint-*"))  # stays here
    uploaded = hub.files["me/sums"]
    assert sorted(uploaded) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "channels.png",
        "loss.png", "report.html", "run.json", "run.md", "run.yaml",
    ]  # fmt: skip
    card = ModelCard(uploaded["README.md"].decode())
    head = yaml.safe_load(card.data.to_yaml())
    assert head["library_name"] == "peft"
    assert head["pipeline_tag"] == "text-generation"
    assert {"peft", "s2ft"} <= set(head["tags"])
    assert "base_model" not in head  # a local folder
    assert "datasets" not in head
    assert 'from_pretrained(model, "me/sums")' in card.text
    assert f"| held-out loss, the lowest | {result.card['training']['best_loss']:.4g} |" in card.text
    shown = set(re.findall(r"!\[[^]]*\]\(([\w.]+)\)", card.text))
    assert shown == {"loss.png", "channels.png"}
    assert uploaded["channels.png"].startswith(b"\x89PNG")  # the other is not drawn in these tests
    for name, content in uploaded.items():
        (tmp_path / "down").mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "down").eval()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model.eval()(ids).logits)


def test_a_failed_upload_keeps_the_result_and_says_how_to_repeat_it(run, hub: FakeHub, tmp_path):
    hub.full = True
    with pytest.raises(S2FTError, match=r"push_to_hub='me/sums' failed: .*upload it by `hf upload me/sums \S+out`"):
        run(push_to_hub="me/sums", max_steps=1)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_what_may_not_be_uploaded_is_said_before_anything_is_loaded(run, hub: FakeHub, tmp_path, monkeypatch):
    for name in ("me/x", "x", "team/x_1.b"):
        check_push(name)
    monkeypatch.setattr("s2ft.finetune.train.prepare", None)
    for name, said in {
        "other/x": "is not yours to write to; your login may write to me, team",
        "a/b/c": "Repo id must be in the form",
        "a b": "Repo id must use alphanumeric",
    }.items():
        with pytest.raises(S2FTError, match=f"push_to_hub='{name}'.*{said}"):
            run(push_to_hub=name)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(S2FTError, match=r"push_to_hub='me/x' needs a login \(`hf auth login`, or HF_TOKEN\)"):
        run(push_to_hub="me/x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(S2FTError, match="HF_HUB_OFFLINE is set"):
        run(push_to_hub="me/x")
    assert hub.files == {}
    assert not Path(tmp_path / "out").exists()
