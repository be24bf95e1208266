"""An encoder as the folder that `transformers.ViTModel.from_pretrained` opens; transformers itself is not needed here.

    FOLDER/config.json                sizes, as ViTConfig names them
    FOLDER/model.safetensors          the tensors, as ViTModel names them in files
    FOLDER/preprocessor_config.json   how ViTImageProcessor makes its input of a picture

Later versions of the library name modules otherwise in memory, and translate; in files the names have stayed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mcf.errors import UserError
from mcf.models.patches import MEAN, STD
from mcf.models.vit import NORM_EPS
from mcf.weights import files
from mcf.weights.vit import ViTShape

WEIGHTS = "model.safetensors"
BILINEAR = 2  # Pillow's number

_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")


def write(folder: str | Path, tensors: Mapping[str, Tensor], shape: ViTShape, heads: int) -> None:
    """Write the folder (made if it is not there) of a ViT given by timm's names; files of the same names are replaced.

    Raises UserError if it cannot be written.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        files.write(place / WEIGHTS, renamed(tensors), {})
        for name, content in (("config", config(shape, heads)), ("preprocessor_config", processor(shape))):
            (place / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"out={folder}: cannot be written ({error.strerror}); choose another folder") from None


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ViT, timm's names → ViTModel's; `qkv` becomes three."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith("blocks."):
            stem, kind = (name, "") if name in _OUTSIDE else name.rsplit(".", 1)
            found[f"{_OUTSIDE[stem]}.{kind}".rstrip(".")] = tensor
            continue
        _, number, rest = name.split(".", 2)
        stem, kind = rest.rsplit(".", 1)
        layer = f"encoder.layer.{number}"
        if stem == "attn.qkv":
            parts = tensor.chunk(3)
            found |= {f"{layer}.attention.attention.{part}.{kind}": t.clone() for part, t in zip(_QKV, parts)}
        else:
            found[f"{layer}.{_IN_BLOCK[stem]}.{kind}"] = tensor
    return found


def config(shape: ViTShape, heads: int) -> dict[str, Any]:
    """config.json: a ViTConfig. ε is not the library's default of 1e-12."""
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": heads,
        "intermediate_size": shape.hidden,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "num_channels": 3,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": NORM_EPS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "dtype": "float32",
    }


def processor(shape: ViTShape) -> dict[str, Any]:
    """preprocessor_config.json: resized to the square, divided by 255, in ImageNet's units."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": shape.image_size, "width": shape.image_size},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
