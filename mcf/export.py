"""Weights out: `python -m mcf.export source=RUN out=FILE` writes what a run has learned for use elsewhere.

    format=timm          FILE.safetensors or FILE.pth: a ViT with timm's names; decoder=true adds MAE's decoder_* names
    format=transformers  FOLDER that transformers' ViTModel.from_pretrained opens
    format=onnx          FILE.onnx: the encoder, or with a run of mcf.finetune its whole network, checked with onnxruntime

`source` is a run directory (its newest whole checkpoint) or one checkpoint of it. What is written loads strictly, with equal
output. A model card lies beside it: README.md, or FILE.README.md where a README.md of something else is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mcf import cli
from mcf.config import Section
from mcf.errors import UserError
from mcf.track.jsonl import METRICS, read

if TYPE_CHECKING:
    from mcf.weights.card import Card
    from mcf.weights.sources import Encoder

SUFFIXES = {"timm": (".safetensors", ".pth", ".pt"), "onnx": (".onnx",)}
PIPELINES = {"alignment": "keypoint-detection", "parsing": "image-segmentation"}  # the Hub's names of the tasks
# Of the last line of metrics before a checkpoint: what says nothing of the weights.
_NO_METRICS = ("step", "samples", "time", "rate/", "memory/", "time/")


class ExportConfig(Section):
    """Keys of mcf.export."""

    source: str = Field(
        description="run directory, or one checkpoint in it; for format=onnx also a run of mcf.finetune"
    )
    out: str = Field(description="file to write: .safetensors, .pth (a flat dict), .onnx; a folder for transformers")
    format: Literal["timm", "transformers", "onnx"] = Field(
        "timm", description="a ViT with timm's names, the folder of a ViTModel of transformers, or ONNX"
    )
    branch: Literal["encoder", "momentum"] = Field(
        "encoder", description="the encoder that was trained by gradients, or the momentum encoder"
    )
    decoder: bool = Field(
        False,
        description="for format=timm: write the decoder beside the encoder, under MAE's names (it was trained with "
        "branch=encoder)",
    )


@cli.main
def main(argv: list[str]) -> int:
    """The verb. Writes the weights and their card, and says what is in them."""
    config = cli.parse(ExportConfig, argv, verb="export")
    check_out(config)
    # torch comes with them: help and refusals need not wait for it.
    from mcf.downstream.saved import is_finetuned
    from mcf.weights import card

    if is_finetuned(Path(config.source)):
        described, said = export_finetuned(config)
    else:
        described, said = export_encoder(config)
    out = Path(config.out)
    place = card.write(described, out if config.format == "transformers" else out.parent)
    print(f"{config.out}: {said}\n{place}: its model card")
    return 0


def check_out(config: ExportConfig) -> None:
    """Refuse a name that does not fit the format, a folder of something else, and a decoder where the format has no place for it."""
    suffixes, out = SUFFIXES.get(config.format), Path(config.out)
    if suffixes and out.suffix not in suffixes:
        raise UserError(f"out={out}: format={config.format} writes a file; end its name in {' or '.join(suffixes)}")
    if not suffixes and (out.suffix in sum(SUFFIXES.values(), ()) or out.is_file()):
        raise UserError(f"out={out}: format=transformers writes a folder; give the name of one")
    if not suffixes and (out / "checkpoints").is_dir():
        raise UserError(f"out={out}: is a run directory; give the export a folder of its own")
    if not suffixes and out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise UserError(f"out={out}: holds other files than an export's; give the name of a new or an empty folder")
    if config.decoder and config.format != "timm":
        raise UserError(f"decoder=true: format={config.format} has no place for a decoder; use format=timm")


def export_encoder(config: ExportConfig) -> tuple[Card, str]:
    """Write an encoder of pre-training; returns its card, and a line about it."""
    from mcf.weights import files, huggingface
    from mcf.weights.sources import find_checkpoint, metadata_of, read_checkpoint, read_decoder

    where = f"source={config.source}"
    folder = find_checkpoint(config.source, where=where)
    encoder = read_checkpoint(folder, config.branch, where=where)
    shape, heads, checked = encoder.shape, encoder.heads, ""
    if heads is None:
        raise UserError(
            f"{where}: run.json of {folder.name} does not state the attention heads; give another checkpoint"
        )
    if config.format == "transformers":
        if shape.clip:
            raise UserError(
                f"{where}: was trained with model.variant=clip, which ViTModel has no place for; use format=timm or onnx"
            )
        huggingface.write(config.out, encoder.tensors, shape, heads)
    elif config.format == "onnx":
        from mcf.models.teacher import vit_of
        from mcf.weights import onnx

        network = onnx.Pixels(vit_of(encoder.tensors, heads=heads)).eval().requires_grad_(False)
        metadata = {"branch": config.branch, "origin": encoder.origin}
        difference = onnx.write(config.out, network, shape.image_size, ["tokens"], metadata)
        checked = f"; onnxruntime differs by {difference:.1e} of the largest output"
    else:
        decoder = read_decoder(folder, where=where) if config.decoder else {}
        if shape.clip and Path(config.out).suffix != ".safetensors":
            raise UserError(
                f"out={config.out}: a .pth cannot state that this is CLIP's variant of a ViT; use .safetensors"
            )
        metadata = {"branch": config.branch, **metadata_of(encoder, heads)}
        if decoder:
            metadata["decoder_heads"] = str(_run(folder)["recipe"].get("model", {}).get("decoder", {}).get("heads"))
        files.write(config.out, {**encoder.tensors, **decoder}, metadata)
    said = (
        f"{encoder.origin}: width {shape.width}, depth {shape.depth}, {heads} heads, patches of {shape.patch_size} pixels, "
        f"images of {shape.image_size}{', with the decoder' if config.decoder else ''}{checked}"
    )
    return encoder_card(config, encoder, folder), said


def export_finetuned(config: ExportConfig) -> tuple[Card, str]:
    """Write the network of a fine-tuning run as ONNX; returns its card, and a line about it."""
    if config.format != "onnx":
        raise UserError(
            f"source={config.source}: a fine-tuned model, which only format=onnx writes; for its encoder give the run that it "
            "was trained from"
        )
    if config.branch != "encoder":
        raise UserError(f"branch={config.branch}: source={config.source} is a fine-tuned model, which has no branches")
    from dataclasses import asdict

    from mcf.downstream.saved import KEY, load
    from mcf.weights import onnx

    network, description = load(config.source, key="source")
    metadata = {KEY: json.dumps(asdict(description))}
    difference = onnx.write(config.out, network, description.input_size, ["logits"], metadata)
    return finetuned_card(config, asdict(description)), (
        f"{description.task} as on {description.dataset}: {description.outputs} "
        f"{'points' if description.task == 'alignment' else 'classes'}, images of {description.input_size}; onnxruntime "
        f"differs by {difference:.1e} of the largest output"
    )


def encoder_card(config: ExportConfig, encoder: Encoder, folder: Path) -> Card:
    """The card of an exported encoder."""
    from mcf.weights import card

    run, shape = _run(folder), encoder.shape
    progress, recipe = run.get("progress", {}), run["recipe"]
    step = int(progress.get("step", 0))
    metrics, at = _metrics(folder.parent.parent, step)
    branch = {"encoder": "the encoder that was trained by gradients", "momentum": "the momentum encoder"}[config.branch]
    file = "model.safetensors" if config.format == "transformers" else Path(config.out).name
    what = (
        f"A vision transformer for faces, pre-trained with Mask Contrastive Face (ACM MM 2023): {branch}"
        f"{', with the decoder under the names of MAE' if config.decoder else ''}. Width {shape.width}, {shape.depth} blocks, "
        f"{encoder.heads} heads, patches of {shape.patch_size} pixels, RGB images of {shape.image_size} × {shape.image_size}, "
        + (
            "given in [0, 1]: ImageNet's mean and standard deviation are inside."
            if config.format == "onnx"
            else "in ImageNet's units (mean 0.485, 0.456, 0.406; standard deviation 0.229, 0.224, 0.225)."
        )
    )
    trained = [
        ("run", str(recipe.get("name"))),
        ("step", f"{step:,}"),
        ("samples seen", f"{progress.get('samples_seen', 0):,}"),
        ("effective batch", str(recipe.get("batch"))),
        ("data", f"{recipe.get('data', {}).get('path')} (fingerprint {progress.get('data') or 'unknown'})"),
        ("teacher", f"{recipe.get('teacher', {}).get('source')} (fingerprint {progress.get('teacher') or 'none'})"),
        ("seed", str(recipe.get("seed"))),
        ("versions", ", ".join(f"{name} {version}" for name, version in progress.get("versions", {}).items())),
    ]
    return card.Card(
        file=file, title=f"{recipe.get('name')}, step {step:,}", what=what, use=_use(config, encoder, file), trained=trained,
        metrics=metrics, measured=f"As the run logged them at step {at:,}, on its training data.", recipe=_public(recipe),
        terms=card.terms(recipe), tags=[config.format],
    )  # fmt: skip


def finetuned_card(config: ExportConfig, description: dict[str, Any]) -> Card:
    """The card of an exported fine-tuned model."""
    from mcf import checkpoint
    from mcf.weights import card

    source, recipe, metrics = Path(config.source), {}, {}
    run_dir = source if source.is_dir() else source.parent
    if newest := checkpoint.steps(run_dir)[-1:]:
        recipe = _read_json(newest[0] / "run.json").get("finetune", {})
    if found := _read_json(run_dir / "metrics.json"):
        metrics = {
            f"{kind}/{name}": value for kind in ("selected", "best_on_test") for name, value in found[kind].items()
        }
    side, alignment = description["input_size"], description["task"] == "alignment"
    meaning = (
        "one heat-map a point, before the sigmoid; the point is the centre of mass of the sigmoid"
        if alignment
        else f"one map a class, before the softmax, in this order: {', '.join(description['classes'])}"
    )
    use = (
        f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{Path(config.out).name}")\n'
        f'(logits,) = session.run(None, {{"images": images}})  # float32 [B, 3, {side}, {side}] in [0, 1]'
    )
    cut = {name: description[name] for name in ("crop", "scale", "warp", "warp_size")}
    return card.Card(
        file=Path(config.out).name, title=f"Face {description['task']} as on {description['dataset']}",
        what=f"A network for face {description['task']}: RGB images in [0, 1] of {side} × {side} pixels, cut around a face as in "
        f"training ({', '.join(f'{name} {value}' for name, value in cut.items())}; mcf.predict does it), to logits: {meaning}.",
        use=use, trained=[("data set", description["dataset"]), ("epoch of the weights", str(description["epoch"]))],
        metrics=metrics, recipe=_public(recipe), terms=card.finetuned_terms(recipe.get("data") or description["dataset"], recipe.get("weights")),
        measured="On the test set. `selected` is the epoch that a comparison may use; `best_on_test` was chosen on the test set.",
        tags=["onnx", description["task"]], pipeline=PIPELINES[description["task"]],
    )  # fmt: skip


def _use(config: ExportConfig, encoder: Encoder, file: str) -> str:
    """How the file is opened elsewhere, Python."""
    shape = encoder.shape
    if config.format == "transformers":
        return (
            "from transformers import ViTModel\n\n"
            'model = ViTModel.from_pretrained("this folder", add_pooling_layer=False)\n'
            "tokens = model(pixel_values).last_hidden_state  # class token first"
        )
    if config.format == "onnx":
        return (
            f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{file}")\n'
            '(tokens,) = session.run(None, {"images": images})  # class token first'
        )
    if shape.clip:
        # timm's own ViT of this variant has no bias in its patch projection, where this one keeps ImageNet's units.
        return (
            "from mcf.models.teacher import vit_of\nfrom mcf.weights.sources import read_file\n\n"
            f'encoder = read_file("{file}", "farl", where="weights")\n'
            f"model = vit_of(encoder.tensors, heads={encoder.heads})  # tokens = model(images), class token first"
        )
    load = f'load_file("{file}")' if file.endswith(".safetensors") else f'torch.load("{file}", weights_only=True)'
    origin = "from safetensors.torch import load_file" if file.endswith(".safetensors") else "import torch"
    only = "\nstate = {k: v for k, v in state.items() if not k.startswith(('decoder_', 'mask_token'))}"
    return (
        f"{origin}\nfrom timm.models.vision_transformer import VisionTransformer\n\n"
        f"model = VisionTransformer(img_size={shape.image_size}, patch_size={shape.patch_size}, embed_dim={shape.width}, "
        f"depth={shape.depth},\n                          num_heads={encoder.heads}, mlp_ratio={shape.mlp_ratio:g}, num_classes=0)\n"
        f"state = {load}{only if config.decoder else ''}\nmodel.load_state_dict(state)"
    )


def _metrics(run_dir: Path, step: int) -> tuple[dict[str, Any], int]:
    """What the run logged last up to a step, and at which one; ({}, step) where nothing is."""
    for record in reversed(read(run_dir / METRICS)):
        if record.get("step", step + 1) <= step:
            return {k: v for k, v in record.items() if not k.startswith(_NO_METRICS)}, int(record["step"])
    return {}, step


def _public(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what belongs to a cluster: a card is made to be passed on, and a tracking URI may hold a password."""
    return {key: value for key, value in recipe.items() if key not in ("output", "slurm", "track")}


def _run(folder: Path) -> dict[str, Any]:
    """run.json of a checkpoint, which `read_checkpoint` has found readable."""
    return _read_json(folder / "run.json")


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no readable one."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
