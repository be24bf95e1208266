"""The reference's training step once more, written from METHOD in the plainest way, for parity to be held against.

It shares no code with mcf: convolution over the whole image, argsort and gather, attention with its matrix, one loss a
rank, autograd. Several ranks are computed one after the other in one process. `write` leaves a golden folder.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

SMALL = {
    "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3,
    "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
    "teacher": {"patch_size": 16, "embed_dim": 16, "depth": 12, "num_heads": 4}, "proj_dim": 8, "proj_hidden": 20,
}  # fmt: skip


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.attn.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        a = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(dim=-1)
        x = x + self.attn.proj((a @ v).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, size, patch, width, depth, heads, fc=None):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        # Any table does for the reference; a random one shows that the file's own is used.
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.3, requires_grad=False)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if fc is not None:
            self.fc = fc

    def embed(self, images, ids=None):
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        if ids is not None:
            x = torch.gather(x, 1, ids.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)

    def forward(self, images, ids):
        x = self.embed(images, ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def head(*widths, last_norm):
    a, b, c = widths
    layers = [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(), nn.Linear(b, c, bias=False)]
    return nn.Sequential(*layers, *([nn.BatchNorm1d(c, affine=False)] if last_norm else []))


class Reference(nn.Module):
    def __init__(self, c, size):
        super().__init__()
        width, hidden, dim, decoder = c["embed_dim"], c["proj_hidden"], c["proj_dim"], c["decoder_embed_dim"]
        patches = (size // c["patch_size"]) ** 2
        shape = (size, c["patch_size"], width, c["depth"], c["num_heads"])
        self.online_encoder = ViT(*shape, head(width, hidden, dim, last_norm=True))
        self.target_encoder = ViT(*shape, head(width, hidden, dim, last_norm=True))
        self.target_encoder.pos_embed.data.copy_(self.online_encoder.pos_embed)
        self.predictor = head(dim, hidden, dim, last_norm=False)
        self.decoder_embed = nn.Linear(width, decoder)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder) * 0.02)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + patches, decoder) * 0.3, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder, c["decoder_num_heads"]) for _ in range(c["decoder_depth"]))
        self.decoder_norm = nn.LayerNorm(decoder, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder, c["patch_size"] ** 2 * 3)
        t = c["teacher"]
        self.perceptual_loss = nn.Module()
        self.perceptual_loss.model = ViT(size, t["patch_size"], t["embed_dim"], t["depth"], t["num_heads"])
        self.perceptual_loss.model.head = nn.Linear(t["embed_dim"], 10)
        self.perceptual_loss.requires_grad_(False)
        self.target_encoder.requires_grad_(False)

    def trained(self):
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def taps(self, images):
        model, found = self.perceptual_loss.model, []
        x = model.embed(images)
        for i, block in enumerate(model.blocks):
            x = block(x)
            if i in (2, 5, 8, 11):
                found.append(x)
        return found

    def decode(self, tokens, restore, p):
        x = self.decoder_embed(tokens)
        missing = self.mask_token.repeat(x.shape[0], restore.shape[1] + 1 - x.shape[1], 1)
        full = torch.cat([x[:, 1:], missing], dim=1)
        full = torch.gather(full, 1, restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], full], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def keep_quarter(noise):
    order = torch.argsort(noise, dim=1)
    restore = torch.argsort(order, dim=1)
    kept = int(noise.shape[1] * 0.25)
    return order[:, :kept], restore, (restore >= kept).float()


def normalised(u8):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (u8.float() / 255 - mean[:, None, None]) / std[:, None, None]


def write(folder: Path, *, config=SMALL, size=32, batch=6, world=1, seed=3, m=0.99) -> None:
    """A golden folder of one step over `world` ranks with `batch` images each."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = Reference(config, size)
    p, patches = config["patch_size"], (size // config["patch_size"]) ** 2
    models = [copy.deepcopy(model) for _ in range(world)]
    outputs, keys = [], []
    for replica in models:
        out = {
            "u8": torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8),
            "noise_online": torch.rand(batch, patches), "noise_target": torch.rand(batch, patches),
        }  # fmt: skip
        out |= {"before." + n: t.clone() for n, t in replica.state_dict().items()}
        with torch.no_grad():
            for target, online in zip(replica.target_encoder.parameters(), replica.online_encoder.parameters()):
                target.data = target.data * m + online.data * (1.0 - m)
            tokens = replica.target_encoder(normalised(out["u8"]), keep_quarter(out["noise_target"])[0])
            out["k"] = replica.target_encoder.fc(tokens[:, 0])
        keys.append(F.normalize(out["k"], dim=1))
        outputs.append(out)
    for rank, (replica, out) in enumerate(zip(models, outputs)):
        images, (kept, restore, out["mask"]) = normalised(out["u8"]), keep_quarter(out["noise_online"])
        tokens = replica.online_encoder(images, kept)
        out["pred"] = replica.decode(tokens, restore, p)
        out["q"] = replica.predictor(replica.online_encoder.fc(tokens[:, 0]))
        g = size // p
        pseudo = out["pred"].reshape(batch, g, g, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, size, size)
        pairs = zip(replica.taps(pseudo), replica.taps(images))
        out["mim"] = sum(F.mse_loss(F.normalize(a, dim=1), F.normalize(b.detach(), dim=1)) for a, b in pairs)
        logits = torch.einsum("nc,mc->nm", F.normalize(out["q"], dim=1), torch.cat(keys)) / 0.2
        out["con"] = F.cross_entropy(logits, torch.arange(batch) + rank * batch) * 0.4
        out["loss"] = 1000 * out["mim"] + out["con"]
        out["loss"].backward()
        out |= {"after.target_encoder." + n: t for n, t in replica.target_encoder.state_dict().items()}
    for name in model.trained():
        gradients = [replica.get_parameter(name).grad for replica in models]
        outputs[0]["grad." + name] = torch.stack(gradients).mean(0)
    torch.set_num_threads(threads)
    for rank, out in enumerate(outputs):
        tensors = {n: t.detach().clone().contiguous() for n, t in out.items()}
        about = {**config, "name": "test", "world": world, "batch": batch}
        save_file(tensors, folder / f"rank{rank}.safetensors", {"config": json.dumps(about)})
