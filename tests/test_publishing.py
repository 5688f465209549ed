"""What stands beside the shards: which files are copied, what the made ones say, and what is warned about."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeflow.checkpoint import Checkpoint, encode_header, open_checkpoint
from mergeflow.dtypes import BY_NAME
from mergeflow.errors import RecipeError
from mergeflow.graph import SideFile
from mergeflow.hub import HubFolder, locate
from mergeflow.publishing import LARGEST_SIDE_FILE, side_files

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "vocab_size": 8}
RECIPE = "recipe: 1\nname: both\nmodels: {a: ./a}\noutput: {node: a}\n"


def model(parent: Path, name: str, files: Mapping[str, Any] | None = None, weights: bool = True) -> Checkpoint:
    """A checkpoint on disk: one scalar of weights and `files`, whose values are text, or data written as JSON."""
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        header, _ = encode_header([("w", BY_NAME["float32"], ())], {})
        (folder / "model.safetensors").write_bytes(header + bytes(4))
    for file, content in (files or {}).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return opened(parent, name)


def opened(parent: Path, name: str) -> Checkpoint:
    return open_checkpoint(locate(f"./{name}", relative_to=parent))


class Published:
    """The files beside one output, by name."""

    def __init__(
        self,
        like: Checkpoint | None,
        tokenizer: Checkpoint | None = None,
        inputs: Mapping[str, Checkpoint] | None = None,
        *,
        output: str = "",
        dtypes: Mapping[str, int] | None = None,
        config: Mapping[str, Any] | None = None,
        card: Mapping[str, Any] | None = None,
        description: str = "",
        recipe: str = RECIPE,
        ops: Sequence[tuple[str, str | None]] = (("linear", None),),
        tied: bool | None = None,
        space: str = "weight",
        quantised: bool = False,
    ) -> None:
        files, self.warnings = side_files(
            output=output,
            like=like,
            like_name="base" if like else "",
            tokenizer=tokenizer,
            tokenizer_name="chat" if tokenizer else "",
            inputs=inputs if inputs is not None else {"base": like} if like else {},
            dtypes=dtypes if dtypes is not None else {"float32": 4},
            config=config or {},
            card=card or {},
            recipe_name="both",
            description=description,
            resolved_recipe=recipe,
            ops=ops,
            tied=tied,
            space=space,
            quantised=quantised,
        )
        assert [file.file for file in files] == sorted(file.file for file in files)
        self.files: dict[str, SideFile] = {file.file: file for file in files}

    def copies(self, model: str = "base") -> list[str]:
        found = [file for file in self.files.values() if file.model == model]
        assert all(file.content is None and file.name == file.file for file in found)
        return [file.file for file in found]

    def made(self) -> list[str]:
        return [name for name, file in self.files.items() if file.content is not None]

    def text(self, name: str) -> str:
        content = self.files[name].content
        assert content is not None
        return content.decode()

    def json(self, name: str = "config.json") -> Any:
        return json.loads(self.text(name))

    @property
    def matter(self) -> Any:
        found = re.match(r"---\n(.*?)\n---\n", self.text("README.md"), re.DOTALL)
        assert found is not None
        return yaml.safe_load(found.group(1))


# config.json


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_is_what_most_bytes_are_written_in_under_the_key_that_the_input_has(tmp_path: Path, key: str) -> None:
    parts = {"text_config": {key: "float32", "a": 1}, "vision_config": {"b": 2}}
    like = model(tmp_path, "base", {"config.json": {"model_type": "x", key: "float32", **parts}})
    config = Published(like, dtypes={"float32": 10, "bfloat16": 30, "int64": 90}).json()
    text = {key: "bfloat16", "a": 1}
    assert config == {"model_type": "x", key: "bfloat16", "text_config": text, "vision_config": {"b": 2}}


def test_a_config_without_a_dtype_gets_one_and_the_other_keys_keep_their_order(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": {"z": 1, "a": {"y": 2, "b": 3}, "m": None}})
    config = Published(like, dtypes={"float16": 2}).json()
    assert list(config) == ["z", "a", "m", "dtype"]
    assert config["dtype"] == "float16"
    assert list(config["a"]) == ["y", "b"]


def test_equal_counts_of_bytes_always_give_the_same_dtype(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": LLAMA})
    for dtypes in ({"float16": 8, "bfloat16": 8}, {"bfloat16": 8, "float16": 8}):
        assert Published(like, dtypes=dtypes).json()["dtype"] == "bfloat16"


def test_an_output_of_integers_leaves_the_dtype_as_it_was(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": LLAMA})
    assert Published(like, dtypes={"int64": 8}).json()["dtype"] == "float32"


def test_float8_weights_are_announced_as_bfloat16_since_no_loader_builds_a_float8_module(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": LLAMA})
    assert Published(like, dtypes={"float8_e4m3fn": 80, "float32": 8}).json()["dtype"] == "bfloat16"


def test_traces_of_where_the_config_came_from_and_of_its_quantisation_are_dropped(tmp_path: Path) -> None:
    noise = {"_name_or_path": "/home/somebody/x", "quantization_config": {"bits": 4}}
    like = model(tmp_path, "base", {"config.json": {**LLAMA, **noise}})
    assert Published(like).json() == LLAMA
    parts = model(tmp_path, "parts", {"config.json": {"text_config": {"a": 1, "quantization_config": {"bits": 4}}}})
    assert Published(parts).json()["text_config"] == {"a": 1}


def test_a_quantised_model_that_is_given_out_as_stored_keeps_what_says_how(tmp_path: Path) -> None:
    config = {**LLAMA, "quantization_config": {"bits": 4}, "dtype": "float16"}
    files = {"config.json": {"_name_or_path": "/home/x", **config}, "quantize_config.json": {"bits": 4}}
    like = model(tmp_path, "base", files)
    published = Published(like, dtypes={"int32": 80, "float32": 8}, quantised=True)
    assert published.json() == config
    assert "quantize_config.json" in published.copies()
    assert "quantize_config.json" not in Published(like).copies()


def test_overrides_come_last_and_nested_ones_are_merged(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": {"rope": {"theta": 1e4, "type": "x"}, "n": 1}})
    config = Published(like, config={"rope": {"theta": 5e5}, "dtype": "float64", "new": {"a": [1]}}).json()
    assert config == {"rope": {"theta": 5e5, "type": "x"}, "n": 1, "dtype": "float64", "new": {"a": [1]}}


def test_the_flag_of_tied_embeddings_is_set_in_every_section_that_may_be_read(tmp_path: Path) -> None:
    parts = {"text_config": {"a": 1}, "decoder": {"tie_word_embeddings": True}}
    like = model(tmp_path, "base", {"config.json": {"tie_word_embeddings": True, **parts}})
    config = Published(like, tied=False).json()
    assert config["tie_word_embeddings"] is False
    assert config["text_config"] == {"a": 1, "tie_word_embeddings": False}
    assert config["decoder"] == {"tie_word_embeddings": False}
    assert Published(like).json()["tie_word_embeddings"] is True
    assert Published(model(tmp_path, "silent", {"config.json": {}}), tied=False).json()["tie_word_embeddings"] is False


def test_a_model_without_a_config_gives_an_output_without_one(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"labels.txt": "a"})
    out = Published(like)
    assert (out.copies(), out.made(), out.warnings) == (["labels.txt"], ["README.md", "recipe.yaml"], ())
    assert "library_name" not in out.matter
    assert Published(None).made() == ["README.md", "recipe.yaml"]


def test_overrides_without_a_config_to_put_them_in_are_warned_about(tmp_path: Path) -> None:
    (warning,) = Published(model(tmp_path, "base"), config={"a": 1}, output="math").warnings
    assert warning.startswith("outputs.math.config: nothing to set it in, the output has no config.json.")


# Which files are copied

SIDE = [
    "1_Pooling/config.json",
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "chat_template.jinja",
    "config_sentence_transformers.json",
    "generation_config.json",
    "labels.txt",
    "merges.txt",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
]
NOISE = [
    ".gitattributes",
    ".cache/x.json",
    "README.md",
    "adapter_config.json",
    "all_results.json",
    "checkpoint-10/trainer_state.json",
    "checkpoint-10/tokenizer.json",
    "deep/er/labels.json",
    "eval_results.json",
    "flax_model.msgpack",
    "global_step5/a.json",
    "mergeflow.json",
    "model.safetensors.index.json.bak",
    "notes.yaml",
    "onnx/config.json",
    "onnx/model.onnx",
    "optimizer.pt",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "rng_state.pth",
    "rng_state_0.json",
    "runs/events.txt",
    "scheduler.pt",
    "train_results.json",
    "trainer_state.json",
    "training_args.bin",
    "weights.pt",
]


def test_side_files_are_copied_and_weights_cards_and_what_training_left_are_not(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": LLAMA, **dict.fromkeys([*SIDE, *NOISE], "{}")})
    out = Published(like)
    assert out.copies() == SIDE
    assert out.made() == ["README.md", "config.json", "recipe.yaml"]
    assert out.warnings == ()


def test_custom_code_is_not_copied_and_a_warning_says_how_to(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": LLAMA, "modeling_x.py": "", "tokenization_x.py": ""})
    out = Published(like)
    assert out.copies() == []
    assert out.warnings == (
        "output: custom code of 'base' is not copied: modeling_x.py, tokenization_x.py. "
        "If you trust it, copy it by hand from ./base into the output",
    )


def test_a_file_too_large_for_a_side_file_is_left_with_a_warning(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"small.json": "{}", "large.json": ""})
    os.truncate(tmp_path / "base" / "large.json", LARGEST_SIDE_FILE)
    out = Published(like)
    assert out.copies() == ["small.json"]
    assert out.warnings == (
        "output: large.json of 'base' is not copied: it has 64 MB. Copy it by hand if it is needed",
    )


def test_a_link_out_of_the_folder_is_left_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"eos_token_id": 5}')
    like = model(tmp_path, "base", {"config.json": LLAMA, "real.json": "{}"})
    for name in ("tokenizer_config.json", "generation_config.json", "README.md"):
        (tmp_path / "base" / name).symlink_to("../secret.json")
    (tmp_path / "base" / "inside.json").symlink_to("real.json")
    out = Published(
        like, inputs={"base": like, "other": model(tmp_path, "other", {"config.json": {"eos_token_id": 1}})}
    )
    assert out.copies() == ["inside.json", "real.json"]
    assert len(out.warnings) == 2
    for warning, name in zip(out.warnings, ("generation_config.json", "tokenizer_config.json"), strict=True):
        assert warning.startswith(
            f"output: {name} of 'base' is not copied: it is a link that leads outside the folder."
        )


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--x"
    model(repository / "snapshots", "abc", {"config.json": LLAMA})
    (repository / "blobs").mkdir()
    (repository / "blobs" / "123").write_text("{}")
    (repository / "snapshots" / "abc" / "tokenizer.json").symlink_to("../../blobs/123")
    out = Published(opened(repository / "snapshots", "abc"))
    assert (out.copies(), out.warnings) == (["tokenizer.json"], ())


def test_what_lies_around_a_single_file_of_weights_is_not_taken_for_the_models(tmp_path: Path) -> None:
    model(tmp_path, "downloads", {"taxes.txt": "mine", "tokenizer.json": "{}"})
    out = Published(opened(tmp_path, "downloads/model.safetensors"))
    assert (out.copies(), out.made()) == ([], ["README.md", "recipe.yaml"])


def test_modules_with_weights_of_their_own_are_warned_about(tmp_path: Path) -> None:
    files = {"config.json": LLAMA, "modules.json": "[]", "1_Pooling/config.json": "{}", "2_Dense/config.json": "{}"}
    like = model(tmp_path, "base", {**files, "2_Dense/model.safetensors": ""})
    out = Published(like)
    assert out.copies() == ["1_Pooling/config.json", "modules.json"]
    assert out.warnings == (
        "output: modules of 'base' with weights of their own are not in the output: 2_Dense. "
        "Copy these folders by hand",
    )


# The tokenizer of another model


def test_tokenizer_files_come_from_the_tokenizer_model_alone(tmp_path: Path) -> None:
    own = {"tokenizer.json": "{}", "vocab.txt": "", "merges.txt": "", "preprocessor_config.json": "{}"}
    theirs = {"tokenizer.json": "{}", "additional_chat_templates/rag.jinja": "", "labels.txt": "", "tok.py": ""}
    like = model(tmp_path, "base", {"config.json": LLAMA, **own})
    chat = model(tmp_path, "chat", {"config.json": LLAMA, "preprocessor_config.json": "{}", **theirs})
    out = Published(like, chat)
    assert out.copies("base") == ["preprocessor_config.json"]
    assert out.copies("chat") == ["additional_chat_templates/rag.jinja", "tokenizer.json"]
    assert [w.split(".")[0] for w in out.warnings] == ["output: custom code of 'chat' is not copied: tok"]


def test_token_ids_follow_the_tokenizer_model(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": {**LLAMA, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}})
    chat = model(tmp_path, "chat", {"config.json": {**LLAMA, "eos_token_id": [5, 6], "unk_token_id": 3}})
    config = Published(like, chat).json()
    assert config == {
        **LLAMA,
        "eos_token_id": [5, 6],
        "unk_token_id": 3,
    }  # what `chat` leaves out has its class's default
    other = model(tmp_path, "other", {"config.json": {"model_type": "x", "eos_token_id": 7}})
    assert Published(like, other).json() == {**LLAMA, "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}
    assert Published(like).json()["eos_token_id"] == 2


def test_token_ids_go_into_the_text_section_of_a_model_that_has_one(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": {"model_type": "vlm", "text_config": {"eos_token_id": 2}}})
    chat = model(tmp_path, "chat", {"config.json": {**LLAMA, "eos_token_id": 5, "bos_token_id": 4}})
    config = Published(like, chat).json()
    assert config["text_config"] == {"eos_token_id": 5, "bos_token_id": 4}
    assert "eos_token_id" not in config
    flat = model(tmp_path, "flat", {"config.json": {**LLAMA, "eos_token_id": 1}})
    assert Published(flat, like).json()["eos_token_id"] == 2


def test_sampling_stays_and_stopping_follows_the_tokenizer_model(tmp_path: Path) -> None:
    own = {"temperature": 0.6, "eos_token_id": 2, "pad_token_id": 0}
    like = model(tmp_path, "base", {"config.json": LLAMA, "generation_config.json": own})
    theirs = {"temperature": 1.0, "eos_token_id": [5, 6], "bos_token_id": 4}
    chat = model(tmp_path, "chat", {"config.json": LLAMA, "generation_config.json": theirs})
    generation = Published(like, chat).json("generation_config.json")
    assert generation == {"temperature": 0.6, "eos_token_id": [5, 6], "bos_token_id": 4}
    assert Published(like).copies() == ["generation_config.json"]
    plain = model(tmp_path, "plain", {"config.json": LLAMA})
    assert Published(plain, chat).json("generation_config.json") == {"bos_token_id": 4, "eos_token_id": [5, 6]}
    ids = model(tmp_path, "ids", {"config.json": {**LLAMA, "eos_token_id": 9}})
    assert Published(like, ids).json("generation_config.json") == {"temperature": 0.6, "eos_token_id": 9}


# Lints


@pytest.mark.parametrize(
    "template",
    [
        {"chat_template.jinja": "{{ x }}"},
        {"chat_template.json": {"chat_template": "{{ x }}"}},
        {"additional_chat_templates/default.jinja": "{{ x }}"},
        {"tokenizer_config.json": {"chat_template": "{{ x }}"}},
    ],
    ids=lambda files: next(iter(files)),
)
def test_a_tokenizer_without_the_chat_template_that_an_input_has_is_warned_about(
    tmp_path: Path, template: dict[str, Any]
) -> None:
    tokenizer = {"tokenizer.json": "{}", "tokenizer_config.json": {"chat_template": None}}
    like = model(tmp_path, "base", tokenizer)
    chat = model(tmp_path, "chat", {**tokenizer, **template})
    inputs = {"base": like, "chat": chat}
    assert Published(like, inputs=inputs).warnings == (
        "output.tokenizer: 'base' has no chat template, and 'chat' has one. "
        "Write `tokenizer: chat` to take its tokenizer",
    )
    assert Published(like, chat, inputs).warnings == ()


def test_an_output_without_the_tokenizer_that_an_input_has_is_warned_about(tmp_path: Path) -> None:
    inputs = {"base": model(tmp_path, "base"), "chat": model(tmp_path, "chat", {"tokenizer.json": "{}"})}
    assert Published(inputs["base"], inputs=inputs).warnings == (
        "output.tokenizer: 'base' has no tokenizer, and 'chat' has one. Write `tokenizer: chat` to take its tokenizer",
    )


def test_other_end_of_text_ids_are_warned_about_once_for_each_set(tmp_path: Path) -> None:
    def ends(name: str, config: Any, generation: Any = None) -> Checkpoint:
        files = {"config.json": {"eos_token_id": config}}
        return model(tmp_path, name, files if generation is None else {**files, "generation_config.json": generation})

    like = ends("base", 2)
    inputs = {
        "base": like,
        "same": ends("same", [2]),
        "silent": ends("silent", None),
        "chat": ends("chat", 2, {"eos_token_id": [9, 2]}),
        "again": ends("again", [2, 9]),
    }
    assert Published(like, inputs=inputs).warnings == (
        "output.tokenizer: end-of-text ids differ: [2] in 'base', [2, 9] in 'chat'. "
        "Text may not stop where 'chat' learned to: write `tokenizer: chat` to take its ids",
    )


# The card and the recipe


def hub(checkpoint: Checkpoint, label: str) -> Checkpoint:
    return replace(checkpoint, folder=HubFolder(label, "c" * 40, label.split("@")[0]))


def test_the_card_says_what_a_hub_and_a_reader_need(tmp_path: Path) -> None:
    readme = "---\nlicense: mit\npipeline_tag: text-generation\n---\n# Base"
    like = model(tmp_path, "base", {"config.json": LLAMA, "README.md": readme})
    inputs = {"base": like, "chat": hub(like, "org/chat-1b@9f31c2"), "twin": hub(like, "org/chat-1b@main")}
    card = {"license": "llama3.2", "tags": ["math", "merge"], "language": ["no", "1e3"], "datasets": None}
    ops = [("ties", "arXiv:2306.01708"), ("linear", None), ("linear", None)]
    out = Published(like, inputs=inputs, card=card, description="Counts well.\nReally.", ops=ops)
    assert out.matter == {
        "base_model": ["org/chat-1b"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "llama3.2",
        "language": ["no", "1e3"],
        "datasets": None,
        "tags": ["merge", "mergeflow", "math"],
    }
    text = out.text("README.md")
    for line in (
        "# both",
        "> Counts well.",
        "> Really.",
        "| `base` | `./base` |  |",
        f"| `chat` | `org/chat-1b` | `{'c' * 40}` |",
        "- `ties` ([arXiv:2306.01708](https://arxiv.org/abs/2306.01708))",
        "- `linear`",
        "mergeflow run recipe.yaml -o ../again",
        f"```yaml\n{RECIPE}```",
    ):
        assert f"\n{line}\n" in text
    assert text.count("- `linear`") == 1
    assert out.text("recipe.yaml") == RECIPE


def test_the_cards_own_keys_win_over_ours(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": LLAMA})
    card = {"library_name": "vllm", "base_model": "org/x", "tags": "one"}
    matter = Published(like, card=card).matter
    assert (matter["library_name"], matter["base_model"]) == ("vllm", "org/x")
    assert matter["tags"] == ["merge", "mergeflow", "one"]


def test_a_config_of_our_own_models_is_not_announced_as_one_of_transformers(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": {"architectures": ["mergeflow_mlp"]}})
    assert Published(like).matter == {"base_model_relation": "merge", "tags": ["merge", "mergeflow"]}


def test_an_output_of_deltas_is_announced_as_such(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": LLAMA})
    out = Published(like, space="delta", output="math")
    assert out.matter == {"base_model_relation": "merge", "tags": ["merge", "mergeflow", "delta"]}
    assert "# both: math\n\nNot a model that runs: its tensors are of the space `delta`" in out.text("README.md")


def test_nothing_in_a_recipe_breaks_out_of_its_place_in_the_card(tmp_path: Path) -> None:
    like = model(tmp_path, "base", {"config.json": LLAMA})
    description = "---\nlicense: stolen\n---\n\n```\n<!-- \x1b[2J \ud800 ````"
    recipe = RECIPE + "description: '---\n\n  `````\n\n  --- x'\n"
    inputs = {"base": like, "odd": replace(like, folder=replace(like.folder, label="./a|b`c\nd"))}
    card = {"license": "mit\n---\nx: 1", "tags": ["---", "a: b\n---"]}
    out = Published(like, inputs=inputs, description=description, recipe=recipe, card=card)
    assert out.matter["license"] == "mit\n---\nx: 1"
    assert out.matter["tags"] == ["merge", "mergeflow", "---", "a: b\n---"]
    text = out.text("README.md")
    body = text.split("\n---\n", 1)[1]
    assert "\n---\n" not in body.replace("> ---", "").split("``````yaml")[0]
    assert all(
        line.startswith("> ")
        for line in body.split("# both\n\n")[1].split("\n\nA merge of")[0].split("\n")
        if line != ">"
    )
    assert f"``````yaml\n{recipe}``````\n" in text
    assert "| `odd` | `./a\\|b'c d` |  |" in text
    assert "\x1b" not in text
    assert yaml.safe_load(out.text("recipe.yaml"))["name"] == "both"


def test_a_card_that_yaml_cannot_say_is_an_error_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^output\.card: "):
        Published(model(tmp_path, "base"), card={"x": float("nan")})


def test_no_folder_of_this_machine_stands_in_any_file(tmp_path: Path) -> None:
    made = model(tmp_path, "base", {"config.json": {**LLAMA, "_name_or_path": str(tmp_path)}})
    like = open_checkpoint(locate(str(tmp_path / "base"), relative_to=tmp_path))
    assert like.folder.label.startswith("/")
    out = Published(like, inputs={"base": like, "other": made})
    assert "| `base` | `base` |  |" in out.text("README.md")
    for name in out.made():
        assert str(tmp_path) not in out.text(name)


def test_the_same_arguments_give_the_same_bytes_wherever_the_models_lie(tmp_path: Path) -> None:
    files = {"config.json": LLAMA, "tokenizer.json": "{}", "LICENSE": "mit", "1_Pooling/config.json": "{}"}
    first = Published(model(tmp_path / "x", "base", files), card={"tags": ["b", "a"]})
    reordered = dict(reversed(files.items()))
    second = Published(model(tmp_path / "y", "base", reordered), card={"tags": ["b", "a"]})
    assert first.files == second.files
    assert all(file.output == "" for file in first.files.values())
