"""Which back-end is chosen, why not the others, and the messages about it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import whisper_flash_attention.flash_attention as package
from whisper_flash_attention.errors import OptionError, UnsupportedAttention
from whisper_flash_attention.flash_attention import (
    AttentionInputs,
    AttentionProblem,
    MaskKind,
    attend,
    backend_names,
    explain,
    pick,
    preference,
)
from whisper_flash_attention.flash_attention.backends import (
    THIS_MACHINE,
    FlashAttn,
    Reference,
    SdpaCudnn,
    SdpaEfficient,
    SdpaFlash,
    TorchKernel,
    Xformers,
    import_reasons,
    package_reasons,
    sdpa_parameters,
)
from whisper_flash_attention.flash_attention.dispatch import BACKENDS, choose
from whisper_flash_attention.flash_attention.problem import Backend

ENCODER = AttentionProblem("cuda", 0, torch.float16, 1, 6, 1500, 1500, 64)
STEP = replace(ENCODER, q_len=1, kv_len=64)
CROSS = replace(ENCODER, q_len=1)
MASKED = replace(STEP, mask=MaskKind.BOOL, mask_shape=(1, 1, 1, 64))
CPU = replace(ENCODER, device_type="cpu", dtype=torch.float32)


@dataclass(frozen=True)
class PretendMachine:
    """A machine that is not there: one GPU, and packages by module name."""

    gpu: tuple[int, int] | None = (9, 0)
    packages: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def capability(self, index: int) -> tuple[int, int] | None:
        return self.gpu if index == 0 else None

    def version(self, module: str) -> str | None:
        return self.packages.get(module)

    def import_failure(self, module: str) -> str | None:
        return self.broken.get(module)


def on(machine: PretendMachine, refused: tuple[str, ...] = ()) -> tuple[Backend, ...]:
    """The back-ends as they would be on `machine`, whose libraries refuse nothing more."""

    def last_word(name: str) -> list[str]:
        return ["the library refuses"] if name in refused else []

    return (
        Reference(),
        SdpaFlash(machine, lambda problem: last_word("sdpa_flash")),
        SdpaCudnn(machine, lambda problem: last_word("sdpa_cudnn")),
        SdpaEfficient(machine, lambda problem: last_word("sdpa_efficient")),
        Xformers(machine, lambda problem: last_word("xformers")),
        FlashAttn(machine),
    )


EVERYTHING = {"xformers": "0.0.35", "flash_attn": "2.8.3.post1", "flash_attn_interface": "3.0.0"}
HOPPER = PretendMachine(packages=EVERYTHING)


def reasons(
    problem: AttentionProblem, name: str, machine: PretendMachine = HOPPER, **options: object
) -> str:
    return "; ".join(explain(replace(problem, **options), on(machine))[name])


def test_names_start_with_auto_and_match_the_back_ends() -> None:
    assert backend_names() == (
        *("auto", "reference", "sdpa_flash", "sdpa_cudnn"),
        *("sdpa_efficient", "xformers", "flash_attn"),
    )
    for problem in (ENCODER, STEP, MASKED, CPU):
        assert sorted(preference(problem)) == sorted(backend_names()[1:])
        assert preference(problem)[-1] == "reference"


def test_every_exported_name_exists() -> None:
    assert all(hasattr(package, name) for name in package.__all__)


@pytest.mark.parametrize("name", backend_names()[1:])
def test_with_everything_installed_a_hopper_gpu_runs_all(name: str) -> None:
    for problem in (ENCODER, STEP, CROSS, replace(ENCODER, q_len=4, kv_len=4, causal=True)):
        assert choose(problem, name, on(HOPPER)).name == name


@pytest.mark.parametrize(
    ("problem", "bare", "full"),
    [
        (ENCODER, "sdpa_cudnn", "sdpa_cudnn"),
        (CROSS, "sdpa_efficient", "sdpa_efficient"),
        (replace(CROSS, batch=256), "sdpa_cudnn", "sdpa_cudnn"),
        (STEP, "sdpa_efficient", "sdpa_efficient"),
        (replace(STEP, batch=32), "sdpa_efficient", "sdpa_efficient"),
        (MASKED, "sdpa_efficient", "sdpa_efficient"),
        (replace(ENCODER, dtype=torch.float32), "sdpa_efficient", "sdpa_efficient"),
        (replace(ENCODER, dtype=torch.float64), "reference", "reference"),
        (replace(STEP, kv_len=1), "sdpa_efficient", "sdpa_efficient"),
        (CPU, "sdpa_flash", "sdpa_flash"),
        (replace(CPU, dropout=0.1), "reference", "reference"),
        (replace(CPU, device_type="meta"), "reference", "reference"),
    ],
    ids=str,
)
def test_auto_takes_the_preferred_back_end_that_can(
    problem: AttentionProblem, bare: str, full: str
) -> None:
    assert choose(problem, "auto", on(PretendMachine())).name == bare
    assert choose(problem, "auto", on(HOPPER)).name == full


def test_auto_passes_over_what_the_library_itself_refuses() -> None:
    backends = on(PretendMachine(), refused=("sdpa_cudnn", "sdpa_flash"))
    assert choose(ENCODER, "auto", backends).name == "sdpa_efficient"
    assert explain(ENCODER, backends)["sdpa_cudnn"] == ["the library refuses"]


def test_auto_always_finds_something() -> None:
    assert choose(ENCODER, "auto", on(PretendMachine(gpu=None))).name == "reference"
    assert choose(replace(ENCODER, device_index=3), "auto", on(HOPPER)).name == "reference"


@pytest.mark.parametrize("name", backend_names()[2:])
def test_a_gpu_that_is_not_there_is_a_reason(name: str) -> None:
    machine = PretendMachine(gpu=None, packages=EVERYTHING)
    assert "there is no cuda:0 on this machine" in reasons(ENCODER, name, machine)


@pytest.mark.parametrize("name", ["sdpa_cudnn", "sdpa_efficient", "xformers", "flash_attn"])
def test_a_cpu_is_a_reason(name: str) -> None:
    assert "needs a CUDA GPU, not cpu" in reasons(CPU, name)


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn", "flash_attn"])
def test_float32_is_a_reason_where_only_halves_run(name: str) -> None:
    assert "needs float16 or bfloat16, not float32" in reasons(ENCODER, name, dtype=torch.float32)


@pytest.mark.parametrize("name", ["sdpa_efficient", "xformers"])
def test_float32_and_masks_run_where_cutlass_does(name: str) -> None:
    assert reasons(MASKED, name, dtype=torch.float32) == ""
    assert "needs float16, bfloat16 or float32, not float64" in reasons(
        ENCODER, name, dtype=torch.float64
    )


@pytest.mark.parametrize("name", ["sdpa_flash", "flash_attn"])
def test_a_mask_is_a_reason_for_flash_kernels(name: str) -> None:
    assert "takes no mask" in reasons(MASKED, name)


def test_a_mask_is_fine_for_the_flash_kernel_of_a_cpu() -> None:
    assert reasons(MASKED, "sdpa_flash", device_type="cpu") == ""
    assert "takes no dropout on a CPU" in reasons(CPU, "sdpa_flash", dropout=0.5)
    assert "float64, not float8_e5m2" in reasons(CPU, "sdpa_flash", dtype=torch.float8_e5m2)


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn", "xformers", "flash_attn"])
def test_an_old_gpu_is_a_reason(name: str) -> None:
    machine = PretendMachine(gpu=(7, 5), packages=EVERYTHING)
    assert "needs compute capability 8.0 or newer, but cuda:0 has 7.5" in reasons(
        ENCODER, name, machine
    )


def test_an_old_gpu_has_no_bfloat16() -> None:
    machine = PretendMachine(gpu=(7, 5), packages=EVERYTHING)
    assert reasons(ENCODER, "sdpa_efficient", machine) == ""
    for name in ("sdpa_efficient", "xformers"):
        found = reasons(MASKED, name, machine, dtype=torch.bfloat16)
        assert "needs compute capability 8.0 for bfloat16" in found


def test_a_new_gpu_is_a_reason_only_for_the_cutlass_kernels_of_xformers() -> None:
    blackwell = PretendMachine(gpu=(10, 0), packages=EVERYTHING)
    assert reasons(ENCODER, "xformers", blackwell) == ""
    for problem in (MASKED, replace(ENCODER, dtype=torch.float32)):
        found = reasons(problem, "xformers", blackwell)
        assert "needs compute capability 9.0 or older, but cuda:0 has 10.0" in found


def test_the_width_of_a_head_is_a_reason() -> None:
    assert "multiple of 8, not 60" in reasons(ENCODER, "sdpa_flash", head_dim=60)
    assert "at most 256, not 264" in reasons(ENCODER, "flash_attn", head_dim=264)
    assert "at most 128, not 160" in reasons(ENCODER, "sdpa_cudnn", head_dim=160)
    assert reasons(MASKED, "sdpa_efficient", head_dim=60, dtype=torch.float32) == ""
    assert "multiple of 8, not 60" in reasons(MASKED, "xformers", head_dim=60)


def test_cudnn_says_what_it_cannot_do() -> None:
    assert "needs two keys or more" in reasons(STEP, "sdpa_cudnn", kv_len=1)
    assert "only multiples of 1/16 as dropout" in reasons(ENCODER, "sdpa_cudnn", dropout=0.1)
    assert "no dropout with a one-token query" in reasons(STEP, "sdpa_cudnn", dropout=0.125)
    assert reasons(ENCODER, "sdpa_cudnn", dropout=0.125) == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "xformers",
            "xformers is not installed: pip install 'whisper-flash-attention[xformers]'",
        ),
        ("flash_attn", "flash_attn is not installed: pip install 'whisper-flash-attention[flash]'"),
    ],
)
def test_a_missing_package_is_a_reason_that_says_how_to_get_it(name: str, message: str) -> None:
    assert reasons(ENCODER, name, PretendMachine()) == message
    assert message in reasons(CPU, name, PretendMachine())


@pytest.mark.parametrize(("name", "version"), [("xformers", "0.0.34"), ("flash_attn", "2.7.4")])
def test_an_old_package_is_a_reason(name: str, version: str) -> None:
    found = reasons(ENCODER, name, PretendMachine(packages={name: version}))
    assert f"{name} {version} is older than" in found and "pip install --upgrade" in found


@pytest.mark.parametrize(
    ("name", "module"), [("xformers", "xformers.ops"), ("flash_attn", "flash_attn")]
)
def test_a_package_that_does_not_load_is_a_reason(name: str, module: str) -> None:
    machine = PretendMachine(
        packages={"xformers": "0.0.35", "flash_attn": "2.8.3"},
        broken={module: "undefined symbol: _ZN3c10"},
    )
    assert reasons(ENCODER, name, machine) == (
        f"{module} cannot be imported: undefined symbol: _ZN3c10"
    )
    assert "imported" not in reasons(CPU, name, machine), "importing takes seconds"


def test_flash_attention_3_alone_runs_on_hopper_without_dropout() -> None:
    machine = PretendMachine(packages={"flash_attn_interface": "3.0.0"})
    assert reasons(ENCODER, "flash_attn", machine) == ""
    assert "flash_attn is not installed" in reasons(ENCODER, "flash_attn", machine, dropout=0.1)
    ampere = replace(machine, gpu=(8, 0))
    assert "flash_attn is not installed" in reasons(ENCODER, "flash_attn", ampere)


def test_asked_for_by_name_nothing_else_is_tried() -> None:
    q = torch.randn(2, 3, 6, 64)
    with pytest.raises(UnsupportedAttention) as refusal:
        attend(q, q, q, causal=True, backend="sdpa_cudnn")
    message = str(refusal.value)
    assert "\n" not in message
    assert message.startswith(
        "attention back-end sdpa_cudnn cannot run q [2, 3, 6, 64], k and v [2, 3, 6, 64], "
        "float32 on cpu, causal: needs"
    )
    for part in ("needs a CUDA GPU, not cpu", "reference can |", "sdpa_flash can |"):
        assert part in message
    for name in backend_names()[1:]:
        assert name in message


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(OptionError, match="Did you mean 'sdpa_flash'") as refusal:
        attend(*torch.randn(3, 1, 1, 1, 8).unbind(), backend="sdpa-flash")
    assert all(name in str(refusal.value) for name in backend_names())
    with pytest.raises(OptionError, match=r"flash_attn\.$"):
        pick(CPU, "something else")


def test_a_choice_is_made_once() -> None:
    problem = replace(CPU, kv_len=1499)
    first = pick(problem)
    hits = pick.cache_info().hits
    assert pick(replace(problem)) is first
    assert pick.cache_info().hits == hits + 1


def test_explain_covers_every_back_end() -> None:
    found = explain(CPU)
    assert tuple(found) == backend_names()[1:]
    assert [name for name, against in found.items() if not against] == ["reference", "sdpa_flash"]


def test_this_machine_tells_missing_packages_from_broken_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_attention.py").write_text("raise ImportError('libcuda\\n  is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    assert THIS_MACHINE.version("no_such_attention") is None
    assert torch.__version__.startswith(str(THIS_MACHINE.version("torch")).split("+")[0])
    assert THIS_MACHINE.version("broken_attention") == "of unknown version"
    assert package_reasons(THIS_MACHINE, "broken_attention", "x", (1, 0)) == []
    (tmp_path / "sound_attention.py").touch()
    assert THIS_MACHINE.version("sound_attention") and "sound_attention" not in sys.modules
    assert import_reasons(THIS_MACHINE, "broken_attention") == [
        "broken_attention cannot be imported: libcuda is missing"
    ]
    assert import_reasons(THIS_MACHINE, "torch") == []


def test_back_ends_of_this_machine_agree_with_pytorch_about_its_gpus() -> None:
    assert THIS_MACHINE.capability(torch.cuda.device_count()) is None
    assert all(backend.why_not(CPU) == [] for backend in BACKENDS[:2])


@pytest.mark.parametrize("kernel", list(TorchKernel))
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a PyTorch without a GPU")
def test_pytorch_has_the_last_word(kernel: TorchKernel) -> None:
    without_gpu = replace(ENCODER, device_type="cpu", device_index=-1)  # -1: make none current
    assert kernel.refusals(without_gpu) == [
        f"PyTorch refuses its {kernel.value} kernel and does not say why"
    ]


def test_the_tensors_shown_to_pytorch_have_the_shapes_of_the_call() -> None:
    q, kv = torch.zeros(2, 3, 6, 64), torch.zeros(2, 5, 6, 64)
    mask = torch.zeros(1, 1, 1, 5)
    params = sdpa_parameters(AttentionInputs(q, kv, kv, True, mask, None, 0.25).problem)
    assert params.query.shape == (2, 6, 3, 64) and params.key.shape == (2, 6, 5, 64)
    assert params.attn_mask.shape == (2, 6, 3, 5) and params.dropout == 0.25
    assert not params.is_causal and not params.query.requires_grad
    assert params.query.stride(-1) == 1
    square = AttentionInputs(q.requires_grad_(), q, q, True).problem
    assert sdpa_parameters(square).is_causal and sdpa_parameters(square).query.requires_grad
