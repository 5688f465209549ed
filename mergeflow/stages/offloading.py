"""Statistics of a model that is larger than memory and no plain list of blocks: its blocks are read while it runs.

Models of two stacks, of images, or with more than one input cannot be walked (mergeflow.stages.walking). They run whole, but the
weights of a block, which is most of them, are read from their files just before it runs and dropped behind it; what stands in no
block stays. So memory holds the outside and one block, and weights are read once for every batch, which a larger `batch_size`
makes fewer. What is computed is what the whole model in memory would compute, to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mergeflow.errors import MachineError
from mergeflow.stages import collecting, data, models, naming
from mergeflow.stages.filling import Filling

if TYPE_CHECKING:
    from torch import nn

    from mergeflow.stages import StageJob


def blocks_of(model: nn.Module) -> dict[str, list[str]]:
    """The parameters of each block, by the block's name: of the outermost lists of modules, what nothing outside shares."""
    from torch import nn

    stacks: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(name.startswith(f"{s}.") for s in stacks):
            stacks.append(name)
    own: dict[int, tuple[str, set[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        block = "" if stack is None else f"{stack}.{name[len(stack) + 1 :].split('.')[0]}"
        own.setdefault(id(parameter), (name, set()))[1].add(block)
    found: dict[str, list[str]] = {}
    for name, blocks in own.values():
        if len(blocks) == 1 and "" not in blocks:
            found.setdefault(blocks.pop(), []).append(name)
    return found


def least_bytes(model: nn.Module, blocks: Mapping[str, list[str]]) -> int:
    """Bytes of weights in memory at once: what stands outside, and the largest block."""
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    inside = [sum(sizes[name] for name in names) for names in blocks.values()]
    return sum(sizes.values()) - sum(inside) + max(inside, default=0)


def collect(
    job: StageJob, folder: models.Folder, examples: data.Examples, model: nn.Module, names: naming.Names
) -> collecting.Collected:
    """Collect with the weights of one block at a time. Raises MachineError where that is too much, or cannot be done."""
    blocks = blocks_of(model)
    least = least_bytes(model, blocks)
    if least > job.memory:
        raise MachineError(
            f"{folder.architecture} takes {least:,} bytes for what stands in no block and its largest block, "
            f"and may take {job.memory:,}",
            where=str(folder.path),
            fix="Give it more --memory.",
        )
    filling = Filling(model, folder, names, job.device)
    inside = {name for own in blocks.values() for name in own}
    filling.fill([name for name, _ in model.named_parameters() if name not in inside])
    filling.fill_buffers()
    for module in model.modules():
        module._buffers = {name: one if one is None else one.to(job.device) for name, one in module._buffers.items()}
    job.progress("the model is larger than half the memory: its blocks are read again for every batch", 0, 0)
    with _streaming(filling, blocks):
        try:
            return collecting.collect_with(job, examples, model, names)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            raise MachineError(
                f"the model is larger than half the memory, and {folder.architecture} cannot be run block by block: "
                "weights of a block are used outside it",
                where=str(folder.path),
                fix="Give it more --memory, so that all of the model is loaded.",
            ) from error


@contextlib.contextmanager
def _streaming(filling: Filling, blocks: Mapping[str, list[str]]) -> Iterator[None]:
    """While this holds, a block's weights are read before it runs, and dropped behind it."""
    handles: list[Any] = []
    for name, own in blocks.items():
        block = filling.model.get_submodule(name)
        handles += [
            block.register_forward_pre_hook(lambda *_, own=own: filling.fill(own)),
            block.register_forward_hook(lambda *_, own=own: filling.empty(own), always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
