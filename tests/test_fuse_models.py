"""`op: fuse` with `task: causal_lm`, from recipe to result: models of several tokenizers, kills, and what cannot be."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_fuse import artifact, killed, ran, run
from test_fuse_alignment import TEXTS, TRAINED_ON, tokenizer
from test_fuse_language import gpt
from test_stages import mlp, weights, write_recipe
from tokenizers import normalizers
from toys import Called, call

from mergeflow import pipeline
from mergeflow.errors import InputError, MergeflowError, NumericError, RecipeError
from mergeflow.recipe import load_recipe
from mergeflow.stages.fuse import capturing, teaching, training

__all__ = ["ran"]
TRAIN: dict[str, Any] = {"epochs": 2, "batch_tokens": 120, "micro_batch_tokens": 64, "lr": 1e-3, "checkpoint_every": 2}
FUSED: dict[str, Any] = {
    "op": "fuse",
    "task": "causal_lm",
    "target": "start",
    "sources": ["a", "b"],
    "data": "texts",
    "capture": {"top_k": 8},
    "train": TRAIN,
}
KINDS = {"start": ("byte-level", 300), "a": ("byte-level", 340), "b": ("metaspace", 380)}


def language_model(folder: Path, kind: str, size: int, seed: int, normalizer: Any = None, **config: Any) -> Path:
    """A small GPT with a tokenizer of its own."""
    backend = type(tokenizer(kind, size).backend).from_str(tokenizer(kind, size).backend.to_str())
    if normalizer is not None:
        backend.normalizer = normalizer
    gpt(backend.get_vocab_size(), seed, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **config).save_pretrained(
        folder
    )
    backend.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles}))
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with language models `start`, `a` and `b` of three tokenizers, texts, and a cache of its own."""
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for seed, (name, (kind, size)) in enumerate(KINDS.items()):
        language_model(tmp_path / name, kind, size, seed)
    lines = [json.dumps({"text": text}) for text in (*TEXTS, *TRAINED_ON[:2])]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def fuse(here: Path, out: str = "out", **changed: Any) -> pipeline.Result:
    return run(here, out, node=FUSED, corpora={"texts": {"path": "./texts.jsonl"}}, **changed)


def called(here: Path, command: str, *words: str, **changed: Any) -> Called:
    """A command over the recipe of the fuse, with some of its keys changed."""
    models = {name: f"./{name}" for name in KINDS}
    data = {"texts": {"path": "./texts.jsonl"}}
    path = write_recipe(here, {"fused": {**FUSED, **changed}}, models=models, data=data, output={"node": "fused"})
    return call(command, str(path), *words)


def steps(result: pipeline.Result) -> list[dict[str, float]]:
    return [json.loads(line) for line in (artifact(result) / training.METRICS).read_text().splitlines()]


def test_the_target_learns_what_models_of_other_tokenizers_say_and_keeps_its_form(here: Path) -> None:
    train = {**TRAIN, "epochs": 20, "batch_tokens": 10_000}
    found = steps(fuse(here, train=train, loss={"clm_weight": 0.0}))
    assert len(found) == 20 and found[-1]["fuse_loss"] < 0.9 * found[0]["fuse_loss"]
    start, made = weights(here / "start"), weights(here / "out")
    assert {name: (one.dtype, one.shape) for name, one in made.items()} == {
        name: (one.dtype, one.shape) for name, one in start.items()
    }
    for file in ("config.json", "tokenizer.json"):
        assert json.loads((here / "out" / file).read_text()) == json.loads((here / "start" / file).read_text())
    assert transformers.AutoModelForCausalLM.from_pretrained(here / "out").config.vocab_size == 300


@pytest.mark.parametrize("kind", ["soft_ce", "kl", "alm"])
def test_a_target_that_is_its_own_only_source_rests(here: Path, kind: str) -> None:
    """With all ids kept, the same tokenizer and the same weights, nothing is to be learnt (to float16, or float32 for ALM)."""
    settings = {} if kind == "alm" else {"capture": {"top_k": 300, "dtype": "float32"}}
    loss = {"kind": kind, "clm_weight": 0.0}
    found = steps(fuse(here, sources=["start"], loss=loss, **{"capture": {}, **settings}))
    assert found[0]["gradient_norm"] < 1e-6, found[0]


def test_plain_training_runs_no_source_and_is_what_a_loop_of_ones_own_gives(here: Path, ran: list[str]) -> None:
    texts = TEXTS[:3]  # which the model reads whole
    (here / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {**TRAIN, "batch_tokens": 10_000, "micro_batch_tokens": 10_000, "warmup_ratio": 0.0}
    plain = {"loss": {"clm_weight": 1}, "capture": {}, "pack": False, "train": settings}
    fuse(here, **plain)
    assert ran == ["start"]
    fuse(here, "other", sources=["b"], **plain)
    assert (here / "out/model.safetensors").read_bytes() == (here / "other/model.safetensors").read_bytes()

    model = transformers.AutoModelForCausalLM.from_pretrained(here / "start").train()
    reader = tokenizer(*KINDS["start"]).backend
    rows = [torch.tensor(reader.encode(text).ids) for text in texts]
    matrices = [one for one in model.parameters() if one.ndim > 1]
    others = [one for one in model.parameters() if one.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step in range(2):
        losses = []
        for row in rows:
            logits = model(input_ids=row[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
        (sum(losses) / sum(len(row) - 1 for row in rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 2))
        optimiser.step()
        optimiser.zero_grad()
    made = weights(here / "out")
    for name, one in model.state_dict().items():
        if name in made and not name.endswith("c_attn.bias"):  # of keys it has no gradient but rounding
            assert torch.allclose(one, made[name], atol=2e-5), name


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"loss": {"kind": "kl"}},
        {"loss": {"kind": "alm"}, "capture": {}},
        {"loss": {"kind": "alm"}, "capture": {}, "fusion": {"function": "avg"}},
        {"align": {"unmatched": "skip"}},
        {"align": {"unmatched": "skip"}, "fusion": {"function": "avg", "granularity": "block"}},
        {"loss": {"clm_weight": 1}, "capture": {}},
    ],
)
def test_what_of_a_step_runs_together_changes_nothing(here: Path, changed: dict[str, Any]) -> None:
    one, several = (
        steps(fuse(here, f"out{size}", train={**TRAIN, "batch_tokens": 10_000, "micro_batch_tokens": size}, **changed))[
            0
        ]
        for size in (64, 10_000)
    )
    assert one == pytest.approx(several, rel=1e-4)


def test_packed_rows_teach_what_rows_of_one_document_do(here: Path) -> None:
    train = {**TRAIN, "batch_tokens": 10_000, "micro_batch_tokens": 128}
    packed, alone = (steps(fuse(here, f"out{pack}", pack=pack, train=train))[0] for pack in (True, False))
    for name in ("clm_loss", "fuse_loss"):
        assert packed[name] == pytest.approx(alone[name], rel=1e-5)


def test_what_is_kept_is_used_again_as_far_as_it_is_the_same(here: Path, ran: list[str]) -> None:
    fuse(here)
    assert sorted(ran) == ["a", "b", "start", "start"], "the target once to see that it can be packed"
    for again, wanted in (
        ({}, []),
        ({"loss": {"clm_weight": 0.25}}, ["start"]),
        ({"fusion": {"function": "avg"}}, ["start"]),
        ({"capture": {"top_k": 4}}, ["a", "b", "start"]),
        ({"sources": ["a", "b", "start"]}, ["start", "start"]),
        ({"loss": {"kind": "alm"}, "capture": {}}, ["a", "b", "start"]),
    ):
        ran.clear()
        fuse(here, f"out{len(str(again))}", **again)
        assert sorted(ran) == wanted, again
    state = load_file(here / "a/model.safetensors")
    changed = {**state, "transformer.ln_f.bias": state["transformer.ln_f.bias"] + 0.125}
    save_file(changed, here / "a/model.safetensors", metadata={"format": "pt"})
    ran.clear()
    fuse(here, "changed")
    assert sorted(ran) == ["a", "start"]


@pytest.mark.parametrize("at", [("training", "_State", "note", 4), ("capturing", "Shards", "write", 2)])
def test_a_run_that_was_killed_goes_on_and_ends_in_the_same_bytes(
    here: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str], at: tuple[str, str, str, int]
) -> None:
    fuse(here, "whole")
    monkeypatch.setenv("MERGEFLOW_CACHE", str(here / "other"))
    killed(here, *at)
    assert not (here / "out").exists()
    ran.clear()
    fuse(here)
    assert ran == (["start"] if at[0] == "training" else ["b", "start"]), "what was made is not made again"
    assert (here / "out/model.safetensors").read_bytes() == (here / "whole/model.safetensors").read_bytes()


def test_two_fused_pairs_and_their_merge_are_one_recipe(here: Path) -> None:
    """FuseChat (arXiv:2408.07990): each source into the pivot, then `sce` over what came out."""
    pairs = {f"from_{name}": {**FUSED, "sources": [name]} for name in ("a", "b")}
    models = {name: f"./{name}" for name in KINDS}
    data = {"texts": {"path": "./texts.jsonl"}}
    sce = {"op": "sce", "base": "start", "inputs": list(pairs), "select_topk": 0.5}
    recipe = write_recipe(here, {**pairs, "chat": sce}, models=models, data=data, output={"node": "chat"})
    result = pipeline.run(load_recipe(recipe), "chat", threads=1)
    parts = {name: f"./cache/artifacts/{key}" for name, key, _ in result.stages}
    alone = write_recipe(here, {"chat": sce}, models={"start": "./start", **parts}, data={})
    pipeline.run(load_recipe(alone), "alone", threads=1)
    made = (here / "chat/model.safetensors").read_bytes()
    assert made == (here / "alone/model.safetensors").read_bytes()
    assert made != (here / "start/model.safetensors").read_bytes()


def test_the_papers_preset_gives_way_to_what_is_written(here: Path, ran: list[str]) -> None:
    plain = {"preset": "fusellm_v1", "capture": {}}
    found = steps(fuse(here, **plain))
    assert sorted(ran) == ["a", "b", "start", "start", "start"], "the start is one of its sources"
    assert found[0]["loss"] == pytest.approx(0.9 * found[0]["clm_loss"] + 0.1 * found[0]["fuse_loss"], rel=1e-5)
    ran.clear()
    found = steps(fuse(here, "other", loss={"clm_weight": 0.5}, include_self=False, **plain))
    assert found[0]["loss"] == pytest.approx(0.5 * found[0]["clm_loss"] + 0.5 * found[0]["fuse_loss"], rel=1e-5)
    assert ran == ["start"], "of the sources nothing is new, and the start is none"
    made = {name: (here / name / "model.safetensors").read_bytes() for name in ("out", "other")}
    fuse(here, "again", include_self=True, **plain)
    assert (here / "again/model.safetensors").read_bytes() == made["out"] != made["other"]


@pytest.mark.parametrize("changed", [{}, {"loss": {"kind": "alm"}, "capture": {}}, {"loss": {"clm_weight": 1}, "capture": {}}])  # fmt: skip
def test_a_plan_says_about_what_disk_a_fuse_takes(here: Path, changed: Mapping[str, Any]) -> None:
    (here / "texts.jsonl").write_text("".join(json.dumps({"text": text * 8}) + "\n" for text in TRAINED_ON * 4))
    result = fuse(here, train={**TRAIN, "epochs": 1, "batch_tokens": 100_000}, **changed)
    assert call("cache", "clear").code == 0
    (told,) = json.loads(call("plan", "recipe.yaml", "--json").out)["stages"]
    fuse(here, "again", train={**TRAIN, "epochs": 1, "batch_tokens": 100_000}, **changed)
    kept = sum(path.stat().st_size for path in (here / "cache/artifacts").rglob("*") if path.is_file())
    count = sum(one.numel() for one in weights(here / "start").values())
    assert told["needs"]["disk"] == pytest.approx(kept + 12 * count, rel=0.5)
    assert told["needs"]["memory"] >= 16 * count
    assert result.rows


# Settings


ONE_STEP = {**TRAIN, "epochs": 1, "batch_tokens": 10_000}


ALM: dict[str, Any] = {"loss": {"kind": "alm"}, "capture": {}}
AVG: dict[str, Any] = {"fusion": {"function": "avg"}}
SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"align": {"unmatched": "skip"}}, {}),
    ({"align": {"vocab": "exact"}}, {}),
    ({"align": {"vocab": "min_edit"}}, {}),
    ({"align": {"valid": "end"}}, {}),
    ({"align": {"method": "dtw"}}, {}),
    ({"align": {"chunk_correction": False}}, {}),
    ({"capture": {"top_k": 8, "min_mass": 0.02}}, {}),
    ({"capture": {"top_k": 8, "dtype": "float32"}}, {}),
    ({"fusion": {"function": "max"}}, {}),
    ({"fusion": {"function": "static"}}, {}),
    (AVG, {}),
    ({"fusion": {"function": "avg_fusellm"}}, AVG),
    ({"fusion": {"function": "avg", "temperature": 0.1}}, AVG),
    ({"fusion": {"function": "avg", "metric": "token_cross_entropy"}}, AVG),
    ({"fusion": {"function": "avg", "granularity": "block"}}, AVG),
    ({"loss": {"tail": "renormalise"}}, {}),
    ({"loss": {"teacher_temperature": 2.0}}, {}),
    ({"loss": {"student_temperature": 2.0}}, {}),
    ({"loss": {"kind": "alm", "alm_tau": 2.0}, "capture": {}}, ALM),
    ({"sources": [{"model": "a", "dtype": "bfloat16"}, "b"]}, {}),
]
"""Changed settings, and those that they stand beside."""


def test_each_setting_reaches_what_is_taught(here: Path) -> None:
    """Against the same without it: plain training is the same, what the sources teach is not."""
    found: dict[str, dict[str, float]] = {}
    for number, given in enumerate(given for pair in SETTINGS for given in pair):
        if str(given) not in found:
            found[str(given)] = steps(fuse(here, f"out{number}", train=ONE_STEP, **given))[0]
    for changed, beside in SETTINGS:
        one, other = found[str(beside)], found[str(changed)]
        assert one["clm_loss"] == other["clm_loss"], changed
        assert math.isfinite(other["fuse_loss"]) and one["fuse_loss"] != other["fuse_loss"], changed


@pytest.mark.parametrize(
    "changed",
    [
        {"sources": [{"model": "a", "batch_tokens": 64}, "b"]},
        {"train": {**ONE_STEP, "gradient_checkpointing": True}},
        {"fusion": {"function": "static"}, "sources": [{"model": "a", "weight": 0.0}, {"model": "b", "weight": 2.0}]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_the_same_by_other_means_is_the_same(here: Path, changed: dict[str, Any]) -> None:
    beside = {"sources": ["b"]} if "fusion" in changed else {}
    one, other = (
        steps(fuse(here, f"out{number}", **{"train": ONE_STEP, **given}))[0]
        for number, given in enumerate((beside, changed))
    )
    assert one == pytest.approx(other, rel=1e-5)


def test_the_texts_of_messages_are_those_that_the_template_makes(here: Path) -> None:
    template = "{% for one in messages %}[{{ one.role }}] {{ one.content }} {% endfor %}"
    for name in KINDS:
        path = here / name / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    told = [[{"role": "user", "content": text}] for text in TEXTS[:4]]
    (here / "texts.jsonl").write_text("".join(json.dumps({"chat": one}) + "\n" for one in told))
    chat = run(here, "out_chat", node=FUSED, corpora={"texts": {"path": "./texts.jsonl", "messages": "chat"}})
    (here / "texts.jsonl").write_text("".join(json.dumps({"text": f"[user] {text} "}) + "\n" for text in TEXTS[:4]))
    fuse(here)
    assert (here / "out_chat/model.safetensors").read_bytes() == (here / "out/model.safetensors").read_bytes()
    assert chat.made


def test_rows_of_the_head_that_no_token_has_are_not_asked(here: Path) -> None:
    """A head that is padded to a round number, as many are."""
    plain = steps(fuse(here, train=ONE_STEP))[0]
    state = load_file(here / "start/model.safetensors")
    wte = state["transformer.wte.weight"]
    state["transformer.wte.weight"] = torch.cat([wte, 9 * torch.ones(20, wte.shape[1])])
    save_file(state, here / "start/model.safetensors", metadata={"format": "pt"})
    config = here / "start/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 320}))
    padded = steps(fuse(here, "out_padded", train=ONE_STEP))[0]
    for name in ("clm_loss", "fuse_loss"):
        assert padded[name] == pytest.approx(plain[name], rel=1e-5)
    assert weights(here / "out_padded")["transformer.wte.weight"].shape[0] == 320


def test_documents_for_which_a_source_gives_nan_are_left_out_and_told(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of eight, which alone comes to the place where a source has no number; one of a thousand would be few enough."""
    monkeypatch.setattr(capturing, "MOST_DROPPED", 0.2)
    state = load_file(here / "b/model.safetensors")
    state["transformer.wpe.weight"][40:] = torch.nan
    save_file(state, here / "b/model.safetensors", metadata={"format": "pt"})
    lines = [*(json.dumps({"text": f"{number} is a number"}) for number in range(7)), json.dumps({"text": "0" * 50})]
    (here / "texts.jsonl").write_text("\n".join(lines))
    # Each alone: what is masked is not seen, but NaN times 0 is NaN.
    settings = {"sources": ["a", {"model": "b", "batch_tokens": 1}], "train": ONE_STEP}
    done = called(here, "run", "-o", "out", **settings)
    assert done.code == 0 and "documents with NaN or Inf, left out: 1" in done.err, done.err
    left = steps(fuse(here, "again", **settings))
    (here / "texts.jsonl").write_text("\n".join(lines[:-1]))
    assert steps(fuse(here, "without", **settings)) == [pytest.approx(one, rel=1e-4) for one in left]


def test_shards_are_opened_as_they_are_asked_for_and_closed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse(here, "whole")
    assert call("cache", "clear").code == 0
    monkeypatch.setattr(capturing, "TOKENS_A_SHARD", 100)
    monkeypatch.setattr(capturing, "SHARDS_OPEN", 2)
    opened: list[str] = []
    mapped = capturing.mapped
    monkeypatch.setattr(capturing, "mapped", lambda path: opened.append(str(path)) or mapped(path))
    fuse(here)
    assert len(opened) > len(set(opened)) >= 5, "one that was closed is opened again"
    assert (here / "out/model.safetensors").read_bytes() == (here / "whole/model.safetensors").read_bytes()


# What cannot be


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"sources": ["lower"]}, InputError, "lower case"),
        ({"sources": ["numbers"]}, RecipeError, "MergeflowMLP is no causal language model"),
        ({"sources": ["broken"]}, NumericError, "NaN"),
        ({"max_length": 100}, RecipeError, "reads 64 tokens, and documents are to have 100"),
        ({"data": "empty"}, InputError, "has no row that can be used"),
        ({"data": "blank"}, InputError, "has no row that can be used"),
        ({"max_length": 2}, MergeflowError, "2"),
        ({"batch_size": 4}, RecipeError, "`batch_size` says nothing for `task: causal_lm`"),
        ({"fusion": {"average": "logits"}}, RecipeError, "`average` says nothing for `task: causal_lm`"),
        ({"loss": {"alm_tau": 2.0}}, RecipeError, "`alm_tau` says nothing for `loss: {kind: soft_ce}`"),
        ({"loss": {"kind": "alm"}}, RecipeError, "`top_k` says nothing for `loss: {kind: alm}`"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_and_nothing_is_written(
    here: Path, changed: dict[str, Any], error: type[Exception], words: str
) -> None:
    language_model(here / "lower", "byte-level", 320, 5, normalizers.Lowercase())
    mlp(here / "numbers")
    state = load_file(language_model(here / "broken", "byte-level", 320, 6) / "model.safetensors")
    save_file(
        {**state, "transformer.ln_f.bias": state["transformer.ln_f.bias"] + torch.nan},
        here / "broken/model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    (here / "empty.jsonl").write_text("")
    (here / "blank.jsonl").write_text('{"text": ""}\n')
    data = {name: {"path": f"./{name}.jsonl"} for name in ("texts", "empty", "blank")}
    with pytest.raises(error) as raised:
        run(here, node=FUSED, corpora=data, **changed)
    assert words in str(raised.value)
    assert not (here / "out").exists()


# Packed rows, contexts and ids


def other_target(folder: Path, model: transformers.PreTrainedModel) -> None:
    """Put a model of another class, of the same tokenizer, in the place of one."""
    with torch.no_grad():
        for one in model.parameters():
            if one.ndim > 1:
                one.mul_(3)  # so that who sees whom is seen
    model.save_pretrained(folder)


SMALL: dict[str, Any] = {"vocab_size": 300, "max_position_embeddings": 64, "hidden_size": 32, "num_attention_heads": 2}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adds its masks": ("GPTNeo", {
        "num_layers": 2, "num_heads": 2, "window_size": 64, "attention_types": [[["global", "local"], 1]],
        "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}),
    "turns its keys": ("Llama", {"num_hidden_layers": 2, "intermediate_size": 48}),
    "turns a part of them": ("GPTNeoX", {"num_hidden_layers": 2, "intermediate_size": 48, "hidden_dropout": 0.0}),
    "turns pairs of them": ("GPTJ", {
        "num_hidden_layers": 2, "rotary_dim": 8,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}  # fmt: skip
"""Models that see places in unlike ways."""


@pytest.mark.parametrize("way", OTHERS)
def test_packed_rows_hide_the_other_documents_in_every_class(here: Path, way: str) -> None:
    torch.manual_seed(0)
    name, own = OTHERS[way]
    config = getattr(transformers, f"{name}Config")(**SMALL, **own)
    other_target(here / "start", getattr(transformers, f"{name}ForCausalLM")(config))
    settings = {"train": {**TRAIN, "batch_tokens": 10_000, "micro_batch_tokens": 10_000}}
    packed, alone = (steps(fuse(here, f"out_{pack}", pack=pack, **settings))[0] for pack in (True, False))
    for name in ("clm_loss", "fuse_loss"):
        assert packed[name] == pytest.approx(alone[name], rel=1e-5), name


def test_a_class_that_cannot_be_told_places_is_refused_by_a_plan(here: Path) -> None:
    config = transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2)
    other_target(here / "start", transformers.BloomForCausalLM(config))
    done = called(here, "plan")
    assert done.code == 2 and "BloomForCausalLM cannot be told which tokens stand where" in done.err, done.err
    assert "Write `pack: false`." in done.err


def test_a_document_may_be_as_long_as_is_asked_where_a_model_names_no_context(here: Path) -> None:
    config = transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2)
    other_target(here / "start", transformers.BloomForCausalLM(config))
    (here / "texts.jsonl").write_text(json.dumps({"text": "0123456789" * 300}) + "\n")
    fuse(here, sources=["start"], pack=False, max_length=2500, loss={"clm_weight": 1}, capture={}, train=ONE_STEP)
    longest = [int(load_file(path)["offsets"].diff().max()) for path in (here / "cache").rglob("tokens.safetensors")]
    assert longest and 2048 < max(longest) <= 2500, longest


def test_a_model_whose_windows_a_mask_replaces_is_not_packed(here: Path, ran: list[str]) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=4,
    )  # fmt: skip
    other_target(here / "start", transformers.MistralForCausalLM(config))
    with pytest.raises(RecipeError, match="documents that share a row") as raised:
        fuse(here)
    assert "pack: false" in str(raised.value) and ran == ["start"], "before a source runs"
    assert fuse(here, pack=False).made


def test_documents_are_cut_for_the_least_context_of_models_with_one_tokenizer(here: Path) -> None:
    language_model(here / "short", *KINDS["start"], seed=7, n_positions=16)
    assert fuse(here, sources=["short"]).made
    longest = [int(load_file(path)["offsets"].diff().max()) for path in (here / "cache").rglob("tokens.safetensors")]
    assert longest and max(longest) <= 16, longest


def test_a_token_that_the_targets_model_has_no_row_for_is_no_target(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizer has an id more than it: what a source says of that token would be taken for another's."""
    token = {"id": 300, "content": "<x>", "special": True, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    transformers.GPT2LMHeadModel(gpt(301, 7).config).save_pretrained(here / "wide")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (here / "wide" / name).write_text((here / "start" / name).read_text())
    for name in ("start", "wide"):
        told = json.loads((here / name / "tokenizer.json").read_text())
        told["added_tokens"].append(token)
        (here / name / "tokenizer.json").write_text(json.dumps(told))
    seen: list[int] = []
    targets = teaching.targets

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(int(given[4].max()))
        return targets(*given, **named)

    monkeypatch.setattr(teaching, "targets", watched)
    assert fuse(here, sources=["wide"], capture={"top_k": 301}).made
    assert seen and max(seen) == 299
