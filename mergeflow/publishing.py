"""What stands in an output folder beside its weights: which files, and what is in them.

It decides, and writes nothing: each file is a `SideFile`, either bytes made here or the name of a file to copy out of a
model's folder. It alone knows what a config, a tokenizer and a model card must say. Files are chosen by what they are,
from a short list of kinds, and never by what they are not: a folder from a stranger can hold anything, and what nobody
asked for stays behind. The bytes depend on the arguments alone: no clock, no machine, no path of this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from mergeflow.document import dump_yaml
from mergeflow.dtypes import BY_NAME
from mergeflow.errors import InputError, RecipeError, printable
from mergeflow.graph import SideFile, Stacked
from mergeflow.restacking import restacked

if TYPE_CHECKING:
    from mergeflow.checkpoint import Checkpoint

MANIFEST = "mergeflow.json"
CARD = "README.md"
RECIPE = "recipe.yaml"
CONFIG = "config.json"
GENERATION = "generation_config.json"
LARGEST_SIDE_FILE = 64_000_000
LARGEST_CARD = 1_000_000

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "bpe.codes",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
    "tokenizer.model.v*",
    "sentencepiece*.model",
    "*.spm",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
LICENCE_SUFFIXES = ("", ".txt", ".md", ".pdf", ".html", ".rst")
SIDE_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".tflite")
LEFT_BEHIND = (
    MANIFEST,
    "*.index.json",
    "adapter_*",
    "trainer_state.json",
    "training_args.*",
    "*_results.json",
    "rng_state*",
    "optimizer.*",
    "scheduler.*",
)
QUANTISATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
LEFT_FOLDERS = ("runs", "global_step*", "checkpoint-*")

VOCABULARY_IDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
DTYPE_KEYS = ("dtype", "torch_dtype")
TIE = "tie_word_embeddings"
DEEPEST_CONFIG = 8


def side_files(
    *,
    output: str,
    like: Checkpoint | None,
    like_name: str,
    tokenizer: Checkpoint | None,
    tokenizer_name: str,
    inputs: Mapping[str, Checkpoint],
    dtypes: Mapping[str, int],
    config: Mapping[str, Any],
    card: Mapping[str, Any],
    recipe_name: str,
    description: str,
    resolved_recipe: str,
    ops: Sequence[tuple[str, str | None]],
    tied: bool | None,
    space: str,
    quantised: bool = False,
    stacks: Sequence[Stacked] = (),
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """The files beside an output's shards, sorted by name, and the warnings that go with them.

    `output` is the output's key; `like` gives config and side files, `tokenizer` (None: `like`) the tokenizer's files
    and token ids; `inputs` are the checkpoints the output is made of, in the recipe's order. `dtypes` counts the bytes
    written in each dtype (torch's names). `config` and `card` are the recipe's overrides, `ops` the ops used with their
    papers. `tied` sets the flag of tied embeddings, None leaves it. `quantised` says that the tensors are `like`'s quantised
    ones as stored, so that what it says of them is kept. `stacks` are the numbered stacks that were made of layers, whose
    count and lists the config follows, and `configs` those of the models that layers come from. Raises InputError for JSON
    that cannot be read, RecipeError for a card that YAML cannot say.
    """
    where = f"outputs.{output}" if output else "output"
    if tokenizer is None:
        tokenizer, tokenizer_name = like, like_name
    follow = tokenizer if tokenizer_name != like_name else None
    warnings: list[str] = []
    files: dict[str, SideFile] = {}

    def copy(model: str, names: Iterable[str]) -> None:
        files.update({name: SideFile(output, name, model=model, name=name) for name in names})

    def write(name: str, content: str) -> None:
        files[name] = SideFile(output, name, content=content.encode())

    made: dict[str, Any] | None = None
    if like is not None:
        copy(like_name, _copied(like, like_name, _like_files(like, quantised), where, warnings))
        warnings += _code(like, like_name, where)
        warnings += _modules(like, like_name, where)
        if like.config is not None:
            source, lints = restacked(like.config, stacks, configs or {}, config)
            warnings += [f"{where}: {lint}" for lint in lints]
            made = _config(source, {} if quantised else dtypes, config, tied, follow, quantised)
            write(CONFIG, _json(made, like_name))
        generation = _generation(like, follow)
        if generation is not None:
            write(GENERATION, _json(generation, like_name))
    if config and made is None:
        fix = "Name a model with a config as `like`, or drop `config:`"
        warnings.append(f"{where}.config: nothing to set it in, the output has no {CONFIG}. {fix}")
    if tokenizer is not None:
        copy(tokenizer_name, _copied(tokenizer, tokenizer_name, _tokenizer_files(tokenizer), where, warnings))
        if follow is not None:
            warnings += _code(follow, tokenizer_name, where)
        warnings += _lints(tokenizer, tokenizer_name, inputs, f"{where}.tokenizer")

    recipe = resolved_recipe.rstrip("\n") + "\n"
    title = f"{recipe_name}: {output}" if output else recipe_name
    try:
        matter = _front_matter(like, made, inputs, card, space)
    except RecipeError as error:
        raise error.placed(f"{where}.card") from None
    write(CARD, matter + _card_text(title, description, inputs, ops, recipe, space, stacks))
    write(RECIPE, recipe)
    return tuple(files[name] for name in sorted(files)), tuple(warnings)


# Which files


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _plain_names(model: Checkpoint) -> Iterator[str]:
    """The folder's names that can be written below any other folder as they are, at most one folder deep.

    A folder that holds weights describes those, and they are not in the output (onnx/, original/): it stays behind.
    Around a single file of weights without a config stands anything at all, and nothing of it is the model's.
    """
    if getattr(model.folder, "only_file", None) and model.config is None:
        return
    names = sorted(model.folder.names())
    heavy = {name.split("/")[0] for name in names if "/" in name and name.lower().endswith(WEIGHT_SUFFIXES)}
    for name in names:
        parts = name.split("/")
        hidden = any(not part or part.startswith(".") for part in parts)
        plain = name.isprintable() and "\\" not in name and ":" not in name
        left = len(parts) > 1 and (parts[0] in heavy or _fits(parts[0], LEFT_FOLDERS))
        if len(parts) <= 2 and plain and not hidden and not left:
            yield name


def _is_tokenizer(name: str) -> bool:
    return _fits(name, TOKENIZER_FILES) or _fits(name.rpartition("/")[2], TOKENIZER_FILES)


def _tokenizer_files(model: Checkpoint) -> Iterator[str]:
    return filter(_is_tokenizer, _plain_names(model))


def _like_files(like: Checkpoint, quantised: bool) -> Iterator[str]:
    """What is copied from `like`: side files and licences, without config, tokenizer and what training left."""
    left = LEFT_BEHIND if quantised else (*LEFT_BEHIND, *QUANTISATION)
    for name in _plain_names(like):
        file = PurePosixPath(name)
        if _fits(name.upper(), LICENCES):
            if file.suffix.lower() in LICENCE_SUFFIXES:
                yield name
        elif name == CONFIG or file.suffix not in SIDE_SUFFIXES:
            continue  # a config below the top (1_Pooling/) is a side file, the one at the top is made here
        elif not _is_tokenizer(name) and not _fits(file.name, left):
            yield name


def _copied(model: Checkpoint, model_name: str, names: Iterable[str], where: str, warnings: list[str]) -> Iterator[str]:
    """The names that can be copied; a warning for each that is too large, unreadable, or a link out of its folder."""
    for name in names:
        what = f"{where}: {name} of '{model_name}' is not copied"
        try:
            size = model.folder.size(name)
        except InputError as error:
            warnings.append(f"{what}: it {error.what}. {error.fix}".rstrip(". "))
            continue
        if size < LARGEST_SIDE_FILE:
            yield name
        else:
            warnings.append(f"{what}: it has {size / 1e6:,.0f} MB. Copy it by hand if it is needed")


def _readable(model: Checkpoint, name: str) -> bool:
    """Whether a file is there and may be read; one that links out of its folder counts as missing, as in `_copied`."""
    try:
        return model.folder.exists(name) and model.folder.size(name) < LARGEST_SIDE_FILE
    except InputError:
        return False


def _modules(like: Checkpoint, like_name: str, where: str) -> Iterator[str]:
    """A warning when `like` is a sentence encoder with modules that have weights of their own."""
    if not like.folder.exists("modules.json"):
        return
    weights = (name for name in like.folder.names() if name.lower().endswith(WEIGHT_SUFFIXES))
    heavy = sorted({name.split("/")[0] for name in weights if fnmatchcase(name, "[0-9]*_*/*")})
    if heavy:
        what = f"modules of '{like_name}' with weights of their own are not in the output: {_listed(heavy)}"
        yield f"{where}: {what}. Copy these folders by hand"


def _code(model: Checkpoint, model_name: str, where: str) -> Iterator[str]:
    code = [name for name in _plain_names(model) if name.endswith(".py")]
    if code:
        fix = f"If you trust it, copy it by hand from {model.folder.label} into the output"
        yield f"{where}: custom code of '{model_name}' is not copied: {_listed(code)}. {fix}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


# What is in config.json and generation_config.json


def _json(value: Mapping[str, Any], model: str) -> str:
    """`value` as Hugging Face writes it; non-ASCII is escaped, so that no character can fail to be written."""
    try:
        return json.dumps(value, indent=2, default=dict) + "\n"
    except RecursionError:
        raise InputError("the config is nested too deeply", where=model) from None


def _config(
    source: Mapping[str, Any],
    dtypes: Mapping[str, int],
    overrides: Mapping[str, Any],
    tied: bool | None,
    follow: Checkpoint | None,
    quantised: bool,
) -> dict[str, Any]:
    """`like`'s config as the output's: its own keys in their order, then what is new."""
    dropped = ("_name_or_path",) if quantised else ("_name_or_path", "quantization_config")
    config = {key: value for key, value in source.items() if key not in dropped}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in config["text_config"].items() if key not in dropped}
    dtype = _written_dtype(dtypes)
    if dtype is not None:
        if not any(key in config for key in DTYPE_KEYS):
            config["dtype"] = dtype
        config = _everywhere(config, dict.fromkeys(DTYPE_KEYS, dtype))
    if tied is not None:
        # Class defaults differ, and which of the two sections is read differs too: say it in both.
        config[TIE] = tied
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = {**config["text_config"], TIE: tied}
        config = _everywhere(config, {TIE: tied})
    if follow is not None and follow.config is not None:
        config = _with_ids(config, follow.config)
    return _merged(config, overrides)


def _written_dtype(dtypes: Mapping[str, int]) -> str | None:
    """The float dtype most bytes are written in; None when there is none.

    A model of float8 tensors is said to be bfloat16, which holds all their values: torch has no modules of float8, so a
    loader that takes the config at its word would fail.
    """
    floats = {name: size for name, size in dtypes.items() if size and BY_NAME[name].kind == "float"}
    if not floats:
        return None
    most = max(sorted(floats), key=floats.__getitem__)
    return most if BY_NAME[most].size > 1 else "bfloat16"


def _everywhere(config: dict[str, Any], values: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """`config` with `values` where their keys stand, in the configs of its parts too (text_config, vision_config)."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        part = key.endswith("_config") or key in ("encoder", "decoder")
        if key in values:
            found[key] = values[key]
        elif part and isinstance(value, dict) and depth < DEEPEST_CONFIG:
            found[key] = _everywhere(value, values, depth + 1)
        else:
            found[key] = value
    return found


def _ids(*sections: Any) -> dict[str, Any]:
    """The token ids that sections of a config give; the first section that has one wins."""
    given: dict[str, Any] = {}
    for section in sections:
        if isinstance(section, Mapping):
            given.update({key: section[key] for key in VOCABULARY_IDS if key in section and key not in given})
    return given


def _with_ids(config: dict[str, Any], tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the token ids of the tokenizer's model, in the text section where there is one.

    An id that only `config` has goes when both are of one model type, since the default of their class is then what the
    tokenizer's model means; between two types it stays, since nothing is known.
    """
    same = config.get("model_type") == tokenizer.get("model_type")
    text, tokenizer_text = config.get("text_config"), tokenizer.get("text_config")
    top = _replaced(config, _ids(tokenizer, tokenizer_text), same, add=not isinstance(text, dict))
    if isinstance(text, dict):
        top["text_config"] = _replaced(text, _ids(tokenizer_text, tokenizer), same, add=True)
    return top


def _replaced(section: Mapping[str, Any], ids: Mapping[str, Any], drop: bool, add: bool) -> dict[str, Any]:
    kept = {k: ids.get(k, v) for k, v in section.items() if k in ids or k not in VOCABULARY_IDS or not drop}
    return {**kept, **{key: value for key, value in ids.items() if add and key not in kept}}


def _generation(like: Checkpoint, follow: Checkpoint | None) -> dict[str, Any] | None:
    """What generation_config.json must say when the tokenizer is another model's; None to leave it as copied.

    How to sample stays `like`'s; when to stop follows the tokenizer's model.
    """
    if follow is None:
        return None
    own = _json_of(like, GENERATION)
    theirs = _json_of(follow, GENERATION)
    if theirs is not None:
        return _replaced(own or {}, _ids(theirs), drop=True, add=True) if own or _ids(theirs) else None
    if own is None:
        return None
    source = follow.config or {}
    same = (like.config or {}).get("model_type") == source.get("model_type")
    return _replaced(own, _ids(source, source.get("text_config")), drop=same, add=False)


def _json_of(model: Checkpoint, name: str) -> Mapping[str, Any] | None:
    found = model.json(name) if _readable(model, name) else None
    return found if isinstance(found, Mapping) else None


def _merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


# Lints


def _lints(chosen: Checkpoint, chosen_name: str, inputs: Mapping[str, Checkpoint], where: str) -> Iterator[str]:
    """Warnings when an input's tokenizer can do what the chosen one cannot, or stops elsewhere."""
    others = {name: model for name, model in inputs.items() if name != chosen_name}
    for kind, has in (("tokenizer", _has_tokenizer), ("chat template", _has_chat_template)):
        able = None if has(chosen) else next((name for name, model in others.items() if has(model)), None)
        if able is not None:
            fix = f"Write `tokenizer: {able}` to take its tokenizer"
            yield f"{where}: '{chosen_name}' has no {kind}, and '{able}' has one. {fix}"
            break
    ends = _ends(chosen)
    seen = [ends]
    for name, model in others.items():
        theirs = _ends(model)
        if ends and theirs and theirs not in seen:
            seen.append(theirs)
            values = f"{_numbers(ends)} in '{chosen_name}', {_numbers(theirs)} in '{name}'"
            fix = f"Text may not stop where '{name}' learned to: write `tokenizer: {name}` to take its ids"
            yield f"{where}: end-of-text ids differ: {values}. {fix}"


def _has_tokenizer(model: Checkpoint) -> bool:
    return any(True for _ in _tokenizer_files(model))


def _has_chat_template(model: Checkpoint) -> bool:
    if any(_fits(name, CHAT_TEMPLATES) for name in _plain_names(model)):
        return True
    return bool((_json_of(model, "tokenizer_config.json") or {}).get("chat_template"))


def _ends(model: Checkpoint) -> frozenset[int]:
    """The ids a model stops at: generation_config.json says it before config.json; empty when neither does."""
    config = model.config or {}
    for section in (_json_of(model, GENERATION), config, config.get("text_config")):
        ids = section.get("eos_token_id") if isinstance(section, Mapping) else None
        found = frozenset(i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int))
        if found:
            return found
    return frozenset()


def _numbers(ids: frozenset[int]) -> str:
    return str(sorted(ids))


# The card


def _front_matter(
    like: Checkpoint | None,
    config: Mapping[str, Any] | None,
    inputs: Mapping[str, Checkpoint],
    card: Mapping[str, Any],
    space: str,
) -> str:
    """The card's YAML: what a hub reads. Keys of the recipe's `card` win; its tags come after ours."""
    matter: dict[str, Any] = {}
    hub = list(dict.fromkeys(name for name in map(_hub_name, inputs.values()) if name is not None))
    if hub:
        matter["base_model"] = hub
    matter["base_model_relation"] = "merge"
    if space == "weight":
        if _loads_in_transformers(config):
            matter["library_name"] = "transformers"
        pipeline = _pipeline_tag(like) if like is not None else None
        if pipeline is not None:
            matter["pipeline_tag"] = pipeline
    tags = card.get("tags", ())
    own = ["merge", "mergeflow", *([] if space == "weight" else [space])]
    given = [tags] if isinstance(tags, str) else list(tags or ())
    matter |= {key: value for key, value in card.items() if key != "tags"}
    matter["tags"] = list(dict.fromkeys([*own, *given]))
    return f"---\n{dump_yaml(matter)}---\n\n"


def _hub_name(model: Checkpoint) -> str | None:
    """`owner/name` of a checkpoint out of a hub; None for one of this machine."""
    return None if model.folder.revision is None else model.folder.label.split("@")[0]


def _source(model: Checkpoint) -> str:
    """Where a checkpoint is from, without the folders of this machine above it."""
    label = model.folder.label
    local = PurePosixPath(label).name if label.startswith(("/", "~")) else label
    return _hub_name(model) or local


def _loads_in_transformers(config: Mapping[str, Any] | None) -> bool:
    named = (config or {}).get("architectures")
    classes = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return bool(classes) and not any(name.startswith("mergeflow_") for name in classes)


def _pipeline_tag(like: Checkpoint) -> str | None:
    """The task that `like`'s card names: one line of its front matter, which no YAML parser need read."""
    if not _readable(like, CARD) or like.folder.size(CARD) > LARGEST_CARD:
        return None
    text = like.folder.read(CARD).decode("utf-8", "replace").replace("\r\n", "\n")
    matter = re.match(r"\ufeff?---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^pipeline_tag:[ \t]*[\"']?([a-z0-9-]+)[\"']?[ \t]*$", matter.group(1), re.M) if matter else None
    return found.group(1) if found else None


def _card_text(
    title: str,
    description: str,
    inputs: Mapping[str, Checkpoint],
    ops: Sequence[tuple[str, str | None]],
    recipe: str,
    space: str,
    stacks: Sequence[Stacked],
) -> str:
    """The card's words. The description is quoted, so that a fence or a tag left open in it ends with it."""
    parts = [f"# {title}"]
    if description.strip():
        lines = printable(description.strip().expandtabs(4)).split("\n")
        parts.append("\n".join(f"> {line}".rstrip() for line in lines))
    if space == "weight":
        parts.append("A merge of the models below, made with mergeflow.")
    else:
        parts.append(f"Not a model that runs: its tensors are of the space `{space}`, made with mergeflow.")
    if inputs:
        rows = [(f"`{name}`", _cell(_source(m)), _cell(m.folder.revision or "")) for name, m in inputs.items()]
        table = ["| model | source | revision |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
        parts += ["## Models", "\n".join(table)]
    if ops:
        used = dict.fromkeys(ops)
        parts += ["## Ops", "\n".join(f"- `{name}`" + (f" ({_paper(paper)})" if paper else "") for name, paper in used)]
    if stacks:
        parts += ["## Layers", *map(_layers_table, stacks)]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", recipe)), default=0))
    parts += [
        "## How it was made",
        f"`{RECIPE}` in this folder is the whole recipe, with every value filled in; `{MANIFEST}` lists what was read "
        "and written, with hashes. To make it again:",
        f"```bash\nmergeflow run {RECIPE} -o ../again\n```",
        f"{fence}yaml\n{recipe}{fence}",
    ]
    return "\n\n".join(parts) + "\n"


def _layers_table(stacked: Stacked) -> str:
    """Which layers of a stack come from where."""
    rows = [f"| {to} | {_cell(source)} | {layers} |" for to, source, layers in stacked.runs()]
    title = f"{_cell(stacked.blocks)}, as node {_cell(stacked.node)} stacks it" if stacked.blocks else "The stack"
    return "\n".join([f"{title}:\n", "| layers | from | its layers |", "| --- | --- | --- |", *rows])


def _cell(text: str) -> str:
    """A table's cell in code style."""
    plain = cell_text(text)
    return f"`{plain}`" if plain else ""


def cell_text(text: str) -> str:
    """Text for a table's cell, in code style or not: what would end the cell or the code is replaced."""
    return printable(text).replace("\n", " ").replace("`", "'").replace("|", "\\|")


def _paper(paper: str) -> str:
    found = re.fullmatch(r"arXiv:([0-9]{4}\.[0-9]{4,5})", paper)
    return f"[{paper}](https://arxiv.org/abs/{found.group(1)})" if found else printable(paper).replace("\n", " ")
