"""The training step written the plain way, as the public codes it descends from do it: what the benchmark races against.

All patches are embedded and three quarters thrown away, masks come from argsort of noise, attention materialises its
probabilities, normalised copies of all features are compared, logits of all keys are written out. Names of tensors are
those of the released checkpoint (METHOD 2). It shares no code with `mcf.models`, so that equal losses mean something.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcf.config import Recipe


class Attention(nn.Module):
    """Multi-head self-attention with its matrix of probabilities."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        probabilities = ((q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((probabilities @ v).transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Convolution from image to tokens."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """A ViT whose input may be masked after its patches are embedded; `fc` is the projector of those that have one."""

    fc: nn.Sequential

    def __init__(self, patches: int, patch: int, width: int, depth: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.patch_embed = PatchEmbed(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def embed(self, images: Tensor) -> Tensor:
        """Tokens [B, L, C] of all patches of normalised images [B, 3, H, W]."""
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def with_cls(self, x: Tensor) -> Tensor:
        """Put the cls token in front."""
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)

    def features(self, images: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """Outputs [B, 1+L, C] of the blocks in `taps`."""
        x, outputs = self.with_cls(self.embed(images)), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in taps:
                outputs.append(x)
        return outputs

    def masked(self, images: Tensor, noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, 1+keep, C] of a random subset of patches, the mask [B, L] (1 = dropped), and the order back."""
        x = self.embed(images)
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        x = torch.gather(x, 1, shuffle[:, :keep, None].repeat(1, 1, x.shape[-1]))
        mask = torch.ones_like(noise)
        mask[:, :keep] = 0
        x = self.with_cls(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), torch.gather(mask, 1, restore), restore


def _head(width: int, hidden: int, dim: int, last_norm: bool) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, Linear, and for the projector a BatchNorm without affine."""
    layers = [
        nn.Linear(width, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, dim, bias=False),
    ]
    return nn.Sequential(*layers, *([nn.BatchNorm1d(dim, affine=False)] if last_norm else []))


class PlainMCF(nn.Module):
    """Everything the reference keeps in one module: both encoders, decoder, heads, teacher and losses.

    Args:
        recipe: shapes, weights and temperature; the choices of METHOD's table at their reference values.
        teacher: shape of the teacher (patches, patch size, width, depth, heads).
    """

    def __init__(self, recipe: Recipe, teacher: tuple[int, int, int, int, int]):
        super().__init__()
        model, heads = recipe.model, recipe.model.projection
        self.recipe, self.keep = recipe, recipe.visible_patches
        self.online_encoder = ViT(
            model.patches, model.patch_size, model.width, model.depth, model.heads, model.mlp_ratio
        )
        self.online_encoder.fc = _head(model.width, heads.hidden, heads.dim, last_norm=True)
        self.target_encoder = copy.deepcopy(self.online_encoder).requires_grad_(False)
        self.predictor = _head(heads.dim, heads.hidden, heads.dim, last_norm=False)
        decoder = model.decoder
        self.decoder_embed = nn.Linear(model.width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, model.patches + 1, decoder.width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder.width, decoder.heads, model.mlp_ratio) for _ in range(decoder.depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder.width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder.width, 3 * model.patch_size**2)
        self.teacher = ViT(*teacher).requires_grad_(False).eval()

    def forward(self, images: Tensor, noise: Tensor, noise_target: Tensor) -> dict[str, Tensor]:
        """Losses `feature`, `contrast`, `total` of normalised images [B, 3, H, W] and mask noises [B, L]."""
        latent, _, restore = self.online_encoder.masked(images, noise, self.keep)
        prediction = self.decode(latent, restore)
        q = self.predictor(self.online_encoder.fc(latent[:, 0]))
        with torch.no_grad():
            self.move_average(self.recipe.momentum.value)
            k = self.target_encoder.fc(self.target_encoder.masked(images, noise_target, self.keep)[0][:, 0])
        feature, contrast = self.feature_loss(prediction, images), self.contrastive_loss(q, k)
        weights = self.recipe.loss
        return {
            "feature": feature, "contrast": contrast, "total": weights.feature * feature + weights.contrast * contrast,
            "pred": prediction, "q": q, "k": k,
        }  # fmt: skip

    def decode(self, latent: Tensor, restore: Tensor) -> Tensor:
        """Pixels of all patches [B, L, p·p·3] out of the visible tokens."""
        x = self.decoder_embed(latent)
        dropped = self.mask_token.repeat(len(x), restore.shape[1] + 1 - x.shape[1], 1)
        body = torch.cat([x[:, 1:], dropped.to(x.dtype)], dim=1)
        body = torch.gather(body, 1, restore[:, :, None].repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], body], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def feature_loss(self, prediction: Tensor, images: Tensor) -> Tensor:
        """Sum over the taps of the mean squared difference of features normalised along the tokens."""
        side, patch = images.shape[-1] // self.recipe.model.patch_size, self.recipe.model.patch_size
        pseudo = prediction.reshape(len(images), side, side, patch, patch, 3)
        pseudo = torch.einsum("nhwpqc->nchpwq", pseudo).reshape(images.shape)
        taps = self.recipe.teacher.taps
        loss = prediction.new_zeros(())
        for a, b in zip(self.teacher.features(pseudo, taps), self.teacher.features(images, taps)):
            loss = loss + F.mse_loss(F.normalize(a, dim=1), F.normalize(b.detach(), dim=1))
        return loss

    def contrastive_loss(self, q: Tensor, k: Tensor) -> Tensor:
        """Cross-entropy of each query against all keys, times 2T."""
        temperature = self.recipe.contrast.temperature
        logits = torch.einsum("nc,mc->nm", F.normalize(q, dim=1), F.normalize(k, dim=1)) / temperature
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device)) * (2 * temperature)

    @torch.no_grad()
    def move_average(self, m: float) -> None:
        """EMA of the momentum branch, parameter by parameter."""
        for mean, value in zip(self.target_encoder.parameters(), self.online_encoder.parameters()):
            mean.data = mean.data * m + value.data * (1 - m)

    def load_released(self, state: dict[str, Tensor]) -> None:
        """Load tensors under the released checkpoint's names; a teacher's head is left out."""
        prefix = "perceptual_loss.model."
        renamed = {name.replace(prefix, "teacher."): value for name, value in state.items()}
        self.load_state_dict({name: value for name, value in renamed.items() if not name.startswith("teacher.head.")})
