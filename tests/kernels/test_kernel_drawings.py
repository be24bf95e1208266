"""The drawings in docs/kernels.md show what the operations compute."""

import re
from pathlib import Path

import torch

from mcf import kernels
from mcf.kernels.bench import gpu_check


def test_the_numbers_in_the_drawings_are_the_kernels_own():
    """The example of the mask's and the decoder's drawings: seed 0, position 4096, 3 of 8 patches."""
    ids_keep, ids_restore = kernels.mask(0, torch.tensor([4096]), kernels.ENCODER, 8, 3)
    folder = Path(gpu_check.__file__).resolve().parents[2] / "docs/kernels"
    drawn = re.findall(r">([^<>]+)</text>", (folder / "mask.svg").read_text())
    at = drawn.index("ids_keep"), drawn.index("ids_restore")
    # ids_keep is drawn before its title, ids_restore behind it.
    assert [int(text) for text in drawn[at[0] - 3 : at[0]]] == ids_keep[0].tolist()
    assert [int(text) for text in drawn[at[1] + 1 : at[1] + 9]] == ids_restore[0].tolist()
    words = kernels.philox((torch.tensor([4096]), torch.tensor([0]), torch.arange(8), torch.tensor([0])), (0, 0))[0]
    assert [f"{int(word):08x}" for word in words] == [text for text in drawn if re.fullmatch("[0-9a-f]{8}", text)]
    drawn = re.findall(r">([^<>]+)</text>", (folder / "token_restore.svg").read_text())
    at_ids = drawn.index("ids_restore")
    assert [int(text) for text in drawn[at_ids + 1 : at_ids + 17 : 2]] == ids_restore[0].tolist()
    places = [text for text in drawn if " + pos " in text]
    wanted = [f"p{patch}" if rank < 3 else "m" for patch, rank in enumerate(ids_restore[0].tolist())]
    assert places == [f"{what} + pos {place}" for place, what in enumerate(["cls", *wanted])]
