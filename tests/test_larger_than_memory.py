"""Statistics of a model that is larger than the memory of its control group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergeflow.checkpoint.statistics import open_statistics
from mergeflow.hub import LocalFolder
from tests.test_collecting import VOCAB, tokenizer
from tests.test_pipeline import MIB, memory_group
from tests.toys import SOURCE

LIMIT = 1024 * MIB
SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
CODE = """
import os, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
sys.path.insert(0, sys.argv[2])
from mergeflow.cli import program
sys.argv = ["mergeflow", *sys.argv[3:]]
leave = os._exit
def end(code):
    print(open("/proc/self/io").read(), open("/proc/self/status").read(), file=sys.stderr, flush=True)
    leave(code)
os._exit = end
program()
"""


def llama(folder: Path) -> int:
    """A Llama of 1.1 billion weights in bfloat16, and its tokenizer; the bytes of its weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: one.shape for name, one in transformers.LlamaForCausalLM(config).state_dict().items()}
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    tensors = {}
    for name, shape in shapes.items():
        made = noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()]
        tensors[name] = made.reshape(shape).clone() if len(shape) > 1 else torch.ones(shape, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(folder)
    return sum(one.nbytes for one in tensors.values())


@pytest.mark.slow
def test_grams_of_a_llama_of_two_gigabytes_are_collected_within_one(tmp_path: Path) -> None:
    size = llama(tmp_path / "llama")
    words = [word for word in VOCAB if word.startswith("w")]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": " ".join((words * 2)[i : i + 48])}) + "\n" for i in range(24))
    )
    called = ["stats", "llama", "--data", "rows.jsonl", "--option", 'only="*.self_attn.*"', "-o", "grams", "-q"]
    started = time.monotonic()
    with memory_group(LIMIT) as group:
        finished = subprocess.run(
            [sys.executable, "-c", CODE, str(group), str(SOURCE), *called],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "MERGEFLOW_CACHE": str(tmp_path / "cache"), "TOKENIZERS_PARALLELISM": "false"},
        )
        oom = "".join(
            (group / name).read_text() for name in ("memory.oom_control", "memory.events") if (group / name).exists()
        )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "oom_kill 0" in oom or "oom_kill" not in oom
    told = dict(line.strip().split(":", 1) for line in finished.stderr.splitlines() if ":" in line)
    read = int(told["rchar"])
    print(
        f"{size / 1e9:.2f} GB in {LIMIT / MIB:.0f} MiB: {time.monotonic() - started:.0f} s, {read / size:.3f} bytes read "
        f"for a byte of weights (once for their digest, once to run them), at most {told['VmHWM'].strip()} resident"
    )
    facts = open_statistics(LocalFolder("grams", tmp_path / "grams")).facts
    layers = SIZES["num_hidden_layers"]
    assert len(facts.groups) == 4 * layers
    assert len(set(facts.groups.values())) == 2 * layers
    assert facts.n_tokens == 24 * 48
    # The head is not run; what is read beside are libraries, headers, and the Grams that are written out.
    beside = 300 * MIB + 2 * sum(path.stat().st_size for path in (tmp_path / "grams").iterdir())
    head = 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    assert 2 * size - head <= read <= 2 * size + beside
