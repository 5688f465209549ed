"""Local folders, and a hub that is a small server on this machine; each process on it has an environment of its own."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from hub_server import HubServer

from mergeflow.checkpoint import encode_header
from mergeflow.dtypes import BY_NAME
from mergeflow.errors import InputError, RecipeError
from mergeflow.hub import LocalFolder, is_local, locate

SHARDS = 4
START = """
import json, pathlib, sys
from mergeflow.checkpoint import open_checkpoint
from mergeflow.errors import MergeflowError
from mergeflow.hub import locate
here = pathlib.Path.cwd()
try:
"""
END = """
except MergeflowError as error:
    answer = {"error": type(error).__name__, "text": str(error)}
print(json.dumps(answer))
"""


def weights(seed: int, elements: int = 250_000) -> bytes:
    """A safetensors file of one float32 tensor."""
    header, _ = encode_header([(f"w{seed}", BY_NAME["float32"], (elements,))], {})
    return header + bytes([seed]) * (4 * elements)


def sharded() -> dict[str, bytes]:
    """The files of a repository of some 4 MB."""
    names = [f"model-{i + 1:05}-of-{SHARDS:05}.safetensors" for i in range(SHARDS)]
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    files = {name: weights(i) for i, name in enumerate(names)}
    return {
        "config.json": b'{"model_type": "toy"}',
        "model.safetensors.index.json": json.dumps(index).encode(),
        "vae/config.json": b"{}",
        "vae/model.safetensors": weights(9, 100),
        **files,
    }


@pytest.fixture
def server() -> Iterator[HubServer]:
    single = {"config.json": b"{}", "model.safetensors": weights(7, 1000)}
    with HubServer(
        {"org/x": sharded(), "org/one": single, "org/secret": single, "org/gated": single},
        gated=frozenset({"org/gated"}),
        private=frozenset({"org/secret"}),
    ) as running:
        yield running


def ask(server: HubServer, home: pathlib.Path, body: str, **environment: str) -> Any:
    """What `answer` is after `body` ran in a process whose hub is `server`, or the error it raised."""
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.indent(textwrap.dedent(body), "    ") + END],
        env=server.environment(home, **environment),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_opening_a_sharded_repository_fetches_under_a_hundredth_of_it(
    server: HubServer, tmp_path: pathlib.Path
) -> None:
    answer = ask(
        server,
        tmp_path,
        """
        checkpoint = open_checkpoint(locate("org/x", relative_to=here))
        answer = [list(checkpoint.tensors), checkpoint.folder.revision, checkpoint.config, checkpoint.folder.label]
        """,
    )
    assert answer == [["w0", "w1", "w2", "w3"], server.commit("org/x"), {"model_type": "toy"}, "org/x"]
    assert 0 < server.bytes_served < server.total("org/x") / 100
    assert sum(request.range is not None and request.path.startswith("/blobs/") for request in server.requests) == 4


def test_only_the_files_asked_for_are_downloaded_and_their_bytes_reported(
    server: HubServer, tmp_path: pathlib.Path
) -> None:
    answer = ask(
        server,
        tmp_path,
        """
        folder, seen = locate("org/x", relative_to=here), []
        wanted = ["model-00002-of-00004.safetensors", "config.json"]
        paths = folder.local(wanted, seen.append)
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        inside = folder.read_range(wanted[0], 100, 110) == paths[wanted[0]].read_bytes()[100:110]
        cached = [path.name for path in (here / "hub").rglob("*.safetensors")]
        answer = [sizes, sum(seen), inside, cached, folder.sha256(wanted[0]), folder.sha256("config.json")]
        """,
    )
    files = sharded()
    shard, config = files["model-00002-of-00004.safetensors"], files["config.json"]
    sizes = {"model-00002-of-00004.safetensors": len(shard), "config.json": len(config)}
    digest = hashlib.sha256(shard).hexdigest()
    assert answer == [sizes, len(shard) + len(config), True, ["model-00002-of-00004.safetensors"], digest, None]
    blobs = [r for r in server.requests if r.path.startswith("/blobs/") and r.method == "GET"]
    assert len(blobs) == 1


def test_a_revision_stays_the_commit_it_was_while_the_branch_moves(server: HubServer, tmp_path: pathlib.Path) -> None:
    old = server.commit("org/one")
    assert old is not None
    server.push("org/one", {"model.safetensors": weights(8, 1000)})
    body = f"""
        answer = [
            [locate(path, relative_to=here).revision, list(open_checkpoint(locate(path, relative_to=here)).tensors)]
            for path in ("org/one", "org/one@{old[:8]}")
        ] + [locate("org/one", revision="{old}", relative_to=here).revision]
        """
    assert ask(server, tmp_path, body) == [[server.commit("org/one"), ["w8"]], [old, ["w7"]], old]


def test_a_subfolder_is_a_folder_of_its_own(server: HubServer, tmp_path: pathlib.Path) -> None:
    body = """
        folder = locate("org/x", subfolder="vae", relative_to=here)
        paths = open_checkpoint(folder).paths()
        answer = [list(folder.names()), [path.stat().st_size for path in paths.values()]]
        """
    assert ask(server, tmp_path, body) == [["config.json", "model.safetensors"], [len(weights(9, 100))]]


def test_offline_runs_use_the_cache_and_say_what_it_lacks(server: HubServer, tmp_path: pathlib.Path) -> None:
    fetch = """
        checkpoint = open_checkpoint(locate("org/x", relative_to=here))
        checkpoint.paths(["model-00001-of-00004.safetensors"])
        whole = open_checkpoint(locate("org/one@main", relative_to=here))
        answer = [str(path) for path in whole.paths().values()]
        """
    paths = ask(server, tmp_path, fetch)
    server.die()
    offline = {"HF_HUB_OFFLINE": "1"}
    body = """
        whole = open_checkpoint(locate("org/one", relative_to=here))
        answer = [[str(path) for path in whole.paths().values()], whole.folder.sha256("model.safetensors")]
        """
    digest = hashlib.sha256(weights(7, 1000)).hexdigest()
    assert ask(server, tmp_path, body, **offline) == [paths, digest]
    for path, text in {
        "org/x": "org/x/model-00002-of-00004.safetensors: is not in the cache, and HF_HUB_OFFLINE forbids",
        "org/one@v2": "org/one@v2: revision 'v2' is not in the cache",
        "org/never": "org/never: is not in the cache",
    }.items():
        answer = ask(
            server, tmp_path, f"answer = len(open_checkpoint(locate({path!r}, relative_to=here)).files)", **offline
        )
        assert answer["error"] in ("MachineError", "Problems")
        assert text in answer["text"]
        assert "`hf download org/" in answer["text"]


def test_each_thing_that_is_missing_has_its_own_message(server: HubServer, tmp_path: pathlib.Path) -> None:
    (tmp_path / "org" / "nothing").mkdir(parents=True)
    body = """
        def said(call):
            try:
                return call()
            except MergeflowError as error:
                return [type(error).__name__, str(error)]
        answer = [
            said(lambda: locate("org/nothing", relative_to=here)),
            said(lambda: locate("org/x", revision="v9", relative_to=here)),
            said(lambda: locate("org/x", subfolder="vea", relative_to=here)),
            said(lambda: locate("org/x", relative_to=here).read("confg.json")),
            said(lambda: open_checkpoint(locate("org/x", relative_to=here), file="other.safetensors")),
            said(lambda: locate("org/gated", relative_to=here)),
            said(lambda: locate("org/secret", relative_to=here)),
        ]
        """
    answer = ask(server, tmp_path, body)
    assert [kind for kind, _ in answer] == ["InputError"] * 7
    texts = [text for _, text in answer]
    assert "the hub has no repository 'org/nothing', or it is private" in texts[0]
    assert "write './org/nothing'" in texts[0]
    assert texts[1].startswith("org/x@v9: the repository has no revision 'v9'")
    assert "no folder 'vea'" in texts[2]
    assert "Did you mean 'vae'?" in texts[2]
    assert texts[3].startswith("org/x/confg.json: no such file in the repository. Did you mean 'config.json'?")
    assert texts[4].startswith("org/x/other.safetensors: no such file")
    assert "gated" in texts[5]
    assert "`hf auth login`" in texts[5]
    assert "`hf auth login`" in texts[6]


def test_a_damaged_copy_in_the_cache_and_an_unusable_cache_are_errors(
    server: HubServer, tmp_path: pathlib.Path
) -> None:
    body = """
        paths = open_checkpoint(locate("org/one", relative_to=here)).paths()
        answer = str(paths["model.safetensors"])
        """
    path = ask(server, tmp_path, body)
    os.truncate(path, 3000)
    answer = ask(server, tmp_path, body)
    assert answer["error"] == "InputError"
    assert "its copy in the cache has 3000 bytes and the hub's has" in answer["text"]
    assert f"Delete {path} and run again." in answer["text"]
    (tmp_path / "file").write_text("")
    answer = ask(server, tmp_path, body, HF_HOME=str(tmp_path / "file"))
    assert answer["error"] == "MachineError"
    assert "cannot be written to the cache" in answer["text"]


def test_a_download_that_is_given_up_leaves_no_file_that_looks_whole(server: HubServer, tmp_path: pathlib.Path) -> None:
    body = """
        folder = locate("org/x", relative_to=here)
        def stop(count):
            raise KeyboardInterrupt
        try:
            folder.local(sorted(folder.names()), stop)
        except KeyboardInterrupt:
            answer = [path.name for path in (here / "hub").rglob("*.safetensors")]
        """
    assert ask(server, tmp_path, body) == []


def test_the_token_goes_to_the_hub_and_not_to_its_store_of_blobs(server: HubServer, tmp_path: pathlib.Path) -> None:
    body = """
        checkpoint = open_checkpoint(locate("org/secret", relative_to=here))
        answer = [len(checkpoint.tensors), len(checkpoint.paths())]
        """
    assert ask(server, tmp_path, body, HF_TOKEN="hf_example") == [1, 1]
    at_hub = {request.authorization for request in server.requests if request.host == "127.0.0.1"}
    at_blobs = {request.authorization for request in server.requests if request.host == "localhost"}
    assert at_hub == {"Bearer hf_example"}
    assert at_blobs == {None}


def test_a_server_that_dies_or_fails_is_an_error_of_the_machine(server: HubServer, tmp_path: pathlib.Path) -> None:
    server.fail = 503
    answer = ask(server, tmp_path, 'answer = str(locate("org/x", relative_to=here))')
    assert answer["error"] == "MachineError"
    assert answer["text"].startswith("org/x: the hub answered with error 503")
    server.fail, server.cut = None, 10
    answer = ask(server, tmp_path, 'answer = len(open_checkpoint(locate("org/one", relative_to=here)).files)')
    assert answer["error"] == "MachineError"
    server.die()
    answer = ask(server, tmp_path, 'answer = str(locate("org/x", relative_to=here))')
    assert answer["error"] == "MachineError"
    assert answer["text"].startswith("org/x: the hub cannot be reached: ")
    assert "HF_HUB_OFFLINE=1" in answer["text"]


def test_a_server_that_dies_before_a_download_is_an_error_of_the_machine(
    server: HubServer, tmp_path: pathlib.Path
) -> None:
    body = f"""
        folder = locate("org/x", relative_to=here)
        import http.client, urllib.request
        try:
            urllib.request.urlopen({server.url!r} + "/silence")
        except http.client.RemoteDisconnected:
            pass
        answer = len(folder.local(["config.json"]))
        """
    answer = ask(server, tmp_path, body)
    assert answer["error"] == "MachineError"
    assert answer["text"].startswith("org/x/config.json: the hub cannot be reached: ")


def test_a_server_without_ranges_is_not_read_to_the_end(tmp_path: pathlib.Path) -> None:
    with HubServer({"org/x": {"model.safetensors": weights(1)}}, ranges=False) as server:
        answer = ask(server, tmp_path, 'answer = len(open_checkpoint(locate("org/x", relative_to=here)).files)')
    assert answer["error"] == "MachineError"
    assert "whole files only" in answer["text"]


def test_a_server_that_is_no_hub_is_named(server: HubServer, tmp_path: pathlib.Path) -> None:
    answer = ask(server, tmp_path, 'answer = str(locate("org/x", relative_to=here))', HF_ENDPOINT=f"{server.url}/web")
    assert answer["error"] in ("InputError", "MachineError")


def test_local_models_never_import_the_hub_client_or_torch(tmp_path: pathlib.Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(weights(1, 10))
    code = (
        "import pathlib, sys\n"
        "from mergeflow.checkpoint import open_checkpoint\n"
        "from mergeflow.hub import locate\n"
        "open_checkpoint(locate('./m', relative_to=pathlib.Path.cwd())).paths()\n"
        "assert not {'huggingface_hub', 'torch', 'numpy', 'tqdm'} & set(sys.modules)\n"
    )
    root = str(pathlib.Path(__file__).parent.parent)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": root})


@pytest.mark.parametrize("path", ["./m", "../m", "/m", "~", "~/m", ".", "..", "m.safetensors", "org/m.safetensors"])
def test_what_looks_like_a_path_is_local(path: str) -> None:
    assert is_local(path)


@pytest.mark.parametrize("path", ["org/m", "org/m@v1", "m", ".m", "..m/x"])
def test_everything_else_is_not(path: str) -> None:
    assert not is_local(path)


def test_a_local_folder_lists_two_levels_and_reads(tmp_path: pathlib.Path) -> None:
    model = tmp_path / "m"
    (model / "sub" / "deep").mkdir(parents=True)
    (model / ".git").mkdir()
    for name in ("b.json", "a.json", "sub/c.json", "sub/deep/d.json", ".git/e"):
        (model / name).write_text(name)
    os.mkfifo(model / "pipe")
    folder = locate("./m/", relative_to=tmp_path)
    assert folder.names() == ("a.json", "b.json", "sub/c.json")
    assert folder.label == "./m/"
    assert folder.revision is None
    assert (folder.exists("a.json"), folder.exists("x")) == (True, False)
    assert folder.size("sub/c.json") == 10
    assert folder.read("b.json") == b"b.json"
    assert folder.read_range("b.json", 2, 6) == b"json"
    assert folder.read_range("b.json", 2, 2) == b""
    assert folder.local(["a.json"]) == {"a.json": model / "a.json"}
    assert folder.sha256("a.json") is None
    assert locate("./m", subfolder="sub", relative_to=tmp_path).names() == ("c.json", "deep/d.json")
    with pytest.raises(InputError, match=r"b\.json: ends at byte 6, before byte 9"):
        folder.read_range("b.json", 2, 9)
    with pytest.raises(InputError, match="6 bytes long, more than the 5 expected"):
        folder.read("b.json", limit=5)
    with pytest.raises(InputError, match=r"\./m/c\.json: no such file"):
        folder.read("c.json")
    with pytest.raises(InputError, match="pipe: is not a regular file"):
        folder.read("pipe")


def test_a_path_to_a_file_is_its_folder_and_that_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(weights(1, 10))
    folder = locate("x.safetensors", relative_to=tmp_path)
    assert folder == LocalFolder("x.safetensors", tmp_path, "x.safetensors")


def test_links_that_lead_outside_are_refused_except_in_the_hub_cache(tmp_path: pathlib.Path) -> None:
    outside, model = tmp_path / "secret", tmp_path / "m"
    outside.write_text("secret")
    model.mkdir()
    (model / "real").write_text("x")
    (model / "inside").symlink_to("real")
    (model / "out").symlink_to(outside)
    folder = locate("./m", relative_to=tmp_path)
    assert folder.read("inside") == b"x"
    for name in ("out", "../secret", str(outside)):
        with pytest.raises(InputError, match="leads outside the folder"):
            folder.read(name)
    cache = tmp_path / "models--org--x"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "blobs" / "1").write_text("blob")
    (cache / "snapshots" / "abc" / "config.json").symlink_to("../../blobs/1")
    (cache / "snapshots" / "abc" / "out").symlink_to(outside)
    cached = locate("./models--org--x/snapshots/abc", relative_to=tmp_path)
    assert cached.read("config.json") == b"blob"
    with pytest.raises(InputError, match="leads outside the folder"):
        cached.read("out")


@pytest.mark.parametrize(
    ("path", "error", "text"),
    [
        ("./moth", InputError, "./moth: no such file or folder. Did you mean 'math'?"),
        ("./no/where", InputError, "does not exist either"),
        ("./file/x", InputError, "no such file or folder"),
        ("math", RecipeError, "'math' is neither a local path nor a repository. For the local one"),
        ("maths", RecipeError, "Local paths start with ./ ../ / or ~"),
        ("a/b/c", RecipeError, "neither a local path nor a repository"),
        ("org/../x", RecipeError, "neither a local path nor a repository"),
        ("org/x y", RecipeError, "neither a local path nor a repository"),
        ("http://host/x", RecipeError, "neither a local path nor a repository"),
        ("org/x@../../y", RecipeError, "cannot be a revision"),
        ("org/x@a b", RecipeError, "cannot be a revision"),
        ("./a\0b", RecipeError, "NUL"),
        ("~nobody-of-this-name/x", InputError, "~nobody-of-this-name/x: cannot be read"),
        ("./" + "n" * 300, InputError, "cannot be read: File name too long"),
    ],
)
def test_a_path_that_leads_nowhere_says_so(
    tmp_path: pathlib.Path, path: str, error: type[Exception], text: str
) -> None:
    (tmp_path / "math").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(error) as caught:
        locate(path, relative_to=tmp_path)
    assert text in str(caught.value)


def test_contradictions_in_a_reference_are_errors(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RecipeError, match="a local path has no revision"):
        locate("./m", revision="v1", relative_to=tmp_path)
    with pytest.raises(RecipeError, match="names one revision and `revision: v2` another"):
        locate("org/x@v1", revision="v2", relative_to=tmp_path)
    for below in ("..", "a/../../b", "/etc", "a\\b"):
        with pytest.raises(RecipeError, match="leads outside"):
            locate("./m", subfolder=below, relative_to=tmp_path)
