"""S²FT under TRL's trainers: what they copy, cast and merge."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from live import layers
from s2ft import S2FTConfig

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes, **special))


def config(**options: Any) -> S2FTConfig:
    return S2FTConfig(**{"ratios": 0.5, "init_weights": False, "task_type": "CAUSAL_LM", **options})


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "bf16": False,
    }
    return {**common, "use_cpu": True, "save_strategy": "no", "learning_rate": 0.1, "disable_tqdm": True, **options}


PREFERENCES = Dataset.from_list(
    [
        {"prompt": "a b c", "chosen": " d e f", "rejected": " x y z"},
        {"prompt": "g h", "chosen": " i j", "rejected": " w v"},
    ]
)


class TestDPO:
    @pytest.mark.parametrize("start", ["config", "trained adapter"])
    def test_the_reference_is_the_start_of_the_trained_adapter(
        self, start: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        given: dict[str, Any] = {"model": model, "peft_config": config()}
        if start == "trained adapter":
            given = {"model": get_peft_model(model, config())}
        trainer = DPOTrainer(
            **given, args=DPOConfig(**settings(tmp_path)), train_dataset=PREFERENCES, processing_class=tokenizer
        )
        blocks = [layer.s2ft_block for layer in layers(trainer.model)]
        assert blocks
        if start == "trained adapter":
            assert all("ref" in block for block in blocks)
        for block in blocks:
            for name in set(block) - {"default"}:
                assert torch.equal(block["default"].indices, block[name].indices)
                assert torch.equal(block["default"].weight, block[name].weight)
        before = copy.deepcopy(blocks)
        trainer.train()
        for block, old in zip(blocks, before, strict=True):
            assert not torch.equal(block["default"].weight, old["default"].weight)
            for name in set(block) - {"default"}:
                assert torch.equal(block[name].weight, old[name].weight)


class TestSFT:
    def test_trains_saves_and_comes_back(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        base = copy.deepcopy(model)
        rows = Dataset.from_list([{"prompt": "a b", "completion": " c d e"}, {"prompt": "f", "completion": " g h"}] * 2)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**settings(tmp_path, max_steps=2, max_length=16)),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=config(init_weights=True),
        )
        trainer.train()
        assert all(layer.s2ft_block["default"].weight.any() for layer in layers(trainer.model))
        trainer.save_model(str(tmp_path / "adapter"))
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        trained = trainer.model.state_dict()
        assert all(torch.equal(value, trained[name]) for name, value in loaded.state_dict().items())

    def test_added_tokens_need_the_field(self) -> None:
        assert config().trainable_token_indices is None


class TestSync:
    def test_merge_send_unmerge_leaves_no_trace(self, model: LlamaForCausalLM) -> None:
        """As GRPO hands the weights to a generation server before every step."""
        adapted = get_peft_model(model.bfloat16(), config())
        before = copy.deepcopy(adapted.state_dict())
        for _ in range(20):
            adapted.merge_adapter()
            adapted.unmerge_adapter()
        assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
