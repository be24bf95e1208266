"""The one import of Triton. Without it the package still imports: kernels are then plain functions that nobody calls.

Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1, on a CPU) is decided when they are decorated, at the
import of their modules: INTERPRETED says what was decided, and later changes of the variable change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

triton: Any
tl: Any

try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ImportError:

    class _Missing:
        """Stands where a module of Triton would: what kernels name at import exists, and `jit` returns its function."""

        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, attribute: str) -> _Missing:
            return _Missing(f"{self._name}.{attribute}")

        def __call__(self, *args: Any, **options: Any) -> Any:
            if not self._name.endswith((".jit", ".constexpr")):
                raise ModuleNotFoundError(f"triton is not installed, and {self._name} needs it: pip install triton")
            return args[0] if args else lambda function: function

    triton, tl = _Missing("triton"), _Missing("triton.language")
    HAS_TRITON = INTERPRETED = False
else:
    HAS_TRITON, INTERPRETED = True, bool(triton.knobs.runtime.interpret)

Kernel = Callable[..., Any]
"""What `triton.jit` makes of a function."""

__all__ = ["HAS_TRITON", "INTERPRETED", "Kernel", "tl", "triton"]
