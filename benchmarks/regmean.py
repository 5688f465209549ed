"""Measure `regmean` on two experts of RoBERTa-base's shape: time beside bare float64 solves and products in torch, and memory.

    python benchmarks/regmean.py --work /tmp/regmean --layers 12

Twelve layers of width 768 and 3072; Grams are float16 correlations of correlated numbers, one for each distinct input. Each run is
a process of its own with one thread, and the bare loop runs before and after, since a shared machine drifts. RssAnon, memory that
is no file's, is sampled from /proc; it may be two Grams of the largest side in float64 and 300 MiB. Only Linux, since /proc is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

WIDTH, FFN = 768, 3072


def weights(layers: int) -> Iterator[tuple[str, int, int, str]]:
    """Name, outputs and inputs of each linear weight, and the group that it reads."""
    for layer in range(layers):
        prefix = f"roberta.encoder.layer.{layer}"
        first = f"{prefix}.attention.self.query.weight"
        for name in ("query", "key", "value"):
            yield f"{prefix}.attention.self.{name}.weight", WIDTH, WIDTH, first
        for name, out, d in (
            ("attention.output", WIDTH, WIDTH),
            ("intermediate", FFN, WIDTH),
            ("output", WIDTH, FFN),
        ):
            yield f"{prefix}.{name}.dense.weight", out, d, f"{prefix}.{name}.dense.weight"


def make(work: Path, layers: int) -> None:
    """Two models and their statistics."""
    import torch
    from safetensors.torch import save_file

    from mergeflow.checkpoint.statistics import Facts, encode

    for seed, model in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        grams = {}
        for d in (WIDTH, FFN):
            x = torch.randn(d + d // 2, d, generator=generator) * torch.logspace(-1, 1, d)
            grams[d] = encode("gram", "correlation16", "", x.T @ x / len(x))
        held, groups, tensors = {}, {}, {}
        for name, out, d, group in weights(layers):
            tensors[name] = torch.randn(out, d, generator=generator) * 0.02
            groups[name] = group
            held.update({part.replace("gram..", f"gram.{group}."): t.clone() for part, t in grams[d].items()})
        (work / model).mkdir(parents=True)
        (work / f"{model}_gram").mkdir()
        save_file(tensors, work / model / "model.safetensors", {"format": "pt"})
        (work / model / "config.json").write_text("{}")
        told = {"kind": "gram", "codec": "correlation16", "op": {"name": "gram"}, "model": {"digest": "0" * 64}}
        facts = Facts.model_validate({**told, "n_examples": 1000, "n_tokens": 100_000, "groups": groups})
        save_file(held, work / f"{model}_gram" / "model.safetensors", {"mergeflow.space": "statistics"})
        (work / f"{model}_gram" / "statistics.json").write_bytes(facts.encoded())


def rss_anon() -> float:
    """MiB of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def merge(work: Path) -> dict[str, float]:
    """Seconds, seconds of CPU and the highest RssAnon of the merge."""
    import torch  # noqa: F401 - loading it is no part of a merge

    from mergeflow import Recipe, run

    recipe = Recipe(
        folder=work,
        models={"a": "./a", "b": "./b"},
        artifacts={"a_gram": "./a_gram", "b_gram": "./b_gram"},
        nodes={"merged": {"op": "regmean", "inputs": [{"model": m, "gram": f"{m}_gram"} for m in "ab"]}},
    )
    shutil.rmtree(work / "merged", ignore_errors=True)
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    run(recipe, work / "merged", threads=1)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    return {"wall": wall, "cpu": cpu, "rss_anon": peak[0]}


def bare(layers: int) -> dict[str, float]:
    """The same solves and products of float64 matrices that are at hand."""
    import torch

    torch.set_num_threads(1)
    grams = {}
    for d in (WIDTH, FFN):
        x = torch.randn(d + d // 2, d, dtype=torch.float64)
        grams[d] = [x.T @ x / len(x) + share * torch.eye(d) for share in (1, 2)]
    wall, cpu = time.perf_counter(), time.process_time()
    for _, out, d, _ in weights(layers):
        deltas = [torch.full((d, out), value, dtype=torch.float64) for value in (0.5, -0.5)]
        right = grams[d][0] @ deltas[0] + grams[d][1] @ deltas[1]
        torch.cholesky_solve(right, torch.linalg.cholesky(grams[d][0] + grams[d][1]))
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main() -> None:
    """Make the inputs once, run in turns, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs and output")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--one", choices=("merge", "bare"), help="what a process of its own runs")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(merge(options.work) if options.one == "merge" else bare(options.layers)))
        return
    if not options.work.exists():
        make(options.work, options.layers)
    found: dict[str, list[dict[str, float]]] = {"bare": [], "merge": []}
    for one in ("bare", "merge", "bare"):
        words = [sys.executable, __file__, "--work", str(options.work), "--layers", str(options.layers), "--one", one]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        found[one].append(json.loads(done.stdout.splitlines()[-1]))
        print(one, {key: round(value, 1) for key, value in found[one][-1].items()}, flush=True)
    ours, beside = found["merge"][0], sum(one["cpu"] for one in found["bare"]) / 2
    limit = 2 * 8 * FFN**2 / 2**20 + 300
    print(f"CPU over bare {ours['cpu'] / beside:.2f}; RssAnon {ours['rss_anon']:.0f} of at most {limit:.0f} MiB")


if __name__ == "__main__":
    main()
