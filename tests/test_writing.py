"""A staging folder: whatever is filled in whatever order becomes the same folder, once, or none at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeflow.digests import PIECE, piece_digest, tensor_digest
from mergeflow.dtypes import BY_NAME, DType
from mergeflow.errors import ClaimedError, InputError, Interrupted, MachineError, MergeflowError, RecipeError
from mergeflow.graph import Row, Shard
from mergeflow.writing import MANIFEST, Finished, Staging, finished_digest, free_bytes, repair
from mergeflow.writing import staging as module
from mergeflow.writing.claim import Holder
from mergeflow.writing.shards import piece_digests

ROOT = Path(__file__).parent.parent
SMALL = 4096  # bytes of an extent in most tests: the smallest that can be written directly
PLAN = {"recipe": "r1", "inputs": "i1", "rows": "w1"}


def row_of(name: str, dtype: DType, shape: tuple[int, ...], shard: int, offset: int, output: str = "") -> Row:
    expression: Any = None  # what makes a row is no concern of writing
    return Row(output, "node", name, expression, dtype, shape, shard, offset, dtype)


def layout(
    files: dict[str, list[tuple[str, tuple[int, ...]]]], outputs: dict[str, str] | None = None
) -> tuple[list[Shard], list[Row]]:
    """Shards and rows for files of (dtype, shape), as planning lays them out."""
    shards: list[Shard] = []
    rows: list[Row] = []
    for file, tensors in files.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for dtype, shape in tensors:
            row = row_of(f"t{len(rows) + len(header)}", BY_NAME[dtype], shape, len(shards), end)
            header[row.name] = {
                "dtype": BY_NAME[dtype].stored,
                "shape": list(shape),
                "data_offsets": [end, end + row.nbytes],
            }
            end += row.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % 64)
        whole = len(text).to_bytes(8, "little") + text
        output = (outputs or {}).get(file, "")
        for name, entry in header.items():
            if name != "__metadata__":
                dtype = next(d for d in BY_NAME.values() if d.stored == entry["dtype"])
                start = len(whole) + entry["data_offsets"][0]
                rows.append(row_of(name, dtype, tuple(entry["shape"]), len(shards), start, output))
        shards.append(Shard(output, file, whole, len(whole) + end))
    return shards, rows


def content(row: int, size: int) -> bytes:
    return random.Random(row).randbytes(size)


def digest_of(row: Row, data: bytes) -> str:
    pieces = [piece_digest(data[i : i + PIECE]) for i in range(0, len(data), PIECE)]
    return tensor_digest(pieces, row.dtype.name, row.shape)


def fill(staging: Staging, rows: Sequence[Row], index: int, cuts: Sequence[int] = ()) -> None:
    """Fill one row, cut at `cuts`, in the order given by shuffling with the row's own seed."""
    data = content(index, rows[index].nbytes)
    edges = sorted({0, len(data), *(cut for cut in cuts if 0 < cut < len(data))})
    ranges = list(itertools.pairwise(edges))
    random.Random(index).shuffle(ranges)
    for start, stop in ranges:
        done = start
        for piece in staging.memory(index, start, stop):
            piece[:] = data[done : done + len(piece)]
            done += len(piece)
        assert done == stop
        staging.filled(index, start, stop)
    staging.row_done(index, digest_of(rows[index], data), {"a": f"in{index}"})


def fill_all(staging: Staging, rows: Sequence[Row]) -> None:
    for index in range(len(rows)):
        if index not in staging.finished:
            fill(staging, rows, index)


def expected(shards: Sequence[Shard], rows: Sequence[Row]) -> list[bytes]:
    files = [bytearray(shard.header.ljust(shard.size, b"?")) for shard in shards]
    for index, row in enumerate(rows):
        files[row.shard][row.offset : row.offset + row.nbytes] = content(index, row.nbytes)
    return [bytes(file) for file in files]


def written(target: Path, shards: Sequence[Shard]) -> list[bytes]:
    return [(target / shard.output / shard.file).read_bytes() for shard in shards]


def opened(target: Path, shards: Sequence[Shard], rows: Sequence[Row], **options: Any) -> Staging:
    options = {"digest": "plan-1", "parts": PLAN, "extent_bytes": SMALL} | options
    return Staging.open(target, shards=shards, rows=rows, **options)


def staging_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.staging")


def make_output(target: Path, digest: str = "plan-0", text: str = "old") -> None:
    target.mkdir()
    (target / MANIFEST).write_text(json.dumps({"plan": digest}))
    (target / "old.txt").write_text(text)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def three() -> tuple[list[Shard], list[Row]]:
    return layout(
        {
            "model-1.safetensors": [("float32", (50, 60)), ("bfloat16", (3,)), ("uint8", (5001,))],
            "model-2.safetensors": [("float16", (64, 64)), ("bool", ()), ("float32", (0, 7))],
        }
    )


# The folder that comes out.


def test_the_folder_is_byte_exact_and_safetensors_reads_it(target: Path, three: tuple[list[Shard], list[Row]]) -> None:
    from safetensors import safe_open

    shards, rows = three
    with opened(target, shards, rows) as staging:
        fill_all(staging, rows)
        done = staging.finish()
        assert {row: what.digest for row, what in done.items()} == {
            i: digest_of(row, content(i, row.nbytes)) for i, row in enumerate(rows)
        }
        assert done[0] == Finished(done[0].digest, {"a": "in0"})
        assert not target.exists()
        staging.publish()
    assert written(target, shards) == expected(shards, rows)
    assert sorted(p.name for p in target.parent.iterdir()) == ["out"]
    assert sorted(p.name for p in target.iterdir()) == ["model-1.safetensors", "model-2.safetensors"]
    with safe_open(target / "model-2.safetensors", "np") as file:
        assert file.get_tensor(rows[3].name).tobytes() == content(3, rows[3].nbytes)


tensors = st.lists(
    st.tuples(
        st.sampled_from(["float32", "bfloat16", "uint8", "float64"]),
        st.lists(st.integers(0, 40), max_size=2).map(tuple),
    ),
    max_size=7,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(tensors, min_size=1, max_size=3),
    threads=st.integers(1, 4),
    extent=st.sampled_from([64, 200, 4096]),
    pool=st.sampled_from([0, 4096 * 40]),
    writers=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_any_order_of_rows_and_ranges_from_any_number_of_threads_gives_the_same_bytes(
    tmp_path: Path, files: list[Any], threads: int, extent: int, pool: int, writers: int, seed: int
) -> None:
    target = tmp_path / f"out{time.monotonic_ns()}"
    shards, rows = layout({f"m{i}.safetensors": file for i, file in enumerate(files)})
    chance = random.Random(seed)
    order = list(range(len(rows)))
    chance.shuffle(order)
    cuts = [[chance.randrange(1, 2000) for _ in range(chance.randrange(5))] for _ in rows]
    with opened(target, shards, rows, extent_bytes=extent, pool_bytes=pool, writers=writers) as staging:
        in_threads([lambda k=k: [fill(staging, rows, i, cuts[i]) for i in order[k::threads]] for k in range(threads)])
        staging.publish()
    assert written(target, shards) == expected(shards, rows)


def in_threads(bodies: Sequence[Callable[[], Any]]) -> None:
    """Run bodies at once; the first error of any is raised here, and none may hang."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], Any]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a caller hangs"
    if errors:
        raise errors[0]


def test_extents_with_holes_are_written_and_read_back_when_the_pool_is_empty(target: Path) -> None:
    shards, rows = layout({"m.safetensors": [("uint8", (SMALL,))] * 100})
    with opened(target, shards, rows, pool_bytes=0) as staging:
        for half in (0, 1):  # leaves a hole in a hundred extents, with buffers for eight
            for index in range(100):
                start, stop = half * SMALL // 2, (half + 1) * SMALL // 2
                data = content(index, SMALL)[start:stop]
                done = 0
                for piece in staging.memory(index, start, stop):
                    piece[:] = data[done : done + len(piece)]
                    done += len(piece)
                staging.filled(index, start, stop)
                assert staging._made <= 9
        for index, row in enumerate(rows):
            staging.row_done(index, digest_of(row, content(index, SMALL)), {})
        staging.publish()
    assert written(target, shards) == expected(shards, rows)


def test_buffers_that_are_all_being_filled_give_an_extra_one_and_no_deadlock(target: Path) -> None:
    shards, rows = layout({"m.safetensors": [("uint8", (SMALL * 40,))]})
    with opened(target, shards, rows, pool_bytes=0) as staging:
        data = content(0, SMALL * 40)
        pieces = staging.memory(0, 0, SMALL * 40)
        done = 0
        for piece in pieces:
            piece[:] = data[done : done + len(piece)]
            done += len(piece)
        staging.filled(0, 0, SMALL * 40)
        staging.row_done(0, "d", {})
        staging.publish()
    assert written(target, shards) == expected(shards, rows)


def test_a_shard_without_rows_and_a_header_larger_than_extents_are_written(target: Path) -> None:
    shards, rows = layout({"empty.safetensors": [], "many.safetensors": [("uint8", (1,))] * 300})
    with opened(target, shards, rows, extent_bytes=4096) as staging:
        fill_all(staging, rows)
        staging.publish()
    assert len(shards[1].header) > 4 * 4096
    assert written(target, shards) == expected(shards, rows)


def test_outputs_lie_in_subfolders_beside_side_files(target: Path, tmp_path: Path) -> None:
    shards, rows = layout(
        {"a.safetensors": [("uint8", (10,))], "b.safetensors": [("uint8", (9000,))]}, {"b.safetensors": "second"}
    )
    source = tmp_path / "tokenizer.json"
    source.write_bytes(b"t" * 9_000_000)
    source.chmod(0o600)
    with opened(target, shards, rows) as staging:
        staging.add("second/config.json", b"{}")
        staging.add("deep/er/x.txt", b"x")
        staging.add("deep/er/x.txt", b"y")
        staging.copy("tokenizer.json", source)
        fill_all(staging, rows)
        staging.publish()
    assert written(target, shards) == expected(shards, rows)
    assert (target / "deep/er/x.txt").read_bytes() == b"y"
    assert (target / "tokenizer.json").read_bytes() == source.read_bytes()
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()) == [
        "a.safetensors",
        "deep/er/x.txt",
        "second/b.safetensors",
        "second/config.json",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o000])
def test_modes_follow_the_umask(target: Path, three: tuple[list[Shard], list[Row]], tmp_path: Path, umask: int) -> None:
    shards, rows = three
    before = os.umask(umask)
    try:
        with opened(target, shards, rows) as staging:
            staging.add("a/config.json", b"{}")
            fill_all(staging, rows)
            staging.publish()
    finally:
        os.umask(before)
    for path in [target, *target.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.parametrize("file", ["../x", "/etc/x", "a/../../x", "", ".", "a//b", "a/", "a\0b"])
def test_a_side_file_cannot_leave_the_folder(target: Path, three: tuple[list[Shard], list[Row]], file: str) -> None:
    with opened(target, *three) as staging, pytest.raises(RecipeError, match="not a path inside"):
        staging.add(file, b"")


def test_a_side_file_cannot_replace_a_shard(target: Path, three: tuple[list[Shard], list[Row]]) -> None:
    with opened(target, *three) as staging, pytest.raises(RecipeError, match="weights file"):
        staging.add("model-1.safetensors", b"")


def test_a_side_file_that_cannot_be_copied_is_an_input_error_that_names_it(
    target: Path, three: tuple[list[Shard], list[Row]], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with opened(target, *three) as staging:
        for name in ("missing.json", "pipe", "."):
            with pytest.raises(InputError, match=str(tmp_path / name) if name != "." else "is not a file"):
                staging.copy("x", tmp_path / name)


def test_rows_that_were_never_done_are_named(target: Path, three: tuple[list[Shard], list[Row]]) -> None:
    shards, rows = three
    with opened(target, shards, rows) as staging:
        fill(staging, rows, 1)
        with pytest.raises(MergeflowError, match=f"5 rows were never finished: {rows[0].name}, "):
            staging.publish()
    assert not target.exists()


def test_mistakes_of_a_caller_are_errors(target: Path, three: tuple[list[Shard], list[Row]]) -> None:
    shards, rows = three
    with opened(target, shards, rows) as staging:
        with pytest.raises(MergeflowError, match="not in this row"):
            staging.memory(0, 0, rows[0].nbytes + 1)
        with pytest.raises(MergeflowError, match="called done"):
            staging.row_done(0, "d", {})
        fill(staging, rows, 1)
        with pytest.raises(MergeflowError, match="twice"):
            staging.filled(1, 0, 1)
    with pytest.raises(MergeflowError, match="closed"):
        staging.memory(0, 0, 1)
    shards[0] = Shard("", shards[0].file, shards[0].header, shards[0].size + 1)
    with pytest.raises(MergeflowError, match="has rows up to byte"):
        opened(target, shards, rows, fresh=True)


# Targets.


def test_a_target_that_exists_is_refused_and_never_touched(target: Path, three: tuple[list[Shard], list[Row]]) -> None:
    make_output(target)
    with pytest.raises(RecipeError, match=r"exists.*--force"):
        opened(target, *three)
    assert (target / "old.txt").read_text() == "old"
    assert sorted(p.name for p in target.parent.iterdir()) == ["out"]


def test_a_file_or_link_or_what_is_below_a_file_is_no_target(
    tmp_path: Path, three: tuple[list[Shard], list[Row]]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name, words in {"file": "is a file", "link": "symbolic link", "file/out": "below a file"}.items():
        with pytest.raises(RecipeError, match=words) as caught:
            opened(tmp_path / name, *three, force=True)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(RecipeError, match="cannot be an output"):
        opened(Path("/"), *three)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_missing_parents_are_made(tmp_path: Path, three: tuple[list[Shard], list[Row]]) -> None:
    shards, rows = three
    with opened(tmp_path / "a/b/out", shards, rows) as staging:
        fill_all(staging, rows)
        staging.publish()
    assert written(tmp_path / "a/b/out", shards) == expected(shards, rows)


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_an_output_and_leaves_nothing_of_it(
    target: Path, three: tuple[list[Shard], list[Row]], monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    shards, rows = three
    make_output(target)
    if not exchange:
        monkeypatch.setattr("mergeflow.writing.staging.rename", refused_rename)
    with opened(target, shards, rows, force=True) as staging:
        fill_all(staging, rows)
        assert (target / "old.txt").exists()
        staging.publish()
    assert written(target, shards) == expected(shards, rows)
    assert not (target / "old.txt").exists()
    assert sorted(p.name for p in target.parent.iterdir()) == ["out"]


def refused_rename(old: Path, new: Path, flags: int) -> None:
    raise OSError(errno.EINVAL, "refused")


def test_force_does_not_delete_a_folder_that_mergeflow_did_not_make(
    target: Path, three: tuple[list[Shard], list[Row]]
) -> None:
    target.mkdir()
    (target / "thesis.tex").write_text("x")
    with pytest.raises(RecipeError, match="not made by mergeflow"):
        opened(target, *three, force=True)
    assert (target / "thesis.tex").exists()


def test_a_target_that_appears_meanwhile_is_kept_and_the_work_too(
    target: Path, three: tuple[list[Shard], list[Row]]
) -> None:
    shards, rows = three
    with pytest.raises(RecipeError, match="appeared"), opened(target, shards, rows) as staging:
        fill_all(staging, rows)
        make_output(target)
        staging.publish()
    assert (target / "old.txt").exists()
    with opened(target, shards, rows, force=True) as staging:
        assert len(staging.finished) == len(rows)
        staging.publish()
    assert written(target, shards) == expected(shards, rows)


def test_a_kill_between_the_two_renames_of_a_replacement_is_repaired(
    target: Path, three: tuple[list[Shard], list[Row]]
) -> None:
    shards, rows = three
    make_output(target)
    target.rename(target.with_name(".out.old"))
    repair(target)
    assert (target / "old.txt").exists()
    make_output(target.with_name(".out.old"))
    repair(target)
    assert sorted(p.name for p in target.parent.iterdir()) == ["out"]
    target.rename(target.with_name(".out.old"))
    with pytest.raises(RecipeError, match="exists"):
        opened(target, shards, rows)
    assert (target / "old.txt").exists()


def test_repair_removes_what_a_kill_after_the_rename_left_but_no_unfinished_run(
    target: Path, three: tuple[list[Shard], list[Row]]
) -> None:
    shards, rows = three
    with opened(target, shards, rows) as staging:
        fill(staging, rows, 0)
    make_output(target, "plan-0")
    repair(target)
    assert (staging_of(target) / "journal.jsonl").exists()
    (target / MANIFEST).write_text(json.dumps({"plan": "plan-1"}))
    repair(target)
    assert sorted(p.name for p in target.parent.iterdir()) == ["out"]


def test_the_finished_digest_is_the_manifests_or_none(tmp_path: Path) -> None:
    assert finished_digest(tmp_path / "none") is None
    make_output(tmp_path / "a", "d1")
    assert finished_digest(tmp_path / "a") == "d1"
    for text in ("", "[]", '{"plan": 3}', "[" * 100_000):
        (tmp_path / "a" / MANIFEST).write_text(text)
        assert finished_digest(tmp_path / "a") is None


def test_the_finished_digest_of_several_outputs_is_that_of_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / MANIFEST).write_text('{"plan": "d1"}')
    assert finished_digest(tmp_path / "out") == "d1"
    (tmp_path / "out/b" / MANIFEST).write_text('{"plan": "d2"}')
    assert finished_digest(tmp_path / "out") is None, "two outputs of a person, not one of ours"
    (tmp_path / "out/b" / MANIFEST).write_text('{"plan": "d1"}')
    (tmp_path / "out/thesis.tex").touch()
    assert finished_digest(tmp_path / "out") is None


# Going on after a run that did not end.


def test_a_failed_run_leaves_no_folder_and_the_next_one_goes_on(
    target: Path, three: tuple[list[Shard], list[Row]]
) -> None:
    shards, rows = three
    with pytest.raises(ValueError), opened(target, shards, rows) as staging:
        fill(staging, rows, 0)
        fill(staging, rows, 4)
        fill(staging, rows, 5)
        raise ValueError
    assert not target.exists()
    assert not list(staging_of(target).rglob("*.safetensors"))
    assert not list(staging_of(target).glob("claim.*"))
    with opened(target, shards, rows) as staging:
        assert dict(staging.finished) == {
            i: Finished(digest_of(rows[i], content(i, rows[i].nbytes)), {"a": f"in{i}"}) for i in (0, 4, 5)
        }
        with pytest.raises(MergeflowError, match="earlier run"):
            staging.memory(0, 0, 1)
        fill_all(staging, rows)
        assert list(staging.finish()) == list(range(len(rows)))
        staging.publish()
    assert written(target, shards) == expected(shards, rows)


def test_a_torn_or_changed_line_of_the_journal_is_not_believed(
    target: Path, three: tuple[list[Shard], list[Row]]
) -> None:
    shards, rows = three
    with opened(target, shards, rows) as staging:
        for index in (0, 1, 2):
            fill(staging, rows, index)
    journal = staging_of(target) / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    journal.write_bytes(b"".join([lines[0], lines[1].replace(b'"a"', b'"b"'), lines[2], lines[3][:-20]]))
    with opened(target, shards, rows) as staging:
        assert list(staging.finished) == [json.loads(lines[2])["row"]]
        fill_all(staging, rows)
        staging.publish()
    assert written(target, shards) == expected(shards, rows)


@pytest.mark.parametrize("place", ["row", "header"])
def test_a_flipped_byte_is_found_and_made_again(target: Path, three: tuple[list[Shard], list[Row]], place: str) -> None:
    shards, rows = three
    with opened(target, shards, rows) as staging:
        fill_all(staging, rows)
        staging.finish()
    part = staging_of(target) / "out" / "model-1.safetensors.part"
    with part.open("r+b") as file:
        at = rows[0].offset + 7 if place == "row" else 9
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    with opened(target, shards, rows) as staging:
        assert len(staging.finished) == len(rows) - (place == "row")
        fill_all(staging, rows)
        staging.publish()
    assert written(target, shards) == expected(shards, rows)


def test_files_that_are_cut_short_missing_or_strange_are_made_again(
    target: Path, three: tuple[list[Shard], list[Row]]
) -> None:
    shards, rows = three
    with opened(target, shards, rows) as staging:
        fill_all(staging, rows)
        staging.add("old/README.md", b"of the run before")
        staging.finish()
    folder = staging_of(target) / "out"
    os.truncate(folder / "model-1.safetensors.part", 100)
    (folder / "model-2.safetensors.part").unlink()
    (folder / "model-2.safetensors.part").symlink_to("/etc/passwd")
    with opened(target, shards, rows) as staging:
        assert {rows[i].nbytes for i in staging.finished} <= {0}
        fill_all(staging, rows)
        staging.publish()
    assert written(target, shards) == expected(shards, rows)
    assert len(list(target.rglob("*"))) == 2


def test_another_plan_is_refused_with_what_changed_and_fresh_forgets_the_old_one(
    target: Path, three: tuple[list[Shard], list[Row]]
) -> None:
    shards, rows = three
    with opened(target, shards, rows) as staging:
        fill(staging, rows, 0)
    other = {"digest": "plan-2", "parts": PLAN | {"inputs": "i2"}}
    with pytest.raises(RecipeError, match=r"inputs changed since.*--fresh"):
        opened(target, shards, rows, **other)
    with opened(target, shards, rows) as staging:
        assert list(staging.finished) == [0]
    with opened(target, shards, rows, fresh=True, **other) as staging:
        assert not staging.finished
    with opened(target, shards, rows, **other) as staging:
        staging.discard()
    assert not list(target.parent.iterdir())


SERVER = """
import os, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_writing import KILLED, fill, layout, opened
from mergeflow.writing import staging as module
module.SYNC_BYTES, module.SYNC_SECONDS = 20_000, 0.005
shards, rows = layout(KILLED)

def run(target, note, manifest):
    with opened(target, shards, rows, force=True, pool_bytes=0) as staging:
        note.write_text(str(len(staging.finished)))
        for index in range(len(rows)):
            if index not in staging.finished:
                fill(staging, rows, index, (100, 5000))
                time.sleep(0.0005)
        staging.add("mergeflow.json", manifest)
        staging.publish()
    note.write_text("done")

for line in sys.stdin:
    child = os.fork()
    if not child:
        target, note, manifest = line.split()
        run(Path(target), Path(note), manifest.encode())
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KILLED = {f"m{i}.safetensors": [("uint8", (n % 9000,)) for n in range(37 + i, 60_000, 1501)] for i in range(3)}


class Runs:
    """Runs in processes of their own, forked from one that has imported everything."""

    def __init__(self) -> None:
        code = SERVER.format(root=str(ROOT), tests=str(ROOT / "tests"))
        self.server = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, target: Path, note: Path, plan: str, kill_after: float | None = None) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        note.write_text("0")
        self.server.stdin.write(f'{target} {note} {{"plan":"{plan}"}}\n')
        self.server.stdin.flush()
        child = int(self.server.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(self.server.stdout.readline())

    def close(self) -> None:
        self.server.communicate()


@pytest.mark.parametrize("times", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path: Path, times: int) -> None:
    shards, rows = layout(KILLED)
    right = expected(shards, rows)
    chance = random.Random(times)
    target, note = tmp_path / "out", tmp_path / "note"
    runs = Runs()
    try:
        assert runs.run(target, note, "plan-0") == 0
        began = time.monotonic()
        assert runs.run(target, note, "plan-0") == 0
        whole = time.monotonic() - began
        outcomes = []
        for _ in range(times):
            # A manifest of this plan's digest now and then: then the replaced output is recognised as left over.
            plan = "plan-1" if chance.random() < 0.2 else "plan-0"
            status = runs.run(target, note, plan, kill_after=chance.uniform(0, whole))
            assert status in (0, -signal.SIGKILL)
            outcomes.append(note.read_text())
            repair(target)
            assert written(target, shards) == right, "what stands at the target is whole at every moment"
            assert {p.name for p in target.iterdir()} == {*KILLED, MANIFEST}
            (target / MANIFEST).write_text('{"plan":"plan-0"}')
        assert runs.run(target, note, "plan-0") == 0
    finally:
        runs.close()
    assert written(target, shards) == right
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note", "out"]
    assert outcomes.count("done") < times
    assert set(outcomes) - {"0", "done"}, "no run ever had something to take up"


# Claims.


def test_of_two_runs_one_is_told_who_holds_the_output(target: Path, three: tuple[list[Shard], list[Row]]) -> None:
    with opened(target, *three):
        with pytest.raises(ClaimedError, match=f"process {os.getpid()} on {socket.gethostname()}") as caught:
            opened(target, *three, fresh=True)
        assert caught.value.exit_code == 4
        repair(target)
        assert (staging_of(target) / "journal.jsonl").exists()
    opened(target, *three).discard()


def test_of_many_that_claim_at_once_exactly_one_wins(target: Path, three: tuple[list[Shard], list[Row]]) -> None:
    for attempt in range(15):
        if attempt % 2:  # over a claim whose process is gone
            staging_of(target).mkdir()
            leave_claim(target, pid=2**22 - 3)
        won: list[Staging] = []
        lost: list[ClaimedError] = []
        start = threading.Barrier(6)

        def claim() -> None:
            start.wait()  # noqa: B023
            try:
                won.append(opened(target, *three))  # noqa: B023
            except ClaimedError as error:
                lost.append(error)  # noqa: B023

        in_threads([claim] * 6)
        assert (len(won), len(lost)) == (1, 5)
        won[0].discard()


def leave_claim(target: Path, number: int = 3, age: float = 0, **fields: Any) -> Path:
    here = Holder.here()
    path = staging_of(target) / f"claim.{number}"
    path.write_text(json.dumps({"host": here.host, "world": here.world, "pid": here.pid, "start": here.start} | fields))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@pytest.mark.parametrize(
    ("fields", "age", "live"),
    [
        ({}, 1000, True),
        ({"pid": 2**22 - 3}, 0, False),
        ({"start": "1"}, 0, False),
        ({"host": "elsewhere", "pid": 1}, 5, True),
        ({"host": "elsewhere", "pid": 1}, 70, False),
        ({"world": "another container"}, 5, True),
        ({"world": "another container"}, 70, False),
    ],
)
def test_a_stale_claim_is_taken_over_and_a_live_one_is_not(
    target: Path, three: tuple[list[Shard], list[Row]], fields: dict[str, Any], age: float, live: bool
) -> None:
    staging_of(target).mkdir()
    path = leave_claim(target, age=age, **fields)
    if live:
        with pytest.raises(ClaimedError, match="last sign of life"):
            opened(target, *three)
    else:
        with opened(target, *three) as staging:
            assert not path.exists()
            staging.discard()


def test_a_claim_without_text_is_stale_after_a_moment(
    target: Path, three: tuple[list[Shard], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergeflow.writing.claim.UNREADABLE_SECONDS", 0.1)
    staging_of(target).mkdir()
    (staging_of(target) / "claim.7").touch()
    opened(target, *three).discard()


def test_a_run_whose_claim_was_taken_over_stops(
    target: Path, three: tuple[list[Shard], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergeflow.writing.claim.BEAT_SECONDS", 0.02)
    with opened(target, *three) as staging:
        next(staging_of(target).glob("claim.*")).unlink()
        with pytest.raises(ClaimedError, match="took this output over"):
            for _ in range(500):
                staging.memory(0, 0, 1)
                time.sleep(0.01)


def test_a_run_that_hashes_again_what_is_there_gives_signs_of_life(
    target: Path, three: tuple[list[Shard], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, rows = three
    with opened(target, shards, rows) as staging:
        fill_all(staging, rows)
    monkeypatch.setattr("mergeflow.writing.claim.BEAT_SECONDS", 0.02)
    beats: list[bool] = []

    def slow(reader: int, start: int, size: int) -> Iterator[bytes]:
        claim = next(staging_of(target).glob("claim.*"))
        os.utime(claim, (0, 0))
        end = time.monotonic() + 5
        while claim.stat().st_mtime < 1000 and time.monotonic() < end:
            time.sleep(0.01)
        beats.append(claim.stat().st_mtime > 1000)
        yield from piece_digests(reader, start, size)

    monkeypatch.setattr(module, "piece_digests", slow)
    monkeypatch.setattr("mergeflow.writing.staging.os.cpu_count", lambda: 1)
    with opened(target, shards, rows) as staging:
        assert len(staging.finished) == len(rows)
        staging.discard()
    assert beats == [True] * len(rows)


def test_a_run_that_hashes_again_what_is_there_can_be_stopped_and_loses_nothing(
    target: Path, three: tuple[list[Shard], list[Row]]
) -> None:
    shards, rows = three
    with opened(target, shards, rows) as staging:
        fill_all(staging, rows)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match="stopped"):
        opened(target, shards, rows, stop=stop)
    assert not list(staging_of(target).glob("claim.*"))
    stop.clear()
    with opened(target, shards, rows, stop=stop) as staging:
        assert len(staging.finished) == len(rows)
        staging.discard()


def test_a_run_whose_claim_was_taken_over_while_it_hashes_again_stops(
    target: Path, three: tuple[list[Shard], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, rows = three
    with opened(target, shards, rows) as staging:
        fill_all(staging, rows)
    monkeypatch.setattr("mergeflow.writing.claim.BEAT_SECONDS", 0.02)

    def slow(reader: int, start: int, size: int) -> Iterator[bytes]:
        for claim in staging_of(target).glob("claim.*"):
            claim.unlink()
        for _ in range(500):
            time.sleep(0.01)
            yield b""

    monkeypatch.setattr(module, "piece_digests", slow)
    with pytest.raises(ClaimedError, match="took this output over"):
        opened(target, shards, rows)


# Folders of our names that are not ours.


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("name", ["thesis.tex", "claim.txt", "claim.1.old", ".git"])
def test_a_folder_that_only_has_the_name_of_a_staging_folder_is_never_touched(
    target: Path, three: tuple[list[Shard], list[Row]], name: str
) -> None:
    folder = staging_of(target)
    (folder / name).mkdir(parents=True)
    for file in ("out", f"{name}/x", "journal.jsonl"):
        (folder / file).write_text("mine")
    before = tree(target.parent)
    for made in (False, True):
        if made:
            make_output(target)
            before = tree(target.parent)
        repair(target)
        for fresh in (False, True):
            with pytest.raises(RecipeError, match=rf"\.out\.staging: is in the way.*'{name}'.*Move it away"):
                opened(target, *three, fresh=fresh, force=made)
    assert tree(target.parent) == before


def test_an_unfinished_run_beside_a_stranger_is_kept_until_the_stranger_is_gone(
    target: Path, three: tuple[list[Shard], list[Row]]
) -> None:
    shards, rows = three
    with opened(target, shards, rows) as staging:
        fill_all(staging, rows)
        (staging_of(target) / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"notes\.txt"):
        opened(target, shards, rows)
    (staging_of(target) / "notes.txt").unlink()
    with opened(target, shards, rows) as staging:
        assert len(staging.finished) == len(rows)
        (staging_of(target) / "notes.txt").write_text("mine")
        staging.publish()
    assert tree(staging_of(target)) == {"notes.txt": b"mine"}


@pytest.fixture(params=["file", "folder", "link"])
def strange_aside(target: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Something of the name that a replaced output has for a moment."""
    aside = target.with_name(".out.old")
    if request.param == "file":
        aside.write_text("mine")
    elif request.param == "folder":
        aside.mkdir()
        (aside / "thesis.tex").write_text("mine")
    else:
        make_output(tmp_path / "elsewhere")
        aside.symlink_to(tmp_path / "elsewhere")
    return aside


def test_what_only_has_the_name_of_a_replaced_output_is_never_touched(
    target: Path, three: tuple[list[Shard], list[Row]], strange_aside: Path
) -> None:
    shards, rows = three
    before = tree(target.parent)
    repair(target)
    assert tree(target.parent) == before
    for force in (False, True):
        with opened(target, shards, rows, force=force) as staging:
            fill_all(staging, rows)
            staging.add(MANIFEST, b'{"plan": "plan-1"}')
            staging.publish()
        repair(target)
    (target / MANIFEST).unlink()
    assert written(target, shards) == expected(shards, rows)
    after = tree(target.parent)
    assert {name: after.get(name) for name in before} == before
    assert os.path.lexists(strange_aside)


def test_what_is_where_a_replaced_output_must_stand_is_named_and_no_work_is_lost(
    target: Path, three: tuple[list[Shard], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, rows = three
    aside = target.with_name(".out.old")
    aside.mkdir()
    (aside / "thesis.tex").write_text("mine")
    make_output(target)
    monkeypatch.setattr("mergeflow.writing.staging.rename", refused_rename)
    with (
        pytest.raises(RecipeError, match=r"\.out\.old: is in the way.*Move it away"),
        opened(target, shards, rows, force=True) as staging,
    ):
        fill_all(staging, rows)
        staging.publish()
    assert (aside / "thesis.tex").exists() and (target / "old.txt").exists()
    aside.rename(target.with_name("mine"))
    with opened(target, shards, rows, force=True) as staging:
        assert len(staging.finished) == len(rows)
        staging.publish()
    assert written(target, shards) == expected(shards, rows)
    assert sorted(p.name for p in target.parent.iterdir()) == ["mine", "out"]


def test_a_replaced_output_that_was_half_deleted_is_deleted_by_the_next_run(
    target: Path, three: tuple[list[Shard], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, rows = three
    make_output(target)

    def failing(path: Path) -> None:
        if (path / MANIFEST).exists():
            (path / MANIFEST).unlink()
            raise OSError(errno.EIO, "failing")

    with monkeypatch.context() as patched:
        patched.setattr("mergeflow.writing.staging.rename", refused_rename)
        patched.setattr("mergeflow.writing.target.remove", failing)
        with opened(target, shards, rows, force=True) as staging:
            fill_all(staging, rows)
            staging.publish()
    assert len(list(target.parent.rglob("old.txt"))) == 1
    repair(target)
    assert written(target, shards) == expected(shards, rows)
    assert sorted(p.name for p in target.parent.iterdir()) == ["out"]


# Disks that fail.


def test_too_many_open_files_are_an_error_of_the_machine_that_says_what_to_do(
    target: Path, three: tuple[list[Shard], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Any, number: int, view: memoryview) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr("mergeflow.writing.shards.ShardFile.write", refused)
        with pytest.raises(MachineError, match=r"Too many open files.*ulimit -n"), opened(target, *three) as staging:
            fill_all(staging, three[1])
            staging.publish()
    monkeypatch.setattr("mergeflow.writing.shards.ShardFile.reserve", lambda file: refused(file, 0, memoryview(b"")))
    with pytest.raises(MachineError, match=r"Too many open files.*ulimit -n"):
        opened(target, *three)


def test_a_write_that_fails_is_raised_in_every_caller_and_nothing_hangs(
    target: Path, three: tuple[list[Shard], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, rows = layout({"m.safetensors": [("uint8", (SMALL * 5,))] * 40})
    write, count = os.pwrite, iter(range(10**6))

    def failing(fd: int, data: Any, offset: int) -> int:
        if next(count) > 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with opened(target, shards, rows, pool_bytes=0) as staging:
        failed = []

        def body(k: int) -> None:
            try:
                for index in range(k, 40, 3):
                    fill(staging, rows, index)
                staging.finish()
            except MachineError as error:
                failed.append(error)

        in_threads([lambda k=k: body(k) for k in range(3)])
        assert len(failed) == 3
        assert all("m.safetensors.part: cannot be written (Input/output error)" in str(error) for error in failed)
        with pytest.raises(MachineError):
            staging.publish()
    assert not target.exists()
    monkeypatch.undo()
    with opened(target, shards, rows) as staging:
        fill_all(staging, rows)
        staging.publish()
    assert written(target, shards) == expected(shards, rows)


def test_a_short_write_goes_on_where_it_stopped(
    target: Path, three: tuple[list[Shard], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, rows = three
    write, chance = os.pwrite, random.Random(1)

    def short(fd: int, data: Any, offset: int) -> int:
        most = chance.choice([100, 4096, 5000, 8192, len(data)])
        try:
            return write(fd, data[:most], offset)
        except OSError:  # an unaligned direct write: do what a disk does that stops in between
            return min(most, write(fd, data, offset))

    monkeypatch.setattr(os, "pwrite", short)
    with opened(target, shards, rows, extent_bytes=16384) as staging:
        fill_all(staging, rows)
        staging.publish()
    assert written(target, shards) == expected(shards, rows)


@pytest.mark.parametrize("when", ["open", "write"])
def test_a_file_system_that_refuses_direct_writes_gets_others(
    target: Path, three: tuple[list[Shard], list[Row]], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    shards, rows = three
    real_open, write, direct = os.open, os.pwrite, set()

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT and when == "open":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd = real_open(path, flags, *rest, **more)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with opened(target, shards, rows) as staging:
        fill_all(staging, rows)
        staging.publish()
    assert written(target, shards) == expected(shards, rows)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("a small tmpfs cannot be mounted here (needs root): a full disk is not tested")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("promise", [True, False])
def test_a_disk_too_small_is_found_before_the_work_and_nothing_stays_reserved(
    tiny_disk: Path, monkeypatch: pytest.MonkeyPatch, promise: bool
) -> None:
    if not promise:
        monkeypatch.setattr("mergeflow.writing.shards.allocate", lambda fd, size: False)
    shards, rows = layout({f"m{i}.safetensors": [("uint8", (600_000,))] for i in range(3)})
    before = free_bytes(tiny_disk)
    with pytest.raises(
        MachineError, match=r"the disk is too small \(No space.*; 7\d\d,\d\d\d bytes are missing"
    ) as caught:
        opened(tiny_disk / "out", shards, rows)
    assert str(tiny_disk / "out") in str(caught.value)
    assert caught.value.exit_code == 5
    assert free_bytes(tiny_disk) == before
    assert not list(tiny_disk.iterdir())
    shards, rows = layout({"m.safetensors": [("uint8", (600_000,))]})
    with opened(tiny_disk / "out", shards, rows) as staging:
        fill_all(staging, rows)
        staging.publish()
    assert written(tiny_disk / "out", shards) == expected(shards, rows)


def test_a_disk_that_fills_up_in_between_says_so_and_the_run_goes_on_later(
    tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergeflow.writing.shards.allocate", lambda fd, size: False)
    shards, rows = layout({"m.safetensors": [("uint8", (60_000,))] * 10})
    with pytest.raises(MachineError, match="the disk is too small"), opened(tiny_disk / "out", shards, rows) as staging:
        (tiny_disk / "other").write_bytes(bytes(700_000))
        fill_all(staging, rows)
        staging.publish()
    assert not (tiny_disk / "out").exists()
    (tiny_disk / "other").unlink()
    with opened(tiny_disk / "out", shards, rows) as staging:
        fill_all(staging, rows)
        staging.publish()
    assert written(tiny_disk / "out", shards) == expected(shards, rows)


@pytest.mark.parametrize("force", [False, True])
def test_a_commit_that_cannot_be_made_durable_is_undone(
    target: Path, three: tuple[list[Shard], list[Row]], monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    shards, rows = three
    if force:
        make_output(target)
    sync = module.sync_path

    def failing(path: Path) -> None:
        if path == target.parent and (target / "model-1.safetensors").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        sync(path)

    with opened(target, shards, rows, force=force) as staging:
        fill_all(staging, rows)
        monkeypatch.setattr(module, "sync_path", failing)
        with pytest.raises(MachineError, match="Input/output error"):
            staging.publish()
    monkeypatch.undo()
    assert target.exists() == force
    assert not (target / "model-1.safetensors").exists()
    with opened(target, shards, rows, force=force) as staging:
        assert len(staging.finished) == len(rows)
        staging.publish()
    assert written(target, shards) == expected(shards, rows)


def test_a_thousand_small_rows_cost_no_system_call_each(target: Path) -> None:
    shards, rows = layout({"m.safetensors": [("bfloat16", (150,))] * 3600})
    with opened(target, shards, rows, extent_bytes=4 << 20) as staging:
        used = time.thread_time()
        for index in range(len(rows)):
            staging.memory(index, 0, 300)[0][:1] = b"x"
            staging.filled(index, 0, 300)
            staging.row_done(index, "d" * 64, {"a": "e" * 64})
        used = time.thread_time() - used
        staging.publish()
    assert used < 0.15


def test_an_interrupt_leaves_what_was_done_to_the_next_run(target: Path, three: tuple[list[Shard], list[Row]]) -> None:
    shards, rows = three
    with pytest.raises(KeyboardInterrupt), opened(target, shards, rows) as staging:
        fill(staging, rows, 1)
        signal.raise_signal(signal.SIGINT)
        time.sleep(1)
    with opened(target, shards, rows) as staging:
        assert list(staging.finished) == [1]
