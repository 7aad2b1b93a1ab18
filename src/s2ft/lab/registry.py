"""What `s2ft bench` and `s2ft study` offer: a row for each, from which its command, help and checks follow.

A row is all that is read before a command runs. The work is in the module of the row's name, which is imported only then:

    lab/bench/NAME.py    bench_NAME(tell=..., **options) → Report;  NAME_line(row), unless rows are printed as they are;
                         draw_NAME(rows, png), if there is a picture
    lab/study/NAME.py    study_NAME(folder, settings, tell, **options) → StudyReport;  NameSettings(seeds=...)

A new benchmark or study is such a module, its row here, and its test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

TellShare = Callable[[float], object]  # is told which share of the work is done, from 0 to 1


@dataclass(frozen=True)
class Option:
    """An option of its own: `--NAME` on the command line, an argument of that name in the module."""

    kind: Any  # bool, str, an enum, ...
    default: Any  # ... if it has to be given
    help: str
    example: str = ""  # a value, for the help's example, which has to go with those of the other options


@dataclass(frozen=True)
class Entry:
    """A benchmark or a study."""

    help: str
    options: Mapping[str, Option] = field(default_factory=dict)
    has_picture: bool = True

    def described(self, command: str, name: str) -> str:
        """The help, which ends in an example."""
        own = "".join(f" --{option} {given.example}" for option, given in self.options.items() if given.example)
        png = f" --png {name}.png" if self.has_picture else ""
        return f"{self.help}\n\nExample: s2ft {command} {name}{own} --json {name}.json{png}"


class Device(StrEnum):
    """Where a benchmark measures."""

    cpu = "cpu"
    cuda = "cuda"


class TrainingPreset(StrEnum):
    """The machine that the training benchmark is for; names in `lab.bench.training.PRESETS`."""

    cpu = "cpu"
    llama = "7b"
    moe = "moe"
    moe_gpu = "moe-gpu"


class TrainingDtype(StrEnum):
    """The dtype of the weights in the training benchmark."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


_DEVICE = Option(Device | None, None, "Measure there alone [default: the CPU, and the GPU if any]")

BENCHMARKS = {
    "selection": Entry("Time the choice of channels at the shape of LLaMA2-7B.", has_picture=False),
    "training": Entry(
        "Time a training step of S²FT and other methods, beside the frozen model, and count what they keep for backward.",
        {
            "preset": Option(
                TrainingPreset | None,
                None,
                "cpu: a small Llama; 7b: LLaMA2-7B, LLaMA3-8B, on a GPU; moe, moe-gpu: the experts' down of a small mixture, "
                "of 8 blocks of Qwen3-30B-A3B [default: cpu; for a --model the GPU, if any]",
                "cpu",
            ),
            "model": Option(str | None, None, "A model instead: a folder, a GGUF file, or a name on the Hub"),
            "dtype": Option(
                TrainingDtype,
                TrainingDtype.auto,
                "Of the weights; auto: fp32 for moe, else bf16 where the device multiplies it",
            ),
            "length": Option(str | None, None, "Tokens in a sequence, 512,1024 [default: the preset's]", "128,256"),
            "batch": Option(str | None, None, "Sequences in a batch, 1,2; at each length [default: the preset's]"),
            "methods": Option(
                str | None,
                None,
                "Of floor and the methods of s2ft train, floor,s2ft,lora [default: all, and variants]",
                "floor,s2ft,lora",
            ),
            "budget": Option(
                str | None, None, "Share of the parameters; several are rows of S²FT: 0.005,0.01 [default: 0.01]"
            ),
            "quantize": Option(
                str | None, None, "Quantise the base, as in s2ft train; on it floor,qlora,s2ft are measured"
            ),
            "liger": Option(bool, False, "Give every method Liger's kernels (GPU)"),
            "chunked": Option(
                bool, False, "Compute the loss as `s2ft train` does, in chunks, without all logits at once"
            ),
        },
    ),
    "quantised": Entry(
        "Compare the gradient of every slice on each quantisation with full autograd on the dequantised model.",
        {"seed": Option(int, 0, "Seed of the model's weights")},
        has_picture=False,
    ),
    "dense": Entry(
        "Time a slice beside its NF4 layer, as it is trained, and one held dense beside a quantised rest.",
        {"device": _DEVICE},
        has_picture=False,
    ),
    "switch": Entry(
        "Time how long a weight of dimension 1k to 32k takes to take an adapter in: S²FT, LoRA, and one copy of the slice.",
        {"device": _DEVICE},
    ),
    "parallel": Entry(
        "Time a batch of 1 to 1,000 adapters, a row each: S²FT, LoRA with equal parameters, and PEFT's mixed batch.",
        {"device": _DEVICE},
    ),
    "fusion": Entry(
        "Time the fusion of two adapters at LLaMA3-8B's shape, on files, beside writing as many bytes.",
        has_picture=False,
    ),
    "everyday": Entry(
        "Time inspect, fuse, merge, export, loading an adapter and preparing data, beside reading and writing the same bytes.",
        {
            "model": Option(
                str | None, None, "A folder with a model in safetensors [default: the embedded base]", "smollm2"
            ),
            "examples": Option(int, 100_000, "Examples that are prepared"),
        },
        has_picture=False,
    ),
    "families": Entry(
        "Train a tiny random model of every class of transformers, and compare with full autograd.",
        {
            "kind": Option(
                str | None,
                None,
                "One of causal, seq2seq, encoder, vision, vision-language, speech [default: all]",
                "causal",
            ),
            "page": Option(str | None, None, "Write the table as a page of Markdown", "families.md"),
            "drawn": Option(
                int | None, None, "Check N classes that the seed draws, and train each for a few steps too"
            ),
            "seed": Option(int, 0, "Seed of weights, inputs and channels"),
            "kept": Option(
                str | None,
                None,
                "Keep each row here as it is found; go on from there, trying what did not run again",
                "rows.jsonl",
            ),
        },
        has_picture=False,
    ),
    "serve": Entry(
        "Ask `s2ft serve` by many clients at once, check each answer, and compare with one at a time and a merged model.",
        {
            "model": Option(
                str | None, None, "A folder, a GGUF file, or a name on the Hub [default: the embedded model]"
            ),
            "clients": Option(int, 64, "Requests at once"),
            "adapters": Option(int, 8, "Adapters beside the base; they are random"),
            "seconds": Option(float, 300.0, "How long the load lasts; each of the others a fifth of it"),
            "vllm": Option(str | None, None, "A Python with s2ft and vLLM, to compare: build/engines/vllm/bin/python"),
        },
        has_picture=False,
    ),
    "sync": Entry(
        "Count the bytes that put an adapter into a running engine: `s2ft.sync`, a LoRA, and the whole model.",
        {
            "model": Option(
                str | None,
                None,
                "A folder with a model in safetensors, beside the embedded base",
                "SmolLM2-135M-Instruct",
            ),
            "budget": Option(float, 0.01, "Share of the parameters that the adapter trains"),
        },
        has_picture=False,
    ),
    "distributed": Entry(
        "Train in two processes by DDP, FSDP2, ZeRO-2 and ZeRO-3: error beside one process, memory and time beside LoRA.",
        has_picture=False,
    ),
    "evaluation": Entry(
        "Time the answers to 200 GSM8K questions by `s2ft eval`, beside transformers' `generate`, with the embedded base.",
        {
            "data": Option(
                str | None, None, "Folder with dataset/gsm8k/test.json [default: made from a seed]", "llm-adapters"
            )
        },
        has_picture=False,
    ),
}

_MODEL = Option(str, ..., "A chat model: a folder, a GGUF file, or a name on the Hub", "SmolLM2.gguf")
_DATA = Option(str, ..., "Folder with dataset/NAME/train.json and test.json, and ft-training_set", "llm-adapters")
_WORKERS = Option(int, 1, "Runs at a time, each in a process of its own")

STUDIES = {
    "selection": Entry("Compare the ways to choose channels, and no fine-tuning, at one budget."),
    "generalization": Entry(
        "Compare full tuning, LoRA, DoRA, SHiRA and S²FT: what is learned, what carries over, what is forgotten."
    ),
    "fusion": Entry("Add up adapters of two skills: LoRA, and S²FT on the same and on disjoint channels."),
    "commonsense": Entry(
        "Train on real text, four commonsense tasks of LLM-Adapters, and ask these and two others.",
        {"data": Option(str, ..., "Folder with dataset/NAME/train.json and test.json", "llm-adapters")},
    ),
    "defaults": Entry(
        "Compare the default rate of `s2ft train` with a grid of rates, and with LoRA's best, on a real model.",
        {
            "model": _MODEL,
            "data": _DATA,
            "workers": _WORKERS,
            "only": Option(
                str | None,
                None,
                "Of style-50,style-200,arithmetic-1000 and of lora,random,weight,variants [default: all]; kept: report what "
                "was run before, and run nothing",
            ),
        },
    ),
    "real": Entry(
        "Test the paper's claims on a real model: arithmetic, in writing too, commonsense, the choice of channels, fusion.",
        {
            "model": _MODEL,
            "data": _DATA,
            "workers": _WORKERS,
            "only": Option(
                str | None,
                None,
                "Of arithmetic,writing,commonsense,selection,fusion [default: all]; kept: report what was run before",
            ),
        },
    ),
}
