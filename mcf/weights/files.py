"""Files of weights, in and out: safetensors, and PyTorch pickles that need no code of their own.

A pickle may run any program when it is opened. Files are therefore opened with `weights_only`, and one that needs more
is refused with the name of what it asks for; `mcf.convert trust=true` rewrites such a file once, by the user's word.
Every way in which a file can be unreadable ends in a `UserError` of one line.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcf import atomic
from mcf.errors import UserError
from mcf.mode import as_umask_asks

# Training scripts keep their command line beside the weights. A namespace is data: opening one runs nothing.
HARMLESS: list[Callable | tuple[Callable, str]] = [argparse.Namespace]

# What torch.save's pickles began with before they were zips.
MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")


@dataclass(frozen=True)
class WeightFile:
    """What a file holds: its content as stored (nested where it is), and the text metadata of safetensors."""

    content: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)


def read(path: str | Path, *, where: str, trust: bool = False) -> WeightFile:
    """Open a file of weights on the CPU; `where` opens every message (for example `teacher.path=FILE`).

    Tensors may be mapped from the file, so that an optimiser state beside the weights costs no memory: clone what is
    kept. `trust` opens pickles that run code; never set it for a file of unknown origin.

    Raises UserError for a path that is missing or a directory, a truncated or damaged file, a file of another kind,
    and a pickle that needs code while `trust` is off.
    """
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{where}: is a directory; give a file (safetensors, .pth, .pth.tar)")
    if not file.exists():
        raise UserError(f"{where}: no such file; check the path")
    try:
        with file.open("rb") as opened:
            head = opened.read(32)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); check its permissions") from None
    if not head:
        raise UserError(f"{where}: the file is empty; fetch it again")
    if head[8:9] == b"{":
        return _read_safetensors(file, where)
    if head.startswith(b"PK"):
        return _read_pickle(file, where, trust, mapped=_holds_pickle(file, where))
    if head.startswith(b"\x80"):
        if len(head) == 32 and MAGIC not in head:
            raise UserError(
                f"{where}: a pickle that torch.save has not written, and opening such a one may run code; give weights "
                "written by torch.save, or safetensors"
            )
        return _read_pickle(file, where, trust, mapped=False)
    raise UserError(
        f"{where}: neither safetensors nor a PyTorch file (it begins with {head[:8]!r}); give a file of weights"
    )


def write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors under their names, whole or not at all: safetensors, or a flat PyTorch dict for .pth and .pt.

    Its mode is the one that umask asks for, whichever of the two it is.

    Raises UserError if the folder is missing or the disk is full.
    """
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(
            f"out={file}: {'is a directory' if file.is_dir() else 'its folder does not exist'}; give a file"
        )
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic.replacing(file) as temporary:
            if file.suffix in (".pth", ".pt"):
                torch.save(content, temporary)
            else:
                with as_umask_asks(temporary):
                    save_file(content, temporary, metadata={"format": "pt", **metadata})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"out={file}: cannot be written ({_first_line(error)}); free some space or choose another folder"
        ) from None


def _read_safetensors(file: Path, where: str) -> WeightFile:
    try:
        with safe_open(file, framework="pt") as opened:
            return WeightFile({name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {}))  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{where}: truncated or damaged safetensors ({_first_line(error)}); fetch the file again"
        ) from None


def _holds_pickle(file: Path, where: str) -> bool:
    """Whether a zip is PyTorch's; its table of contents stands at its end, so a truncated one has none."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        raise UserError(f"{where}: truncated or damaged file; fetch it again") from None
    if not any(name.endswith("data.pkl") for name in names):
        raise UserError(f"{where}: a zip archive, but not a PyTorch file; give a file of weights")
    return True


def _read_pickle(file: Path, where: str, trust: bool, *, mapped: bool) -> WeightFile:
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", mmap=mapped or None, weights_only=not trust)
    except pickle.UnpicklingError as error:
        if not (wanted := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise UserError(f"{where}: truncated or damaged PyTorch file; fetch it again") from None
        raise UserError(
            f"{where}: opening this pickle would run code ({wanted[1]}); if you trust its origin, convert it once: "
            f"python -m mcf.convert source={file} out=converted.safetensors trust=true"
        ) from None
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(
            f"{where}: needs code that is not installed here ({_first_line(error)}); convert it where it is"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything at all
        raise UserError(f"{where}: truncated or damaged PyTorch file ({_first_line(error)}); fetch it again") from None
    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds a {type(content).__name__}, no dict of weights; give a state dict")
    return WeightFile(content)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:160]
