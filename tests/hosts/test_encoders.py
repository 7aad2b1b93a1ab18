"""Encoders by the task: heads and channels of o and down train beside the head of the task, which is saved with them."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import Tensor

from families import TWO_BLOCKS, VOCABULARY, tokens
from s2ft import S2FTConfig, S2FTError, in_place
from s2ft.layer.linear import sliced_layers
from s2ft.layer.linears import weight_matrix

CONFIGS: dict[str, Any] = {
    "Bert": lambda: hf.BertConfig(**TWO_BLOCKS),
    "Roberta": lambda: hf.RobertaConfig(**TWO_BLOCKS, pad_token_id=0),
    "ModernBert": lambda: hf.ModernBertConfig(**TWO_BLOCKS, pad_token_id=0, local_attention=4),
    "DistilBert": lambda: hf.DistilBertConfig(vocab_size=VOCABULARY, dim=24, hidden_dim=44, n_layers=2, n_heads=4),
    "Electra": lambda: hf.ElectraConfig(**TWO_BLOCKS, embedding_size=16),
    "MPNet": lambda: hf.MPNetConfig(**TWO_BLOCKS),
    "Deberta": lambda: hf.DebertaConfig(**TWO_BLOCKS, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "DebertaV2": lambda: hf.DebertaV2Config(**TWO_BLOCKS, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "Albert": lambda: hf.AlbertConfig(**TWO_BLOCKS, embedding_size=16),
    "Qwen3": lambda: hf.Qwen3Config(
        **TWO_BLOCKS, num_key_value_heads=2, head_dim=8, pad_token_id=0
    ),  # embedding models
}
TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
}


def built(family: str, task: str) -> hf.PreTrainedModel:
    model = getattr(hf, family + TASKS[task])(CONFIGS[family]()).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def config(task: str, **options: Any) -> S2FTConfig:
    return S2FTConfig(ratios=0.25, task_type=task, seed=0, init_weights=False, **options)


def output(model: torch.nn.Module, x: Tensor) -> Tensor:
    return model(input_ids=x)[0]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", CONFIGS)
def test_it_trains_saves_reloads_and_merges(family: str, task: str, tmp_path: Path) -> None:
    base, x = built(family, task), tokens(3, 7)
    head = {"modules_to_save": ["classifier"]} if (family, task) == ("ModernBert", "QUESTION_ANS") else {}
    tuned = get_peft_model(deepcopy(base), config(task, **head)).eval()
    heads = [name for name, p in tuned.named_parameters() if p.requires_grad and "s2ft_block" not in name]
    assert bool(heads) == (task != "FEATURE_EXTRACTION")
    assert all("modules_to_save.default" in name for name in heads)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * (name in heads))
    loss_weights = torch.randn_like(output(tuned, x))
    (output(tuned, x) * loss_weights).sum().backward()

    dense = deepcopy(tuned).merge_and_unload().requires_grad_()
    torch.testing.assert_close(output(dense, x), output(tuned, x), rtol=1e-9, atol=1e-9)
    (output(dense, x) * loss_weights).sum().backward()
    for path, layer in sliced_layers(tuned.get_base_model(), "default").items():
        block, full = layer.block("default"), dense.get_submodule(path)
        torch.testing.assert_close(block.weight.grad.double(), block.trained.of(full.weight.grad), rtol=1e-5, atol=1e-8)
        assert weight_matrix(full).shape == full.weight.shape

    tuned.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(deepcopy(base), str(tmp_path)).eval()
    assert torch.equal(output(again, x), output(tuned, x))
    with in_place(tuned):
        torch.testing.assert_close(output(tuned, x), output(again, x), rtol=1e-6, atol=1e-6)
    assert torch.equal(output(tuned, x), output(again, x))


@pytest.mark.parametrize(
    ("family", "given", "task", "message"),
    [
        (
            "Bert",
            "FEATURE_EXTRACTION",
            "SEQ_CLS",
            "BertModel has none that is called classifier or score: load the model",
        ),
        ("Qwen3", "FEATURE_EXTRACTION", "TOKEN_CLS", "with AutoModelForTokenClassification, or name its head in"),
        ("ModernBert", "QUESTION_ANS", "QUESTION_ANS", "has none that is called qa_outputs: load the model with"),
    ],
)
def test_a_task_whose_head_is_missing_is_refused(family: str, given: str, task: str, message: str) -> None:
    base = built(family, given)
    before = [name for name, _ in base.named_parameters()]
    with pytest.raises(S2FTError, match=rf"task_type='{task}' trains a head, and .*") as raised:
        get_peft_model(base, config(task))
    assert message in str(raised.value)
    assert [name for name, _ in base.named_parameters()] == before
