"""Several threads on one live model: each pass sees one state of it, and its base weights come back."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import s2ft
from families import build, tokens
from live import logits
from s2ft import S2FTConfig, S2FTError
from s2ft.layer.turns import Turns
from s2ft.tuner.pool import AdapterPool

NAMES = [f"user{number}" for number in range(6)]


def together(work: list[Callable[[], Any]]) -> list[Any]:
    """Each in a thread of its own, all begun at once; what they return, or raises what they raise."""
    start = threading.Barrier(len(work))

    def run(one: Callable[[], Any]) -> Any:
        start.wait()
        return one()

    with ThreadPoolExecutor(len(work)) as threads:
        return [future.result() for future in [threads.submit(run, one) for one in work]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A base, and six adapters of it; no two hold the same channels, and one holds other modules."""
    base, root = build("llama", torch.float64), tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(NAMES):
        ratios = {"up_proj": 0.3} if number == 5 else {"o_proj": 0.5, "down_proj": 0.1 * (number + 1)}
        model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=ratios, seed=number), adapter_name=name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root)
    return base, root


@pytest.mark.soak
def test_batches_of_three_threads_on_one_pool(
    saved: tuple[nn.Module, Path], tries: Callable[[int, int], int], one_thread: None
) -> None:
    base, root = saved
    ids = tokens(3, 4)
    alone = {
        name: logits(PeftModel.from_pretrained(copy.deepcopy(base), root / name).eval(), ids) for name in NAMES
    } | {"__base__": logits(base, ids)}
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios={"o_proj": 0.5}), adapter_name="own").eval()
    room = sum((root / name / "adapter_model.safetensors").stat().st_size for name in NAMES[2:5])
    pool = AdapterPool(model, root, device_bytes=room, host_bytes=room // 2)  # adapters come and go all the time
    base_output, count = alone["__base__"], tries(80, 4000)

    def batches(seed: int) -> int:
        rng, wrong = Random(seed), 0
        for _ in range(count):
            if rng.random() < 0.2:
                found, wanted = logits(model, ids), base_output  # a plain pass: "own" has no effect yet
            else:
                row = [rng.choice([*NAMES, "__base__"]) for _ in range(2)]
                row.append(row[0])
                found = logits(model, ids, adapter_names=row)
                wanted = torch.stack([alone[name][place] for place, name in enumerate(row)])
            wrong += not torch.allclose(found, wanted)
        return wrong

    seeds = [int(seed) for seed in torch.randint(2**31, (3,))]
    assert together([lambda seed=seed: batches(seed) for seed in seeds]) == [0, 0, 0]
    pool.close()


@pytest.mark.soak
def test_changes_and_passes_of_several_threads(tries: Callable[[int, int], int], one_thread: None) -> None:
    ids, count = tokens(2, 4), tries(60, 3000)
    model = get_peft_model(build("llama", torch.float32), S2FTConfig(ratios=0.4, seed=1), adapter_name="a").eval()
    model.add_adapter("b", S2FTConfig(ratios={"down_proj": 0.5, "up_proj": 0.3}, seed=2))
    for name, parameter in model.named_parameters():
        if "s2ft_block" in name:
            nn.init.normal_(parameter, std=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    possible = []
    for adapter in ("a", "b", None):
        s2ft.switch(model, adapter)
        possible.append(logits(model, ids))
    s2ft.switch(model, None)
    model.merge_adapter(["a", "b"])
    possible.append(logits(model, ids))
    model.set_adapter("a")

    def change(seed: int) -> int:
        rng, refused = Random(seed), 0
        for _ in range(count):
            name = rng.choice(["a", "b", None])
            calls = [lambda name=name: s2ft.switch(model, name), model.unmerge_adapter]
            if name:
                calls += [lambda name=name: model.merge_adapter([name]), lambda name=name: model.set_adapter(name)]
            try:
                rng.choice(calls)()
            except S2FTError:  # merging while switched, and the other way round
                refused += 1
        return int(refused == count)

    def passes() -> int:
        found = [logits(model, ids) for _ in range(count)]
        return sum(not any(torch.allclose(one, other, 1e-3, 1e-3) for other in possible) for one in found)

    assert together([lambda: change(1), lambda: change(2), passes, passes]) == [0] * 4
    model.unmerge_adapter()
    s2ft.switch(model, None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TestTurns:
    def test_passes_run_beside_each_other(self) -> None:
        turns, inside = Turns(), threading.Barrier(3, timeout=30)

        def one() -> None:
            with turns.together(), turns.together():
                inside.wait()  # returns only if all three are inside

        together([one] * 3)

    def test_a_change_waits_for_passes_and_they_for_it(self) -> None:
        turns, seen = Turns(), []

        def change() -> None:
            for _ in range(200):
                with turns.alone(), turns.together(), turns.alone():
                    seen.append(1)
                    assert len(seen) == 1
                    seen.clear()

        def one() -> None:
            for _ in range(200):
                with turns.together():
                    assert not seen

        together([change, change, one, one])

    def test_a_thread_changes_the_model_from_inside_its_pass(self) -> None:
        turns = Turns()
        with turns.together(), turns.alone(), turns.together():
            pass
        together([lambda: turns.alone().__enter__()])  # nothing is left taken

    def test_two_threads_that_would_wait_for_each_other(self) -> None:
        turns, inside = Turns(), threading.Barrier(2, timeout=30)

        def one() -> str:
            with turns.together():
                inside.wait()
                try:
                    with turns.alone():
                        return "alone"
                except S2FTError as error:
                    return str(error)

        assert sorted(together([one, one])) == [
            "alone",
            "two threads want to change this model, each inside of a forward pass of its own",
        ]

    def test_copies_and_pickles_of_a_model_have_their_own(self) -> None:
        model = get_peft_model(build("llama", torch.float32), S2FTConfig(ratios=0.4))
        with model.base_model.shared.turns.alone():
            twin = copy.deepcopy(model)
            assert together([lambda: logits(twin, tokens(1, 3)).isfinite().all()]) == [True]
        assert len(twin.base_model.shared.layers) == len(model.base_model.shared.layers) > 0
        assert not set(twin.base_model.shared.layers) & set(model.base_model.shared.layers)
