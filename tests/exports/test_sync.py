"""`s2ft.sync`: what is sent makes a base the merged model, and the base again; by an engine that is only a state dict."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load, load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

import s2ft
from exported import save_adapter, save_base
from mixtures import mixture
from s2ft import S2FTError
from s2ft.adapters.merge import merge
from s2ft.exports.sync_callback import SliceSync

RATIOS = {"o_proj": 0.5, "down_proj": 0.3}
OTHERS = {"q_proj": 0.5, "down_proj": 0.6}


class FakeEngine:
    """What `exports/vllm_weights.py` does, on a state dict."""

    def __init__(self, base: Path) -> None:
        self.state = load_file(base / "model.safetensors")
        self.calls: list[str] = []
        self._held: dict[str, tuple[int, Tensor, Tensor]] = {}

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, request: dict[str, Any]) -> None:
        self.calls.append("update")
        info = request["update_info"]
        tensors = load(base64.b64decode(info["tensors"])) if info["slices"] else {}
        for name, (dim, channels, own) in self._held.items():
            self._put(name, dim, channels, own)
        held = {}
        for name, where in info["slices"].items():
            assert list(self.state[name].shape) == where["shape"]
            channels, dim = tensors[f"{name}.at.0"].long(), 1 - where["across"]
            own = tensors[f"{name}.own"] if f"{name}.own" in tensors else self._held[name][2]
            held[name] = (dim, channels, own)
            self._put(name, dim, channels, tensors[f"{name}.values"])
        self._held = held

    def _put(self, name: str, dim: int, channels: Tensor, rows: Tensor) -> None:
        self.state[name].index_copy_(dim, channels, rows.T if dim == 1 else rows)

    def finish_weight_update(self) -> None:
        self.calls.append("finish")

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")


def assert_state(engine: FakeEngine, folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    assert engine.state.keys() == expected.keys()
    assert all(torch.equal(engine.state[name], expected[name]) for name in expected)


@pytest.fixture(params=["llama", "gpt2"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    """A base, two adapters and their merged models; GPT-2 keeps its weights as [in, out]."""
    base = save_base(tmp_path / "base", request.param)
    ratios = {"a": RATIOS, "b": OTHERS if request.param == "llama" else {"down_proj": 0.6}}
    found = {"base": base}
    for name, wanted in ratios.items():
        found[name] = save_adapter(tmp_path / name, base, wanted)
        found[f"merged-{name}"] = merge(found[name], tmp_path / f"merged-{name}")
    return found


def test_the_engine_holds_the_merged_model_then_another_then_the_base(made: dict[str, Path]) -> None:
    engine = FakeEngine(made["base"])
    for name in ("a", "b", "a"):
        sent = s2ft.sync(engine, made[name])
        assert_state(engine, made[f"merged-{name}"])
        assert sent.parameters == s2ft.read_adapter(made[name]).parameters
        assert 2 * sent.parameters < sent.bytes < sent.merged_bytes + sent.parameters * 4
    assert s2ft.sync(engine, None).bytes == 0
    assert_state(engine, made["base"])
    assert engine.calls == ["start", "update", "finish", "reset"] * 4


def test_what_cannot_be_sent_is_refused_before(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    other = save_base(tmp_path / "other", "llama")
    adapter, engine = save_adapter(tmp_path / "a", base, RATIOS), FakeEngine(base)
    with pytest.raises(S2FTError, match=r"differ|another|other weights"):
        s2ft.sync(engine, adapter, base=str(other))
    with pytest.raises(S2FTError, match="nowhere"):
        s2ft.sync(engine, tmp_path / "nowhere")
    assert engine.calls == []


def test_slices_of_stacked_experts_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    base = tmp_path / "base"
    mixture("mixtral", torch.float32).save_pretrained(base)
    experts = {"target_parameters": ["mlp.experts.down_proj"], "strategy": "random"}
    adapter, engine = save_adapter(tmp_path / "a", base, 0.3, **experts), FakeEngine(base)
    with pytest.raises(
        S2FTError, match=r"layers\.0\.mlp\.experts\.down_proj is a slice of stacked experts.*s2ft merge"
    ):
        s2ft.sync(engine, adapter)
    assert engine.calls == []


def test_what_the_engine_says_is_told_with_what_it_needs(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    engine = FakeEngine(base)
    engine.update_weights = lambda request: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(S2FTError, match=r"division by zero.*weight_transfer_config=\{'backend': 's2ft'\}"):
        s2ft.sync(engine, None)


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[str, Any, str | None]]]]:
    """An address, and what is asked there."""
    asked: list[tuple[str, Any, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, json.loads(body), self.headers.get("Authorization")))
            fails = {"/update_weights": 20, "/pause?mode=wait&clear_cache=true": 40}  # once so much was asked
            self.send_response(500 if len(asked) > fails.get(self.path, 999) else 200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None: ...

    found = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}", asked
    found.shutdown()
    thread.join()


def test_a_server_pauses_takes_it_and_goes_on(server: tuple[str, list[Any]], tmp_path: Path) -> None:
    url, asked = server
    base = save_base(tmp_path / "base", "llama")
    s2ft.sync(f"{url}/v1", save_adapter(tmp_path / "a", base, RATIOS), key="secret")
    paths = ["/pause?mode=wait&clear_cache=true", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert [path for path, _, _ in asked] == [*paths, "/reset_prefix_cache", "/resume"]
    assert {key for _, _, key in asked} == {"Bearer secret"}
    engine = FakeEngine(base)
    engine.update_weights(asked[2][1])
    assert_state(engine, merge(tmp_path / "a", tmp_path / "merged"))
    asked.extend([("", None, None)] * 20)
    with pytest.raises(S2FTError, match="update_weights answers 500"):
        s2ft.sync(url, None)
    assert asked[-1][0] == "/resume"  # whatever happens
    asked.extend([("", None, None)] * 20)
    with pytest.raises(S2FTError, match=r"pause\?\S+ answers 500"):
        s2ft.sync(url, None)
    assert asked[-1][0] == "/resume"  # a pause that took too long may still begin
    with pytest.raises(S2FTError, match="does not answer"):
        s2ft.sync("http://127.0.0.1:1", None)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_trainer_sends_each_step(tmp_path: Path, in_place: bool) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "a", base, RATIOS)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter), is_trainable=True)
    engine, state = FakeEngine(base), TrainerState(is_world_process_zero=True)
    callback = SliceSync(engine)
    sizes = []

    def steps() -> None:
        callback.on_train_begin(None, state, TrainerControl(), model=model)
        for _ in range(2):
            assert callback.last is not None
            sizes.append(callback.last.bytes)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            callback.on_step_end(None, state, TrainerControl(), model=model)

    if in_place:
        with s2ft.in_place(model):
            steps()
    else:
        steps()
    model.save_pretrained(str(tmp_path / "trained"))
    assert_state(engine, merge(tmp_path / "trained", tmp_path / "merged", str(base)))
    assert sizes[1] < 0.6 * sizes[0]  # the base's own values went once


def test_a_trainer_without_vllm_in_this_process_is_refused() -> None:
    with pytest.raises(S2FTError, match="runs no vLLM in this process"):
        SliceSync.of(object())


class Generation:
    """TRL's, with a vLLM in this process."""

    llm = object()
    sync_weights = None
    enable_sleep_mode = False


class Trainer:
    """TRL's, as far as `SliceSync.of` looks at it."""

    accelerator = type("Accelerator", (), {"unwrap_model": staticmethod(lambda model: model)})

    def __init__(self, model: Any) -> None:
        self.model, self.vllm_generation = model, Generation()


def test_a_vllm_that_sleeps_is_refused() -> None:
    """Its weights are gone then, and only TRL's own `sync_weights` wakes it and sends them all."""
    trainer = Trainer(None)
    trainer.vllm_generation.enable_sleep_mode = True
    with pytest.raises(S2FTError, match=r"vllm_enable_sleep_mode=True: .* leave it False"):
        SliceSync.of(trainer)
    assert trainer.vllm_generation.sync_weights is None


@pytest.mark.parametrize(
    ("more", "name"),
    [({"modules_to_save": ["lm_head"]}, "lm_head"), ({"trainable_token_indices": [3]}, "embed_tokens")],
)
def test_what_is_trained_beside_slices_is_refused(tmp_path: Path, more: dict[str, Any], name: str) -> None:
    base = save_base(tmp_path / "base", "llama")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), s2ft.S2FTConfig(ratios=RATIOS, **more))
    engine = FakeEngine(base)
    with pytest.raises(S2FTError, match=f"{name} is trained beside the slices"):
        SliceSync(engine).push(model)
    assert engine.calls == []


def test_slices_of_a_packed_base_are_refused(tmp_path: Path) -> None:
    """As bitsandbytes packs: a plain tensor, of two dimensions and of other sizes."""
    base = save_base(tmp_path / "base", "llama")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), s2ft.S2FTConfig(ratios=RATIOS))
    down = model.base_model.model.model.layers[0].mlp.down_proj.get_base_layer()
    down.weight = torch.nn.Parameter(torch.zeros(down.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(S2FTError, match=r"the weight of \S+layers\.0\.mlp\.down_proj is quantised .* cannot be sent"):
        SliceSync(FakeEngine(base)).push(model)


def test_of_takes_the_place_of_the_trainers_own_way(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), s2ft.S2FTConfig(ratios=RATIOS))
    trainer = Trainer(model)
    callback, engine = SliceSync.of(trainer), FakeEngine(base)
    callback._engine = engine
    callback.on_step_end(None, TrainerState(is_world_process_zero=True), TrainerControl(), model=model)
    assert engine.calls == []  # the trainer asks when it generates
    trainer.vllm_generation.sync_weights()
    assert engine.calls == ["start", "update", "finish", "reset"]
