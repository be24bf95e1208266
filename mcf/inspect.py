"""Look at the data: `python -m mcf.inspect data=DIR`, or the very batch of a step: `mcf.inspect recipe=… step=1000`.

    data=DIR          figures of the manifest, and a contact sheet of random pictures of all shards
    recipe=… step=N   each face of step N as the loader gives it, flipped or not, and what both masks leave of it; a line
                      for each with its position, shard, row and key

Steps count from 1, as in metrics.jsonl and events.jsonl. A batch is a function of (seed, step): no rank, checkpoint or GPU
is needed to see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from mcf import cli
from mcf.config import NonNegative, Positive, Recipe, Section
from mcf.data.loader import Loader
from mcf.data.shards import Manifest, load_manifest
from mcf.data.sheet import sheet
from mcf.errors import UserError
from mcf.kernels import ENCODER, FLIP, MOMENTUM, mask, uniform

_DROPPED = 190  # grey of a dropped patch
_CELL = 128  # side of a picture on a sheet, pixels


class DataConfig(Section):
    """What `mcf.inspect data=DIR` can be told. With recipe= and step= instead, it shows the batch of a step."""

    data: str = Field(description="folder that mcf.pack wrote")
    out: str = Field("inspect.png", description="picture that is written")
    count: Positive = Field(96, description="pictures on it, random ones of all shards")
    seed: NonNegative = Field(0, description="which random ones")


class StepConfig(Section):
    """What `mcf.inspect recipe=… step=N` can be told beside the recipe's keys. With data=DIR it shows a folder."""

    step: Positive = Field(description="step whose batch is shown, from 1 as in metrics.jsonl")
    out: str = Field("inspect.png", description="picture that is written")
    count: Positive = Field(24, description="faces on it")
    first: NonNegative = Field(0, description="which of the step's samples is the first one shown")


@cli.main
def main(argv: list[str]) -> int:
    """Show a folder of shards, or the batch of a step."""
    if any(word.partition("=")[0] in ("recipe", "step") for word in argv):
        recipe, options = cli.load(argv, StepConfig, verb="inspect")
        return show_step(recipe, options)
    return show_folder(cli.parse(DataConfig, argv, verb="inspect"))


# --- a folder -------------------------------------------------------------------------------------------------------


def show_folder(options: DataConfig) -> int:
    """Print what the manifest says, and write a contact sheet."""
    manifest = load_manifest(options.data, key="data")
    print("\n".join(figures(manifest)))
    pictures = [content for _, content in some(manifest, options.count, options.seed)]
    _save(sheet(pictures, columns=12, cell=_CELL), options.out)
    return 0


def figures(manifest: Manifest) -> Iterator[str]:
    """The manifest in lines."""
    counts, sizes = manifest.counts, [shard.bytes for shard in manifest.shards]
    yield f"{manifest.path}: {manifest.samples:,} samples in {len(counts):,} shards, {sum(sizes) / 1e9:,.2f} GB"
    yield f"  samples a shard  {counts.min():,} to {counts.max():,}, median {int(np.median(counts)):,}"
    yield f"  bytes a sample   {sum(sizes) / manifest.samples:,.0f}, index and headers included"
    yield f"  fingerprint      {manifest.fingerprint}"
    packed = manifest.meta.get("counts", {})
    for key, title in (("left_out", "left out"), ("faces_left_out", "faces left out"), ("dropped", "dropped")):
        if packed.get(key):
            yield f"  {title:<16} " + ", ".join(f"{count:,} {reason}" for reason, count in packed[key].items())
    settings = manifest.meta.get("pack", {})
    if settings:
        yield "  packed with      " + " ".join(f"{key}={cli.render(value)}" for key, value in settings.items())


def some(manifest: Manifest, count: int, seed: int) -> list[tuple[str, bytes]]:
    """(key, JPEG) of random samples of all shards, in the order they lie in."""
    order = np.random.default_rng(seed).permutation(manifest.samples) if manifest.samples < 10**7 else None
    chosen = order[:count] if order is not None else np.random.default_rng(seed).integers(0, manifest.samples, count)
    ends = np.cumsum(manifest.counts)
    found = []
    for place in np.sort(chosen).tolist():
        shard = int(np.searchsorted(ends, place, side="right"))
        row = manifest.index(shard)[place - int(ends[shard]) + int(manifest.counts[shard])]
        with (manifest.path / manifest.shards[shard].name).open("rb") as file:
            file.seek(int(row["offset"]))
            found.append((row["key"].decode(errors="replace"), file.read(int(row["size"]))))
    return found


# --- a step ---------------------------------------------------------------------------------------------------------


def show_step(recipe: Recipe, options: StepConfig) -> int:
    """Print where each sample of a step lies, and write what both branches see of it."""
    if options.first >= recipe.batch:
        raise UserError(f"first={options.first}: a step has {recipe.batch:,} samples; give 0 to {recipe.batch - 1}")
    shown = faces(recipe, options.step, options.first, min(options.count, recipe.batch - options.first))
    pictures, captions = [], []
    print(f"step {options.step}, batch {recipe.batch:,}, seed {recipe.seed}")
    print(f"{'position':>12}  {'shard':<18} {'row':>6}  {'flipped':<8} key")
    for face in shown:
        bad = f"  (unreadable: {face['reason']}; shown instead: {face['substitute']})" if face["reason"] else ""
        flipped = "yes" if face["flipped"] else "no"
        print(f"{face['position']:>12,}  {face['shard']:<18} {face['row']:>6}  {flipped:<8} {face['key']}{bad}")
        pictures += [face["image"], face["encoder"], face["momentum"]]
        captions += [f"{face['position'] % recipe.batch}{' flipped' if face['flipped'] else ''}", "encoder", "momentum"]
    _save(sheet(pictures, columns=6 if len(shown) < 9 else 12, cell=_CELL, captions=captions), options.out)
    return 0


def faces(recipe: Recipe, step: int, first: int, count: int) -> list[dict[str, Any]]:
    """Samples `first` … of a step: position, shard, row, key, flipped, image, and what each branch's mask leaves of it.

    Images are uint8 [H, W, 3]. `reason` and `substitute` tell of a sample that could not be read.
    """
    small = next(size for size in range(min(64, recipe.batch), 0, -1) if recipe.batch % size == 0)
    loader = Loader(
        recipe.data,
        batch=recipe.batch,
        micro_batch=small,
        seed=recipe.seed,
        image_size=recipe.model.image_size,
        rank=0,
        world_size=1,
        device="cpu",
        start=(step - 1) * recipe.batch,
    )
    found: list[dict[str, Any]] = []
    try:
        for number, batch in enumerate(loader):
            if number * small >= first + count:
                break
            if (number + 1) * small > first:
                found += _faces(recipe, loader, batch.images, batch.positions, batch.keys)
        bad = {sample.position: sample for sample in loader.take_bad()}
    finally:
        loader.close()
    begin = first - first // small * small
    for face in found:
        sample = bad.get(face["position"])
        face |= {"reason": sample and sample.reason, "substitute": sample and sample.substitute}
    return found[begin : begin + count]


def _faces(recipe: Recipe, loader: Loader, images: torch.Tensor, positions: torch.Tensor, keys: list[str]):
    encoder, momentum = masks(recipe, positions)
    flipped = uniform(recipe.seed, positions, FLIP) < recipe.data.flip
    for i, position in enumerate(positions.tolist()):
        place = loader.order.locate(position)
        image = images[i].numpy()
        yield {
            "position": position,
            "shard": loader.manifest.shards[place.shard].name,
            "row": place.row,
            "key": keys[i],
            "flipped": bool(flipped[i]),
            "image": image,
            "encoder": _masked(image, encoder[i], recipe.model.patch_size),
            "momentum": _masked(image, momentum[i], recipe.model.patch_size),
        }


def masks(recipe: Recipe, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches that stay visible to the encoder and to the momentum encoder, bool [B, L] each."""
    patches, keep = recipe.model.patches, recipe.visible_patches

    def visible(view: int) -> torch.Tensor:
        return mask(recipe.seed, positions, view, patches, keep)[1] < keep

    encoder = visible(ENCODER)
    if recipe.mask.momentum == "same":
        return encoder, encoder
    return encoder, visible(MOMENTUM) if recipe.mask.momentum == "independent" else torch.ones_like(encoder)


def _masked(image: np.ndarray, visible: torch.Tensor, patch_size: int) -> np.ndarray:
    """The image with its dropped patches grey."""
    side = image.shape[0] // patch_size
    grid = visible.view(side, side).repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1).numpy()
    return np.where(grid[..., None], image, np.uint8(_DROPPED))


def _save(picture: Image.Image, out: str) -> None:
    path = Path(out)
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"out={path}: cannot be written ({error}); name a .png or .jpg in a folder that is there"
        ) from None
    print(f"{path}: {picture.width}x{picture.height}")


if __name__ == "__main__":
    raise SystemExit(main(None))
