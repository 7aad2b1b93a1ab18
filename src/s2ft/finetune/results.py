"""The files of a finished run: an adapter or a model, its README, its options, and the run card."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from s2ft.adapters.answer_end import with_end
from s2ft.adapters.file import read_adapter
from s2ft.adapters.inspection import draw
from s2ft.common.files import replaced_file, staged
from s2ft.data.template import turn_end
from s2ft.finetune.card import Card, final_mean, write_card
from s2ft.finetune.estimate import Estimate
from s2ft.finetune.methods import find_method
from s2ft.finetune.model_card import model_card
from s2ft.finetune.objectives import OBJECTIVES
from s2ft.finetune.options import TrainOptions, to_yaml, unasked
from s2ft.finetune.prepare import Setup
from s2ft.finetune.values import repeats
from s2ft.finetune.weights import layer_changes
from s2ft.format.config import S2FTConfig
from s2ft.format.terms import DRAWN
from s2ft.report.run import run_page
from s2ft.runtime.environment import environment, peak_memory
from s2ft.runtime.gguf import reading
from s2ft.runtime.processes import engine, process_count
from s2ft.selection.coverage import parameter_counts


def section(options: TrainOptions) -> str:
    """The run card's section on what was trained: "adapter" or "model"."""
    return "model" if find_method(options.method).leaves_model else "adapter"


def parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers of trained parameters (LISA's at a time) and of the base model's, however they are stored."""
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    added = f".{prefix}" if (prefix := getattr(getattr(model, "base_model", None), "prefix", "")) else None  # by PEFT
    own = [count for name, count in parameter_counts(model).items() if added is None or added not in name]
    return trainable, sum(own)


def save_result(
    options: TrainOptions,
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: Card,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Writes everything to `options.output`, each file whole or not at all.

    A model is brought to the dtype that its base was stored in, and gets the tokenizer along.

    Args:
        state: What was trained, where an engine has divided it among processes.
    """
    method, output = find_method(options.method), Path(options.output)
    answers_chat = card["data"]["format"] == "chat" and OBJECTIVES[options.objective].answers
    end = turn_end(tokenizer) if answers_chat else None
    end = None if end == tokenizer.eos_token_id else end
    if method.leaves_model:
        model.to(_stored_dtype(options.model))
        if end is not None:
            model.generation_config.eos_token_id = with_end(model.generation_config.eos_token_id, end)
    with staged(output) as aside:
        model.save_pretrained(str(aside), state_dict=state)
        if method.leaves_model:
            tokenizer.save_pretrained(str(aside))
        if end is not None:
            card["data"]["answer_end"] = tokenizer.convert_ids_to_tokens(end)
        if options.push_to_hub is not None and method.ours:
            draw(read_adapter(aside), aside / "channels.png")
        (aside / "run.yaml").write_text(f"# {command(options)}\n{to_yaml(options)}", encoding="utf-8")
        card[section(options)]["bytes"] = sum(path.stat().st_size for path in aside.glob("*.safetensors"))
    write_run(output, card)


def write_run(output: Path, card: Card) -> None:
    """Writes, from the card and what lies beside it, the README for the Hub, the page `report.html`, and the card; each whole.

    The card is the last, as it says that the run is finished: one that is killed before goes on, and writes all of them.
    """
    pictures = {path.name for path in output.glob("*.png")}
    if card.get("loss_curve"):
        pictures.add("loss.png")  # comes with the card
    with replaced_file(output / "README.md") as aside:
        aside.write_text(model_card(card, sorted(pictures)), encoding="utf-8")
    with replaced_file(output / "report.html") as aside:
        aside.write_text(run_page(card, output), encoding="utf-8")
    write_card(output, card)


def command(options: TrainOptions, resume: bool = False) -> str:
    """The command line that runs these options again, from the file beside the result."""
    words = ["s2ft", "train", "--config", str(Path(options.output) / "run.yaml"), *(["--resume"] if resume else [])]
    return shlex.join(words)


def whole_command(options: TrainOptions) -> str:
    """The command line that runs these options again, without any file.

    Example:
        >>> whole_command(TrainOptions(model="org/base", data=["a b.json"], output="out", ratios={"o_proj": 0.1}, packing=True))
        "s2ft train --model org/base --data 'a b.json' --output out --ratios o_proj=0.1 --packing"
    """
    return shlex.join(command_words(options))


def command_words(options: TrainOptions) -> list[str]:
    """The words of that command line."""
    words = ["s2ft", "train"]
    fields, left_out = TrainOptions.model_fields, unasked(options)
    names = [name for name in fields if name not in left_out]
    for name in sorted(names, key=lambda name: not fields[name].is_required()):
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is not None and value != fields[name].default:
            words += _typed(flag, value, repeated=repeats(fields[name]))
    return words


_AS_YAML = "--peft-config"  # whose values keep their types


def _typed(flag: str, value: Any, repeated: bool) -> list[str]:
    """An option as it is typed."""
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if (isinstance(value, dict) and any(isinstance(item, dict | list) for item in value.values())) or flag == _AS_YAML:
        return [flag, yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip()]
    if isinstance(value, dict):
        return [flag, ",".join(f"{key}={item}" for key, item in value.items())]
    if isinstance(value, list) and repeated:
        return [word for item in value for word in (flag, item)]
    if isinstance(value, list):
        return [flag, ",".join(map(str, value)) + ("," if len(value) == 1 else "")]  # a single one stays a list
    return [flag, str(value)]


def _stored_dtype(base: str) -> torch.dtype:
    source, more = reading(base)
    dtype = getattr(AutoConfig.from_pretrained(source, trust_remote_code=False, **more), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def run_card(setup: Setup, steps: int, foreseen: Estimate | None, metrics: dict[str, float]) -> Card:
    """What the run was and what came out, but for its scores and the size of its files.

    Args:
        setup: After the training.
        steps: As planned.
        foreseen: The estimate that was told.
        metrics: From transformers' `Trainer.train`.
    """
    options, state, tokens = setup.options, setup.trainer.state, setup.data.tokens
    trainable, total = parameters(setup.trainer.model)
    card = {
        "options": options.model_dump(mode="json"),
        "given": list(setup.note.given),
        **({} if setup.note.rewards is None else {"rewards": setup.note.rewards}),
        "environment": environment(),
        "data": {
            "digest": setup.data.digest,
            "format": setup.data.format,
            "examples": len(tokens.dataset),
            "without_response": tokens.empty,
            "response_beyond_max_length": tokens.too_long,
            "shortened": tokens.shortened,
            "without_end": tokens.endless,
            **({"alike": tokens.alike} if tokens.alike else {}),
        },
        **_objective(setup),
        **_selection(setup.config),
        section(options): {
            "trainable_parameters": trainable,
            "model_parameters": total,
            "share": trainable / total,
        },
        "training": _training(setup, steps, foreseen, setup.note.seconds + metrics["train_runtime"]),
        **({} if setup.note.search is None else {"learning_rate_search": setup.note.search}),
        "loss_curve": _points(state.log_history, "loss"),
        "rate_curve": _points(state.log_history, "learning_rate"),
        "layers": layer_changes(setup.trainer.model),
        "command": whole_command(options.model_copy(update={"resume": False})),
    }
    if setup.data.held_out is not None:
        card["held_out_curve"] = _points(state.log_history, "eval_loss")
    return card


def _objective(setup: Setup) -> Card:
    """What TRL measured besides the loss: the mean over the last tenth of the run."""
    measures = OBJECTIVES[setup.options.objective].measures
    history = setup.trainer.state.log_history
    return {"objective": {name: final_mean(_points(history, name)) for name in measures}} if measures else {}


def _training(setup: Setup, steps: int, foreseen: Estimate | None, seconds: float) -> Card:
    options, state, reasons = setup.options, setup.trainer.state, setup.note.reasons
    tokens = _tokens(setup)
    training = {
        "method": options.method,
        "learning_rate": options.learning_rate,
        "learning_rate_reason": reasons["learning_rate"],
        "batch": reasons["batch"],
        "precision": reasons["precision"],
        **({"processes": process_count(), "engine": engine()} if process_count() > 1 else {}),
        **({"layout": reasons["layout"]} if "layout" in reasons else {}),
        "max_length": setup.data.tokens.max_length,
        "warmup_steps": int(setup.trainer.args.warmup_steps),
        "steps": state.global_step,
        "planned_steps": steps,
        "resumed_from": None if setup.checkpoint is None else setup.checkpoint.name,
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "final_loss": final_mean(_points(state.log_history, "loss")),
    }
    if setup.data.held_out is not None:
        best = {"best_step": state.best_global_step, "best_loss": state.best_metric}
        training |= {"held_out": len(setup.data.held_out), **best}
    return training | peak_memory() | ({} if foreseen is None else foreseen.card)


def _tokens(setup: Setup) -> int:
    """What TRL has counted in the parts of the run whose seconds are known; most trainers count anew when a run goes on."""
    counts, begins = _points(setup.trainer.state.log_history, "num_tokens"), setup.note.parts
    parts = [
        max((count for step, count in counts if begin < step <= end), default=0)
        for begin, end in zip(begins, (*begins[1:], math.inf), strict=True)
    ]
    return int(sum(parts) if setup.trainer.counts_anew else max(parts))


def _points(history: Sequence[dict[str, float]], name: str) -> list[tuple[int, float]]:  # (step, value)
    return [(int(entry["step"]), entry[name]) for entry in history if name in entry]


def _selection(config: PeftConfig | None) -> Card:
    if not isinstance(config, S2FTConfig):
        return {}
    chosen = {"seed": config.seed} if config.strategy in DRAWN else {"subset": config.subset}
    return {"selection": {"strategy": config.strategy, **chosen, "modules": len(config.slices or {})}}
