"""An image encoder of CLIP by transformers, and its state under OpenAI's names: what FaRL's files hold."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WIDTH, DEPTH, PATCH, SIDE = 128, 3, 8, 32  # heads of 64, as in every CLIP


def tower(seed: int = 0, side: int = SIDE):
    """transformers' CLIPVisionModel with weights in which nothing is zero or one."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=WIDTH // 64, intermediate_size=4 * WIDTH,
        patch_size=PATCH, image_size=side, hidden_act="quick_gelu", layer_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    model = CLIPVisionModel(config).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        parameter.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.15 * noise)
    return model


def openai_names(model) -> dict[str, Tensor]:
    """Its tensors as OpenAI's CLIP names them, `visual.` before each."""
    theirs = {name.removeprefix("vision_model."): tensor for name, tensor in model.state_dict().items()}
    found = {
        "class_embedding": theirs["embeddings.class_embedding"],
        "positional_embedding": theirs["embeddings.position_embedding.weight"],
        "conv1.weight": theirs["embeddings.patch_embedding.weight"],
        "proj": torch.randn(WIDTH, 64),
    }
    for ours, name in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        found |= {f"{ours}.{kind}": theirs[f"{name}.{kind}"] for kind in ("weight", "bias")}
    for i in range(DEPTH):
        layer, block = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            parts = [theirs[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
            for ours, name in (
                ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
            ):  # fmt: skip
                found[f"{block}.{ours}.{kind}"] = theirs[f"{layer}.{name}.{kind}"]
    return {f"visual.{name}": tensor.clone() for name, tensor in found.items()}


def farl_file(path, model, **changes: Tensor | None) -> dict[str, Tensor]:
    """Write a file as FaRL's: the tower, what masked image modelling adds to it, and the text encoder, under `state_dict`.

    None takes a name away.
    """
    text = {
        "positional_embedding": torch.randn(7, 16), "text_projection": torch.randn(16, 64), "logit_scale": torch.ones(()),
        "token_embedding.weight": torch.randn(9, 16), "ln_final.weight": torch.ones(16),
        "transformer.resblocks.0.attn.in_proj_weight": torch.randn(48, 16),
        "transformer.resblocks.0.ln_1.weight": torch.ones(16),
    }  # fmt: skip
    masked = {
        "visual.mask_token": torch.randn(WIDTH), "visual.lm_head.weight": torch.randn(11, WIDTH),
        "visual.lm_head.bias": torch.randn(11), "visual.ln_lm.weight": torch.ones(WIDTH),
        "visual.lm_transformer.resblocks.0.attn.in_proj_weight": torch.randn(3 * WIDTH, WIDTH),
        "visual.lm_transformer.resblocks.0.ln_1.bias": torch.randn(WIDTH),
    }  # fmt: skip
    names = {**text, **masked, **openai_names(model), **changes}
    state = {name: tensor for name, tensor in names.items() if tensor is not None}
    torch.save({"state_dict": state, "epoch": 64}, path)
    return state
