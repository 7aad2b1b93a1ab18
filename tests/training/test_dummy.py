"""What models of every sense are called with: they run on it, it is the same each time, and nothing random is used up."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor

from s2ft.training.dummy import dummy_inputs, main_input, parts

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
QWEN = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 64,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, Callable[[], hf.PreTrainedModel]]] = {
    "text": ("input_ids", lambda: hf.BertModel(hf.BertConfig(**SIZES, vocab_size=64))),
    "text to text": (
        "input_ids",
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=64, d_model=32, d_kv=8, num_layers=1, num_heads=4)),
    ),
    "image": ("pixel_values", lambda: hf.ViTModel(hf.ViTConfig(**SIZES, image_size=(16, 24), patch_size=8, num_channels=1))),
    "patches": ("hidden_states", lambda: hf.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(
        hf.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(**QWEN))),
    "frames": ("input_features", lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER))),
    "wave": ("input_values", lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**SIZES, conv_dim=(8,) * 7))),
}  # fmt: skip


@pytest.mark.parametrize("sense", MODELS)
def test_it_runs_and_is_the_same_each_time(sense: str) -> None:
    argument, make = MODELS[sense]
    model = make().eval()
    state = torch.get_rng_state()
    first, second = dummy_inputs(model), dummy_inputs(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert argument in first
    assert sense == "patches" or main_input(model) == argument
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
    with torch.no_grad():
        assert torch.isfinite(model(**first)[0]).all()


def test_the_outer_model_comes_before_its_parts() -> None:
    model = MODELS["frames"][1]()
    paths = [path for path, _ in parts(model)]
    assert paths[:2] == ["", "model"]
    assert {"model.encoder", "model.decoder"} <= set(paths)
