"""One of the processes that `bench distributed` starts: trains S²FT and LoRA under one engine, in turns.

python -m torch.distributed.run --nproc_per_node 2 -m s2ft.lab.bench.divided ENGINE FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from s2ft.finetune.engines import trained_state
from s2ft.finetune.lora import equal_rank
from s2ft.format.config import S2FTConfig
from s2ft.layer.sharding import local
from s2ft.runtime.memory import own_tensors, saved_bytes
from s2ft.runtime.processes import is_divided
from s2ft.runtime.timing import milliseconds, spread
from s2ft.training.in_place import in_place
from s2ft.tuner.model import S2FTModel  # noqa: F401 - PEFT knows the method from here on

METHODS = ("s2ft", "lora")
RATE = 1e-3

Step = Callable[[Tensor], None]  # of this process's rows, [rows, length]


@dataclass(frozen=True)
class Running:
    """A method under an engine."""

    model: PeftModel
    step: Step
    optimizer: torch.optim.Optimizer  # torch's, of this process's part
    layout: str


def make(method: str, settings: dict[str, Any]) -> PeftModel:
    """The same model in every process, with as many trained parameters by either method."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**settings["shapes"])).requires_grad_(False).train()
    sliced = S2FTConfig(budget=settings["budget"], strategy="weight")
    if method == "s2ft":
        return get_peft_model(base, sliced)
    rank = equal_rank(base, round(settings["budget"] * base.num_parameters()))
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def batches(settings: dict[str, Any], steps: int) -> Tensor:  # [steps, rows, length]
    """The same in every process."""
    drawn = torch.Generator().manual_seed(1)
    shape = (steps, settings["rows"], settings["length"])
    return torch.randint(settings["shapes"]["vocab_size"], shape, generator=drawn)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Of next tokens."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Forward, backward, optimizer."""

    def step(ids: Tensor) -> None:
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adam(model: nn.Module) -> torch.optim.AdamW:
    """Over what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)


def start(engine: str, model: PeftModel) -> tuple[Step, torch.optim.Optimizer]:
    """Puts the model under the engine."""
    if engine == "ddp":
        optimizer = adam(model)
        return plain_step(DistributedDataParallel(model), optimizer), optimizer
    if engine == "fsdp2":
        base: Any = model.get_base_model()
        for block in base.model.layers:
            fully_shard(block)
        fully_shard(model)
        optimizer = adam(model)
        return plain_step(model, optimizer), optimizer
    return _deepspeed(int(engine.removeprefix("zero")), model)


def _deepspeed(stage: int, model: PeftModel) -> tuple[Step, torch.optim.Optimizer]:
    import deepspeed

    optimizer = adam(model)
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed scales nothing by it
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    def step(ids: Tensor) -> None:
        engine.backward(loss_of(engine, ids))
        engine.step()

    return step, optimizer


def state_bytes(running: Running) -> int:
    """Weights, what is trained, and the optimizer's state, of this process."""
    held = [getattr(parameter, "ds_tensor", local(parameter)) for parameter in running.model.parameters()]
    states = chain.from_iterable(state.values() for state in running.optimizer.state.values())
    tensors = [*held, *(local(value) for value in states if isinstance(value, Tensor))]
    return sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}.values())


def reloads(state: dict[str, Tensor], method: str, settings: dict[str, Any], folder: Path) -> bool:
    """Whether the saved adapter, on a fresh base, holds exactly what was trained."""
    found = PeftModel.from_pretrained(make(method, settings).unload(), folder).state_dict()
    return all(torch.equal(found[name], value) for name, value in state.items())


def _run(engine: str, folder: Path, settings: dict[str, Any], stack: ExitStack) -> Iterator[dict[str, Any]]:
    rank, running = distributed.get_rank(), dict[str, Running]()
    mine = batches(settings, settings["steps"] + settings["rounds"]).chunk(2, dim=1)[rank]
    for method in METHODS:
        model = make(method, settings)
        if lies_in_place := method == "s2ft" and not is_divided():
            stack.enter_context(in_place(model))
        step, optimizer = start(engine, model)
        running[method] = Running(model, step, optimizer, "in place" if lies_in_place else "beside the layers")
    facts: dict[str, dict[str, Any]] = {}
    for method, one in running.items():
        for ids in mine[: settings["steps"]]:
            one.step(ids)
        state, place = trained_state(one.model), folder / f"{engine}-{method}"
        if rank == 0:
            one.model.save_pretrained(str(place), state_dict=state)
        same = rank == 0 and reloads(state, method, settings, place)
        facts[method] = {"reloaded_equal": same, "state_bytes": state_bytes(one), "layout": one.layout}
    times = _in_turns(running, mine[settings["steps"] :])
    for method, one in running.items():
        forward = partial(loss_of, one.model, mine[0])
        counted = None if is_divided() else saved_bytes(forward, own_tensors(one.model))
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in one.model.parameters() if p.requires_grad)
        row = {"engine": engine, "method": method, **facts[method], "saved_bytes": counted, "trainable": trained}
        yield {**row, **spread(times[method], "step_ms")}


def _in_turns(running: dict[str, Running], mine: Tensor) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {method: [] for method in running}
    order = random.Random(0)  # the same in every process
    for ids in mine:
        for method in order.sample(METHODS, len(METHODS)):
            distributed.barrier()
            times[method].append(milliseconds(partial(running[method].step, ids)))
    return times


def main() -> None:
    """Writes FOLDER/ENGINE.json."""
    engine, folder = sys.argv[1], Path(sys.argv[2])
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        distributed.init_process_group("gloo")
    with ExitStack() as stack:
        rows = list(_run(engine, folder, settings, stack))
        distributed.barrier()
        if distributed.get_rank() == 0:
            (folder / f"{engine}.json").write_text(json.dumps(rows), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
