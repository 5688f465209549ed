"""What language models say of documents: kept, brought to another vocabulary, weighed and taught, beside slow references."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fuse_alignment import TEXTS, tokenizer
from torch import nn

from mergeflow.errors import InputError, Interrupted, NumericError
from mergeflow.stages.fuse import capturing, selecting
from mergeflow.stages.fuse.aligning import align
from mergeflow.stages.fuse.capturing import Captured, Document, capture, disk_bytes
from mergeflow.stages.fuse.losses import alm_loss, fuse_loss
from mergeflow.stages.fuse.projecting import vocabulary_map
from mergeflow.stages.fuse.teaching import Chunks, Targets, chunks, join, join_chunks, mix, targets
from mergeflow.stages.fuse.tokenising import Tokenised, tokenise

Model = Any


def gpt(vocab: int, seed: int = 0, **more: Any) -> Model:
    torch.manual_seed(seed)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=vocab, **{**sizes, **more})
    made = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.mul_(4)  # predictions that are far from uniform
    return made


def tokens_of(documents: list[list[int]], ends: list[list[int]] | None = None) -> Tokenised:
    """Documents of these ids, a byte each, unless `ends` say otherwise."""
    ends = [list(range(1, len(one) + 1)) for one in documents] if ends is None else ends
    flat = [np.array([one for row in rows for one in row], dtype=np.int32) for rows in (documents, ends)]
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    return Tokenised(flat[0], flat[1], offsets, np.array([row[-1] if row else 0 for row in ends], dtype=np.int64))


def some_documents(count: int, vocab: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocab, draw.integers(0, longest)).tolist() for _ in range(count)]


class Counting(nn.Module):
    """A model that counts its passes, and breaks off or says NaN where it is told to."""

    def __init__(self, model: Model, nan_at: int = -1) -> None:
        super().__init__()
        self.model, self.nan_at, self.documents = model, nan_at, 0

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
        self.documents += len(input_ids)
        output = self.model(input_ids=input_ids, **more)
        output.logits[(input_ids == self.nan_at).any(1)] = torch.nan
        return output


# Capture


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_kept_is_what_the_model_says_of_each_document_alone(tmp_path: Path, tied: bool) -> None:
    model = gpt(70, tie_word_embeddings=tied)  # 6 rows of the head are of padding
    documents = [[], [5], *some_documents(12, 64)]
    tokenised = tokens_of(documents)
    capture(model, tokenised, tmp_path, vocab=64, top_k=9, dtype="float32", batch_tokens=40)
    found = Captured.open(tmp_path)
    double = gpt(70, tie_word_embeddings=tied).double()
    for number, ids in enumerate(documents):
        said = found.document(number)
        assert len(said.true) == max(len(ids) - 1, 0)
        if len(ids) < 2:
            assert found.nll[number] == 0 == found.tokens[number]
            continue
        with torch.no_grad():
            dense = double(torch.tensor([ids])).logits[0, :-1, :64].log_softmax(1)
        best = dense.topk(9)
        assert np.array_equal(said.ids, best.indices.numpy())
        assert np.allclose(said.log_probs, best.values.numpy(), atol=2e-5)
        true = dense.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert np.allclose(said.true, true.numpy(), atol=2e-5)
        assert math.isclose(found.nll[number], -float(true.sum()), rel_tol=1e-5)
        assert found.tokens[number] == len(ids) - 1 == found.bytes[number]


def test_so_few_are_kept_that_they_have_the_mass_that_is_asked_for(tmp_path: Path) -> None:
    documents = some_documents(6, 64)
    whole, some = tmp_path / "whole", tmp_path / "some"
    for folder, mass in ((whole, None), (some, 0.7)):
        folder.mkdir()
        capture(gpt(64), tokens_of(documents), folder, vocab=64, top_k=20, min_mass=mass, dtype="float32")
    few, all_ = Captured.open(some), Captured.open(whole)
    for number in range(len(documents)):
        said, full = few.document(number), all_.document(number)
        for row in range(len(said.true)):
            own, mass = np.exp(said.log_probs[row]), np.exp(full.log_probs[row].astype(np.float64))
            count = min(int(np.searchsorted(np.cumsum(mass), 0.7)) + 1, 20)
            assert int((own > 0).sum()) == count
            assert np.array_equal(said.ids[row, :count], full.ids[row, :count])
            assert np.array_equal(said.log_probs[row, :count], full.log_probs[row, :count])


def test_without_likeliest_tokens_only_what_follows_is_kept(tmp_path: Path) -> None:
    tokenised = tokens_of(some_documents(20, 64, 60))
    capture(gpt(64), tokenised, tmp_path, vocab=64, top_k=0)
    assert Captured.open(tmp_path).document(3).log_probs.shape[1] == 0
    assert (tmp_path / "said-00000.safetensors").stat().st_size < 4 * len(tokenised.ids) + 400


def test_a_capture_that_was_killed_goes_on_and_makes_no_shard_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capturing, "TOKENS_A_SHARD", 100)
    documents = some_documents(60, 64, seed=1)
    tokenised = tokens_of(documents)
    run = {"vocab": 64, "top_k": 5, "batch_tokens": 60}
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    broken.mkdir(), unbroken.mkdir()  # type: ignore[func-returns-value]
    capture(gpt(64), tokenised, unbroken, **run)

    calls = itertools.count()

    def stop() -> None:
        if next(calls) == 11:
            raise Interrupted("stopped")

    first, second, third = Counting(gpt(64)), Counting(gpt(64)), Counting(gpt(64))
    with pytest.raises(Interrupted):
        capture(first, tokenised, broken, **run, check_stop=stop)
    whole = sorted(path.name for path in broken.glob("*.safetensors"))
    assert 1 < len(whole) < len(list(unbroken.glob("said-*")))
    torn = broken / whole[0]
    torn.write_bytes(torn.read_bytes()[:-1])
    told: list[int] = []
    capture(second, tokenised, broken, **run, progress=lambda done, total: told.append(done))
    assert sum(told) == len(tokenised.ids)
    kept = {
        name: (unbroken / name).read_bytes() for name in sorted(path.name for path in unbroken.glob("*.safetensors"))
    }
    assert all((broken / name).read_bytes() == content for name, content in kept.items())
    begun = [int(one) for one in Captured.open(unbroken).shards]
    again = len([one for one in documents[: begun[1]] if len(one) > 1])
    rest = len([one for one in documents[begun[len(whole)] :] if len(one) > 1])
    assert second.documents == again + rest  # the torn shard, and those that were not made
    capture(third, tokenised, broken, **run)
    assert third.documents == 0


def test_documents_of_nan_are_marked_and_too_many_are_an_error(tmp_path: Path) -> None:
    documents = [[1, 2, 3]] * 1000
    documents[17] = [1, 9, 3]
    capture(Counting(gpt(16), nan_at=9), tokens_of(documents), tmp_path, vocab=16, top_k=4)
    found = Captured.open(tmp_path)
    assert np.flatnonzero(found.bad).tolist() == [17]
    assert np.isfinite(np.delete(found.nll, 17)).all()
    documents[18] = [1, 9, 3]
    with pytest.raises(NumericError, match="NaN or Inf for 2 of 1000 documents"):
        (tmp_path / "other").mkdir()
        capture(Counting(gpt(16), nan_at=9), tokens_of(documents), tmp_path / "other", vocab=16, top_k=4)


def test_a_tokenizer_of_more_ids_than_the_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gives the id 40, and the model knows 32"):
        capture(gpt(32), tokens_of([[1, 40, 2]]), tmp_path, vocab=48, top_k=4)


def test_ten_likeliest_take_at_most_53_bytes_a_token(tmp_path: Path) -> None:
    tokenised = tokens_of(some_documents(1500, 64, 40))
    tokenised.save(tmp_path)
    capture(gpt(64), tokenised, tmp_path, vocab=64, top_k=10)
    whole = sum(path.stat().st_size for path in tmp_path.iterdir())
    by_document = 8 * 7 * 1500  # scores and borders
    assert whole - by_document < 53 * len(tokenised.ids)
    assert disk_bytes(len(tokenised.ids), 10, 65_536) == 52 * len(tokenised.ids)
    assert disk_bytes(1, 10, 65_537) == 72 and disk_bytes(1, 0, 50_000) == 12


# Selection


def test_shares_are_those_of_the_papers() -> None:
    scores = np.array([[1.5, 2.0], [2.0, 1.0], [2.5, 2.0]])
    assert selecting.choose(scores, "min").tolist() == [[1, 0], [0, 1], [0, 0]]
    assert selecting.choose(scores, "max").tolist() == [[0, 1], [0, 0], [1, 0]]
    assert np.allclose(selecting.choose(scores, "avg")[:, 0], [0.506, 0.307, 0.186], atol=6e-4)
    assert np.allclose(selecting.choose(scores, "avg_fusellm")[:, 0], [0.359, 0.329, 0.312], atol=6e-4)
    assert np.allclose(selecting.choose(scores, "static", weights=(1, 2, 1))[:, 1], [0.25, 0.5, 0.25])
    cold = selecting.choose(scores, "avg", temperature=0.01)
    assert np.allclose(cold, selecting.choose(scores, "min"), atol=1e-12)


def test_a_source_that_predicts_nothing_of_a_document_is_not_chosen_for_it() -> None:
    rates = np.stack([selecting.rate(np.array([0.0, 0.0]), np.array([0.0, 0.0])),
                      selecting.rate(np.array([9.0, 0.0]), np.array([3.0, 0.0]))])  # fmt: skip
    assert selecting.choose(rates, "min")[:, 0].tolist() == [0, 1]
    assert selecting.choose(rates, "avg").tolist() == [[0, 0.5], [1, 0.5]]


def test_by_bytes_the_better_model_is_chosen_though_the_finer_tokenizer_has_the_smaller_loss_a_token(
    tmp_path: Path,
) -> None:
    one = np.array([10.0]), np.array([10]), np.array([20])  # nats, tokens, bytes: two bytes a token
    other = np.array([12.0]), np.array([20]), np.array([20])  # worse, in tokens of a byte
    made = [
        Captured(tmp_path, *both, bad=np.zeros(1, bool), shards=np.zeros(1), offsets=np.zeros(2), complete=False)
        for both in (one, other)
    ]
    chosen = {
        metric: selecting.choose(np.stack([selecting.rate(*selecting.score(c, metric)) for c in made]), "min")[:, 0]
        for metric in ("bits_per_byte", "token_cross_entropy")
    }
    assert chosen["bits_per_byte"].tolist() == [1, 0] and chosen["token_cross_entropy"].tolist() == [0, 1]
    assert math.isclose(selecting.rate(*selecting.score(made[0]))[0], 0.5 / math.log(2))


def test_what_a_template_adds_behind_a_text_is_not_of_its_score(tmp_path: Path) -> None:
    made = tokenizer("byte-level")
    tokenised = tokenise(made, ["The quick fox", "dog"])
    capture(gpt(made.size), tokenised, tmp_path, vocab=made.size, top_k=0)
    found = Captured.open(tmp_path)
    for number, text in enumerate(("The quick fox", "dog")):
        said = found.document(number).true
        assert found.bytes[number] == len(text) and found.tokens[number] == len(said) - 1
        assert math.isclose(found.nll[number], -float(said[:-1].astype(np.float64).sum()), rel_tol=1e-6)


# Targets


@st.composite
def lessons(draw: st.DrawFn) -> tuple[Document, list[int], list[int], list[int], list[int]]:
    """What a source says over a document of m tokens, and a target's tokens with their places in it."""
    m, k, n, vocab = draw(st.integers(2, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 6)), 8
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    dense = random.dirichlet(np.full(vocab, 0.5), m - 1).clip(1e-9)
    dense /= dense.sum(1, keepdims=True)
    ids = np.argsort(-dense, axis=1)[:, :k]
    following = random.integers(0, vocab, m - 1)
    document = Document(
        ids,
        np.log(np.take_along_axis(dense, ids, 1)).astype(np.float32),
        np.log(dense[np.arange(m - 1), following]).astype(np.float32),
    )
    starts, stops = [-1] * n, [-1] * n
    for t in range(n - 1):
        if draw(st.booleans()):
            starts[t] = draw(st.integers(0, m - 2))
            if draw(st.booleans()):
                stops[t] = draw(st.integers(starts[t] + 1, m - 1))
    projection = draw(st.lists(st.integers(-1, 6), min_size=vocab, max_size=vocab))
    return document, starts, stops, draw(st.lists(st.integers(0, 6), min_size=n, max_size=n)), projection


def slowly(
    document: Document, start: int, stop: int, true: int, projection: list[int], correct: bool
) -> dict[int, float]:
    """The distribution over the target's ids at one position, by the rule."""
    said: dict[int, float] = defaultdict(float)
    for one, log_prob in zip(document.ids[start].tolist(), document.log_probs[start].tolist(), strict=True):
        if projection[one] >= 0:
            said[projection[one]] += math.exp(log_prob)
    if correct and stop >= 0:
        exact = math.exp(sum(float(one) for one in document.true[start:stop]))
        others = sum(p for one, p in said.items() if one != true)
        scale = min(1.0, (1 - exact) / others) if others else 1.0
        said = {one: p * scale for one, p in said.items()} | {true: exact}
    return dict(said)


def at(made: Targets, row: int) -> dict[int, float]:
    """What is taught at one position."""
    kept = made.kept[row]
    ids = made.ids[row][kept].tolist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, made.probs[row][kept].tolist(), strict=True))


@settings(max_examples=300, deadline=None)
@given(lessons(), st.booleans(), st.sampled_from(["gold", "skip"]))
def test_targets_are_those_of_the_rule_and_sum_to_one(lesson: Any, correct: bool, unmatched: Any) -> None:
    document, starts, stops, ids, projection = lesson
    given = [np.array(one, dtype=np.int32) for one in (starts, stops, ids, projection)]
    made = targets(document, *given, unmatched=unmatched, chunk_correction=correct)
    assert made.ids[:, 0].tolist() == ids[1:]
    for row in range(len(ids) - 1):
        if starts[row] < 0:
            assert made.valid[row] == (unmatched == "gold")
            assert at(made, row) == ({ids[row + 1]: 1.0} if unmatched == "gold" else {})
            continue
        expected = slowly(document, starts[row], stops[row], ids[row + 1], projection, correct)
        found = at(made, row)
        assert found.keys() == expected.keys() and made.valid[row]
        assert all(math.isclose(found[one], p, rel_tol=1e-5, abs_tol=1e-7) for one, p in expected.items())
        assert math.isclose(sum(found.values()) + made.tail[row], 1, abs_tol=1e-6)


@settings(max_examples=200, deadline=None)
@given(lessons(), st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any), st.data())
def test_a_mixture_is_the_weighted_mean_of_what_each_source_teaches(lesson: Any, shares: list[int], data: Any) -> None:
    _, _, _, ids, _ = lesson
    made = []
    for _ in range(3):
        document, starts, stops, _, projection = data.draw(lessons())
        n = len(ids)
        starts, stops = (np.array([*(one + [-1] * n)[: n - 1], -1], dtype=np.int32) for one in (starts, stops))
        made.append(targets(document, starts, stops, np.array(ids, dtype=np.int32),
                            np.array(projection, dtype=np.int32), unmatched="skip"))  # fmt: skip
    weights = np.array(shares) / sum(shares)
    found = mix(made, weights)
    for row in range(len(ids) - 1):
        teaching_here = [(one, w) for one, w in zip(made, weights, strict=True) if one.valid[row] and w]
        assert found.valid[row] == bool(teaching_here) and found.ids[row, 0] == ids[row + 1]
        if not teaching_here:
            continue
        total = sum(w for _, w in teaching_here)
        expected: dict[int, float] = defaultdict(float)
        for one, w in teaching_here:
            for key, p in at(one, row).items():
                expected[key] += w / total * p
        got = at(found, row)
        assert got.keys() == expected.keys()
        assert all(math.isclose(got[key], p, rel_tol=1e-5, abs_tol=1e-7) for key, p in expected.items())
        assert math.isclose(sum(got.values()) + found.tail[row], 1, abs_tol=1e-5)


def test_joined_targets_are_those_of_the_parts() -> None:
    random = np.random.default_rng(0)
    made = [
        Targets(random.integers(0, 9, (n, k)), random.random((n, k), dtype=np.float32), random.random((n, k)) < 0.5,
                random.random(n, dtype=np.float32), random.random(n) < 0.5)
        for n, k in ((3, 2), (0, 4), (2, 5))
    ]  # fmt: skip
    whole = join(made)
    assert whole.ids.shape == (5, 5) and not whole.kept[:3, 2:].any()
    assert np.array_equal(whole.probs[:3, :2], made[0].probs) and np.array_equal(whole.ids[3:], made[2].ids)
    assert np.array_equal(whole.tail, np.concatenate([one.tail for one in made]))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("byte-level", "metaspace"), ("wordpiece", "unigram"), ("unigram", "byte-level")]
)
def test_masses_between_real_tokenizers_sum_to_one(tmp_path: Path, dtype: Any, ours: str, theirs: str) -> None:
    source, target = tokenizer(ours), tokenizer(theirs)
    read, wanted = tokenise(source, TEXTS), tokenise(target, TEXTS)
    capture(gpt(source.size), read, tmp_path, vocab=source.size, top_k=10, dtype=dtype)
    said, pairs, projection = Captured.open(tmp_path), align(read, wanted), vocabulary_map(source, target)
    within = 1e-4 if dtype == "float32" else 1e-3
    matched = 0
    for number in range(len(TEXTS)):
        here = slice(wanted.offsets[number], wanted.offsets[number + 1])
        made = targets(said.document(number), pairs.starts[here], pairs.stops[here], wanted.ids[here], projection)
        sums = np.where(made.kept, made.probs, 0).sum(1, dtype=np.float64) + made.tail
        assert np.abs(sums - 1).max() < within
        assert made.probs.min() >= 0 and made.tail.min() >= 0 and made.probs.max() <= 1 + 1e-6
        matched += int((pairs.starts[here] >= 0).sum())
    assert matched


# Losses


def student_of(model: Model, ids: np.ndarray[Any, Any], taught: Targets) -> torch.Tensor:
    """The log-probabilities of the taught ids, with gradients."""
    logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].float()
    picked: torch.Tensor = logits.log_softmax(1).gather(1, torch.from_numpy(taught.ids))
    return picked


@pytest.mark.parametrize(("dtype", "within", "still"), [("float32", 1e-5, 1e-6), ("float16", 1e-3, 1e-3)])
def test_with_equal_tokenizers_and_all_ids_the_loss_is_the_dense_one_and_a_student_like_its_teacher_rests(
    tmp_path: Path, dtype: Any, within: float, still: float
) -> None:
    made = tokenizer("byte-level")
    tokenised = tokenise(made, TEXTS)
    teacher, student = gpt(made.size, 0), gpt(made.size, 1)
    capture(teacher, tokenised, tmp_path, vocab=made.size, top_k=made.size, dtype=dtype)
    said, pairs, projection = Captured.open(tmp_path), align(tokenised, tokenised), vocabulary_map(made, made)
    same = gpt(made.size, 0).requires_grad_(True)
    for number in range(len(TEXTS)):
        ids, _ = tokenised.document(number)
        here = slice(tokenised.offsets[number], tokenised.offsets[number + 1])
        taught = targets(said.document(number), pairs.starts[here], pairs.stops[here], ids, projection)
        assert taught.valid.all() and not taught.tail.any()
        found = fuse_loss(student_of(student, ids, taught), taught.tensors())
        whole = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.no_grad():
            p = teacher(whole).logits[0, :-1].double().log_softmax(1)
            q = student(whole).logits[0, :-1].double().log_softmax(1)
        dense = -(p.exp() * q).sum(1)
        assert (found - dense).abs().max() <= within * dense.abs().max()
        fuse_loss(student_of(same, ids, taught), taught.tensors()).mean().backward()
    logits = same.lm_head.weight.grad
    assert logits is not None
    norms = [float(one.grad.abs().max()) for one in same.parameters() if one.grad is not None]
    # Of single-precision products of weights around 1: measured by the gradient of a student that is another.
    other = gpt(made.size, 1).requires_grad_(True)
    fuse_loss(student_of(other, ids, taught), taught.tensors()).mean().backward()
    scale = max(float(one.grad.abs().max()) for one in other.parameters() if one.grad is not None)
    assert max(norms) < still * max(scale, 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.5, 3))
def test_the_tails_gradient_is_that_of_one_class_more(seed: int, k: int, temperature: float) -> None:
    random = np.random.default_rng(seed)
    n, vocab = 5, 9
    logits = torch.tensor(random.normal(0, 2, (n, vocab)), requires_grad=True)
    ids = np.stack([random.permutation(vocab)[:k] for _ in range(n)])
    whole = random.dirichlet(np.ones(k + 1), n)
    kept = random.random((n, k)) < 0.8
    probs, tail = np.where(kept, whole[:, :k], 0.7), whole[:, k] + np.where(kept, 0, whole[:, :k]).sum(1)
    valid = random.random(n) < 0.8
    taught = {name: torch.from_numpy(one) for name, one in
              {"ids": ids, "probs": probs, "kept": kept, "tail": tail, "valid": valid}.items()}  # fmt: skip
    picked = logits.log_softmax(1).gather(1, taught["ids"])
    found = fuse_loss(picked, taught, teacher_temperature=temperature)
    (gradient,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)

    expected, losses = torch.zeros(n, vocab, dtype=torch.float64), []
    for row in range(n):
        own = [int(one) for one, is_kept in zip(ids[row], kept[row], strict=True) if is_kept]
        p = np.array([[*probs[row][kept[row]].tolist(), tail[row]]]).ravel() ** (1 / temperature)
        p /= p.sum()
        z = logits.detach()[row].clone().requires_grad_(True)
        others = [one for one in range(vocab) if one not in own]
        classes = torch.stack([*(z[one] for one in own), z[others].logsumexp(0)])
        loss = -(torch.from_numpy(p) * classes.log_softmax(0)).sum()
        if valid[row]:
            expected[row] = torch.autograd.grad(loss, z)[0]
        losses.append(float(loss.detach()) if valid[row] else 0.0)
    assert np.allclose(found.detach(), losses, atol=1e-9) and torch.allclose(gradient, expected, atol=1e-9)
    divergence = fuse_loss(picked, taught, kind="kl", teacher_temperature=temperature)
    assert (divergence > -1e-9).all()
    (same,) = torch.autograd.grad(divergence.sum(), logits, retain_graph=True)
    assert torch.allclose(same, gradient)
    # Renormalised, what is kept is the whole, and the student's other ids get nothing.
    cut = fuse_loss(picked, taught, tail="renormalise", teacher_temperature=temperature)
    for row in np.flatnonzero(valid & kept.any(1)):
        p = probs[row][kept[row]] ** (1 / temperature)
        assert math.isclose(
            float(cut[row].detach()),
            -float((p / p.sum() * picked[row].detach().numpy()[kept[row]]).sum()),
            rel_tol=1e-9,
        )


def test_a_loss_where_the_student_leaves_nothing_for_the_tail_is_finite() -> None:
    taught = {"ids": torch.tensor([[0]]), "probs": torch.tensor([[0.5]]), "kept": torch.tensor([[True]]),
              "tail": torch.tensor([0.5]), "valid": torch.tensor([True])}  # fmt: skip
    student = torch.zeros(1, 1, requires_grad=True)
    loss = fuse_loss(student, taught)
    loss.sum().backward()
    assert (
        math.isclose(float(loss.detach()), -0.5 * math.log(1e-6), rel_tol=1e-6) and torch.isfinite(student.grad).all()
    )


# Stretches


def test_stretches_cost_what_the_paper_says_and_nothing_moves_where_both_say_the_same() -> None:
    index = torch.tensor([-1, 0, 0, 1, 2, -1])
    student = torch.tensor([-9.0, -0.5, -1.5, -0.25, -3.0, -9.0], dtype=torch.float64, requires_grad=True)
    said = torch.tensor([-1.0, -0.5, -2.0], dtype=torch.float64)
    loss = alm_loss(student, index, said, tau=10)
    for number, own in enumerate((-2.0, -0.25, -3.0)):
        a, b = math.exp(said[number].item()) ** 0.1, math.exp(own) ** 0.1
        assert math.isclose(
            float(loss[number].detach()), -10 * (a * math.log(b) + (1 - a) * math.log(1 - b)), rel_tol=1e-9
        )
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient[0] == 0 == gradient[5] and gradient[1] == gradient[2] < 0 < gradient[3]
    equal = torch.tensor([-2.0, -0.25, -3.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(alm_loss(student, index, equal, tau=100).sum(), student)
    assert gradient.abs().max() < 1e-9


def test_a_source_says_of_a_stretch_what_it_says_of_its_tokens() -> None:
    source, target = np.array([0, 2, 3, 6, 6], dtype=np.int32), np.array([0, 1, 3, 4, 6], dtype=np.int32)
    found = chunks(np.array([-1.0, -2.0, -4.0, -8.0], dtype=np.float32), source, target)
    assert found.index.tolist() == [0, 0, 1, 1] and found.said.tolist() == [-3.0, -4.0]
    joined = join_chunks([found, Chunks(np.array([-1, 0]), np.array([-5.0], dtype=np.float32)), found])
    assert joined.index.tolist() == [0, 0, 1, 1, -1, 2, 3, 3, 4, 4] and joined.said.tolist() == [-3, -4, -5, -3, -4]


def test_a_student_like_its_teacher_rests_over_stretches_of_real_tokens(tmp_path: Path) -> None:
    made = tokenizer("metaspace")
    tokenised = tokenise(made, TEXTS)
    teacher = gpt(made.size)
    capture(teacher, tokenised, tmp_path, vocab=made.size, top_k=0)
    said = Captured.open(tmp_path)
    for number in range(len(TEXTS)):
        ids, ends = tokenised.document(number)
        found = chunks(said.document(number).true, ends, ends)
        whole = torch.from_numpy(ids.astype(np.int64))
        logits = teacher(whole[None]).logits[0, :-1].detach().requires_grad_(True)
        own = logits.log_softmax(1).gather(1, whole[1:, None])[:, 0]
        loss = alm_loss(own, torch.from_numpy(found.index), torch.from_numpy(found.said))
        (gradient,) = torch.autograd.grad(loss.mean(), logits)
        assert gradient.abs().max() < 1e-4
