"""The recipe: defaults that are the reference's, and impossible combinations refused with values that work."""

import re

import pytest

from mcf import checks, cli
from mcf.config import Recipe
from mcf.errors import UserError


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        cli.load_recipe(["teacher.path=t.pth", *argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load(*argv: str) -> Recipe:
    return cli.load_recipe(["teacher.path=t.pth", *argv])


# What METHOD says of the released code: section 1's table, and the values in bold.
REFERENCE = {
    "batch": 4096,
    "model.image_size": 224,
    "model.patch_size": 16,
    "model.width": 768,
    "model.depth": 12,
    "model.heads": 12,
    "model.mlp_ratio": 4.0,
    "model.decoder.width": 512,
    "model.decoder.depth": 8,
    "model.decoder.heads": 16,
    "model.projection.hidden": 4096,
    "model.projection.dim": 256,
    "model.projection.batch_norm": "per_rank",
    "mask.ratio": 0.75,
    "mask.momentum": "independent",
    "teacher.source": "moco_v3",
    "teacher.taps": (2, 5, 8, 11),
    "loss.feature": 1000.0,
    "loss.contrast": 1.0,
    "loss.pixel": 0.0,
    "loss.feature_axis": "tokens",
    "contrast.temperature": 0.2,
    "contrast.scope": "micro_batch",
    "momentum.value": 0.99,
    "momentum.schedule": "constant",
    "momentum.update": "micro_batch",
    "optimizer.blr": 1.5e-4,
    "optimizer.lr": None,
    "optimizer.min_lr": 0.0,
    "optimizer.warmup_epochs": 1.0,
    "optimizer.betas": (0.9, 0.95),
    "optimizer.weight_decay": 0.05,
    "data.flip": 0.5,
    "train.epochs": 16.0,
    "train.precision": "bf16",
}


@pytest.mark.parametrize("argv", [[], ["recipe=vit_b_20m"]], ids=["defaults", "vit_b_20m"])
def test_the_faithful_run(argv):
    values = cli.flatten(load(*argv))
    assert {key: values[key] for key in REFERENCE} == REFERENCE


VARIANTS = {
    "vit_s_20m": {"model.width": 384, "model.heads": 6, "model.decoder.width": 256, "model.decoder.depth": 2},
    "vit_l_20m": {"model.width": 1024, "model.depth": 24, "model.heads": 16},
    "vit_h_20m": {"micro_batch": 32, "model.patch_size": 14, "model.width": 1280, "model.depth": 32, "model.heads": 16},
    "vit_b_channels_axis": {"loss.feature_axis": "channels"},
    "vit_b_ema_per_step": {"momentum.update": "step"},
    "vit_b_momentum_cosine": {"momentum.schedule": "cosine"},
    "vit_b_negatives_4096": {"contrast.scope": "step"},
    "vit_b_negatives_512": {"contrast.scope": "group", "contrast.group_size": 512},
    "vit_b_syncbn": {"model.projection.batch_norm": "synchronised"},
    "vit_b_pixel": {
        "teacher.source": "none",
        "teacher.path": None,
        "loss.feature": 0.0,
        "loss.pixel": 1.0,
        "loss.pixel_normalise": True,
    },
    "vit_b_pixel_beside": {"loss.pixel": 1.0, "loss.pixel_normalise": True},
    "vit_b_mae": {
        "teacher.source": "none",
        "teacher.path": None,
        "loss.feature": 0.0,
        "loss.contrast": 0.0,
        "loss.pixel": 1.0,
        "loss.pixel_normalise": True,
    },
    "vit_b_no_contrast": {"loss.contrast": 0.0},
    "vit_b_no_feature": {"teacher.source": "none", "teacher.path": None, "loss.feature": 0.0},
    "vit_b_feature_100": {"loss.feature": 100.0},
    "vit_b_contrast_10": {"loss.contrast": 10.0},
    "vit_b_last_tap": {"teacher.taps": (11,)},
    "vit_b_temperature_0.1": {"contrast.temperature": 0.1},
    "vit_b_same_mask": {"mask.momentum": "same"},
    "vit_b_no_momentum_mask": {"mask.momentum": "none"},
    "vit_b_decoder_4": {"model.decoder.depth": 4},
    "vit_b_decoder_2": {"model.decoder.depth": 2},
    "vit_b_decoder_1": {"model.decoder.depth": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_from_the_faithful_run_in_what_its_name_says_and_nothing_else(name):
    base, variant = (cli.flatten(cli.load_recipe([f"recipe={recipe}"])) for recipe in ("vit_b_20m", name))
    assert {k: v for k, v in variant.items() if v != base[k]} == {"name": name, **VARIANTS[name]}


def test_every_shipped_recipe_is_named_above():
    small = {"demo", "faces_small", "faces_small_mae"}
    assert set(VARIANTS) == set(cli.recipe_names()) - small - {"vit_b_20m"}


def small(*argv: str) -> list[str]:
    """Arguments over a small batch."""
    given = {argument.partition("=")[0] for argument in argv}
    return [a for a in ("batch=64", "micro_batch=8", "data.streams=16") if a.partition("=")[0] not in given] + [*argv]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        # batch = ranks × micro_batch × accumulation
        (["micro_batch=6"], ["batch=64", "1 ranks", "micro_batch=6", "use micro_batch=4, 8"]),
        (["gpus_per_node=8", "micro_batch=3"], ["= 8 ranks", "micro_batch=3", "use micro_batch=2, 4, 8"]),
        (["gpus_per_node=3"], ["batch=64 cannot be shared", "= 3 ranks", "2, 4", "63, 66"]),
        (["nodes=5", "gpus_per_node=4"], ["nodes=5 × gpus_per_node=4 = 20 ranks", "16"]),
        # the order of the data
        (["data.streams=48"], ["data.streams=48 does not divide batch=64", "32, 64"]),
        (["gpus_per_node=32", "micro_batch=2"], ["32 ranks", "do not divide data.streams=16", "data.streams=32, 64"]),
        # masks
        (["mask.ratio=0.9999"], ["mask.ratio=0.9999 keeps none of the 196 patches"]),
        # losses and teacher
        (["loss.feature=0", "loss.contrast=0"], ["are all 0"]),
        (["loss.pixel_normalise=true"], ["set loss.pixel=1"]),
        (["teacher.source=none"], ["teacher.source=none", "loss.feature=0"]),
        (["teacher.source=random"], ["teacher.allow_random=true"]),
        (["teacher.taps=[]"], ["teacher.taps=[]", "rising order"]),
        (["teacher.taps=[5,2]"], ["rising order"]),
        (["teacher.taps=[2,2]"], ["rising order"]),
        (["teacher.source=random", "teacher.allow_random=true", "teacher.depth=11"], ["beyond teacher.depth=11", "up to 10"]),
        (["teacher.source=random", "teacher.allow_random=true", "teacher.heads=7"], ["teacher.width=768", "heads=7"]),
        # contrast
        (["contrast.group_size=8"], ["contrast.scope=group, or leave group_size out"]),
        (["contrast.scope=group"], ["needs contrast.group_size"]),
        (["contrast.scope=group", "contrast.group_size=12"], ["contrast.group_size=12", "use 8, 16"]),
        (["contrast.scope=group", "contrast.group_size=2", "gpus_per_node=4"], ["multiple of the 4 ranks", "use 4, 8"]),
        (["micro_batch=1"], ["without negatives"]),
        (["micro_batch=1", "contrast.scope=step"], ["BatchNorm", "micro_batch=2"]),
        # schedule
        (["optimizer.warmup_epochs=16"], ["optimizer.warmup_epochs=16", "train.epochs=16"]),
        (["optimizer.lr=1e-4", "optimizer.min_lr=1e-3"], ["optimizer.min_lr=0.001", "0.0001"]),
        # the rest
        (["checkpoint.every=300", "checkpoint.keep_every=1000"], ["checkpoint.keep_every=1000", "use 900"]),
        (["slurm.time=2", "slurm.warn_seconds=120"], ["slurm.warn_seconds=120"]),
        (["model.heads=5"], ["model.width=768 is not divisible by model.heads=5"]),
        (["model.width=90", "model.heads=9"], ["multiple of 4"]),
    ],
)  # fmt: skip
def test_impossible_combinations(argv, parts):
    message = refusal(*small(*argv))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        (["micro_batch=6"], "use micro_batch="),
        (["gpus_per_node=8", "micro_batch=3"], "use micro_batch="),
        (["gpus_per_node=3", "micro_batch=2"], "divides it: "),
        (["gpus_per_node=3", "micro_batch=1", "data.streams=3"], "a batch like "),
        (["data.streams=48"], "use data.streams="),
        (["gpus_per_node=32", "micro_batch=2"], "or data.streams="),
        (["gpus_per_node=32", "micro_batch=2"], "ranks that divide it: "),
        (["gpus_per_node=4", "contrast.scope=group", "contrast.group_size=24"], "; use "),
        (["contrast.scope=group"], "with this batch: "),
        (["checkpoint.every=300", "checkpoint.keep_every=1000"], "; use "),
        (["model.image_size=230"], "; use "),
        (["train.epochs=2", "optimizer.warmup_epochs=3"], "optimizer.warmup_epochs="),
    ],
)  # fmt: skip
def test_the_values_of_a_remedy_work(argv, remedy):
    """Every value that a message proposes passes the check that spoke."""
    message = refusal(*small(*argv))
    values = re.match(r"[\d., ]*\d", message[message.rindex(remedy) + len(remedy) :])[0].split(", ")
    key = {"divides it: ": "gpus_per_node", "ranks that divide it: ": "gpus_per_node", "a batch like ": "batch"}.get(
        remedy, "contrast.group_size" if "contrast.scope=group" in argv else argv[-1].partition("=")[0]
    )
    key = remedy.split()[-1].rstrip("=") if remedy.endswith("=") else key
    for value in values:
        changed = [a for a in argv if not a.startswith(f"{key}=")] + [f"{key}={value}"]
        try:
            load(*small(*changed))
        except UserError as error:
            assert _topic(str(error)) != _topic(message)


def _topic(message: str) -> str:
    """A message without its numbers."""
    return re.sub(r"[\d., ]+", " ", message)[:40]


def test_a_teacher_from_a_file_needs_the_file():
    for source in ("moco_v3", "timm", "checkpoint"):
        with pytest.raises(UserError, match=f"teacher.source={source} needs teacher.path"):
            cli.load_recipe([f"teacher.source={source}"])


def test_without_feature_loss_no_teacher_is_asked_for():
    assert cli.load_recipe(["loss.feature=0"]).teacher.source == "moco_v3"


@pytest.mark.parametrize(
    ("argv", "keys"),
    [
        (["gpus_per_node=8"], 512),
        (["gpus_per_node=8", "nodes=2"], 1024),
        (["gpus_per_node=8", "contrast.scope=step"], 4096),
        (["gpus_per_node=8", "contrast.scope=group", "contrast.group_size=1024"], 1024),
    ],
)
def test_keys_a_query_meets(argv, keys):
    assert checks.keys_per_query(load(*argv)) == keys


def test_peak_learning_rate():
    assert checks.peak_lr(load()) == pytest.approx(2.4e-3)  # METHOD section 1
    assert checks.peak_lr(load("optimizer.lr=1e-3")) == 1e-3


def test_divisors():
    assert checks.divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert checks.divisors(1) == [1]
    assert checks.divisors(97) == [1, 97]


@pytest.mark.parametrize("key, good, bad", [("optimizer.betas", "[0.9,0.999]", "[0.9,1]"), ("seed", 2**64 - 1, 2**64)])
def test_values_that_the_optimizer_or_the_generators_would_refuse(key, good, bad):
    assert load(f"{key}={good}")
    assert key in refusal(f"{key}={bad}")


def test_a_recipe_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        load().batch = 3
