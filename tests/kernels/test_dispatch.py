"""Which implementation computes what, what is said of it, and what happens where Triton is not."""

import os
import subprocess
import sys

import pytest
import torch

from mcf import kernels
from mcf.kernels import dispatch, tuning

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgetful():
    """Choices and what was said of them are remembered; not from test to test."""
    for remembered in (dispatch._resolve, dispatch._say):
        remembered.cache_clear()
    yield
    for remembered in (dispatch._resolve, dispatch._say):
        remembered.cache_clear()


@pytest.fixture
def on(monkeypatch):
    """`on(capability, …)` makes this a machine with such a GPU, or none, and with Triton or without."""

    def machine(capability: tuple[int, int] | None, *, triton: bool = True, interpreted: bool = False) -> None:
        dispatch._resolve.cache_clear()
        monkeypatch.setattr(dispatch, "HAS_TRITON", triton)
        monkeypatch.setattr(dispatch, "INTERPRETED", interpreted)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return machine


def resolve(implementation: str, device: torch.device, dtype: torch.dtype = torch.float32, unless: str = "") -> str:
    return dispatch._resolve("op", implementation, device, dtype, unless)


def test_auto_is_triton_on_gpus_that_can_and_the_reference_elsewhere(on):
    on((9, 0))
    assert (
        resolve("auto", CUDA) == resolve("auto", CUDA, torch.bfloat16) == resolve("auto", CUDA, torch.int64) == "triton"
    )
    assert resolve("auto", CPU) == "reference"
    assert resolve("auto", CUDA, torch.float64) == resolve("auto", CUDA, torch.float16) == "reference"
    assert resolve("auto", CUDA, unless="too many") == "reference"
    on((7, 5))
    assert resolve("auto", CUDA) == "reference"
    on((9, 0), triton=False)
    assert resolve("auto", CUDA) == "reference"
    on(None, interpreted=True)
    assert resolve("auto", CPU) == "reference" and resolve("triton", CPU) == "triton"


def test_reference_is_the_reference_anywhere(on):
    on((9, 0))
    for device in (CPU, CUDA):
        for dtype in (torch.float32, torch.float64):
            assert resolve("reference", device, dtype, "too many") == "reference"


@pytest.mark.parametrize(
    "machine, device, dtype, unless, why",
    [
        ({"capability": None}, CPU, torch.float32, "", "Triton computes on CUDA devices only, this is cpu"),
        ({"capability": (9, 0), "triton": False}, CUDA, torch.float32, "", "Triton is not installed"),
        ({"capability": (7, 5)}, CUDA, torch.float32, "", "the kernels need compute capability 8.0, this device has 7.5"),
        ({"capability": (9, 0)}, CUDA, torch.float16, "", "the kernel does not compute in float16"),
        ({"capability": (9, 0)}, CUDA, torch.float32, "the sun shines", "the sun shines"),
        ({"capability": None, "interpreted": True}, CPU, torch.float64, "", "the kernel does not compute in float64"),
    ],
)  # fmt: skip
def test_triton_where_it_cannot_compute_is_one_line(on, machine, device, dtype, unless, why):
    on(**machine)
    with pytest.raises(ValueError) as caught:
        resolve("triton", device, dtype, unless)
    assert str(caught.value) == f"op: implementation='triton': {why}; use 'auto' or 'reference'"


def test_without_what_builds_a_launcher_auto_is_the_reference(on, monkeypatch, tmp_path):
    """Nodes often lack a compiler, or Python's headers, and Triton then fails at the first kernel."""
    on((9, 0))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    include = tmp_path / "include"
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(include))

    def choice() -> str:
        dispatch._resolve.cache_clear()
        dispatch._no_launcher.cache_clear()
        return resolve("auto", CUDA)

    assert choice() == "reference"
    with pytest.raises(ValueError, match="needs a C compiler to launch kernels, and there is neither gcc nor clang"):
        resolve("triton", CUDA)
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert choice() == "reference"
    with pytest.raises(ValueError, match=r"needs Python's headers to launch kernels, and .*Python\.h is not there"):
        resolve("triton", CUDA)
    include.mkdir()
    (include / "Python.h").touch()
    assert choice() == "triton"
    dispatch._no_launcher.cache_clear()


def test_an_unknown_implementation_is_one_line():
    with pytest.raises(ValueError, match="mask: implementation='cuda' is none of auto, triton, reference"):
        kernels.mask(0, torch.arange(2), 0, 4, 2, implementation="cuda")


def test_a_choice_is_said_once_for_each_operation(caplog):
    caplog.set_level("INFO", logger="mcf.kernels.dispatch")
    position, ids = torch.zeros(1, 5, 3), torch.arange(4)[None]
    for batch in (1, 2, 3):
        kernels.mask(0, torch.arange(batch), 0, 4, 2)
        kernels.token_restore(torch.zeros(1, 2 + batch, 3), torch.zeros(3), position, ids)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("\n" not in line for line in said)
    assert said[0].startswith("mask on cpu: reference (") and said[1].startswith("token_restore on cpu: reference (")
    kernels.mask(0, torch.arange(2), 0, 4, 2, implementation="reference")
    assert [record.getMessage() for record in caplog.records][2:] == ["mask on cpu: reference (as asked)"]


def test_a_choice_is_said_under_torch_compile_too(caplog):
    caplog.set_level("INFO", logger="mcf.kernels.dispatch")
    run = torch.compile(lambda p: kernels.mask(0, p, 0, 4, 2)[0], fullgraph=True, backend="aot_eager")
    for _ in range(2):
        run(torch.arange(3))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["mask on cpu"]


def test_any_input_in_a_type_that_kernels_lack_decides(device):
    tokens, ids = torch.zeros(1, 3, 8, device=device), torch.arange(4, device=device)[None]
    position = torch.zeros(5, 8, dtype=torch.float64, device=device)
    mask_token = torch.zeros(8, device=device)
    assert kernels.token_restore(tokens, mask_token, position, ids).dtype == torch.float64
    with pytest.raises(ValueError, match="does not compute in float64"):
        kernels.token_restore(tokens, mask_token, position, ids, implementation="triton")


def of_everything(implementation: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each operation that has a gradient makes of sixteen values: a scalar."""
    options = {"implementation": implementation}
    tokens, table, ids = x.view(1, 2, 8), torch.ones(5, 8, device=x.device), torch.arange(4, device=x.device)[None]
    keys = torch.eye(3, 8, device=x.device)
    return {
        "feature_loss": kernels.feature_loss(tokens, table[None, :2], **options),
        "feature_tap": kernels.feature_tap(tokens, table[None, :2], **options)[1],
        "info_nce": kernels.info_nce(tokens[0], keys, ids[0, :2], 0.2, **options),
        "patch_gather": kernels.patch_gather(x[:12].view(1, 3, 2, 2), None, 1, **options).pow(3).sum(),
        "token_restore": kernels.token_restore(tokens, table[0], table, ids, **options).pow(3).sum(),
    }


@pytest.mark.parametrize("op", ["feature_loss", "feature_tap", "info_nce", "patch_gather", "token_restore"])
def test_a_second_derivative_is_the_references_or_an_error(op, device):
    """Kernels have first derivatives alone: a penalty on a gradient must not be zero without a word."""
    start = torch.randn(16, generator=torch.Generator().manual_seed(0)).to(device)
    firsts = {}
    for implementation in ("reference", "triton"):
        x = start.clone().requires_grad_()
        (firsts[implementation],) = torch.autograd.grad(of_everything(implementation, x)[op], x, create_graph=True)
        penalty = firsts[implementation].square().sum() + x.sum()
        if implementation == "reference":
            assert (torch.autograd.grad(penalty, x)[0] - 1).norm() > 1e-4
        else:
            with pytest.raises(RuntimeError, match=r"backward through mcf\.\w+_backward.* no autograd formula"):
                penalty.backward()
    torch.testing.assert_close(firsts["triton"], firsts["reference"], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ in other processes


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in (os.environ | environment).items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, timeout=300)


WITHOUT_TRITON = """
import sys
for name in ("triton", "triton.language"):
    sys.modules[name] = None  # importing it raises ImportError, as if it were not installed
import torch
from mcf import kernels
from mcf.kernels import reference

ids_keep, ids_restore = kernels.mask(0, torch.arange(3), 0, 9, 4)
assert torch.equal(ids_keep, reference.mask(0, torch.arange(3), 0, 9, 4)[0])
images = torch.zeros(3, 6, 6, 3, dtype=torch.uint8)
assert kernels.patch_gather(images, ids_keep, 2, (0, 0, 0), (1, 1, 1)).shape == (3, 4, 12)
tokens = torch.randn(3, 5, 8)
x = kernels.token_restore(tokens, torch.zeros(8), torch.zeros(10, 8), ids_restore)
loss = kernels.feature_loss(x, torch.randn(3, 10, 8))
loss += kernels.info_nce(x[:, 0], torch.eye(8)[:3], torch.arange(3), 0.2)
assert loss.isfinite()
for call in (
    lambda: kernels.mask(0, torch.arange(3), 0, 9, 4, implementation="triton"),
    lambda: kernels.feature_loss(x, x, implementation="triton"),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_without_triton_everything_imports_and_the_reference_computes():
    done = python(WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{op}: implementation='triton': Triton is not installed; use 'auto' or 'reference'"
        for op in ("mask", "feature_loss")
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which Triton computes")
def test_a_cpu_without_the_interpreter_refuses_triton_in_one_line():
    code = "import torch; from mcf import kernels; kernels.mask(0, torch.arange(3), 0, 9, 4, implementation='triton')"
    done = python(code, TRITON_INTERPRET=None)
    assert done.stderr.splitlines()[-1] == (
        "ValueError: mask: implementation='triton': Triton computes on CUDA devices only, this is cpu; "
        "use 'auto' or 'reference'"
    )


def test_importing_touches_no_gpu_and_nothing_else_of_the_project():
    code = (
        "import sys; from mcf import kernels; import torch; "
        "print(torch.cuda.is_initialized(), sorted(m for m in sys.modules if m.startswith('mcf.') "
        "and not m.startswith('mcf.kernels')))"
    )
    done = python(code)
    assert done.stdout.strip() == "False []", done.stderr


# ------------------------------------------------------------------------------------------------ configurations


def test_every_kernel_has_rows_for_every_chip():
    names = {kernel for kernel, _, _ in tuning.TABLE}
    for kernel in names:
        for chip in (*tuning.CHIPS, "interpreter"):
            # What no row is for is in the row "any"; a kernel without one names all its shapes.
            shapes = {shape for name, shape, where in tuning.TABLE if (name, where) == (kernel, chip)}
            everywhere = {shape for name, shape, _ in tuning.TABLE if name == kernel} - {"any"}
            assert "any" in shapes or everywhere <= shapes, (kernel, chip)
    for (kernel, _, chip), row in tuning.TABLE.items():
        assert row.num_warps in (1, 2, 4, 8, 16) and row.num_stages >= 1, (kernel, chip)


def test_a_chip_takes_the_rows_of_the_newest_that_is_no_newer(monkeypatch):
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    tuning._chip.cache_clear()
    for capability, chip in (
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_90"),
        ((12, 0), "sm_80"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        tuning._chip.cache_clear()
        assert tuning.chip_of(CUDA) == chip
    tuning._chip.cache_clear()


def test_a_row_for_a_shape_goes_before_the_row_for_any(monkeypatch):
    table = {("k", "any", "sm_90"): tuning.Config({"B": 1}), ("k", "small", "sm_90"): tuning.Config({"B": 2})}
    monkeypatch.setattr(tuning, "TABLE", table)
    assert tuning.config("k", "small", "sm_90").blocks == {"B": 2}
    assert tuning.config("k", "large", "sm_90").blocks == {"B": 1}
    with pytest.raises(KeyError):
        tuning.config("k", "small", "sm_80")
