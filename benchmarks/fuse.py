"""What a fuse of language models costs beside what it is made of, on this machine, in one run.

Usage: fuse.py [--tokens 8000] [--work FOLDER] [--source-ids 6144]

Alignment in tokens a second on one thread; the time of a capture (32 likeliest tokens) against plain passes of the same model
over the same batches; a training step, and its peak of memory, against one of plain training in the same loop; the bytes that a
capture of 10 likeliest tokens takes. Times are seconds of the processor on one thread, the least of several rounds in which
both sides take turns, so that what else the machine does counts little. Models are random (12 million parameters, 8,192 and
6,144 ids) and texts Python's own library. `--source-ids 50000` gives the source a vocabulary as large as published models have.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mergeflow.ops.fuse import Capture, Fuse, Loss, Source, Train
from mergeflow.recipe.grammar import DataSource
from mergeflow.stages import models
from mergeflow.stages.fuse import aligning, capturing, language, tokenising, training
from mergeflow.stages.fuse.job import FuseJob

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "fuse-lm"))
import prepare_lm

SIZES = {"target": 8192, "source": 6144}
CONTEXT = 512
ROUNDS = 3


def prepare(work: Path, tokens: int, source_ids: int) -> None:
    """Write two random models with their tokenizers, and texts of about so many tokens."""
    texts = [piece for pieces in prepare_lm.parts().values() for piece in pieces]
    texts = [texts[at] for at in np.random.default_rng(0).permutation(len(texts))]
    for name, size in (SIZES | {"source": source_ids}).items():
        torch.manual_seed(size)
        config = transformers.GPT2Config(
            vocab_size=size, n_positions=CONTEXT, n_embd=320, n_layer=8, n_head=5, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        prepare_lm.save(
            transformers.GPT2LMHeadModel(config), prepare_lm.tokenizer(texts[: max(4000, size)], size), work / name
        )
    chosen, length = [], 0
    for text in texts:
        if length < 3 * tokens:
            chosen.append(text)
            length += len(text)
    (work / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))


def job_of(work: Path, **parts: Any) -> FuseJob:
    """A fuse of `source` into `target`, with what it keeps below `work`."""

    def kept(told: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        folder = work / "kept" / hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=12).hexdigest()
        if not folder.exists():
            folder.mkdir(parents=True)
            make(folder)
        return folder

    op = Fuse(task="causal_lm", sources=(Source(),), **parts)
    return FuseJob(
        op=op, target=work / "target", sources=(work / "source",), digests=("t", "s"), corpus="texts", folder=work,
        data=DataSource(path="texts.jsonl"), work=work / "work", write=lambda *given: None, kept=kept, free=lambda: 1 << 40,
    )  # fmt: skip


def least(*sides: Callable[[], object]) -> list[float]:
    """The least seconds of the processor for each side, which take turns."""
    found = [float("inf")] * len(sides)
    for _ in range(ROUNDS):
        for index, side in enumerate(sides):
            began = time.process_time()
            side()
            found[index] = min(found[index], time.process_time() - began)
    return found


def texts_of(work: Path) -> list[str]:
    """The texts that `prepare` wrote."""
    return [json.loads(line)["text"] for line in (work / "texts.jsonl").read_text().splitlines()]


def alignment(work: Path) -> str:
    """Tokens of both sides that are paired in a second."""
    readers = [tokenising.load(work / name) for name in SIZES]
    texts = (texts_of(work) * 20)[:20_000]
    target, source = (tokenising.tokenise(reader, texts) for reader in readers)
    (seconds,) = least(lambda: aligning.align(source, target, "both_ends"))
    return f"{(len(target.ids) + len(source.ids)) / seconds:,.0f} tokens/s ({len(target.ids):,} of the target's)"


def capture(work: Path) -> str:
    """A capture against plain passes over the same batches."""
    model = models.load_model(models.open_folder(work / "source"), "cpu")
    reader = tokenising.load(work / "source")
    corpus = tokenising.cut(texts_of(work), [(reader, CONTEXT)])
    tokenised = tokenising.tokenise(reader, corpus.texts)
    sizes = np.diff(tokenised.offsets)
    starts = [*capturing._shard_starts(sizes), len(sizes)]

    def plain() -> None:
        with torch.inference_mode():
            for first, last in itertools.pairwise(starts):
                for batch in capturing.batches(sizes, range(first, last), 4096):
                    model(**capturing.inputs(tokenised, batch), use_cache=False)

    def kept() -> None:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            capturing.capture(model, tokenised, Path(folder), vocab=reader.size, top_k=32, batch_tokens=4096)

    bare, whole = least(plain, kept)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        capturing.capture(model, tokenised, Path(folder), vocab=reader.size, top_k=10, batch_tokens=4096)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    each = size / len(tokenised.ids) + 8  # with the tokens' ids and byte ends
    return f"{whole / bare:.3f} ({whole:.1f} s, plain {bare:.1f} s); top 10 take {each:.1f} bytes a token"


def ways(kind: str) -> dict[str, Any]:
    """The parts of an op that trains in this way."""
    train = Train(epochs=1, batch_tokens=4096, micro_batch_tokens=2048, lr=1e-4)
    loss = Loss(clm_weight=1.0) if kind == "plain" else Loss(kind="alm") if kind == "alm" else Loss()
    return {"train": train, "loss": loss, **({} if kind == "alm" else {"capture": Capture(top_k=32)})}


def trainer(work: Path, kind: str) -> Callable[[], None]:
    """Training over all texts, from the same start each time."""
    job = job_of(work, max_length=CONTEXT, **ways(kind))
    folders = models.open_folder(job.target), [models.open_folder(path) for path in job.sources]
    lessons = language.lessons(job, *folders, 0)
    model = models.load_model(folders[0], "cpu")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.requires_grad_(True)

    def run() -> None:
        model.load_state_dict(start)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            training.train(model, lessons, training.Course(job.op.train, Path(folder), 0))

    return run


def steps(work: Path) -> str:
    """A training step against one of plain training."""
    kinds = ("plain", "soft_ce", "alm")
    plain, *others = least(*(trainer(work, kind) for kind in kinds))
    return ", ".join(f"{kind} {seconds / plain:.3f}" for kind, seconds in zip(kinds[1:], others, strict=True))


def peak(work: Path, kind: str) -> int:
    """The most bytes of its own (RssAnon) that a process has while it trains."""
    words = [sys.executable, __file__, "--work", str(work), "--train", kind]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def own_peak(run: Callable[[], None]) -> int:
    """The most bytes of memory that is no file's (RssAnon) while something runs."""
    most, end = [0], threading.Event()

    def watch() -> None:
        while not end.wait(0.002):
            status = Path("/proc/self/status").read_text()
            most[0] = max(most[0], int(status.partition("RssAnon:")[2].split()[0]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    end.set()
    watcher.join()
    return most[0]


def main() -> None:
    """Read the command line, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_000)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--source-ids", type=int, default=SIZES["source"])
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if options.train:
        print(own_peak(trainer(options.work, options.train)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        asked, told = {"tokens": options.tokens, "source_ids": options.source_ids}, work / "asked.json"
        if told.exists() and json.loads(told.read_text()) != asked:
            parser.error(f"{work} holds models of {json.loads(told.read_text())}: give another folder, or delete it")
        if not told.exists():
            prepare(work, options.tokens, options.source_ids)
            told.write_text(json.dumps(asked))
        print(f"alignment        {alignment(work)}", flush=True)
        print(f"capture          {capture(work)}", flush=True)
        print(f"training step    {steps(work)} of plain training", flush=True)
        plain, *others = (peak(work, kind) for kind in ("plain", "soft_ce", "alm"))
        told = ", ".join(f"{kind} {size / plain:.3f}" for kind, size in zip(("soft_ce", "alm"), others, strict=True))
        print(f"peak of memory   {told} of plain training ({plain >> 20} MiB)")


if __name__ == "__main__":
    main()
