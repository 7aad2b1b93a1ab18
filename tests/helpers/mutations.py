"""Adapter folders, damaged at random: bits flipped, files cut, headers that lie, junk in the config, what is no file at all."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adapter_files import CONFIG, PREFIX, WEIGHTS

Mutation = Callable[[Path, random.Random], None]

JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 7, 2**63, 10**400, 0.3, 1e308, "", "x", "in 0", "in 0-16777214", "\x1b[2J", "[/red]", "(", "\ud800"),
    *([], [1], ["x"], [[[]]], {}, {"x": 1}, {"x": "in 0"}, {"\x1b[31m": "in 0"}, [None], {"": ""}, "all-linear"),
)  # fmt: skip
DTYPES = (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float16, torch.float64, torch.float8_e4m3fn)
BASE_NAMES = (
    "model.norm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.base_layer.weight",
    "model.layers.0.self_attn.o_proj.base_layer.weight",
    "model.norm.original_module.weight",
)


def mutate(folder: Path, rng: random.Random) -> str:
    """Damages an adapter folder in one way, or leaves it sound; says how."""
    name = rng.choice(list(MUTATIONS))
    MUTATIONS[name](folder, rng)
    return name


def flip_bits(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice((WEIGHTS, WEIGHTS, CONFIG))
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 50))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def reverse_bytes(folder: Path, rng: random.Random) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    begin = rng.randrange(8 + int.from_bytes(data[:8], "little"), len(data) - 64)
    data[begin : begin + 64] = data[begin : begin + 64][::-1]
    (folder / WEIGHTS).write_bytes(data)


def cut(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice((WEIGHTS, CONFIG))
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice((0, 4, rng.randrange(len(data)), len(data) - 1))])


def lengthen(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice((WEIGHTS, CONFIG))
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice((1, 100))))


def lie_in_header(folder: Path, rng: random.Random) -> None:
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    lie = rng.choice(("dtype", "shape", "transposed", "offsets", "swapped", "junk", "size"))
    if lie == "dtype":
        entry["dtype"] = rng.choice(("F32", "F64", "I32", "F16", "BF16", "U8", "BOOL", "F8_E4M3", "C64", "X9"))
    elif lie == "shape":
        entry["shape"] = rng.choice(([], [0], [-1], [1 << 40], entry["shape"][:-1], [*entry["shape"], 1]))
    elif lie == "transposed":
        entry["shape"] = entry["shape"][::-1]
    elif lie == "offsets":
        entry["data_offsets"] = rng.choice(([0, 0], [5, 1], [0, 1 << 50], [4, entry["data_offsets"][1] + 4]))
    elif lie == "swapped":
        other = rng.choice([other for other in header if other != "__metadata__"])
        header[name], header[other] = header[other], entry
    elif lie == "junk":
        header[name] = rng.choice(([], None, {"dtype": 3}, "x"))
    text = json.dumps(header).encode()
    length = len(text) if lie != "size" else rng.choice((0, 1 << 40, len(text) + 7))
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])


CHANGES = ("drop", "dtype", "narrow", "wide", "transposed", "value", "unsorted", "rename", "empty", "scalar", "noise")


def change_tensor(folder: Path, rng: random.Random) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    change = rng.choice(CHANGES)
    if change == "drop":
        del tensors[name]
    elif change == "dtype":
        tensors[name] = tensor.to(rng.choice(DTYPES))
    elif change == "narrow":
        dim = rng.randrange(tensor.dim())
        tensors[name] = tensor.narrow(dim, 0, tensor.shape[dim] - 1).contiguous()
    elif change == "wide":
        tensors[name] = torch.cat([tensor, tensor], rng.randrange(tensor.dim()))
    elif change == "transposed":
        tensors[name] = tensor.T.contiguous() if tensor.dim() == 2 else tensor.flip(0)
    elif change == "value" and tensor.is_floating_point():
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((torch.nan, torch.inf, -torch.inf, 3e38))
    elif change == "unsorted":
        tensors[name] = tensor.flip(0)
    elif change == "rename":
        tensors[rng.choice((name[:-1], name + "x", "x" + name, name.replace(".0.", ".9."), "\x1b[31m" + name, ""))] = (
            tensors.pop(name)
        )
    elif change == "empty":
        tensors[name] = tensor[:0]
    elif change == "scalar":
        tensors[name] = tensor.reshape(-1)[0].clone()
    elif change == "noise" and tensor.is_floating_point():
        tensors[name] = torch.randn_like(tensor)
    save_file(tensors, folder / WEIGHTS)


def add_base_tensor(folder: Path, rng: random.Random) -> None:
    """What would overwrite the base model."""
    tensors = load_file(folder / WEIGHTS)
    shapes = {
        "norm.weight": (24,),
        "embed_tokens.weight": (61, 24),
        "lm_head.weight": (61, 24),
        "q_proj.weight": (40, 24),
    }
    name = rng.choice(BASE_NAMES)
    shape = next(
        (shape for end, shape in shapes.items() if name.endswith(end)), (24, 40) if "o_proj" in name else (24, 44)
    )
    shape = (24,) if "original_module" in name else shape
    tensors[rng.choice((PREFIX, PREFIX, "")) + name] = torch.full(shape, 7.0)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, rng: random.Random) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    key = rng.choice([*fields, "runtime_config", "r", "unknown"])
    if rng.random() < 0.2:
        fields.pop(key, None)
    else:
        fields[key] = rng.choice(JUNK)
    (folder / CONFIG).write_text(json.dumps(fields))


TEXTS = ("in 0-16777214", "in 5,4", "out 0", "in", "in 0-3", "", "in ١", "in 0=ab; in 1=cd", "0" * 32)
NAMES = ("x", "", "model.norm", "\x1b]0;pwn\x07", "\ud800", "model.layers.7.mlp.down_proj", "lm_head")


def edit_slice(folder: Path, rng: random.Random) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    entries = fields[rng.choice(("slices", "base_digest", "checksums" if "checksums" in fields else "slices"))]
    name = rng.choice(list(entries))
    change = rng.choice(("text", "drop", "add", "rename"))
    if change == "text":
        entries[name] = rng.choice(TEXTS)
    elif change == "drop":
        del entries[name]
    else:
        value = entries[name] if change == "add" else entries.pop(name)
        entries[rng.choice(NAMES)] = value
    (folder / CONFIG).write_text(json.dumps(fields))


def replace_config(folder: Path, rng: random.Random) -> None:
    text = rng.choice(
        (
            *(b"", b"[]", b"null", b"3", b'"S2FT"', b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 50_000),
            *(b'{"peft_type": "S2FT", "seed": ' + b"9" * 5000 + b"}", b'{"peft_type": "S2FT"}', b'{"peft_type": ["S2FT"]}'),
            *(b'{"peft_type": "LORA"}', b'{"peft_type": "S2FT", "slices": {}}', b"\x00" * 1000),
        )
    )  # fmt: skip
    (folder / CONFIG).write_bytes(text)


def replace_file(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice((CONFIG, WEIGHTS))
    path.unlink()
    kind = rng.choice(("missing", "fifo", "folder", "loop", "dangling", "pickle"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "pickle":
        torch.save({"x": torch.ones(2)}, folder / "adapter_model.bin")


def leave(folder: Path, rng: random.Random) -> None:
    """Nothing is wrong."""


def copy(folder: Path, rng: random.Random) -> None:
    """Written anew, in another order."""
    tensors = list(load_file(folder / WEIGHTS).items())
    rng.shuffle(tensors)
    save_file(dict(tensors), folder / WEIGHTS)


MUTATIONS: dict[str, Mutation] = {
    function.__name__: function
    for function in (
        *(
            flip_bits,
            reverse_bytes,
            cut,
            lengthen,
            lie_in_header,
            change_tensor,
            add_base_tensor,
            edit_config,
            edit_slice,
        ),
        *(replace_config, replace_file, leave, copy),
    )
}


SOUND = (leave.__name__, copy.__name__)


def fresh(source: Path, target: Path) -> Path:
    """A copy of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target
