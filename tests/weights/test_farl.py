"""FaRL's files (CLIP's image encoder in OpenAI's names) against transformers' CLIPVisionModel, which knows nothing of us."""

from __future__ import annotations

import pytest
import torch
from clip_names import DEPTH, MEAN, PATCH, SIDE, STD, WIDTH, farl_file, tower

from mcf import convert
from mcf.config import TeacherConfig
from mcf.downstream.backbone import load_backbone
from mcf.downstream.config import FinetuneConfig
from mcf.errors import UserError
from mcf.models.teacher import vit_of
from mcf.weights import load_teacher
from mcf.weights.sources import read_file

# Two float32 programs of one network; the patch projection differs in rounding too, since ImageNet's units are inside. Values
# of the stream are up to 30 after three such blocks.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def clip():
    return tower()


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (3, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def theirs(model, pixels):
    """transformers' outputs of every block, and the normalised class token, for uint8 images."""
    x = ((pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    out = model(pixel_values=x, output_hidden_states=True)
    return out.hidden_states, out.pooler_output


def test_a_farl_file_computes_what_transformers_does(tmp_path, clip, pixels):
    farl_file(tmp_path / "farl.pth", clip)
    for kind in ("farl", "auto"):
        encoder = read_file(tmp_path / "farl.pth", kind, where="x")
        shape = encoder.shape
        assert (shape.width, shape.depth, shape.patch_size, shape.image_size) == (WIDTH, DEPTH, PATCH, SIDE)
        assert shape.clip and encoder.heads == 2
    vit = vit_of(encoder.tensors, heads=2).eval()
    hidden, pooled = theirs(clip, pixels)
    with torch.no_grad():
        torch.testing.assert_close(vit.embed(pixels), hidden[0], **CLOSE)  # after ln_pre
        for ours, expected in zip(vit.features(pixels, (0, 1, 2)), hidden[1:], strict=True):
            torch.testing.assert_close(ours, expected, **CLOSE)
        torch.testing.assert_close(vit(pixels)[:, 0], pooled, **CLOSE)
        # Each of the three things that make it CLIP's shows, far beyond rounding.
        for undo in ("gelu", "norm", "mean"):
            other = vit_of(encoder.tensors, heads=2).eval()
            if undo == "gelu":
                for block in other.blocks:
                    block.mlp.activation = torch.nn.functional.gelu
            elif undo == "norm":
                other.norm_pre = torch.nn.Identity()
            else:
                other.patch_embed.proj.bias.data.zero_()
            assert (other(pixels)[:, 0] - pooled).abs().max() > 0.02, undo


def test_half_precision_is_widened_before_units_are_folded_in(tmp_path, clip, pixels):
    state = farl_file(tmp_path / "farl.pth", clip)
    torch.save({"state_dict": {k: v.half() for k, v in state.items()}}, tmp_path / "half.pth")
    clip.half().float()
    encoder = read_file(tmp_path / "half.pth", "farl", where="x")
    assert all(tensor.dtype == torch.float32 for tensor in encoder.tensors.values())
    with torch.no_grad():
        torch.testing.assert_close(vit_of(encoder.tensors, heads=2)(pixels)[:, 0], theirs(clip, pixels)[1], **CLOSE)


def test_as_teacher_and_converted(tmp_path, clip, pixels, capsys, one_line):
    farl_file(tmp_path / "farl.pth", clip)
    assert convert.main([f"source={tmp_path}/farl.pth", f"out={tmp_path}/farl.safetensors"]) == 0
    assert "2 heads" in capsys.readouterr().out
    hidden, _ = theirs(clip, pixels)
    for name in ("farl.pth", "farl.safetensors"):
        config = TeacherConfig(source="farl", path=str(tmp_path / name), heads=2, taps=(0, 2))
        teacher = load_teacher(config, image_size=SIDE)
        assert teacher.vit.clip
        for ours, expected in zip(teacher.features(pixels), (hidden[1], hidden[3]), strict=True):
            torch.testing.assert_close(ours, expected, **CLOSE)
    for keys, said in (
        ({"source": "timm"}, "is a farl file, not timm; set teacher.source=farl"),
        ({"source": "farl", "heads": 4}, "set teacher.heads=2"),
    ):
        with pytest.raises(UserError) as error:
            load_teacher(config.model_copy(update=keys), image_size=SIDE)
        assert said in one_line(error.value)
    # Where nothing can say that it is CLIP's, a file of it is not written, and one that somebody wrote is not read.
    assert convert.main([f"source={tmp_path}/farl.pth", f"out={tmp_path}/out.pth"]) == 2
    assert "use .safetensors" in capsys.readouterr().err
    torch.save(read_file(tmp_path / "farl.pth", "farl", where="x").tensors, tmp_path / "silent.pth")
    with pytest.raises(UserError, match=r"norm_pre\.\w+, norm_pre\.\w+ are not part of a plain ViT"):
        read_file(tmp_path / "silent.pth", "auto", where="x")


def test_as_backbone_at_another_resolution(tmp_path, clip, pixels):
    """Twice the resolution: the table is resized as FaRL's protocol says, and the taps are those of a tower of that size."""
    farl_file(tmp_path / "farl.pth", clip)
    config = FinetuneConfig(
        task="alignment",
        dataset="csv",
        data="x",
        weights=str(tmp_path / "farl.pth"),
        input_size=2 * SIDE,
        taps=(0, 1, 1, 2),
    )
    backbone = load_backbone(config).eval()
    large = tower(side=2 * SIDE)
    state = clip.state_dict()
    place = next(name for name in state if name.endswith("position_embedding.weight"))
    table = state[place]
    maps = torch.nn.functional.interpolate(
        table[1:].T.view(1, WIDTH, 4, 4), size=(8, 8), mode="bicubic", align_corners=False
    )
    state[place] = torch.cat([table[:1], maps[0].flatten(1).T])
    large.load_state_dict({k: v for k, v in state.items() if "position_ids" not in k}, strict=False)
    images = torch.randint(0, 256, (2, 2 * SIDE, 2 * SIDE, 3), dtype=torch.uint8)
    hidden, _ = theirs(large, images)
    with torch.no_grad():
        found = backbone(images.permute(0, 3, 1, 2) / 255)
    for ours, expected in zip(found, (hidden[1], hidden[2], hidden[2], hidden[3]), strict=True):
        torch.testing.assert_close(ours, expected[:, 1:].mT.unflatten(-1, (8, 8)), **CLOSE)
    untrained = load_backbone(config.model_copy(update={"random": True}))
    assert untrained.vit.clip and untrained.vit.norm_pre.weight.shape == (WIDTH,)


def test_a_fine_tuned_farl_comes_back_as_clips_variant(tmp_path, clip):
    from mcf.downstream import saved
    from mcf.downstream.config import HeadConfig
    from mcf.downstream.datasets import Face, FaceSet
    from mcf.downstream.network import Decoder, Network

    farl_file(tmp_path / "farl.pth", clip)
    config = FinetuneConfig(
        task="parsing", dataset="masks", data="x", weights=str(tmp_path / "farl.pth"), input_size=SIDE, taps=(0, 1, 1, 2),
        head=HeadConfig(channels=8, pools=(1, 2)),
    )  # fmt: skip
    network = Network(load_backbone(config), Decoder(WIDTH, 3, config.head)).eval()
    faces = FaceSet(
        "masks", "parsing", [Face("a", tmp_path)], [Face("a", tmp_path)], crop="whole", classes=("a", "b", "c")
    )
    saved.write(tmp_path / "model.safetensors", network, saved.describe(network, config.sized(SIDE), faces, 1))
    again, description = saved.load(str(tmp_path / "model.safetensors"))
    assert description.clip
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(again(images), network(images))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"visual.ln_pre.weight": None, "visual.ln_pre.bias": None}, "norm_pre.weight, norm_pre.bias are missing"),
        ({"visual.transformer.resblocks.1.attn.in_proj_bias": None}, "blocks.1.attn.qkv.bias is missing"),
        ({"visual.class_embedding": None}, "cls_token is missing"),
        ({"visual.conv1.weight": None}, "patch_embed.proj.weight missing"),
        (
            {"visual.transformer.resblocks.2.mlp.c_fc.weight": torch.zeros(3, 5)},
            "blocks.2.mlp.fc1.weight has shape [3, 5]",
        ),
        ({"visual.positional_embedding": torch.zeros(16, WIDTH)}, "pos_embed has 16 rows"),
        ({"visual.layer1.0.conv1.weight": torch.zeros(3)}, "visual.layer1.0.conv1.weight is not part of a farl file"),
        (
            {"visual.transformer.resblocks.0.ls.weight": torch.zeros(3)},
            "resblocks.0.ls.weight is not part of a farl file",
        ),
        ({"visual.ln_post.bias": torch.full((WIDTH,), float("nan"))}, "norm.bias holds NaN"),
    ],
)
def test_a_part_of_a_farl_file_is_refused(tmp_path, clip, one_line, changes, said):
    farl_file(tmp_path / "farl.pth", clip, **changes)
    with pytest.raises(UserError) as error:
        read_file(tmp_path / "farl.pth", "auto", where="weights=farl.pth")
    assert said in one_line(error.value)
    assert str(error.value).startswith("weights=farl.pth: ")
