"""Make the data and train the models of the fused language model, in plain torch, from Python's own standard library.

Usage: prepare_lm.py [FOLDER] [--steps N]    (default: work/ beside this file; about three minutes on two cores)

There are two domains: the source of the standard library without its docstrings and comments, and the prose of those docstrings.
A module's text is in one part alone: that of the teachers, of the base, of the fuse, or held out. Each of the three models has a
byte-level BPE tokenizer of its own, trained on its own part: `code` and `prose` are the teachers (448 and 512 ids), `base` (384)
has seen a little of both domains. `shuffled_code` and `shuffled_prose` are the teachers with the rows of their heads permuted,
so that all they say is of other tokens: from them nothing can be learnt.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DOMAINS = ("code", "prose")
CONTEXT = 256
END = "<|endoftext|>"
VOCABULARY = {"base": 384, "code": 448, "prose": 512}
STEPS = {"base": 150, "code": 600, "prose": 600}
LONGEST = {"base": 200_000, "fuse": 150_000, "test": 60_000}
"""Bytes of each domain in a part, at most; the teachers have the rest."""


def modules() -> Iterator[tuple[str, str, str]]:
    """The name, the code and the prose of each module of the standard library that can be read, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"}.isdisjoint(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        prose = []
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            found = ast.get_docstring(node)
            if found:
                prose.append(found)
                node.body = node.body[1:] or [ast.Pass()]
        yield name, ast.unparse(tree) + "\n", "\n\n".join(prose) + "\n"


def pieces(text: str, longest: int = 1000) -> Iterator[str]:
    """A text in pieces of whole lines, of at most so many characters unless one line is longer."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > longest:
            yield piece
            piece = ""
        piece += line
    if piece.strip():
        yield piece


def parts() -> dict[tuple[str, str], list[str]]:
    """The pieces of each part and domain."""
    found: dict[tuple[str, str], list[str]] = {
        (part, domain): [] for part in ("teacher", *LONGEST) for domain in DOMAINS
    }
    for name, code, prose in modules():
        draw = hashlib.blake2b(name.encode(), digest_size=4).digest()[0]
        part = "teacher" if draw < 150 else "base" if draw < 190 else "fuse" if draw < 220 else "test"
        for domain, text in zip(DOMAINS, (code, prose), strict=True):
            own = found[part, domain]
            for piece in pieces(text):
                if part == "teacher" or sum(map(len, own)) < LONGEST[part]:
                    own.append(piece)
    return found


def tokenizer(texts: Sequence[str], size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of these texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def trained(ids: torch.Tensor, size: int, steps: int, seed: int, rows: int = 16) -> transformers.GPT2LMHeadModel:
    """A GPT of some 0.3 million parameters after `steps` steps on windows of these ids."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=size, n_positions=CONTEXT, n_embd=96, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        starts = torch.randint(len(ids) - CONTEXT, (rows,), generator=draw)
        batch = ids[starts[:, None] + torch.arange(CONTEXT)]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return model.eval()


def save(model: transformers.GPT2LMHeadModel, reader: Tokenizer, folder: Path) -> None:
    """Write a model with its tokenizer."""
    model.save_pretrained(folder)
    reader.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


def prepare(folder: Path, steps: dict[str, int] = STEPS, seed: int = 0) -> None:
    """Write models and data into `folder`."""
    texts = parts()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows = {f"test-{domain}": texts["test", domain] for domain in DOMAINS}
    both = [texts["fuse", domain] for domain in DOMAINS]
    rows["fuse"] = [piece for pair in zip(*both, strict=False) for piece in pair]
    for name, own in rows.items():
        lines = "".join(json.dumps({"text": piece}) + "\n" for piece in own)
        (folder / "data" / f"{name}.jsonl").write_text(lines)
    for name, size in VOCABULARY.items():
        own = texts["base", "code"] + texts["base", "prose"] if name == "base" else texts["teacher", name]
        reader = tokenizer(own, size)
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed)).tolist()
        ids = [one for at in order for one in [0, *reader.encode(own[at]).ids]]
        model = trained(torch.tensor(ids), size, steps[name], seed)
        save(model, reader, folder / "models" / name)
        if name in DOMAINS:
            permuted = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(
                {**model.config.to_dict(), "tie_word_embeddings": False}))  # fmt: skip
            permuted.load_state_dict(model.state_dict())
            moved = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
            permuted.lm_head.weight.data = model.lm_head.weight.detach()[moved].clone()
            save(permuted, reader, folder / "models" / f"shuffled_{name}")


def main() -> None:
    """Read the command line and make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument(
        "--steps", type=int, help="training steps of each model; default: 600 for a teacher, 150 for the base"
    )
    options = parser.parse_args()
    prepare(options.folder, STEPS if options.steps is None else dict.fromkeys(STEPS, options.steps))


if __name__ == "__main__":
    main()
