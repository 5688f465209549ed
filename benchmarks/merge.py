"""Measure merges of Llama-shaped checkpoints: mergeflow, mergekit beside it, and the floor that the machine sets.

    python benchmarks/merge.py --mergekit ENVIRONMENT/bin/mergekit-yaml --pairs 5 --markdown table.md
    python benchmarks/merge.py --size small --cases linear,ties --pairs 1          (a quick trial)

There is a case for every op but the stages, which run a model on data, and mergekit takes part where it has the method. Ops
that decompose whole matrices run at one layer's attention only, since their time grows with the third power of a matrix's
side, and those that need statistics on small models, with statistics of random numbers; the table says so.

Models are made once in the work folder and kept: a base of normal numbers, and fine-tunes that are the base plus small
noise, rounded to bfloat16, so that many of their changes are exactly zero or equal in size, as in real fine-tunes. Each
run is a fresh process after the inputs have been read once and everything dirty is on disk; the tools take turns, in
changing order, and each one's output is deleted before the next starts. Seconds of CPU are those of wait4; RssAnon
(memory that is not a file's) and bytes are sampled from /proc every few milliseconds. Bytes through read and write
calls and bytes from and to the disk are told apart: what a memory map brings out of a warm cache shows up in neither.

The floor reads every byte of the inputs and then writes as many bytes as the output has, with fdatasync and nothing
else, once through a memory map and once by pread, once buffered and once past the page cache (O_DIRECT).

Only Linux, since /proc is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import mmap
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = 0.005  # seconds between two looks at /proc
CHUNK = 4 << 20
MIB = 1 << 20
LIMIT = 1 << 30  # of the memory cgroup


# Models


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-shaped model; attention heads have `hidden / heads` numbers."""

    hidden: int
    layers: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name, in the order of the file."""
        key = self.hidden // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            for name, shape in {
                "input_layernorm": (self.hidden,),
                "self_attn.q_proj": (self.hidden, self.hidden),
                "self_attn.k_proj": (key, self.hidden),
                "self_attn.v_proj": (key, self.hidden),
                "self_attn.o_proj": (self.hidden, self.hidden),
                "post_attention_layernorm": (self.hidden,),
                "mlp.gate_proj": (self.ffn, self.hidden),
                "mlp.up_proj": (self.ffn, self.hidden),
                "mlp.down_proj": (self.hidden, self.ffn),
            }.items():
                found[f"model.layers.{layer}.{name}.weight"] = shape
        return {**found, "model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    def config(self) -> dict[str, Any]:
        """The config.json that both tools read."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "tinyllama": Shape(hidden=2048, layers=22, ffn=5632, vocab=32000, heads=32, kv_heads=4),
    "small": Shape(hidden=256, layers=4, ffn=704, vocab=4000, heads=8, kv_heads=4),
    "tiny": Shape(hidden=16, layers=400, ffn=16, vocab=32, heads=2, kv_heads=1),  # 3,603 tensors of 32 to 1,024 bytes
    "plan": Shape(hidden=256, layers=3333, ffn=256, vocab=256, heads=8, kv_heads=8),  # 30,000 tensors, never filled
}


def safetensors_header(tensors: Mapping[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """The header of a bfloat16 file with its 8 length bytes, and the number of data bytes that follow it."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def in_shards(tensors: Mapping[str, tuple[int, ...]], shards: int) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """File names and their tensors, the names cut into `shards` runs of about equal bytes."""
    if shards == 1:
        yield "model.safetensors", dict(tensors)
        return
    total = sum(math.prod(shape) for shape in tensors.values())
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    before = 0
    for name, shape in tensors.items():
        parts[min(shards - 1, before * shards // total)][name] = shape
        before += math.prod(shape)
    for number, part in enumerate(parts, start=1):
        yield f"model-{number:05}-of-{shards:05}.safetensors", part


def make_models(folder: Path, shape: Shape, names: Sequence[str], shards: int, filled: bool = True) -> dict[str, Path]:
    """Folders of the models of `names`, made where they are missing: the first is the base, the rest fine-tunes of it.

    Not `filled` means sparse files: right headers, and zeros that take no disk.
    """
    settings = {**shape.config(), "_benchmark_shards": shards}
    for number, name in enumerate(names):
        here = folder / name
        with contextlib.suppress(FileNotFoundError):
            if json.loads((here / "config.json").read_text()) == settings:
                continue
        print(f"making {here}", file=sys.stderr)
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir(parents=True)
        weight_map, size = {}, 0
        for file, part in in_shards(shape.tensors(), shards):
            header, nbytes = safetensors_header(part)
            with open(here / file, "wb") as out:
                out.write(header)
                if filled:
                    fill(out, part, number)
                else:
                    out.truncate(len(header) + nbytes)
            weight_map.update(dict.fromkeys(part, file))
            size += nbytes
        if shards > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (here / "model.safetensors.index.json").write_text(json.dumps(index))
        (here / "config.json").write_text(json.dumps(settings, indent=2))  # last: its presence says that all is there
    return {name: folder / name for name in names}


def fill(out: Any, tensors: Mapping[str, tuple[int, ...]], number: int) -> None:
    """Write the data of model `number`: a base (0) of N(0, 0.02), or the same plus N(0, 0.0005), in bfloat16."""
    import torch

    for place, shape in enumerate(tensors.values()):
        count = math.prod(shape)
        generator = torch.Generator().manual_seed(crc32(f"base {place}".encode()))  # seeds count to 32 bits only
        values = torch.empty(count).normal_(0, 0.02, generator=generator)
        if number:
            generator.manual_seed(crc32(f"{number} {place}".encode()))
            values = values.bfloat16().float() + torch.empty(count).normal_(0, 0.0005, generator=generator)
        out.write(values.bfloat16().view(torch.int16).numpy().tobytes())


# Processes


@dataclass
class Run:
    """What one process cost: seconds, peak RssAnon in bytes, and the bytes that /proc/PID/io tells."""

    wall: float
    user: float
    system: float
    rss_anon: int
    io: dict[str, int]
    said: str = ""
    output: int = 0  # bytes of the safetensors files it left

    @property
    def cpu(self) -> float:
        """Seconds of CPU, user and system."""
        return self.user + self.system


class Failed(Exception):
    """A measured process did not end well."""


def measure(command: Sequence[str | Path], before: Callable[[], None] | None = None) -> Run:
    """Run `command` and measure it; `before` is called in the child just before it starts. Raises Failed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command], stdout=out, stderr=err, cwd=ROOT, env=environment, preexec_fn=before
        )
        status, io, rss_anon = Path(f"/proc/{process.pid}/status"), {}, 0
        try:
            while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                rss_anon = max(rss_anon, kib_of(status, "RssAnon") * 1024)
                time.sleep(SAMPLE)
            wall = time.perf_counter() - start
            for line in Path(f"/proc/{process.pid}/io").read_text().splitlines():  # a zombie still knows
                name, _, value = line.partition(":")
                io[name] = int(value)
        except BaseException:
            process.kill()
            raise
        _, code, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        out.seek(0)
        err.seek(0)
        said = out.read().decode(errors="replace")
        if process.returncode:
            told = (err.read().decode(errors="replace") or said).strip().splitlines()[-15:]
            code = process.returncode
            ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise Failed(f"{' '.join(map(str, command))}: {ended}\n    " + "\n    ".join(told))
    return Run(wall, usage.ru_utime, usage.ru_stime, rss_anon, io, said)


def kib_of(status: Path, name: str) -> int:
    """A field of /proc/PID/status in KiB; 0 where it is not there (before exec, after the end)."""
    with contextlib.suppress(OSError):
        for line in status.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
    return 0


def timings(run: Run) -> dict[str, float]:
    """The seconds of each stretch of a mergeflow run, as its JSON on stdout tells them; empty where it tells none."""
    try:
        seconds = json.loads(run.said).get("seconds", {})
    except ValueError:
        return {}
    return {name: float(value) for name, value in seconds.items()}


def warm(folders: Sequence[Path]) -> None:
    """Read every weight file once, so that the page cache holds it, and let everything dirty reach the disk."""
    os.sync()
    buffer = bytearray(16 * MIB)
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def cool(folders: Sequence[Path]) -> None:
    """Drop the weight files from the page cache."""
    os.sync()
    for folder in folders:
        for path in folder.glob("*.safetensors"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size_of(folder: Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# The floor


def floor_worker(reading: str, writing: str, target: str, nbytes: int, inputs: Sequence[str]) -> None:
    """Read the files of `inputs` to the end, write `nbytes` to `target`, print the seconds of both as JSON.

    Single-threaded and one after the other, so that a caller can add them (nothing overlaps) or take the larger one.
    """
    start = time.perf_counter()
    buffer = mmap.mmap(-1, CHUNK)  # page-aligned, as O_DIRECT wants it
    for path in inputs:
        with open(path, "rb", buffering=0) as file:
            if reading == "pread":
                place = 0
                while count := os.preadv(file.fileno(), [buffer], place):
                    place += count
            else:
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
                    mapped.madvise(mmap.MADV_SEQUENTIAL)
                    for place in range(0, len(view), CHUNK):
                        buffer[: min(CHUNK, len(view) - place)] = view[place : place + CHUNK]
    middle = time.perf_counter()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if writing == "direct" else 0)
    descriptor = os.open(target, flags, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        for place in range(0, nbytes, CHUNK):
            wanted = min(CHUNK, nbytes - place)
            if writing == "direct":
                wanted += -wanted % mmap.PAGESIZE
            if os.pwrite(descriptor, memoryview(buffer)[:wanted], place) != wanted:
                raise OSError("a short write")
        os.ftruncate(descriptor, nbytes)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
        os.unlink(target)
    print(json.dumps({"read": middle - start, "write": time.perf_counter() - middle}))


def floors(folders: Sequence[Path], nbytes: int, work: Path, pairs: int) -> dict[str, dict[str, float]]:
    """For each way to read and to write: median seconds of reading, of writing, and of both one after the other."""
    inputs = [str(path) for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(pairs):
        for reading in ("mmap", "pread"):
            for writing in ("fsync", "direct"):
                name = f"{reading} + {'O_DIRECT' if writing == 'direct' else 'buffered and fdatasync'}"
                warm(folders)
                target = work / "floor.part"
                target.unlink(missing_ok=True)
                words = ["--floor-worker", reading, writing, str(target), str(nbytes), *inputs]
                try:
                    run = measure([sys.executable, "-S", __file__, *words])
                except Failed as problem:
                    print(f"SKIPPED floor, {name}: {problem}", file=sys.stderr)
                    continue
                found.setdefault(name, []).append(json.loads(run.said))
    return {
        name: {
            "read": statistics.median(one["read"] for one in runs),
            "write": statistics.median(one["write"] for one in runs),
            "total": statistics.median(one["read"] + one["write"] for one in runs),
        }
        for name, runs in found.items()
    }


# Cases


@dataclass(frozen=True)
class Case:
    """A merge: the models it reads, its node in our recipe, and mergekit's configuration where it has the method.

    A node or a configuration that depends on the number of layers is a function of the shape.
    """

    models: tuple[str, ...]
    node: dict[str, Any] | Callable[[Shape], dict[str, Any]]
    mergekit: dict[str, Any] | Callable[[Shape], dict[str, Any]] | None = None
    shape: str = ""  # default: the size of the command line
    floor: bool = False
    about: str = ""  # what is not as it seems
    statistics: str = ""  # the key of each input that names statistics: gram or fisher
    memory: str = ""  # mergeflow's --memory, where the command line's is too little

    def artifacts(self) -> tuple[str, ...]:
        """The names of the statistics that the node reads: one for each model."""
        return tuple(f"{name}_{self.statistics}" for name in self.models) if self.statistics else ()

    def node_of(self, shape: Shape) -> dict[str, Any]:
        """The node for models of a shape."""
        return self.node(shape) if callable(self.node) else self.node

    def mergekit_of(self, shape: Shape) -> dict[str, Any] | None:
        """mergekit's configuration for models of a shape; None where it has no such method."""
        return self.mergekit(shape) if callable(self.mergekit) else self.mergekit


def of(models: Sequence[str], **parameters: Any) -> list[dict[str, Any]]:
    """mergekit's list of models; `{name}` is filled in later."""
    return [{"model": model, **({"parameters": parameters} if parameters else {})} for model in models]


AB = ("a", "b")
BASE_AB = ("base", "a", "b")
PART = "model.layers.0.self_attn.*"
LINEAR_NODE = {"op": "linear", "inputs": [{"model": "a", "weight": 0.5}, {"model": "b", "weight": 0.5}]}


def on_deltas(
    op: str,
    models: Sequence[str] = AB,
    *,
    theirs: str | None = "",
    each: Mapping[str, Any] | None = None,
    shared: Mapping[str, Any] | None = None,
    there: Mapping[str, Any] | None = None,
    **more: Any,
) -> Case:
    """An op on a base and what models learnt since.

    `each` are parameters of each model and `shared` those of the whole, the same in both tools but for `there`, which mergekit
    is given instead of `shared`. `theirs` is mergekit's name for the method, as ours by default, None where it has none.
    """
    node = {"op": op, "base": "base", "inputs": list(models), **(each or {}), **(shared or {}), **more}
    if theirs is None:
        return Case(("base", *models), node)
    whole = shared if there is None else there
    mergekit = {"merge_method": theirs or op, "base_model": "base", "models": of(models, **(each or {}))}
    return Case(("base", *models), node, {**mergekit, **({"parameters": dict(whole)} if whole else {})})


def on_matrices(op: str, **parameters: Any) -> Case:
    """An op that decomposes whole matrices, at the attention of one layer; all else is the mean."""
    node = {"op": op, "base": "base", "inputs": list(AB), "only": PART, "others": "mean", **parameters}
    about = f"only at {PART}, the mean elsewhere, with --memory 2GiB: whole matrices are held"
    return Case(BASE_AB, node, about=about, memory="2GiB")


def with_statistics(op: str, key: str, *, inputs: tuple[str, ...] = AB, base: str | None = None) -> Case:
    """An op that reads statistics beside each input, on models small enough that making them is no work."""
    items = [{"model": name, key: f"{name}_{key}", "for": "names"} for name in inputs]
    about = f"on models of {SHAPES['small'].hidden} dimensions, with statistics of random numbers"
    node = {"op": op, **({"base": base} if base else {}), "inputs": items}
    return Case((*((base,) if base else ()), *inputs), node, shape="small", about=about, statistics=key)


def make_statistics(folder: Path, shape: Shape, key: str, number: int) -> Path:
    """A folder of Grams, or of Fisher diagonals, for models of a shape, made where it is missing.

    The Gram of d channels is that of 2 d rows of random numbers, the more alike the channels the later they stand; what q, k and
    v read is one, and so is what gate and up read. A Fisher diagonal is the square of a random number at every parameter.
    """
    import torch
    from safetensors.torch import save_file

    from mergeflow.checkpoint.statistics import Facts, ModelNote, StageOp, encode

    if (folder / "statistics.json").is_file():
        return folder
    print(f"making {folder}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(number)
    kind: Any = {"fisher": "fisher_diag"}.get(key, key)
    codec: Any = "correlation16" if key == "gram" else "float32"
    first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    groups: dict[str, str] = {}
    tensors: dict[str, Any] = {}
    for name, sizes in shape.tensors().items():
        if key == "fisher":
            tensors |= encode(kind, codec, name, torch.randn(sizes, generator=draw).square_())
        elif len(sizes) == 2 and "embed" not in name:
            last = name.split(".")[-2]
            groups[name] = name.replace(last, first.get(last, last))
            if groups[name] == name:
                rows = torch.randn((2 * sizes[1], sizes[1]), generator=draw, dtype=torch.float64)
                rows += torch.linspace(0, 1, sizes[1]) * rows[:, :1]
                tensors |= encode(kind, codec, name, rows.T @ rows / len(rows) if key == "gram" else rows.abs().mean(0))
    facts = Facts(
        kind=kind,
        codec=codec,
        op=StageOp(name=kind),
        model=ModelNote(digest="0" * 64),
        n_examples=2 * shape.ffn,
        n_tokens=8 * shape.ffn,
        groups=groups,
    )
    metadata = {
        "format": "pt",
        "mergeflow.space": "statistics",
        "mergeflow.artifact": json.dumps({"kind": kind}),
    }
    save_file(tensors, folder / "model.safetensors", metadata)
    (folder / "statistics.json").write_bytes(facts.encoded())  # last: its presence says that all is there
    return folder


def stacked(shape: Shape) -> dict[str, Any]:
    """All layers of one model, then the upper half of another."""
    last = shape.layers - 1
    return {
        "op": "stack",
        "layers": [{"model": "a", "take": f"0-{last}"}, {"model": "b", "take": f"{shape.layers // 2}-{last}"}],
    }


def stacked_there(shape: Shape) -> dict[str, Any]:
    """The same in mergekit's slices, whose ends are not included."""
    ranges = [("a", [0, shape.layers]), ("b", [shape.layers // 2, shape.layers])]
    slices = [{"sources": [{"model": model, "layer_range": span}]} for model, span in ranges]
    return {"merge_method": "passthrough", "slices": slices}


def task_vector(model: str) -> dict[str, Any]:
    """What a model learnt, as a node in place."""
    return {"op": "task_vector", "base": "base", "model": model}


SPARSE = {"weight": 0.5, "density": 0.2}
CASES = {
    "linear": Case(AB, LINEAR_NODE, {"merge_method": "linear", "models": of(AB, weight=0.5)}, floor=True),
    "ties": on_deltas("ties", each=SPARSE, shared={"normalize": True}),
    "task_arithmetic": on_deltas("task_arithmetic", each={"weight": 0.4}),
    "slerp": Case(
        AB,
        {"op": "slerp", "inputs": list(AB), "t": 0.3},
        {"merge_method": "slerp", "base_model": "a", "models": of(AB), "parameters": {"t": 0.3}},
    ),
    "tiny": Case(AB, LINEAR_NODE, {"merge_method": "linear", "models": of(AB, weight=0.5)}, shape="tiny"),
    "ties_model": on_deltas("ties", theirs=None, each=SPARSE, scope="model"),
    "dare_linear": on_deltas("dare_linear", each=SPARSE),
    "dare_ties": on_deltas("dare_ties", each=SPARSE),
    "breadcrumbs": on_deltas("breadcrumbs", each={**SPARSE, "gamma": 0.01}),
    "breadcrumbs_ties": on_deltas("breadcrumbs_ties", each={**SPARSE, "gamma": 0.01}),
    "della": on_deltas("della", each={**SPARSE, "epsilon": 0.1}),
    "della_linear": on_deltas("della_linear", each={**SPARSE, "epsilon": 0.1}),
    "sce": on_deltas("sce", shared={"select_topk": 0.5}),
    "model_stock": on_deltas("model_stock"),
    "ram": on_deltas("ram"),
    "ramplus": on_deltas("ramplus", theirs="ramplus_tl"),
    "nearswap": Case(
        ("base", "a"),
        {"op": "nearswap", "base": "base", "inputs": ["a"], "t": 0.001},
        {
            "merge_method": "nearswap",
            "base_model": "base",
            "models": of(("base", "a")),
            "parameters": {"t": 0.001},
        },
    ),
    "arcee_fusion": on_deltas("arcee_fusion", ("a",)),
    "nuslerp": Case(
        AB,
        {"op": "nuslerp", "inputs": list(AB), "weight": 0.5},
        {"merge_method": "nuslerp", "models": of(AB, weight=0.5)},
    ),
    "multislerp": Case(
        AB,
        {"op": "multislerp", "inputs": list(AB), "weight": 0.5},
        {"merge_method": "multislerp", "models": of(AB, weight=0.5)},
    ),
    "karcher": Case(AB, {"op": "karcher", "inputs": list(AB)}, {"merge_method": "karcher", "models": of(AB)}),
    "stack": Case(AB, stacked, stacked_there),
    "passthrough": Case(
        ("a",),
        {"op": "passthrough", "model": "a"},
        {"merge_method": "passthrough", "models": of(("a",))},
    ),
    "select": Case(AB, {"op": "select", "rules": [{"match": "*.mlp.*", "model": "a"}, {"model": "b"}]}),
    "scale": Case(("a",), {"op": "scale", "model": "a", "by": 0.5}),
    "cast": Case(("a",), {"op": "cast", "model": "a", "to": "float16"}),
    "task_vector": Case(("base", "a"), task_vector("a")),
    "add": Case(BASE_AB, {"op": "add", "base": "base", "inputs": [task_vector(name) for name in AB], "weight": 0.5}),
    "magmax": on_deltas("magmax", theirs=None),
    "consensus": on_deltas("consensus", theirs=None),
    "pcb": on_deltas("pcb", theirs=None, ratio=0.2),
    "widen": on_deltas("widen", theirs=None),
    "evolve_cross": Case(AB, {"op": "evolve_cross", "inputs": list(AB)}),
    "emr": on_deltas("emr", theirs=None),
    "emr_apply": Case(
        BASE_AB,
        {"op": "emr_apply", "base": "base", "emr": {"op": "emr", "base": "base", "inputs": list(AB)}, "task": "a"},
    ),
    "tsv": on_matrices("tsv"),
    "iso_c": on_matrices("iso_c"),
    "iso_cts": on_matrices("iso_cts"),
    "knots": on_matrices("knots", density=0.2),
    "star": on_matrices("star"),
    "cart": on_matrices("cart"),
    "wudi": on_matrices("wudi", steps=20),
    "regmean": with_statistics("regmean", "gram"),
    "fisher": with_statistics("fisher", "fisher"),
    "lot": with_statistics("lot", "gram", base="base"),
    "aim": with_statistics("aim", "act_absmean", inputs=("a",), base="base"),
}
NO_CASE = ("regmean_pp", "gram", "gram_diag", "input_mean", "act_absmean", "fisher_diag", "fuse")
"""Stages: their time is that of a model on data, which these checkpoints have no use for."""
OTHER_CASES = ("threads", "plan", "cgroup")


@dataclass
class Report:
    """What has been measured: rows of the main table, and lines for the rest; `failures` make the exit code 1."""

    machine: dict[str, Any]
    idle: dict[str, float] = field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


class Bench:
    """One benchmark: the options of the command line, the work folder, and what has been found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.report = Report(machine=machine(options))

    def models(self, shape: str, names: Sequence[str]) -> dict[str, Path]:
        """The models of `names` in `shape`, made if need be. The base comes first, since the others grow from it."""
        made = make_models(self.work / shape, SHAPES[shape], BASE_AB, self.options.shards if shape != "tiny" else 1)
        return {name: made[name] for name in names}

    def statistics(self, case: Case) -> dict[str, Path]:
        """What the node of a case reads beside its models, by name, made if need be."""
        home = self.work / (case.shape or self.options.size)
        shape = SHAPES[case.shape or self.options.size]
        return {
            name: make_statistics(home / name, shape, case.statistics, number)
            for number, name in enumerate(case.artifacts(), start=1)
        }

    def recipe(
        self,
        models: Mapping[str, Path],
        nodes: Mapping[str, Any],
        like: str,
        artifacts: Mapping[str, Path] | None = None,
    ) -> Path:
        """Write a recipe (JSON is YAML) and give its path."""
        path = self.work / "recipe.yaml"
        text = {
            "recipe": 1,
            "name": "benchmark",
            "models": {name: str(folder) for name, folder in models.items()},
            **({"artifacts": {name: str(folder) for name, folder in artifacts.items()}} if artifacts else {}),
            "nodes": dict(nodes),
            "output": {"like": like},
        }
        path.write_text(json.dumps(text, indent=1))
        return path

    def mergeflow(self, case: Case, models: Mapping[str, Path], *more: str, before: Any = None) -> Run:
        """One run of mergeflow, its output deleted afterwards."""
        shape = SHAPES[case.shape or self.options.size]
        recipe = self.recipe(models, {"merged": case.node_of(shape)}, case.models[0], self.statistics(case))
        out = self.work / "out-mergeflow"
        for left in (out, self.work / ".out-mergeflow.staging"):
            shutil.rmtree(left, ignore_errors=True)
        words = ["run", recipe, "-o", out, "--memory", case.memory or self.options.memory, "--json", *more]
        run = measure([sys.executable, "-m", "mergeflow", *words], before)
        run.output = size_of(out)
        shutil.rmtree(out)
        return run

    def mergekit(self, case: Case, models: Mapping[str, Path]) -> Run:
        """One run of mergekit with its defaults on the CPU, but for the tokenizer, which these models do not have."""

        def named(value: Any) -> Any:
            if isinstance(value, dict):
                at = {"model", "base_model"}
                return {key: str(models[item]) if key in at else named(item) for key, item in value.items()}
            return [named(item) for item in value] if isinstance(value, list) else value

        config = self.work / "mergekit.yaml"
        theirs = case.mergekit_of(SHAPES[case.shape or self.options.size])
        config.write_text(json.dumps({**named(theirs), "dtype": "bfloat16"}, indent=1))
        out = self.work / "out-mergekit"
        shutil.rmtree(out, ignore_errors=True)
        run = measure([self.options.mergekit, config, out, "--no-copy-tokenizer", "--quiet"])
        run.output = size_of(out)
        shutil.rmtree(out)
        return run

    def side_by_side(self, name: str) -> None:
        """The tools in turn, `--pairs` times, the one that starts changing each time."""
        case = CASES[name]
        models = self.models(case.shape or self.options.size, case.models)
        tools = [tool for tool in self.options.tools if tool != "mergekit" or case.mergekit is not None]
        runs: dict[str, list[Run]] = {tool: [] for tool in tools}
        for pair in range(self.options.pairs):
            order = list(runs) if pair % 2 == 0 else list(reversed(runs))
            for tool in order:
                if tool == "mergekit" and pair >= self.options.mergekit_pairs:
                    continue
                warm(list(models.values()))
                run = self.mergeflow(case, models) if tool == "mergeflow" else self.mergekit(case, models)
                runs[tool].append(run)
                print(f"{name}, pair {pair + 1}, {tool}: {run.wall:.2f} s", file=sys.stderr)
        found: dict[str, Any] = {
            tool: [asdict(run) | timed(run) for run in some] for tool, some in runs.items() if some
        }
        if case.about:
            found["about"] = case.about
        ours, theirs = runs.get("mergeflow", []), runs.get("mergekit", [])
        ratios = [a.wall / b.wall for a, b in zip(ours, theirs, strict=False)]
        if ratios:
            found["ratio"] = statistics.median(ratios)
        if case.floor:
            nbytes = next((run.output for some in runs.values() for run in some), 0)
            found["floor"] = floors(list(models.values()), nbytes, self.work, self.options.pairs)
            found["against_floor"] = against_floor(
                ours, found["floor"], self.report.idle["wall"], self.report.machine["cores"]
            )
        self.report.cases[name] = found

    def threads(self) -> None:
        """TIES with one thread and with two."""
        case = CASES["ties"]
        models = self.models(self.options.size, case.models)
        runs: dict[str, list[Run]] = {"1": [], "2": []}
        for pair in range(self.options.pairs):
            for count in ("1", "2") if pair % 2 == 0 else ("2", "1"):
                warm(list(models.values()))
                runs[count].append(self.mergeflow(case, models, "--threads", count))
                print(f"threads, pair {pair + 1}, {count}: {runs[count][-1].wall:.2f} s", file=sys.stderr)
        found: dict[str, Any] = {f"{n} threads": [asdict(r) | timed(r) for r in some] for n, some in runs.items()}
        found["faster"] = statistics.median(a.wall / b.wall for a, b in zip(runs["1"], runs["2"], strict=True))
        working = [[without_start_up(run, self.report.idle["wall"]) for run in some] for some in runs.values()]
        found["faster_without_start_up"] = statistics.median(a / b for a, b in zip(*working, strict=True))
        self.report.cases["threads"] = found

    def plan(self) -> None:
        """Planning 30,000 tensors through two nodes, from headers alone."""
        models = make_models(self.work / "plan", SHAPES["plan"], BASE_AB, 1, filled=False)
        nodes = {
            "mean": {"op": "linear", "inputs": list(AB)},
            "merged": {"op": "task_arithmetic", "base": "base", "inputs": ["mean"], "weight": 0.5},
        }
        runs = []
        for _ in range(self.options.pairs):
            recipe = self.recipe(models, nodes, "base")
            runs.append(measure([sys.executable, "-m", "mergeflow", "plan", recipe, "--json"]))
            print(f"plan: {runs[-1].wall:.2f} s", file=sys.stderr)
        self.report.cases["plan"] = {"mergeflow": [asdict(run) | {"said": ""} for run in runs]}

    def cgroup(self) -> None:
        """The linear merge in a memory cgroup of 1 GiB, its inputs not in the page cache."""
        case = CASES["linear"]
        models = self.models(self.options.size, case.models)
        with memory_cgroup(LIMIT) as group:
            if group is None:
                return
            cool(list(models.values()))
            run = self.mergeflow(case, models, before=group.enter)
            self.report.cases["cgroup"] = {"mergeflow": [asdict(run) | timed(run)], **group.told()}

    def idle(self) -> None:
        """A process that imports torch and does nothing: what every run starts from."""
        code = (
            "import json, time; start = time.perf_counter(); import torch; end = time.perf_counter()\n"
            "lines = open('/proc/self/status').read().splitlines()\n"
            "kib = next(int(line.split()[1]) for line in lines if line.startswith('RssAnon'))\n"
            "print(json.dumps({'import': end - start, 'rss_anon': kib * 1024}))"
        )
        runs = [measure([sys.executable, "-c", code]) for _ in range(max(3, self.options.pairs))]
        told = [json.loads(run.said) for run in runs]
        self.report.idle = {
            "wall": statistics.median(run.wall for run in runs),
            "import": statistics.median(one["import"] for one in told),
            "rss_anon": statistics.median(one["rss_anon"] for one in told),
        }

    def run(self) -> Report:
        """All chosen cases; one that fails is told, and the others go on."""
        self.idle()
        for name in self.options.cases:
            try:
                if name in CASES:
                    self.side_by_side(name)
                elif "mergeflow" in self.options.tools:
                    {"threads": self.threads, "plan": self.plan, "cgroup": self.cgroup}[name]()
            except Failed as problem:
                print(f"FAILED {name}: {problem}", file=sys.stderr)
                self.report.failures.append(f"{name}: {problem}")
        return self.report


def timed(run: Run) -> dict[str, Any]:
    """What takes the place of a run's output in the report: the seconds of its stretches."""
    return {"said": "", "seconds": timings(run)}


def without_start_up(run: Run, idle: float) -> float:
    """Wall seconds of the work alone, as the run told them by part; else those beyond an idle process with torch."""
    told = timings(run)
    parts = [told[part] for part in ("plan", "budget", "stage", "fetch", "rows", "publish") if part in told]
    return sum(parts) if parts else run.wall - idle


def against_floor(
    runs: Sequence[Run], floor: Mapping[str, Mapping[str, float]], idle: float, cores: int
) -> dict[str, dict[str, float]]:
    """Median wall of `runs` without start-up over each floor, with the digests and without their share of the threads."""
    if not runs:
        return {}
    working = statistics.median(without_start_up(run, idle) for run in runs)
    digests = statistics.median(timings(run).get("threads.hash", 0.0) / cores for run in runs)
    return {
        way: {"with_digests": working / seconds["total"], "without_digests": (working - digests) / seconds["total"]}
        for way, seconds in floor.items()
    }


class Group:
    """A memory cgroup, of version 1 or 2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def enter(self) -> None:
        """Put the calling process into the group."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def told(self) -> dict[str, int]:
        """The peak of memory with the page cache, and how often the kernel killed for want of it."""
        peak = next(p for n in ("memory.max_usage_in_bytes", "memory.peak") if (p := self.folder / n).exists())
        kills = next(p for n in ("memory.oom_control", "memory.events") if (p := self.folder / n).exists())
        counts = dict(line.split() for line in kills.read_text().splitlines())
        return {"limit": LIMIT, "peak": int(peak.read_text()), "oom_kills": int(counts.get("oom_kill", 0))}


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Group | None]:
    """A fresh memory cgroup of `limit` bytes, or None with a notice where this machine or user cannot have one."""
    for parent, name in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(parent) / f"mergeflow-benchmark-{os.getpid()}"
        if not Path(parent).is_dir():
            continue
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / name).write_text(str(limit))
        except OSError:
            folder.rmdir()
            continue
        try:
            yield Group(folder)
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return
    print("SKIPPED cgroup: a memory cgroup can be made neither in version 1 nor 2 (it needs root)", file=sys.stderr)
    yield None


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    words = Path("/proc/cpuinfo").read_text().splitlines()
    versions = {name: version_of(name) for name in ("mergeflow", "torch", "safetensors")}
    return {
        "processor": next(
            (line.split(":", 1)[1].strip() for line in words if line.startswith("model name")), "unknown"
        ),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        **versions,
        "mergekit": mergekit_version(options.mergekit) if "mergekit" in options.tools else "not run",
        "size": options.size,
        "shards": options.shards,
        "pairs": options.pairs,
        "memory_option": options.memory,
    }


def version_of(package: str) -> str:
    """The version of a package that is installed here, or `this tree`."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "this tree"


def mergekit_version(program: Path) -> str:
    """The version of mergekit in the environment that `program` belongs to."""
    code = "from importlib.metadata import version; print(version('mergekit'))"
    asked = subprocess.run([program.parent / "python", "-c", code], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


# Tables


def rows_of(report: Report) -> list[tuple[str, ...]]:
    """The main table: a header, then a row for each case and tool."""
    rows: list[tuple[str, ...]] = [
        (
            "case",
            "tool",
            "wall s (min-max)",
            "CPU s",
            "RssAnon MiB (beyond idle)",
            "read MB, calls (disk)",
            "written MB, calls (disk)",
            "ratio",
        )
    ]
    for case, found in report.cases.items():
        for tool, runs in found.items():
            if not isinstance(runs, list):
                continue
            walls = [run["wall"] for run in runs]
            rss = statistics.median(run["rss_anon"] for run in runs)
            io = {key: statistics.median(run["io"].get(key, 0) for run in runs) / 1e6 for key in runs[0]["io"]}
            rows.append(
                (
                    case,
                    tool,
                    f"{statistics.median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})",
                    f"{statistics.median(run['user'] + run['system'] for run in runs):.2f}",
                    f"{rss / MIB:.0f} ({(rss - report.idle['rss_anon']) / MIB:+.0f})",
                    f"{io['rchar']:.0f} ({io['read_bytes']:.0f})",
                    f"{io['wchar']:.0f} ({io['write_bytes']:.0f})",
                    f"1/{1 / found['ratio']:.1f}" if "ratio" in found and tool == "mergeflow" else "",
                )
            )
    return rows


def lines_of(report: Report) -> list[str]:
    """What the main table has no column for."""
    about = report.machine
    lines = [
        f"{about['processor']}, {about['cores']} cores, {about['memory'] / 2**30:.0f} GiB; Python {about['python']}, "
        f"torch {about['torch']}, mergekit {about['mergekit']}; size {about['size']}, median of {about['pairs']}, "
        f"--memory {about['memory_option']}",
        f"idle: importing torch {report.idle['import']:.2f} s, the whole process {report.idle['wall']:.2f} s, "
        f"RssAnon {report.idle['rss_anon'] / MIB:.0f} MiB",
    ]
    abouts: dict[str, list[str]] = {}
    for name, found in report.cases.items():
        if "about" in found:
            abouts.setdefault(found["about"], []).append(name)
    lines += [f"{', '.join(names)}: {about}" for about, names in abouts.items()]
    if report.cases.keys() >= CASES.keys():
        lines.append(f"{', '.join(NO_CASE)}: not measured here, since stages run a model on data")
    for name, found in report.cases.items():
        for way, seconds in found.get("floor", {}).items():
            ratio = found["against_floor"].get(way)
            lines.append(
                f"floor of {name}, {way}: read {seconds['read']:.2f} s, write {seconds['write']:.2f} s, "
                f"together {seconds['total']:.2f} s"
                + (f"; mergeflow without start-up is {ratio['with_digests']:.2f} times that" if ratio else "")
                + (f", without digests too {ratio['without_digests']:.2f}" if ratio else "")
            )
        if any(run.get("seconds") for run in found.get("mergeflow", [])):
            stretches = found["mergeflow"][0]["seconds"]
            middle = {
                key: statistics.median(r["seconds"].get(key, 0.0) for r in found["mergeflow"]) for key in stretches
            }
            lines.append(f"{name}, seconds of mergeflow: " + ", ".join(f"{k} {v:.2f}" for k, v in middle.items()))
        if "faster" in found:
            lines.append(
                f"{name}: two are {found['faster']:.2f} times as fast as one, "
                f"{found['faster_without_start_up']:.2f} times without start-up"
            )
        if "oom_kills" in found:
            lines.append(
                f"{name}: finished under a limit of {found['limit'] / MIB:.0f} MiB, peak with page cache "
                f"{found['peak'] / MIB:.0f} MiB, {found['oom_kills']} kills"
            )
    return lines + [f"FAILED {failure}" for failure in report.failures]


def as_text(report: Report) -> str:
    """The report for a terminal."""
    rows = rows_of(report)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*table, "", *lines_of(report)])


def as_markdown(report: Report) -> str:
    """The report for a README."""
    head, *rows = rows_of(report)
    table = [f"| {' | '.join(row)} |" for row in (head, ("---",) * 2 + ("---:",) * (len(head) - 2), *rows)]
    return "\n".join([*table, "", *(f"- {line}" for line in lines_of(report))]) + "\n"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*CASES, *OTHER_CASES]
    parser.add_argument("--size", choices=("tinyllama", "small"), default="tinyllama", help="of the models")
    parser.add_argument("--shards", type=int, default=1, help="files that each model is cut into (default 1)")
    parser.add_argument("--cases", type=lambda text: text.split(","), default=every, help=f"of {', '.join(every)}")
    parser.add_argument("--pairs", type=int, default=5, help="how often the tools take turns (default 5)")
    parser.add_argument("--mergekit", type=Path, metavar="PATH", help="the mergekit-yaml to compare with")
    parser.add_argument("--mergekit-pairs", type=int, default=10**6, help="let mergekit run in the first N pairs only")
    parser.add_argument("--tools", type=lambda text: text.split(","), default=["mergeflow", "mergekit"])
    parser.add_argument("--memory", default="256MiB", help="mergeflow's --memory (default 256MiB)")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work", help="where models and outputs go")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every run")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for a README")
    options = parser.parse_args(words)
    if unknown := set(options.cases) - set(every):
        parser.error(f"unknown case {', '.join(sorted(unknown))}: there are {', '.join(every)}")
    if unknown := set(options.tools) - {"mergeflow", "mergekit"}:
        parser.error(f"unknown tool {', '.join(sorted(unknown))}: there are mergeflow and mergekit")
    if "mergekit" in options.tools and (options.mergekit is None or not options.mergekit.is_file()):
        print(
            "SKIPPED mergekit: "
            + (f"{options.mergekit} is not there" if options.mergekit else "no --mergekit PATH/TO/mergekit-yaml given"),
            file=sys.stderr,
        )
        options.tools.remove("mergekit")
    return options


def main() -> int:
    """Run the benchmark, or one floor in the process that measures it."""
    if sys.argv[1:2] == ["--floor-worker"]:
        reading, writing, target, nbytes, *inputs = sys.argv[2:]
        floor_worker(reading, writing, target, int(nbytes), inputs)
        return 0
    options = parse(sys.argv[1:])
    report = Bench(options).run()
    print(as_text(report))
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(as_markdown(report))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
