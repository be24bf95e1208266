"""A network as an ONNX file, held against onnxruntime before it is called done. The door to onnxscript and onnxruntime."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcf import atomic
from mcf.errors import UserError, missing_package
from mcf.models.patches import MEAN, STD
from mcf.models.vit import VisionTransformer

INPUT = "images"
TOLERANCE = 1e-4  # of the largest output, or of 1: float32 sums in another order differ by some 1e-6
LARGEST = 1_900_000_000  # bytes; the format ends at 2 GiB with all that is not weights
CHECKED = (1, 3)  # batch sizes; the graph is traced with another one


class Pixels(nn.Module):
    """An encoder that takes pixels: images float32 [B, 3, S, S] in [0, 1] → its output tokens [B, 1+L, width]."""

    mean: Tensor
    std: Tensor

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.vit = vit
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.vit((images - self.mean) / self.std)


def write(
    path: str | Path, network: nn.Module, image_size: int, outputs: Sequence[str], metadata: Mapping[str, str]
) -> float:
    """Export a network of images float32 [B, 3, S, S] in [0, 1], any B, and compare the file with it.

    Args:
        path: the file, written whole or not at all.
        network: in evaluation mode, on the CPU.
        image_size: S, pixels.
        outputs: names of what it returns, one tensor or a tuple.
        metadata: text that the file carries.

    Returns:
        The largest difference of onnxruntime's outputs on random images from the network's, relative to the largest
        output (to 1 where that is smaller).

    Raises:
        UserError: a package is missing, the file cannot be written, or what it computes differs by more than TOLERANCE.
    """
    _needed()
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(
            f"out={file}: {'is a directory' if file.is_dir() else 'its folder does not exist'}; give a file"
        )
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if size > LARGEST:
        raise UserError(f"out={file}: {size / 1e9:.1f} GB of weights, and one ONNX file holds 2 GB; use format=timm")
    network = portable(network)
    shapes = ({0: torch.export.Dim("batch")},)
    example = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with _quiet():
        program: Any = torch.onnx.export(
            network, (example,), dynamo=True, verbose=False, input_names=[INPUT], output_names=list(outputs),
            dynamic_shapes=shapes,
        )  # fmt: skip
    program.model.metadata_props.update(metadata)
    try:
        with atomic.replacing(file) as temporary:
            program.save(temporary, external_data=False)
            difference = compare(temporary, network, image_size)
            if not difference <= TOLERANCE:
                raise UserError(
                    f"out={file}: onnxruntime computes something else (by {difference:.1e} of the largest output); not "
                    "written, try other versions of torch, onnxscript and onnxruntime"
                )
    except OSError as error:
        raise UserError(
            f"out={file}: cannot be written ({error.strerror}); free some space or choose another folder"
        ) from None
    return difference


def portable(network: nn.Module) -> nn.Module:
    """The network, made to compute with plain operations alone: no kernels, no fused attention."""
    module: Any
    for module in network.modules():
        if hasattr(module, "kernels"):
            module.kernels = "reference"
        if hasattr(module, "implementation"):
            module.implementation = "math"
    return network


@torch.no_grad()
def compare(path: Path, network: nn.Module, image_size: int) -> float:
    """The largest difference of a file's outputs from the network's, relative to the largest output or 1."""
    runtime = _needed()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    differences = []
    for batch in CHECKED:
        images = torch.rand(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(batch))
        ours = network(images)
        ours = (ours,) if isinstance(ours, Tensor) else ours
        for mine, theirs in zip(ours, session.run(None, {INPUT: images.numpy()}), strict=True):
            scale = max(float(mine.abs().max()), 1.0)
            differences.append((mine - torch.from_numpy(theirs)).abs().max() / scale)
    return float(torch.stack(differences).max())  # NaN where one is


def _needed() -> Any:
    """onnxruntime, once both packages are known to be there."""
    try:
        import onnxscript  # noqa: F401  torch's exporter writes with it
    except ImportError:
        raise missing_package("onnxscript", "format=onnx") from None
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "format=onnx") from None
    return onnxruntime


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed and on its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
