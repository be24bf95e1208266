"""The networks of a step alone, and what each lever is worth to them: `python -m mcf.bench.blocks key=value …`.

    images ──► encoder ──► decoder ──► pseudo image ──► teacher ──► feature loss ──► backward
        └────► the momentum encoder, and the teacher on the image: without a gradient

What is left out of a step (heads, contrast, optimiser, average) is a hundredth of its operations. torch alone is needed,
and triton for kernels: this is for a machine on which nothing else is installed (`make gpu-check`); where all is,
`mcf.bench part=levers` measures whole steps. Where memory does not suffice, the batch is halved. A lever and none take
turns; numbers are in OUT/levers.csv after each lever. What has to be compiled comes last: where time is short, the rest is
known.
"""

from __future__ import annotations

import copy
import csv
import gc
import importlib.util
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mcf import attention, kernels
from mcf.kernels.arguments import ArgumentError, nearest, number, parse, said
from mcf.kernels.bench.table import here
from mcf.models import float8
from mcf.models.decoder import Decoder
from mcf.models.patches import unpatchify
from mcf.models.regional import compile_blocks, recompute_blocks
from mcf.models.teacher import Teacher
from mcf.models.vit import VisionTransformer

NONE: dict[str, Any] = {
    "attention": "math", "kernels": "reference", "compile": False, "stream": False, "float8": False, "recompute": ()
}  # fmt: skip
# `all` leaves out what has to do with memory and what rounds more than a run does by default, and takes attention as it
# comes.
LEVERS: dict[str, dict[str, Any]] = {
    "attention: sdpa": {"attention": "sdpa"},
    "attention: xformers": {"attention": "xformers"},
    "kernels": {"kernels": "triton"},
    "teacher's stream bf16": {"stream": True},
    "teacher float8": {"float8": True},
    "teacher recomputed": {"recompute": ("teacher",)},
    "all recomputed": {"recompute": ("encoder", "decoder", "teacher")},
    "compiled blocks": {"compile": True},
    "all": {"attention": "auto", "kernels": "auto", "compile": True, "stream": True},
    "teacher float8 + compiled + stream": {"float8": True, "compile": True, "stream": True},
}
COLUMNS = (
    "lever", "images_per_second", "none_images_per_second", "times", "peak_mib", "none_peak_mib", "launches", "loss_difference",
    "gradient_difference", "of_matmul", "failed", "attention", "device", "torch",
)  # fmt: skip
KEYS = {
    "out": (".", "folder for levers.csv, made if it is missing"),
    "only": ("", "levers with this in their names"),
    "batch": ("128", "images a step; halved until memory suffices on a GPU"),
    "rounds": ("10", "rounds, in each of which a lever and none have their turns"),
    "seconds": ("200", "begin with no further lever after so long"),
    "size": ("224", "side of the images, pixels: a multiple of 16"),
    "depth": ("12", "blocks of encoder and teacher"),
}
# ViT-B/16 at 224 pixels, MAE's decoder.
SHAPE: dict[str, Any] = {
    "size": 224,
    "patch": 16,
    "width": 768,
    "depth": 12,
    "heads": 12,
    "decoder": (512, 8, 16),
    "taps": (2, 5, 8, 11),
}


@dataclass
class Networks:
    """Encoder, momentum encoder, decoder and teacher, with equal weights for equal shapes; and what their passes took."""

    encoder: VisionTransformer
    momentum: VisionTransformer
    decoder: Decoder
    teacher: Teacher
    keep: int  # patches that a mask leaves
    seconds: list[float] = field(default_factory=list)

    def step(self, images: Tensor, patch: int) -> Tensor:
        """Loss and gradients of the trained networks, in bfloat16 by autocast."""
        patches = (images.shape[1] // patch) ** 2
        positions = torch.arange(len(images), device=images.device)
        implementation = self.decoder.kernels
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            parameter.grad = None
        with torch.autocast(images.device.type, torch.bfloat16):
            keep, restore = kernels.mask(
                0, positions, kernels.ENCODER, patches, self.keep, implementation=implementation
            )
            with torch.no_grad():
                self.momentum(images, keep)
                targets = self.teacher.features(images)
            pred = self.decoder(self.encoder(images, keep), restore)
            loss = self.teacher.feature_loss(unpatchify(pred, patch), targets)
        loss.backward()
        return loss.detach()

    def gradient(self) -> Tensor:
        """All gradients, one after the other, on the CPU."""
        parts = [*self.encoder.parameters(), *self.decoder.parameters()]
        return torch.cat([p.grad.flatten().cpu() for p in parts if p.grad is not None]).double()


def build(shape: dict[str, Any], device: torch.device, levers: dict[str, Any]) -> Networks:
    """The networks on a device, with levers on. The teacher is as large as the encoder, if `shape` does not say otherwise."""
    torch.manual_seed(0)
    common = {"attention": levers["attention"], "kernels": levers["kernels"]}
    sides: dict[str, Any] = {"image_size": shape["size"], "patch_size": shape["patch"]}
    own = (shape["width"], shape["depth"], shape["heads"])
    vit = _vit(sides, own, common)
    width, depth, heads = shape["decoder"]
    decoder = Decoder(
        tokens_width=shape["width"], grid=shape["size"] // shape["patch"], patch_size=shape["patch"], width=width, depth=depth,
        heads=heads, **common,
    )  # fmt: skip
    other = shape.get("teacher", own)
    taught = vit if other == own else _vit(sides, other, common)
    teacher = Teacher(taught.state_dict(), heads=other[2], taps=shape["taps"], **common)
    if levers["float8"]:
        teacher.to_float8()
    if levers["stream"]:
        teacher.to_stream(torch.bfloat16)
    else:
        teacher.to_autocast(torch.bfloat16)
    momentum = copy.deepcopy(vit).requires_grad_(False)
    parts: dict[str, nn.Module] = {"encoder": vit, "momentum": momentum, "decoder": decoder, "teacher": teacher}
    for part in parts.values():
        part.to(device)
    recompute_blocks(*(parts[name] for name in levers["recompute"]))
    if levers["compile"]:
        compile_blocks(*parts.values())
    return Networks(vit, momentum, decoder, teacher, shape.get("keep", (shape["size"] // shape["patch"]) ** 2 // 4))


def _vit(sides: dict[str, Any], shape: tuple[int, int, int], common: dict[str, Any]) -> VisionTransformer:
    width, depth, heads = shape
    return VisionTransformer(**sides, width=width, depth=depth, heads=heads, **common)


def levers(device: torch.device, only: str) -> dict[str, dict[str, Any]]:
    """The levers that a kind of device has, those with `only` in their names."""
    found = {name: keys for name, keys in LEVERS.items() if only in name}
    if device.type != "cuda":
        found = {n: k for n, k in found.items() if k.get("kernels") != "triton" and k.get("attention") != "xformers"}
    elif importlib.util.find_spec("xformers") is None:
        found.pop("attention: xformers", None)
    return found


def attention_of(shape: dict[str, Any], device: torch.device, implementation: str) -> str:
    """What computes attention in a step by a name of `mcf.attention`: one name, or several with whose they are."""
    if implementation != "auto":
        return implementation
    patches, (decoder, _, heads) = (shape["size"] // shape["patch"]) ** 2, shape["decoder"]
    width = shape["width"] // shape["heads"]
    # Tokens, width of a head, and whether gradients follow: the momentum encoder has none, nor the teacher on the image.
    calls = {
        "encoder": ((patches // 4 + 1, width, False), (patches // 4 + 1, width, True)),
        "decoder": ((patches + 1, decoder // heads, True),),
        "teacher": ((patches + 1, width, False), (patches + 1, width, True)),
    }
    found = {
        part: list(dict.fromkeys(attention.resolve("auto", device.type, torch.bfloat16, *call) for call in its))
        for part, its in calls.items()
    }
    names = {name for its in found.values() for name in its}
    return names.pop() if len(names) == 1 else ", ".join(f"{part} {'/'.join(its)}" for part, its in found.items())


def measure(
    shape: dict[str, Any],
    device: torch.device,
    chosen: dict[str, dict[str, Any]],
    *,
    batch: int,
    rounds: int,
    seconds: float,
    out: Path,
) -> int:
    """Every lever beside none; the number that failed. Begins with no further lever after so many seconds.

    Raises:
        ArgumentError: the images cannot be allocated.
    """
    began = time.monotonic()
    machine = here(device)
    threads = "" if device.type == "cuda" else f", threads: {torch.get_num_threads()}"
    none = build(shape, device, NONE)
    images, loss = _fitting(none, shape, device, batch)
    batch, gradient = len(images), none.gradient()
    counter = FlopCounterMode(display=False)
    with counter:
        none.step(images[:1], shape["patch"])
    flops, peak = counter.get_total_flops(), matmul_rate(device)
    print(
        f"batch {batch}, {flops / 1e9:.1f} GFLOP an image, bfloat16 products at {peak / 1e12:.2f} TFLOP/s, "
        f"{machine.device}{threads}, torch {machine.torch}\n"
        f"{'lever':36}{'images/s':>10}{'none':>9}{'times':>7}{'MiB':>8}{'none':>8}{'launches':>9}{'of matmul':>10}"
        f"{'loss ±':>9}{'gradient ±':>11}  attention",
        flush=True,
    )
    failed = 0
    with (out / "levers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name, keys in chosen.items():
            row: dict[str, Any] = {"lever": name, "device": machine.device + threads, "torch": machine.torch}
            if time.monotonic() - began > seconds:
                row["failed"] = f"left out: {seconds:.0f} s were over"
            elif keys.get("float8") and (why := float8.unavailable(device)):
                row["failed"] = f"left out: {why}"
            else:
                try:
                    row |= _beside(none, build(shape, device, {**NONE, **keys}), images, shape["patch"], rounds)
                    row["of_matmul"] = row["images_per_second"] * flops / peak
                    row["loss_difference"] = abs(row.pop("loss") / loss.item() - 1)
                    row["gradient_difference"] = float((row.pop("gradient") - gradient).norm() / gradient.norm())
                    row["attention"] = attention_of(shape, device, {**NONE, **keys}["attention"])
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                    failed += 1
            writer.writerow(row)
            file.flush()
            print(line(row), flush=True)
            gc.collect()
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return failed


def _fitting(none: Networks, shape: dict[str, Any], device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
    """Images for which the memory of two suffices, and the loss on them."""
    size = shape["size"]
    try:
        images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    except (RuntimeError, TypeError) as error:  # too large for memory, or for a number of elements
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise ArgumentError(
            f"batch={batch}: images of {size} pixels cannot be allocated ({reason}); give a smaller batch"
        ) from None
    while len(images) > 2 and not _fits(none, images, shape["patch"]):
        images = images[: len(images) // 2]
    return images, none.step(images, shape["patch"])


def _fits(networks: Networks, images: Tensor, patch: int) -> bool:
    """Whether a step takes at most two thirds of the GPU's memory: weights and passes of another stand beside it."""
    if images.device.type != "cuda":
        return True
    torch.cuda.reset_peak_memory_stats(images.device)
    try:
        networks.step(images, patch)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return 3 * torch.cuda.max_memory_allocated(images.device) < 2 * torch.cuda.mem_get_info(images.device)[1]


def _beside(none: Networks, lever: Networks, images: Tensor, patch: int, rounds: int) -> dict[str, Any]:
    loss = lever.step(images, patch)  # compiles
    gradient = lever.gradient()
    pair = {"lever": lever, "none": none}
    for networks in pair.values():
        networks.step(images, patch)
        networks.seconds = []
    peaks: dict[str, int] = dict.fromkeys(pair, 0)
    for index in range(rounds):
        for name in list(pair)[:: 1 if index % 2 else -1]:
            start, held = _now(images.device), _reset_peak(images.device)
            pair[name].step(images, patch)
            pair[name].seconds.append(_now(images.device) - start)
            peaks[name] = max(peaks[name], _peak(images.device) - held)
    return {
        "images_per_second": len(images) / statistics.median(lever.seconds),
        "none_images_per_second": len(images) / statistics.median(none.seconds),
        "times": statistics.median(b / a for a, b in zip(lever.seconds, none.seconds)),
        "peak_mib": peaks["lever"] / 2**20, "none_peak_mib": peaks["none"] / 2**20,
        "launches": _launches(lever, images, patch), "loss": loss.item(), "gradient": gradient,
    }  # fmt: skip


def _launches(networks: Networks, images: Tensor, patch: int) -> int | None:
    if images.device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        networks.step(images, patch)
        torch.cuda.synchronize()
    # The calls that launched them are told of too.
    found = (event for event in profiler.events() or [] if str(event.device_type).endswith("CUDA"))
    return sum(is_kernel(event.name) for event in found)


def is_kernel(name: str) -> bool:
    """Whether what a profiler saw on a GPU is a kernel, and no copy or filling of memory."""
    return not name.startswith(("Memcpy", "Memset"))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> int:
    """Bytes that are held now, on a GPU: what a pass takes is counted from there."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large product in bfloat16: the best of some."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = _now(device)
        a @ b
        best = min(best, _now(device) - start)
    return 2 * n**3 / best


def line(row: dict[str, Any]) -> str:
    """A row for a person."""
    if row.get("failed"):
        return f"{row['lever']:36}{row['failed']}"
    return (
        f"{row['lever']:36}{row['images_per_second']:10.1f}{row['none_images_per_second']:9.1f}{row['times']:7.2f}"
        f"{row['peak_mib']:8.0f}{row['none_peak_mib']:8.0f}{row['launches'] or '':>9}{row['of_matmul']:10.0%}"
        f"{row['loss_difference']:9.1e}{row['gradient_difference']:11.1e}  {row['attention']}"
    )


def main(argv: list[str]) -> int:
    """The benchmark; 1 if a lever failed, 2 if a value is wrong, which is said before anything is measured."""
    try:
        values = parse("mcf.bench.blocks", "measures what each lever is worth to the networks", KEYS, argv)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        batch, rounds, depth = (_whole(key, values[key]) for key in ("batch", "rounds", "depth"))
        seconds = number("seconds", values["seconds"], 0)
        size, patch = _whole("size", values["size"]), SHAPE["patch"]
        # The encoder sees a quarter of the patches: of fewer than four, none.
        if size % patch or size < 2 * patch:
            raise ArgumentError(
                f"size={values['size']}: must be a multiple of {patch}, the patch size, from {2 * patch} on"
            )
        chosen, every = levers(device, values["only"]), list(levers(device, ""))
        if not chosen:
            raise ArgumentError(
                f"only={values['only']}: no lever of this device has it in its name{nearest(values['only'], every)}; "
                f"there are {', '.join(every)}"
            )
        taps = tuple(tap for tap in SHAPE["taps"] if tap < depth - 1)
        shape = {**SHAPE, "size": size, "depth": depth, "taps": (*taps, depth - 1)}
        out = _folder(values["out"])
        failed = measure(shape, device, chosen, batch=batch, rounds=rounds, seconds=seconds, out=out)
    except ArgumentError as error:
        return said(error)
    return 1 if failed else 0


def _whole(key: str, text: str) -> int:
    value = number(key, text, 1)
    if value != int(value):
        raise ArgumentError(f"{key}={text}: must be a whole number")
    return int(value)


def _folder(text: str) -> Path:
    """The folder, in which levers.csv can be written: minutes later would be late to find out."""
    out = Path(text)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "levers.csv").open("a").close()
    except OSError as error:
        raise ArgumentError(
            f"out={text}: levers.csv cannot be written there ({error.strerror}); give another folder"
        ) from None
    return out


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
