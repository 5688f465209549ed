"""A local Hugging Face folder -> a model that runs: the class that config.json's `architectures` names.

The class is transformers' own, or one of our small table; code that comes with a model is never run. Models are in eval mode,
in float32 (float64 where they are stored so), whatever the dtype on disk: statistics are not to be those of a rounding.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergeflow.checkpoint import ALLOW, WRITE_FIRST, Checkpoint, open_checkpoint
from mergeflow.errors import InputError, MachineError, MergeflowError
from mergeflow.hub import locate

if TYPE_CHECKING:
    import torch
    from torch import nn

Task = Literal["features", "images", "seq2seq", "classifier", "tokens", "causal", "encoder"]
"""What a model reads and gives: rows of numbers, images; text, and then a text, a label, a label for each token, the next token,
or vectors alone."""

OURS = ("mergeflow_mlp", "MergeflowMLP")
EXTRA = "Install it with `pip install 'mergeflow[models]'`."


@dataclass(frozen=True, eq=False)
class Folder:
    """A model's folder before any weight is read."""

    path: Path
    config: Mapping[str, Any]
    checkpoint: Checkpoint

    @property
    def architecture(self) -> str:
        """The class that config.json names. Raises InputError where it names none."""
        named = self.config.get("architectures")
        if isinstance(named, list) and named and isinstance(named[0], str):
            return named[0]
        if self.config.get("model_type") in OURS:
            return OURS[1]
        raise InputError(
            "names no class in `architectures`",
            where=str(self.path / "config.json"),
            fix='Add it, e.g. "architectures": ["LlamaForCausalLM"].',
        )

    @property
    def ours(self) -> bool:
        """Whether the class is one of our own."""
        return self.architecture in OURS

    @property
    def task(self) -> Task:
        """What the class reads and gives."""
        name = self.architecture
        if self.ours:
            return "features"
        if "ForImageClassification" in name or self.image_size is not None:
            return "images"
        if self._two_sided and "ForSequenceClassification" not in name:
            return "seq2seq"
        for part, task in _TASKS.items():
            if part in name:
                return task
        return "encoder"

    @property
    def _two_sided(self) -> bool:
        """Whether a decoder reads what an encoder gives; where config.json does not say, as its class has it."""
        given = self.config.get("is_encoder_decoder")
        if given is None and "ForConditionalGeneration" in self.architecture:
            given = config_of(self).is_encoder_decoder
        return bool(given)

    @property
    def image_size(self) -> Any:
        """The side of the images that the model reads; None where it reads no images."""
        return self.config.get("image_size") if "text_config" not in self.config else None

    @property
    def labels(self) -> Mapping[str, int] | None:
        """The number of each label, by the names in config.json; None where it names none."""
        names = self.config.get("label2id")
        if isinstance(names, dict) and names:
            return {str(name): int(number) for name, number in names.items()}
        ids = self.config.get("id2label")
        if isinstance(ids, dict) and ids:
            return {str(name): int(number) for number, name in ids.items()}
        return None

    @property
    def n_labels(self) -> int:
        """How many classes a classifier tells apart."""
        given = self.config.get("num_labels")
        if isinstance(given, int):
            return given
        return len(self.labels) if self.labels else 2

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads at once; None where it has no such number."""
        found = self.number("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
        return found - (2 if self.config.get("model_type") in _OFFSET else 0) if found else None

    def longest(self, asked: int | None, unknown: int) -> int:
        """Tokens of a text that it reads: no more than its context and than what is asked for; `unknown` where neither is given."""
        return min((limit for limit in (self.context, asked) if limit), default=unknown)

    def number(self, *keys: str) -> int:
        """The first positive number that config.json, or else its part for text, has under one of these; 0 where it has none."""
        text = self.config.get("text_config")
        given = (one.get(key) for one in (self.config, text if isinstance(text, dict) else {}) for key in keys)
        return next((value for value in given if isinstance(value, int) and value > 0), 0)

    @property
    def elements(self) -> int:
        """How many floating-point numbers the model has."""
        return sum(tensor.elements for tensor in self.checkpoint.tensors.values() if tensor.dtype.kind == "float")

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors as they are stored."""
        return sum(tensor.nbytes for tensor in self.checkpoint.tensors.values())


_TASKS: dict[str, Task] = {
    "ForSequenceClassification": "classifier",
    "ForTokenClassification": "tokens",
    "ForConditionalGeneration": "causal",  # of texts and images, since there is no encoder apart
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
}
_OFFSET = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "data2vec-text", "mpnet", "xmod",
    "ibert", "esm", "luke", "markuplm",
)  # fmt: skip
"""Model types whose first position is that after the padding token's id, so that two positions are never used."""


def check_ids(highest: int, rows: int, where: str = "") -> None:
    """Raises InputError where a model of so many embeddings (0: not known) lacks ids that its tokenizer gives."""
    if 0 < rows <= highest:
        raise InputError(
            f"its tokenizer gives the id {highest}, and the model knows {rows}",
            where=where,
            fix="Use the tokenizer that the model was trained with.",
        )


def open_folder(path: Path, checkpoint: Checkpoint | None = None) -> Folder:
    """The folder by its config.json and headers, unless `checkpoint` has these already. Raises InputError."""
    where = str(path / "config.json")
    try:
        config = json.loads((path / "config.json").read_bytes())
    except FileNotFoundError:
        raise InputError(
            "holds no config.json", where=str(path), fix="A stage needs a whole Hugging Face folder."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {str(error)[:200]}", where=where) from None
    if not isinstance(config, dict):
        raise InputError("is not a JSON object", where=where)
    try:
        return Folder(path, config, checkpoint or open_checkpoint(locate(str(path.resolve()), relative_to=path)))
    except InputError as error:
        if error.fix == ALLOW:
            error.fix = WRITE_FIRST
        raise


def transformers() -> Any:
    """The package. Raises MachineError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise MachineError("running models needs transformers, which is not installed", fix=EXTRA) from None
    return transformers


def _class_of(folder: Folder) -> Any:
    library = transformers()
    found = getattr(library, folder.architecture, None)
    if not (isinstance(found, type) and issubclass(found, library.PreTrainedModel)):
        custom = " Its own code (`auto_map`) is never run." if "auto_map" in folder.config else ""
        raise InputError(
            f"names the class {folder.architecture[:80]}, which transformers {library.__version__} does not have.{custom}",
            where=str(folder.path / "config.json"),
            fix="Use a model of a class that transformers has, or another version of it.",
        )
    return found


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bars and remarks of transformers, whose findings are raised as errors instead."""
    logging = transformers().utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def config_of(folder: Folder) -> Any:
    """transformers' own reading of config.json. Raises InputError."""
    try:
        with quietly():
            return _class_of(folder).config_class.from_pretrained(folder.path, local_files_only=True)
    except MergeflowError:
        raise
    except Exception as error:
        raise InputError(
            f"transformers cannot read it: {_first_line(error)}", where=str(folder.path / "config.json")
        ) from error


def compute_dtype(folder: Folder) -> torch.dtype:
    """float32, or float64 where most of the model is stored so."""
    import torch

    count = {"float64": 0, "other": 0}
    for tensor in folder.checkpoint.tensors.values():
        if tensor.dtype.kind == "float":
            count["float64" if tensor.dtype.name == "float64" else "other"] += tensor.elements
    return torch.float64 if count["float64"] > count["other"] else torch.float32


def empty_model(folder: Folder, *, buffers: bool = False) -> nn.Module:
    """The model on the meta device, without weights; with `buffers` those that are made, not read, are real."""
    import torch

    if folder.ours:
        from mergeflow.stages.mlp import empty

        return empty(folder.config)
    config = config_of(folder)
    made = _class_of(folder)
    dtype = compute_dtype(folder)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with quietly():
            if buffers:
                from accelerate import init_empty_weights

                with init_empty_weights(include_buffers=False):
                    model: nn.Module = made._from_config(config, experts_implementation="eager")
            else:
                with torch.device("meta"):
                    model = made._from_config(config, experts_implementation="eager")
    except ImportError:
        raise MachineError("models larger than memory need accelerate, which is not installed", fix=EXTRA) from None
    except Exception as error:
        raise InputError(
            f"transformers cannot make {folder.architecture} of it: {_first_line(error)}",
            where=str(folder.path / "config.json"),
        ) from error
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()  # type: ignore[operator]
    return model.eval()


def load_model(folder: Folder, device: str = "cpu") -> nn.Module:
    """The model with its weights, in eval mode and without gradients.

    Raises InputError where the checkpoint lacks weights that the class has (the pooler of one without a head apart, which
    many lack and few use).
    """
    import torch

    if folder.ours:
        return _load_ours(folder).to(device)
    made = _class_of(folder)
    try:
        with quietly():
            model, info = made.from_pretrained(
                folder.path,
                config=config_of(folder),
                dtype=compute_dtype(folder),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                experts_implementation="eager",
                output_loading_info=True,
            )
    except MergeflowError:
        raise
    except Exception as error:
        raise InputError(
            f"transformers cannot load it as {folder.architecture}: {_first_line(error)}", where=str(folder.path)
        ) from error
    # What a pooler gives goes into the head of a class that has one, and out of one that has none.
    bare = folder.architecture.endswith("Model")
    lacks = sorted(name for name in info["missing_keys"] if not (bare and "pooler." in name))
    if lacks:
        raise InputError(
            f"lacks {len(lacks)} weights that {folder.architecture} has: {', '.join(lacks[:3])}",
            where=str(folder.path),
            fix="Take a model with all its weights: what is not there would be random.",
        )
    for parameter in model.parameters():
        # Out of the file's map: how a tensor lies in memory decides the last bits of a product, and a walk has it so.
        parameter.data = parameter.data.clone()
    loaded: nn.Module = model.to(torch.device(device)).eval().requires_grad_(False)
    return loaded


def _load_ours(folder: Folder) -> nn.Module:
    from mergeflow.stages.mlp import MergeflowMLP
    from mergeflow.stages.naming import read_tensor

    model = MergeflowMLP(folder.config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    have = {name: tensor.shape for name, tensor in folder.checkpoint.tensors.items()}
    odd = [name for name in sorted(wanted.keys() | have.keys()) if wanted.get(name) != have.get(name)]
    if odd:
        raise InputError(
            f"{len(odd)} tensors are not those of a mergeflow_mlp of its sizes: {', '.join(odd[:3])}",
            where=str(folder.path),
        )
    dtype = compute_dtype(folder)
    weights = {name: read_tensor(folder.checkpoint, name).to(dtype) for name in wanted}
    model.to(dtype).load_state_dict(weights)
    return model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    """What an error of another package says, short enough for one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
