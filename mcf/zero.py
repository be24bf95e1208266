"""What DeepSpeed is told to reduce, fetch and keep at a time: numbers that the engine sets and the plan counts with.

They grow with the model, so that a toy in a test is cut into as many pieces as a large model is.
"""

from __future__ import annotations

# Elements. DeepSpeed allocates its reduction buffer anew each step, and its own default is 2 GB of float32.
BUCKET = 50_000_000
# Elements that are reduced at once beside the backward pass: 25 MB, as PyTorch has it.
OVERLAPPED = 6_500_000
# Elements. DeepSpeed's default: splitting less saves nothing and costs a message.
PERSISTENT = 100_000


def bucket(size: int) -> int:
    """Elements that are reduced at a time, and fetched ahead under stage 3, of a model of `size` elements."""
    return min(-(-size // 8), BUCKET)


def overlapped(size: int) -> int:
    """Elements that are reduced at a time while the backward pass goes on, of a model of `size` elements."""
    return min(-(-size // 8), OVERLAPPED)


def persistent(size: int) -> int:
    """Most elements of a parameter that stage 3 leaves whole on every rank, of a model of `size` elements."""
    return min(size // 1000, PERSISTENT)
