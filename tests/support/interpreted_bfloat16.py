"""bfloat16 in Triton's interpreter as hardware computes it.

The interpreter keeps bfloat16 as the integers of its bits. It multiplies and adds those integers, and its casts
truncate. Here operands are widened to float32 before any arithmetic, and results are rounded to nearest, ties to even.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from betaclip.kernels import architecture


def mend() -> None:
    """Make the interpreter compute bfloat16 rightly, and let the kernels run in it."""
    import triton.language as tl
    from triton.runtime import interpreter

    def is_bfloat16(value: Any) -> bool:
        return isinstance(value, interpreter.TensorHandle) and value.dtype.name == "bf16"

    def widened(value: Any) -> Any:
        if not is_bfloat16(value):
            return value
        return interpreter.TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(value: Any) -> Any:
        bits = torch.tensor(value.data, dtype=torch.float32).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    def in_float32(compute: Callable[..., Any]) -> Callable[..., Any]:
        def computed(builder: Any, first: Any, *rest: Any) -> Any:
            # All operands have one dtype. The condition of a selection comes first, and that needs no arithmetic.
            if first.dtype.name != "bf16":
                return compute(builder, first, *rest)
            result = compute(builder, widened(first), *map(widened, rest))
            return rounded(result) if result.data.dtype == np.float32 else result  # comparisons give booleans

        return computed

    def cast(plain: Callable[..., Any]) -> Callable[..., Any]:
        def converted(builder: Any, value: Any, dtype: Any, *rounding: Any) -> Any:
            to_nearest = not rounding or rounding[0] in (None, interpreter._ir.ROUNDING_MODE.RTNE)
            if dtype.scalar != tl.bfloat16 or not to_nearest:
                return plain(builder, widened(value), dtype, *rounding)
            return value if is_bfloat16(value) else rounded(value)

        return converted

    def dot(product: Callable[..., Any]) -> Callable[..., Any]:
        return lambda builder, a, b, *rest: product(builder, widened(a), widened(b), *rest)

    patches: dict[Callable[..., Any], tuple[str, ...]] = {
        in_float32: ("binary_op", "unary_op", "ternary_op", "create_fma", "create_fabs", "create_rsqrt", "create_erf"),
        cast: ("cast_impl", "create_fp_to_fp"),
        dot: ("create_dot",),
    }
    for patch, names in patches.items():
        for name in names:
            setattr(interpreter.InterpreterBuilder, name, patch(getattr(interpreter.InterpreterBuilder, name)))
    architecture.INTERPRETED_DTYPES.add(torch.bfloat16)
