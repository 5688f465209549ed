"""The one table of dtypes: the name in a safetensors header, the name in torch (and in recipes), bytes, and kind.

Reading it needs no torch; `torch_dtype` loads torch when a tensor is really made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["float", "integer", "boolean"]


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype. `name` is torch's (`bfloat16`), `stored` the safetensors header's (`BF16`), `size` in bytes.

    `largest` is the greatest finite value of a float dtype; None for integers and booleans.
    """

    name: str
    stored: str
    size: int
    kind: Kind
    largest: float | None = None


DTYPES: tuple[DType, ...] = (
    DType("float64", "F64", 8, "float", 1.7976931348623157e308),
    DType("float32", "F32", 4, "float", 3.4028234663852886e38),
    DType("float16", "F16", 2, "float", 65504.0),
    DType("bfloat16", "BF16", 2, "float", 3.3895313892515355e38),
    DType("float8_e4m3fn", "F8_E4M3", 1, "float", 448.0),
    DType("float8_e5m2", "F8_E5M2", 1, "float", 57344.0),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", 1, "float", 240.0),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", 1, "float", 57344.0),
    DType("int64", "I64", 8, "integer"),
    DType("int32", "I32", 4, "integer"),
    DType("int16", "I16", 2, "integer"),
    DType("int8", "I8", 1, "integer"),
    DType("uint64", "U64", 8, "integer"),
    DType("uint32", "U32", 4, "integer"),
    DType("uint16", "U16", 2, "integer"),
    DType("uint8", "U8", 1, "integer"),
    DType("bool", "BOOL", 1, "boolean"),
)
BY_NAME: dict[str, DType] = {dtype.name: dtype for dtype in DTYPES}
BY_STORED: dict[str, DType] = {dtype.stored: dtype for dtype in DTYPES}
FLOATS: tuple[str, ...] = tuple(dtype.name for dtype in DTYPES if dtype.kind == "float")


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of the same name."""
    import torch

    found: torch.dtype = getattr(torch, dtype.name)
    return found
