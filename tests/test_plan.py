"""The plan: numbers worked out by hand, and held against the real modules."""

import pytest

from mcf import cli
from mcf.errors import UserError
from mcf.machine import load_machine
from mcf.plan import Plan, make_plan
from mcf.sizes import count_parameters, estimate_memory, largest_micro_batch


def plan(*argv: str, samples: int | None = None) -> Plan:
    return make_plan(cli.load_recipe(list(argv)), samples)


def test_the_faithful_run_on_one_node():
    p = plan("recipe=vit_b_20m")
    assert (p.world_size, p.accumulation) == (8, 8)
    # 20,000,000 // 4096 = 4882 whole batches; 16 times that. METHOD's 78,125 counts the broken batch of each epoch.
    assert (p.steps_per_epoch, p.steps, p.epochs) == (4882, 78_112, 16)
    assert p.lr == pytest.approx(2.4e-3)
    assert p.warmup_steps == 4882
    assert (p.keys, p.negatives) == (512, 511)
    assert p.momentum_updates == 8
    assert p.momentum_per_step == pytest.approx(0.923, abs=5e-4)  # METHOD: 0.99⁸


@pytest.mark.parametrize(
    ("argv", "accumulation", "keys", "updates"),
    [
        (["nodes=1"], 8, 512, 8),
        (["nodes=2"], 4, 1024, 4),
        (["nodes=8"], 1, 4096, 1),
        (["nodes=16"], 1, 4096, 1),
        (["nodes=64"], 1, 4096, 1),
        (["nodes=1", "gpus_per_node=1"], 64, 64, 64),
        (["nodes=2", "contrast.scope=step"], 4, 4096, 4),
        (["nodes=2", "momentum.update=step"], 4, 1024, 1),
    ],
)
def test_any_number_of_nodes_keeps_the_effective_batch(argv, accumulation, keys, updates):
    p = plan("recipe=vit_b_20m", *argv)
    assert (p.batch, p.accumulation, p.keys, p.momentum_updates) == (4096, accumulation, keys, updates)
    assert p.world_size * p.micro_batch * p.accumulation == 4096
    assert (p.steps, p.lr) == (78_112, pytest.approx(2.4e-3))


def test_many_ranks_share_the_batch_and_the_plan_says_so():
    p = plan("recipe=vit_b_20m", "nodes=16")
    assert p.micro_batch == 32
    assert "each handles its share, 32" in str(p)
    with pytest.raises(UserError, match=r"cannot be reached by .* of micro_batch=48: .*use micro_batch=.*32, 64"):
        plan("recipe=vit_b_20m", "micro_batch=48")


@pytest.mark.parametrize("name", cli.recipe_names())
def test_every_recipe_plans(name):
    small = name in ("demo", "faces_small", "faces_small_mae")
    # The teacher of this one is a run of the user's own.
    teacher = ["teacher.path=runs/first"] if name == "faces_small" else []
    text = str(plan(f"recipe={name}", *teacher, samples=1500 if small else None))
    assert name in text
    assert ("RANDOM" in text) == (name == "demo")
    if not small:
        assert "effective batch 4,096 = 8 ranks" in text


def test_what_is_printed():
    lines = dict(line.split(maxsplit=1) for line in str(plan("recipe=vit_b_20m", "nodes=2")).splitlines())
    text = str(plan("recipe=vit_b_20m", "nodes=2"))
    assert lines["ranks"] == "16 = 2 nodes × 8"
    assert "4,096 = 16 ranks × micro-batch 64 × accumulation 4" in text
    assert "78,112 steps = 16 epochs of 4,882 steps (20,000,000 samples)" in text
    assert "0 → 0.0024 over 4,882 steps, then half-cosine → 0" in text
    assert "1,023 a query (1,024 keys with its own)" in text
    assert "0.99 4 times a step = 0.9606 a step" in text
    assert "rising to 1" not in text
    assert "rising to 1" in str(plan("recipe=vit_b_momentum_cosine"))
    assert "0.99 once a step" in str(plan("recipe=vit_b_ema_per_step"))


# --- length -------------------------------------------------------------------------------------------------------


def test_length_in_steps():
    p = plan("recipe=demo", "train.steps=100", "optimizer.warmup_epochs=0.5", samples=640)
    assert (p.steps_per_epoch, p.steps, p.epochs, p.warmup_steps) == (10, 100, 10.0, 5.0)


def test_the_remainder_of_an_epoch_is_left_out():
    assert plan("recipe=demo", samples=64 * 7 + 63).steps_per_epoch == 7


def test_the_size_of_the_data_set():
    with pytest.raises(UserError, match=r"not known.*data.samples=NUMBER"):
        plan("recipe=demo")
    assert plan("recipe=demo", "data.samples=128").samples == 128
    p = plan("recipe=demo", "data.samples=128", samples=130)
    assert p.samples == 130
    assert "the data folder has 130 samples, the recipe speaks of 128" in str(p)
    with pytest.raises(UserError, match=r"63 samples, fewer than batch=64"):
        plan("recipe=demo", samples=63)


@pytest.mark.parametrize(
    ("argv", "samples", "said"),
    [
        (["recipe=vit_b_20m", "gpus_per_node=1"], 160, "use batch=128 data.streams=128, or more data"),
        (["recipe=vit_b_20m", "gpus_per_node=8"], 160, "use batch=128 data.streams=128, or more data"),
        (
            ["recipe=vit_b_20m", "gpus_per_node=3", "batch=3840", "data.streams=240"],
            100,
            "use batch=96 data.streams=96,",
        ),
        (
            ["recipe=vit_b_20m", "micro_batch=48", "batch=3072", "data.streams=64"],
            1000,
            "use batch=512 micro_batch=32,",
        ),
        (["recipe=vit_b_negatives_512"], 300, "use batch=256 data.streams=256 contrast.group_size=256,"),
        (["recipe=demo"], 63, "use batch=32, or more data"),
    ],
)
def test_the_batch_that_few_samples_fill_is_named_and_accepted(argv, samples, said):
    with pytest.raises(UserError, match=rf"the data set has {samples} samples, fewer than batch=") as caught:
        plan(*argv, samples=samples)
    assert said in str(caught.value)
    remedy = str(caught.value).partition("; use ")[2].partition(",")[0].split()
    given = {word.partition("=")[0] for word in remedy}
    others = [word for word in argv if word.partition("=")[0] not in given]
    assert plan(*others, *remedy, samples=samples).batch <= samples


def test_without_a_batch_that_fits_fewer_ranks_are_asked_for():
    with pytest.raises(UserError, match="use fewer ranks and a smaller batch, or more data"):
        plan("recipe=vit_b_20m", samples=7)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(UserError, match=r"optimizer.warmup_epochs=0.5 are 5 steps, and the run has only 4"):
        plan("recipe=demo", "train.steps=4", "optimizer.warmup_epochs=0.5", samples=640)


# --- disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["train.steps=1000", "checkpoint.every=100", "checkpoint.keep=3"], 3),
        (["train.steps=150", "checkpoint.every=100", "checkpoint.keep=3"], 2),  # at 100 and at the end
        (["train.steps=1000", "checkpoint.every=100", "checkpoint.keep=3", "checkpoint.keep_every=200"], 8),
        (["train.steps=1000", "checkpoint.every=100", "checkpoint.keep=1", "checkpoint.keep_every=100"], 10),
    ],
)
def test_checkpoints_on_disk(argv, kept):
    # keep_every=200 keeps 200, 400, … 1000, and the newest three may all be others: an upper bound.
    assert plan("recipe=demo", *argv, samples=640).checkpoints == kept


@pytest.mark.parametrize(("steps", "records"), [(100, 1), (101, 2), (150, 2), (200, 2)])
def test_metrics_are_recorded_at_every_interval_and_at_the_end(steps, records):
    p = plan("recipe=demo", f"train.steps={steps}", "train.log_every=100", samples=640)
    assert p.metric_records == records


# --- memory -------------------------------------------------------------------------------------------------------


def state(stage: int, nodes: int) -> float:
    """Bytes of state per trained parameter on a rank, in float32 (no copies for autocast)."""
    recipe = cli.load_recipe(
        ["recipe=vit_b_20m", "train.precision=fp32", f"train.zero_stage={stage}", "gpus_per_node=1", f"nodes={nodes}"]
    )
    parameters = count_parameters(recipe)
    memory = estimate_memory(recipe, parameters)
    return (memory.weights + memory.optimizer) / parameters.trained


def test_state_by_zero_stage():
    # Parameters, gradients, two moments: 16 bytes. Split, DeepSpeed keeps a master copy of its slice beside them; one
    # rank splits nothing. Biases and norms, 0.15 % of the parameters, stay whole under stage 3.
    assert [state(stage, 1) for stage in range(4)] == [16] * 4
    assert [state(stage, 4) for stage in range(3)] == pytest.approx([16, 8 + 12 / 4, 4 + 16 / 4], rel=1e-6)
    assert 20 / 4 < state(3, 4) < 20 / 4 + 4 * 0.002


def test_the_momentum_branch_and_its_snapshot_are_always_there():
    """Also where nothing is contrasted: the training loop makes keys whatever their weight. Stage 3 splits it too."""
    for argv in ([], ["loss.contrast=0"], ["gpus_per_node=4"], ["gpus_per_node=4", "train.zero_stage=3"]):
        recipe = cli.load_recipe(["recipe=demo", *argv])
        parameters = count_parameters(recipe)
        parts = 4 if "train.zero_stage=3" in argv else 1
        assert estimate_memory(recipe, parameters).momentum == 2 * 4 * parameters.momentum // parts


def test_copies_in_bfloat16_and_images_that_wait_by_hand():
    """ViT-B on 8 ranks: the student's parameters and the teacher's, images of 224 × 224 × 3 bytes, 512 a rank and step."""

    def memory(*argv: str):
        recipe = cli.load_recipe(["recipe=vit_b_20m", *argv])
        return estimate_memory(recipe, count_parameters(recipe))

    full, half = memory("train.precision=fp32"), memory()
    # Autocast holds a second copy of what is trained; the frozen teacher has one alone.
    assert half.weights - full.weights == 2 * 117_963_520
    assert (full.teacher, half.teacher) == (4 * 85_647_360, 2 * 85_647_360)
    image = 3 * 224**2
    # The micro-batch at work, and three that are decoded ahead.
    assert memory("data.prefetch=3").images == 4 * 64 * image
    # All keys come before the first query: the step's images are held.
    for scope in (["contrast.scope=step"], ["contrast.scope=group", "contrast.group_size=512"]):
        assert memory("data.prefetch=3", *scope).images == (4 * 64 + 512) * image


def test_which_micro_batch_fills_the_memory():
    recipe = cli.load_recipe(["recipe=vit_b_20m", "machine=h200", "data.samples=20000000"])
    machine, parameters = load_machine("h200"), count_parameters(recipe)
    assert machine is not None

    def taken(size: int) -> int:
        return estimate_memory(recipe.model_copy(update={"micro_batch": size}), parameters).total

    # Eight ranks share a batch of 4,096.
    assert largest_micro_batch(recipe, taken(128), parameters) == 128
    assert largest_micro_batch(recipe, taken(128) - 1, parameters) == 64
    assert largest_micro_batch(recipe, 2 * taken(512), parameters) == 512
    assert largest_micro_batch(recipe, taken(2) - 1, parameters) is None

    def notes(memory: float) -> str:
        return "\n".join(make_plan(recipe, machine=machine.model_copy(update={"memory": memory})).notes)

    # A tenth of the memory is left to others.
    assert "micro_batch=128 would still fit a GPU of machine=h200" in notes(1.12 * taken(128))
    assert "fit" not in notes(1.05 * taken(128))
    assert f"a GPU of machine=h200 has {taken(32) / 0.89 / 2**30:.1f} GiB: use micro_batch=32, which fits" in notes(
        taken(32) / 0.89
    )
    assert "use a higher train.zero_stage, or more ranks" in notes(taken(1) / 2)


def test_parameters_of_known_models():
    p = count_parameters(cli.load_recipe(["recipe=vit_b_20m"]))
    # ViT-B/16 without head and position table: 86,567,656 of timm's model − 769,000 of its head − 151,296 positions.
    assert p.encoder == p.teacher == 86_567_656 - 769_000 - 151_296 == 85_647_360
    assert p.predictor == 256 * 4096 * 2 + 2 * 4096
    assert p.projector == 768 * 4096 + 2 * 4096 + 4096 * 256


# Everything else is counted from the modules themselves, at sizes where a formula cannot be right by chance.
SHAPES = (
    "recipe=demo", "micro_batch=8", "model.image_size=64", "model.patch_size=8", "model.width=48", "model.depth=3",
    "model.heads=4", "model.mlp_ratio=3", "model.decoder.width=40", "model.decoder.depth=2", "model.decoder.heads=5",
    "model.projection.hidden=56", "model.projection.dim=24", "teacher.width=72", "teacher.depth=2", "teacher.heads=6",
    "teacher.taps=[0,1]", "teacher.patch_size=16",
)  # fmt: skip


def build(recipe, attention="sdpa"):
    from mcf.models import MCF, MomentumBranch, Objective
    from mcf.models.teacher import Teacher
    from mcf.models.vit import VisionTransformer

    t = recipe.teacher
    vit = VisionTransformer(
        image_size=recipe.model.image_size, patch_size=t.patch_size, width=t.width, depth=t.depth, heads=t.heads
    )
    # The estimate of activations is of an attention that keeps no scores.
    student = MCF(recipe.model, attention=attention)
    teacher = Teacher(vit.state_dict(), heads=t.heads, taps=t.taps, attention=attention)
    return student, MomentumBranch(student), Objective(recipe, teacher)


def test_parameters_are_those_of_the_modules():
    recipe = cli.load_recipe([*SHAPES])
    student, momentum, objective = build(recipe)
    expected = count_parameters(recipe)

    def size(module):
        return sum(p.numel() for p in module.parameters())

    for part in ("encoder", "decoder", "projector", "predictor"):
        assert getattr(expected, part) == size(getattr(student, part)), part
    assert expected.trained == size(student)
    assert expected.momentum == size(momentum)
    assert expected.teacher == size(objective.teacher)


def test_checkpoint_is_as_large_as_its_tensors():
    recipe = cli.load_recipe([*SHAPES])
    student, momentum, _ = build(recipe)
    moments = 2 * 4 * sum(p.numel() for p in student.parameters())
    tensors = sum(t.numel() * t.element_size() for m in (student, momentum) for t in m.state_dict().values())
    # Counters of BatchNorm and the like: a few bytes.
    assert make_plan(recipe, 640).checkpoint_bytes == pytest.approx(moments + tensors, abs=200)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["model.image_size=224", "model.patch_size=16", "teacher.patch_size=16", "model.width=384", "model.heads=6"],
        ["loss.feature=0", "loss.pixel=0"],
        ["speed.recompute=[encoder,decoder,teacher]", "model.depth=8", "teacher.depth=6", "teacher.taps=[1,5]"],
        ["speed.recompute=[teacher]", "teacher.stream=bfloat16"],
        ["teacher.products=float8"],
    ],
    ids=["small", "wide", "contrast alone", "recomputed", "teacher recomputed", "float8"],
)
def test_activations_are_what_autograd_keeps(precision, extra):
    """Every tensor that autograd saves in a real forward pass is counted, parameters aside."""
    import torch

    from mcf import kernels
    from mcf.models import recompute_blocks
    from mcf.models.vit import Block

    recipe = cli.load_recipe(["recipe=demo", "micro_batch=8", f"train.precision={precision}", *extra])
    student, momentum, objective = build(recipe)
    networks = {"encoder": student.encoder, "decoder": student.decoder, "teacher": objective.teacher}
    again = [network for name, network in networks.items() if name in recipe.speed.recompute]
    recompute_blocks(*again)
    known = {t.untyped_storage().data_ptr() for m in (student, objective) for t in (*m.parameters(), *m.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    patches, size = recipe.model.patches, recipe.model.image_size
    images = torch.zeros(8, size, size, 3, dtype=torch.uint8)
    keep, restore = kernels.mask(0, torch.arange(8), kernels.ENCODER, patches, patches // 4)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        pred, q = student(images, keep, restore)
        keys = torch.nn.functional.normalize(momentum(images, keep).float(), dim=-1).detach()
        objective(images, pred, q, keys, torch.arange(8), restore >= keep.shape[1])
        measured = sum(storage.nbytes() for storage in saved.values())
        # What the largest of the blocks that are computed again keeps, while its turn is.
        largest = 0
        for network in again:
            block = next(module for module in network.modules() if isinstance(module, Block))
            saved.clear()
            block.recompute = False
            stream = torch.bfloat16 if "teacher.stream=bfloat16" in extra and precision == "bf16" else torch.float32
            tokens = 1 + patches // 4 if network is student.encoder else 1 + patches
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16" and stream == torch.float32):
                block(torch.zeros(8, tokens, block.norm1.normalized_shape[0], dtype=stream, requires_grad=True))
            largest = max(largest, sum(storage.nbytes() for storage in saved.values()))
        measured += largest
    memory = estimate_memory(recipe, count_parameters(recipe))
    # Weights in bfloat16, but for those of blocks that forget them too (autocast holds these until the forward ends).
    forgotten = {p for network in again for m in network.modules() if isinstance(m, Block) for p in m.parameters()}
    copies = sum(2 * p.numel() for p in student.parameters() if p not in forgotten) if precision == "bf16" else 0
    # An estimate for people: within a tenth (it was within 3 % when it was written).
    assert memory.activations + copies == pytest.approx(measured, rel=0.1)
