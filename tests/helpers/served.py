"""What is served in tests: a base with adapters, and a scheduler that a test turns by hand."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from families import build
from s2ft import S2FTConfig
from s2ft.serve.batch import Batch
from s2ft.serve.job import End, Event, Failure, Job, Piece, Prompt, Sampling
from s2ft.serve.model import Base, prepared
from s2ft.serve.scheduler import Scheduler, Watch
from s2ft.tuner.pool import AdapterPool

RATIOS = {"q_proj": 0.5, "o_proj": 0.5, "up_proj": 0.2, "down_proj": 0.3}
PLENTY = 1 << 30


def talkative(family: str) -> PreTrainedModel:
    """A model in float32 whose answers vary, and have no end."""
    model = build(family, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model


class Letters:
    """A tokenizer with a letter for each token."""

    eos_token_id = None
    chat_template = None

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(0x4E00 + token) for token in tokens)


def save_adapters(base: nn.Module, root: Path, count: int, ratios: Any = RATIOS, size: float = 0.1) -> list[str]:
    """Adapters of several ranks whose deltas are large enough to change what the model says."""
    names = [f"user{number}" for number in range(count)]
    for number, name in enumerate(names):
        scaled = {module: min(1.0, ratio * (1 + number / count)) for module, ratio in ratios.items()}
        model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=scaled, seed=number), adapter_name=name)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if ".s2ft_block." in path:
                    parameter.add_(size * torch.randn_like(parameter))
        model.save_pretrained(root)
    return names


def greedy(base: nn.Module, adapter: Path | None, prompt: Sequence[int], count: int) -> list[int]:
    """What `generate` alone writes."""
    model: Any = copy.deepcopy(base) if adapter is None else PeftModel.from_pretrained(copy.deepcopy(base), adapter)
    ids = torch.tensor([list(prompt)])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


class Desk:
    """A scheduler without a thread, on a base with a folder of adapters."""

    def __init__(self, base: nn.Module, root: Path, rows: int = 4, device_bytes: int = PLENTY, **more: Any) -> None:
        self.root = root
        self.base: Base = prepared(copy.deepcopy(base), Letters())
        self.pool = AdapterPool(self.base.tuner, {}, device_bytes, more.pop("host_bytes", PLENTY))
        self.events: dict[Job, list[Event]] = defaultdict(list)
        self.scheduler = Scheduler(
            Batch(self.base.tuner),
            self.pool,
            Letters(),
            more.pop("ends", ()),
            rows,
            more.pop("waiting", 100),
            self._deliver,
            more.pop("watch", Watch()),
        )

    def _deliver(self, events: list[tuple[Job, Event]]) -> None:
        for job, event in events:
            self.events[job].append(event)

    def ask(self, prompt: Sequence[int], adapter: str | None = None, count: int = 5, **how: Any) -> Job:
        sampling = Sampling(count, **{key: how.pop(key) for key in [*how] if key in Sampling.__dataclass_fields__})
        folder = None if adapter is None else self.root / adapter
        job = Job(prompt, adapter or "__base__", sampling, folder, **how)
        self.scheduler.submit([job])
        return job

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.scheduler._turn()

    def finish(self) -> None:
        """Until nothing is under way."""
        for _ in range(1000):
            if not self.scheduler._rows and not self.scheduler._waiting:
                return
            self.turn()
        raise AssertionError("it does not come to an end")

    def tokens(self, job: Job) -> list[int]:
        pieces = [event for event in self.events[job] if isinstance(event, Piece)]
        return [told.token for piece in pieces for told in piece.tokens]

    def text(self, job: Job) -> str:
        return "".join(event.text for event in self.events[job] if isinstance(event, Piece))

    def prompt(self, job: Job) -> Prompt:
        return next(event for event in self.events[job] if isinstance(event, Prompt))

    def last(self, job: Job) -> End | Failure:
        event = self.events[job][-1]
        assert isinstance(event, End | Failure)
        return event
