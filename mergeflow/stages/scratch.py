"""Files that a stage makes on its way: what a disk refuses is a MachineError that names the file, whoever writes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeflow.errors import MachineError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Around whatever writes a file. Raises MachineError where the disk is full or fails."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors tells of the disk in words alone
        raise MachineError(
            f"cannot be written: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            fix="Make room on its disk, and run again: what is made stays.",
        ) from None


def save(
    path: Path,
    tensors: Mapping[str, Tensor] | Mapping[str, np.ndarray[Any, Any]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file, of torch's tensors or of numpy's arrays. Raises MachineError where the disk is full or fails."""
    import numpy as np
    from safetensors import numpy as arrays
    from safetensors import torch as others

    values: dict[str, Any] = dict(tensors)
    own = arrays if all(isinstance(one, np.ndarray) for one in values.values()) else others
    with written(path):
        own.save_file(values, path, metadata=metadata)


def put(path: Path, content: bytes) -> None:
    """Write a small file beside, make it durable, and put it in the place of the last. Raises MachineError as `written` does."""
    part = path.with_name(f"{path.name}.part")
    with written(path):
        part.write_bytes(content)
        durable(part)
        os.replace(part, path)


def durable(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
