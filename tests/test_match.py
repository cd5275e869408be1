"""judge follows the table row by row and says every reason; rank is a total order."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubaoti.artifact.kernel_pin import KernelPin
from hubaoti.artifact.requirements import Requirements
from hubaoti.artifact.variant import Recipe, Variant
from hubaoti.host.match import Compromise, MatchResult, Refusal, Verdict, judge
from hubaoti.host.probe import Gpu, Host, Torch, probe_host
from hubaoti.host.rank import Candidate, rank
from hubaoti.settings import Settings

# A deadline would measure whoever shares the machine.
unhurried = settings(deadline=None, max_examples=200)

PIN = KernelPin("kernels-community/flash-attn3", "a" * 40, (90,))
CUDA = Requirements(
    device="cuda",
    os="linux",
    torch="2.13.0+cu130",
    level="x86_64_v3",
    cuda="13.0",
    driver="13.0",
    sm=90,
    glibc="2.34",
    glibcxx="3.4.30",
    cxxabi="1.3.13",
    libraries=("libc.so.6",),
    shared_memory=227 << 10,
    kernels=(PIN,),
)
CPU = Requirements(device="cpu", os="linux", torch="2.13.0+cpu", level="x86_64_v3", glibc="2.34")


def fake_torch(version: str = "2.13.0+cu130", cuda: str | None = "13.0") -> Torch:
    return Torch(version=version, cuda=cuda, git=None, path=Path("/site-packages/torch"))


def fake_gpu(sm: int) -> Gpu:
    return Gpu(name=f"Fake {sm}", sm=sm, memory=80 << 30)


fake_gpu_host = Host(
    os="linux",
    machine="x86_64",
    python="3.12.0",
    level="x86_64_v3",
    cpu="haswell",
    cores=8,
    torch=fake_torch(),
    gpus=(fake_gpu(90),),
    driver="580.65.06",
    driver_cuda="13.0",
    glibc="2.34",
    glibcxx="3.4.30",
    cxxabi="1.3.13",
    libraries=frozenset({"libc.so.6"}),
    endpoint="https://hub.example",
    mirror=Path("/mirror"),
)
fake_cpu_host = replace(
    fake_gpu_host,
    torch=fake_torch("2.13.0+cpu", None),
    gpus=(),
    driver=None,
    driver_cuda=None,
    notes=("NVML: NVML Shared Library Not Found",),
)


def needs(verdict: Verdict) -> str:
    return "; ".join(refusal.need for refusal in verdict.refusals)


# The table


def test_the_kind_of_host_it_was_built_for_is_exact() -> None:
    assert judge(CUDA, fake_gpu_host) == Verdict(device=0)
    assert judge(CPU, fake_cpu_host) == Verdict()
    assert judge(CUDA, fake_gpu_host).fit is MatchResult.EXACT


@pytest.mark.parametrize(
    ("built", "here", "fit"),
    [
        ("2.13.0+cpu", "2.13.0+cpu", MatchResult.EXACT),
        ("2.13.0", "2.13", MatchResult.EXACT),
        ("2.14.0.dev20260701+cpu", "2.14.0.dev20260701+cpu", MatchResult.EXACT),
        ("2.13.0+cpu", "2.13.0+cu130", MatchResult.COMPATIBLE),
        ("2.13.0+cpu", "2.13.1+cpu", MatchResult.COMPATIBLE),
        ("2.13.1+cpu", "2.13.0+cpu", MatchResult.COMPATIBLE),
        ("2.13.0+cpu", "2.13.0.post1+cpu", MatchResult.COMPATIBLE),
        ("2.13.0+cpu", "2.12.0+cpu", MatchResult.INCOMPATIBLE),
        ("2.13.0+cpu", "2.14.0+cpu", MatchResult.INCOMPATIBLE),
        ("2.13.0+cpu", "3.13.0+cpu", MatchResult.INCOMPATIBLE),
        ("2.13.0+cpu", "1!2.13.0+cpu", MatchResult.INCOMPATIBLE),
        ("2.13.0+cpu", "2.13.0rc1+cpu", MatchResult.INCOMPATIBLE),
        ("2.13.0a0+git1a2b3c4", "2.13.0+cpu", MatchResult.INCOMPATIBLE),
        ("2.14.0.dev20260701+cpu", "2.14.0.dev20260702+cpu", MatchResult.INCOMPATIBLE),
        ("2.13.0+cpu", "our own build", MatchResult.INCOMPATIBLE),
    ],
)
def test_torch(built: str, here: str, fit: MatchResult) -> None:
    host = replace(fake_cpu_host, torch=fake_torch(here, None))
    assert judge(replace(CPU, torch=built), host).fit is fit


@pytest.mark.parametrize(
    ("built", "here", "advice"),
    [
        ("2.13.0+cpu", "2.12.0+cpu", "pull a torch2.12 variant, or install torch 2.13.0+cpu"),
        ("2.14.0.dev1+cpu", "2.13.0+cpu", "pull a torch2.13 variant, or install"),
        ("2.13.0+cpu", "2.13.0rc1+cpu", "compile one here, or install torch 2.13.0+cpu"),
        ("2.13.0+cpu", "2.14.0.dev1+cpu", "compile one here, or install torch 2.13.0+cpu"),
        ("2.14.0.dev1+cpu", "2.14.0.dev2+cpu", "compile one here, or install torch 2.14.0.dev1"),
        ("2.13.0a0+git1a2b3c4", "2.13.0+cpu", "compile one here, or install torch 2.13.0a0"),
    ],
)
def test_the_advice_about_torch_leads_to_an_artifact_that_runs(
    built: str, here: str, advice: str
) -> None:
    host = replace(fake_cpu_host, torch=fake_torch(here, None))
    (refusal,) = judge(replace(CPU, torch=built), host).refusals
    assert refusal.advice.startswith(advice)


@pytest.mark.parametrize(
    ("built", "here", "fit"),
    [
        ("13.0", "13.0", MatchResult.EXACT),
        ("13.0", "13.2", MatchResult.COMPATIBLE),
        ("13.2", "13.0", MatchResult.INCOMPATIBLE),
        ("12.8", "13.0", MatchResult.INCOMPATIBLE),
        ("13.0", "12.8", MatchResult.INCOMPATIBLE),
        ("13.0", None, MatchResult.INCOMPATIBLE),
        ("13.0", "rocm", MatchResult.INCOMPATIBLE),
    ],
)
def test_the_cuda_toolkit(built: str, here: str | None, fit: MatchResult) -> None:
    host = replace(fake_gpu_host, torch=fake_torch(cuda=here))
    assert judge(replace(CUDA, cuda=built), host).fit is fit


@pytest.mark.parametrize(
    ("built", "ptx", "here", "fit"),
    [
        (90, None, 90, MatchResult.EXACT),
        (90, 90, 90, MatchResult.EXACT),
        (90, 90, 120, MatchResult.COMPATIBLE),
        (90, 80, 86, MatchResult.COMPATIBLE),
        (90, None, 120, MatchResult.INCOMPATIBLE),
        (80, None, 86, MatchResult.INCOMPATIBLE),
        (90, 90, 89, MatchResult.INCOMPATIBLE),
        (90, 50, 0, MatchResult.INCOMPATIBLE),
    ],
)
def test_the_compute_capability(built: int, ptx: int | None, here: int, fit: MatchResult) -> None:
    requires = replace(CUDA, sm=built, ptx=ptx, shared_memory=None, kernels=())
    assert judge(requires, replace(fake_gpu_host, gpus=(fake_gpu(here),))).fit is fit


@pytest.mark.parametrize(
    ("built", "here", "fit"),
    [
        ("x86_64_v3", "x86_64_v3", MatchResult.EXACT),
        ("x86_64_v3", "x86_64_v4", MatchResult.COMPATIBLE),
        ("x86_64_v4", "x86_64_v3", MatchResult.INCOMPATIBLE),
        ("aarch64", "aarch64", MatchResult.EXACT),
        ("aarch64", "x86_64_v4", MatchResult.INCOMPATIBLE),
        ("x86_64", "aarch64", MatchResult.INCOMPATIBLE),
        ("x86_64_v9", "x86_64_v4", MatchResult.INCOMPATIBLE),
        ("x86_64_v3", "unknown", MatchResult.INCOMPATIBLE),
    ],
)
def test_the_cpu_level(built: str, here: str, fit: MatchResult) -> None:
    verdict = judge(replace(CPU, level=built), replace(fake_cpu_host, level=here))
    assert verdict.fit is fit


@pytest.mark.parametrize(
    ("cpu", "said"), [("zen4", "x86_64_v4 (zen4)"), ("x86_64_v4", "x86_64_v4")]
)
def test_a_cpu_that_is_called_as_its_level_is_named_once(cpu: str, said: str) -> None:
    (note,) = judge(CPU, replace(fake_cpu_host, level="x86_64_v4", cpu=cpu)).notes
    assert note.have == said


@pytest.mark.parametrize("name", ["glibc", "glibcxx", "cxxabi"])
@pytest.mark.parametrize(
    ("needed", "here", "fits"),
    [
        ("3.4.9", "3.4.30", True),
        ("3.4.30", "3.4.30", True),
        ("3.4.31", "3.4.30", False),
        ("3.4", None, False),
        (None, None, True),
    ],
)
def test_the_c_libraries(name: str, needed: Any, here: Any, fits: bool) -> None:
    requires = replace(replace(CPU, glibc=None), **{name: needed})
    verdict = judge(requires, replace(fake_cpu_host, **{name: here}))
    assert (verdict.fit is MatchResult.EXACT) == fits


@pytest.mark.parametrize(
    ("needed", "here", "fits"),
    [
        ("12.8", "13.0", True),
        ("13.0", "13.0", True),
        ("13.10", "13.2", False),
        ("13.0", None, False),
    ],
)
def test_the_driver(needed: str, here: str | None, fits: bool) -> None:
    verdict = judge(replace(CUDA, driver=needed), replace(fake_gpu_host, driver_cuda=here))
    assert (verdict.fit is MatchResult.EXACT) == fits


def test_another_operating_system_is_refused() -> None:
    assert "operating system" in needs(judge(CPU, replace(fake_cpu_host, os="darwin")))


def test_missing_libraries_are_refused_by_name() -> None:
    requires = replace(CPU, libraries=("libc.so.6", "libnvrtc.so.13", "libcuda.so.1"))
    assert needs(judge(requires, fake_cpu_host)) == "the libraries libcuda.so.1, libnvrtc.so.13"


def test_what_comes_with_torch_is_not_missed_where_torch_is() -> None:
    libraries = ("libtorch_cpu.so", "libc10.so", "libodd.so.2")
    without = replace(fake_cpu_host, torch=None)
    said = "torch 2.13.0+cpu; the libraries libodd.so.2"
    assert needs(judge(replace(CPU, libraries=libraries), without)) == said
    assert needs(judge(replace(CPU, libraries=libraries[:2]), without)) == "torch 2.13.0+cpu"
    assert "libc10.so" in needs(judge(replace(CPU, libraries=libraries), fake_cpu_host))


@pytest.mark.parametrize(
    ("sm", "bytes_"), [(75, 64 << 10), (89, 99 << 10), (80, 163 << 10), (999, 48 << 10)]
)
def test_shared_memory_has_the_limit_of_its_gpu(sm: int, bytes_: int) -> None:
    host = replace(fake_gpu_host, gpus=(fake_gpu(sm),))
    requires = replace(CUDA, sm=sm, kernels=(), shared_memory=bytes_)
    assert judge(requires, host).fit is MatchResult.EXACT
    assert "shared memory" in needs(judge(replace(requires, shared_memory=bytes_ + 1), host))


@pytest.mark.parametrize(
    ("offline", "cached", "fits"),
    [(False, False, True), (True, True, True), (True, False, False)],
)
def test_a_kernel_is_here_or_may_be_fetched(offline: bool, cached: bool, fits: bool) -> None:
    kernels = frozenset({str(PIN)} if cached else set())
    verdict = judge(CUDA, replace(fake_gpu_host, offline=offline, kernels=kernels))
    assert (verdict.fit is MatchResult.EXACT) == fits


def test_a_kernel_that_is_not_built_for_the_gpu_is_refused() -> None:
    requires = replace(CUDA, sm=120, shared_memory=None)
    verdict = judge(requires, replace(fake_gpu_host, gpus=(fake_gpu(120),)))
    assert needs(verdict) == "sm_90 for the kernel kernels-community/flash-attn3"
    anywhere = replace(requires, kernels=(KernelPin("a/b", "b" * 40),))
    assert judge(anywhere, replace(fake_gpu_host, gpus=(fake_gpu(120),))).fit is MatchResult.EXACT


def test_a_host_without_torch_is_refused() -> None:
    verdict = judge(CUDA, replace(fake_gpu_host, torch=None))
    assert [refusal.have for refusal in verdict.refusals] == ["no torch", "no torch, without CUDA"]


# GPUs


def test_a_host_without_a_gpu_is_told_what_nvml_said() -> None:
    verdict = judge(CUDA, fake_cpu_host)
    assert "no NVIDIA GPU (NVML: NVML Shared Library Not Found)" in [
        refusal.have for refusal in verdict.refusals
    ]


def test_gpus_that_are_hidden_are_told_of() -> None:
    note = "CUDA_VISIBLE_DEVICES= hides 2 of 2 GPUs"
    verdict = judge(CUDA, replace(fake_gpu_host, gpus=(), notes=(note,)))
    assert [refusal.have for refusal in verdict.refusals] == [f"no NVIDIA GPU ({note})"]


def test_any_gpu_that_fits_will_do_and_the_verdict_says_which() -> None:
    host = replace(fake_gpu_host, gpus=(fake_gpu(120), fake_gpu(90), fake_gpu(90)))
    assert judge(CUDA, host) == Verdict(device=1)


def test_an_exact_gpu_goes_before_a_compatible_one() -> None:
    requires = replace(CUDA, ptx=90, shared_memory=None, kernels=())
    host = replace(fake_gpu_host, gpus=(fake_gpu(120), fake_gpu(90)))
    assert judge(requires, host) == Verdict(device=1)
    assert judge(requires, host, device_index=0).fit is MatchResult.COMPATIBLE
    assert judge(requires, host, device_index=0).device == 0


def test_a_named_gpu_is_the_only_one_judged() -> None:
    host = replace(fake_gpu_host, gpus=(fake_gpu(90), fake_gpu(120)))
    assert judge(CUDA, host, device_index=0).fit is MatchResult.EXACT
    assert judge(CUDA, host, device_index=1).fit is MatchResult.INCOMPATIBLE


@pytest.mark.parametrize("index", [-1, 1, 99])
def test_a_gpu_that_is_not_there_is_refused(index: int) -> None:
    assert f"as GPU {index}" in needs(judge(CUDA, fake_gpu_host, device_index=index))


def test_if_no_gpu_fits_the_reasons_of_all_are_said_once_a_kind() -> None:
    host = replace(fake_gpu_host, gpus=(fake_gpu(80), fake_gpu(80), fake_gpu(120)))
    verdict = judge(replace(CUDA, kernels=(), shared_memory=None), host)
    assert [each.have for each in verdict.refusals] == ["sm_80 (Fake 80)", "sm_120 (Fake 120)"]
    assert verdict.device is None


def test_a_cpu_artifact_runs_on_a_gpu_host_as_a_compromise() -> None:
    verdict = judge(CPU, fake_gpu_host, device_index=7)
    assert (verdict.fit, verdict.device) == (MatchResult.COMPATIBLE, None)


# Reasons


def test_every_reason_is_said_and_not_the_first_only() -> None:
    host = replace(
        fake_cpu_host,
        os="darwin",
        torch=fake_torch("2.11.0", None),
        level="aarch64",
        glibc=None,
        glibcxx=None,
        cxxabi=None,
        libraries=frozenset(),
        offline=True,
    )
    # One for each row that asks the host, and one for the GPU that is not there.
    assert len(judge(CUDA, host).refusals) == 11


def test_a_verdict_is_json() -> None:
    requires = replace(CUDA, glibc="2.99")
    said = json.loads(json.dumps(judge(requires, fake_gpu_host).to_dict()))
    assert said["fit"] == "incompatible"
    assert said["refusals"][0].keys() == {"need", "have", "advice"}


def test_this_machine_fits_what_is_built_like_it(tmp_path: Path) -> None:
    here = probe_host(Settings(home=tmp_path))
    assert here.torch is not None
    requires = Requirements(
        device="cpu",
        os=here.os,
        torch=here.torch.version,
        level=here.level,
        glibc=here.glibc,
        glibcxx=here.glibcxx,
        cxxabi=here.cxxabi,
        libraries=("libtorch.so",),
    )
    assert judge(requires, here).fit is MatchResult.EXACT


# Properties

LEVELS = ["x86_64", "x86_64_v2", "x86_64_v3", "x86_64_v4"]
VERSIONS = ["2.17", "2.34", "2.36", "2.100"]
DRIVERS = ["12.8", "13.0", "13.2"]
TORCHES = ["2.12.0+cu130", "2.13.0+cu130", "2.13.1", "2.13.0rc1", "2.14.0.dev20260701", "odd"]
SMS = [75, 80, 86, 89, 90, 120]
LIBRARIES = ["libc.so.6", "libcuda.so.1", "libgomp.so.1"]
PINS = [PIN, KernelPin("a/any", "b" * 40), KernelPin("a/many", "c" * 40, (80, 86, 90))]
MEMORY = [0, 48 << 10, 99 << 10, 163 << 10, 227 << 10, 228 << 10]


def maybe(values: list[Any]) -> st.SearchStrategy[Any]:
    return st.none() | st.sampled_from(values)


def changed(base: Any, fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """The base with at most three of its fields drawn anew: near the border between yes and no."""
    some = st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True)
    drawn = some.flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    )
    return drawn.map(lambda values: replace(base, **values))


on_host = {
    "os": st.sampled_from(["linux", "darwin"]),
    "level": st.sampled_from([*LEVELS, "aarch64", "unknown"]),
    "torch": st.none() | st.builds(fake_torch, st.sampled_from(TORCHES), maybe(DRIVERS)),
    "gpus": st.lists(st.sampled_from([0, *SMS]).map(fake_gpu), max_size=3).map(tuple),
    "driver_cuda": maybe(DRIVERS),
    "glibc": maybe(VERSIONS),
    "glibcxx": maybe(VERSIONS),
    "cxxabi": maybe(VERSIONS),
    "libraries": st.frozensets(st.sampled_from(LIBRARIES)),
    "kernels": st.frozensets(st.sampled_from(PINS).map(str)),
    "offline": st.booleans(),
}
needed_anywhere = {
    "torch": st.sampled_from(TORCHES[:-1]),
    "level": st.sampled_from([*LEVELS, "aarch64"]),
    "glibc": maybe(VERSIONS),
    "glibcxx": maybe(VERSIONS),
    "cxxabi": maybe(VERSIONS),
    "libraries": st.lists(st.sampled_from(LIBRARIES), max_size=1).map(tuple),
    "kernels": st.lists(st.sampled_from(PINS), max_size=1).map(tuple),
}
needed_of_a_gpu = {
    "cuda": st.sampled_from(DRIVERS),
    "driver": maybe(DRIVERS),
    "sm": st.sampled_from(SMS),
    "ptx": maybe(SMS),
    "shared_memory": maybe(MEMORY),
}
hosts = changed(fake_gpu_host, on_host)
requirements = (
    changed(CPU, needed_anywhere)
    | changed(CUDA, needed_anywhere | needed_of_a_gpu)
    | changed(replace(CUDA, kernels=(), shared_memory=None), needed_of_a_gpu)
)


# Each bound, its values from low to high, and whether None is below them all. A GPU's sm and the
# torch release are no bounds: they must be equal. PTX that is not there serves nothing, so None is
# no lower bound of it. The toolkit's minor is one within its major.
BOUNDS: list[tuple[str, list[Any], bool]] = [
    ("level", LEVELS, False),
    ("glibc", VERSIONS, True),
    ("glibcxx", VERSIONS, True),
    ("cxxabi", VERSIONS, True),
    ("driver", DRIVERS, True),
    ("cuda", ["13.0", "13.2"], False),
    ("ptx", SMS, False),
    ("shared_memory", MEMORY, True),
    ("libraries", [(), *[(each,) for each in LIBRARIES[:1]], tuple(LIBRARIES)], False),
    ("kernels", [(), (PINS[1],), (PINS[1], PINS[2]), tuple(PINS)], False),
]


@settings(deadline=None, max_examples=1000)
@given(requirements, hosts, st.sampled_from(BOUNDS), st.lists(st.integers(0, 6), min_size=2))
def test_raising_a_lower_bound_never_turns_a_refusal_into_an_acceptance(
    requires: Requirements, host: Host, bound: tuple[str, list[Any], bool], places: list[int]
) -> None:
    name, values, none_is_lowest = bound
    values = [None, *values] if none_is_lowest else values
    if requires.device == "cpu" and name in {"driver", "cuda", "ptx", "shared_memory"}:
        return
    low, high = sorted(min(place, len(values) - 1) for place in places[:2])
    lower = judge(replace(requires, **{name: values[low]}), host)
    higher = judge(replace(requires, **{name: values[high]}), host)
    assert lower.fit is not MatchResult.INCOMPATIBLE or higher.fit is MatchResult.INCOMPATIBLE


@unhurried
@given(requirements, hosts)
def test_every_reason_has_need_have_and_advice(requires: Requirements, host: Host) -> None:
    verdict = judge(requires, host)
    for reason in (*verdict.refusals, *verdict.notes):
        assert reason.need and reason.have and reason.advice
        assert "None" not in f"{reason.need} {reason.have} {reason.advice}"


@unhurried
@given(requirements, hosts)
def test_the_device_is_a_gpu_that_fits_alone(requires: Requirements, host: Host) -> None:
    verdict = judge(requires, host)
    if verdict.device is not None:
        assert judge(requires, host, verdict.device) == verdict
    elif requires.device == "cuda":
        alone = [judge(requires, host, index).fit for index in range(len(host.gpus))]
        assert set(alone) <= {MatchResult.INCOMPATIBLE}


# Ranking

NO = Verdict(refusals=(Refusal("a", "b", "c"),))
SO_SO = Verdict(notes=(Compromise("a", "b", "c"),))

RECIPES = ["bfloat16-fa3", "bfloat16-sdpa", "float32-sdpa", "bfloat16-sdpa-int8wo"]
RECIPES += ["bfloat16-fa3+decode", "bfloat16-flex"]
VARIANTS = [
    "torch2.13-cu130-sm90-x86_64_v3-linux",
    "torch2.13-cu132-sm90-x86_64_v3-linux",
    "torch2.13-cu130-sm80-x86_64_v3-linux",
    "torch2.13-cu130-sm90-x86_64_v4-linux",
    "torch2.13-cpu-x86_64_v3-linux",
    "torch2.13-cpu-x86_64_v9-linux",
]


def candidate(recipe: str, variant: str = VARIANTS[0], verdict: Verdict | None = None) -> Candidate:
    return Candidate(
        Recipe.parse(recipe), Variant.parse(variant), verdict or Verdict(), f"{recipe}/{variant}"
    )


candidates = st.lists(
    st.builds(
        candidate,
        st.sampled_from(RECIPES),
        st.sampled_from(VARIANTS),
        st.sampled_from([Verdict(), SO_SO, NO]),
    ),
    unique_by=lambda each: each.id,
    max_size=12,
)
asked = st.none() | st.sampled_from(RECIPES).map(Recipe.parse)


@unhurried
@given(st.data(), candidates, asked)
def test_ranking_does_not_depend_on_the_order_that_candidates_come_in(
    draw: Any, offered: list[Candidate], recipe: Recipe | None
) -> None:
    shuffled = draw.draw(st.permutations(offered))
    assert rank(shuffled, recipe) == rank(offered, recipe)


@unhurried
@given(candidates, asked)
def test_ranking_is_a_total_order(offered: list[Candidate], recipe: Recipe | None) -> None:
    ranked = rank(offered, recipe)
    assert len(set(ranked)) == len(ranked)
    for better, worse in itertools.combinations(ranked, 2):
        assert rank([worse, better], recipe) == [better, worse]


@unhurried
@given(candidates, asked)
def test_what_does_not_fit_or_was_not_asked_for_is_never_offered(
    offered: list[Candidate], recipe: Recipe | None
) -> None:
    for each in rank(offered, recipe):
        assert each.verdict.fit is not MatchResult.INCOMPATIBLE
        assert each.recipe == recipe if recipe else each.recipe.quantization is None


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (candidate("float32-sdpa"), candidate("bfloat16-fa3", verdict=SO_SO)),
        (candidate("bfloat16-fa3"), candidate("bfloat16-sdpa", VARIANTS[3])),
        (candidate("bfloat16-sdpa"), candidate("bfloat16-flex")),
        (candidate("bfloat16-fa3"), candidate("bfloat16-fa3+decode")),
        (candidate("float32-sdpa"), candidate("bfloat16-sdpa", VARIANTS[4])),
        (candidate("float32-sdpa", VARIANTS[3]), candidate("bfloat16-sdpa", VARIANTS[1])),
        (candidate("float32-sdpa", VARIANTS[1]), candidate("bfloat16-sdpa", VARIANTS[0])),
        (candidate("float32-sdpa", VARIANTS[0]), candidate("bfloat16-sdpa", VARIANTS[2])),
        (candidate("bfloat16-sdpa", VARIANTS[4]), candidate("bfloat16-sdpa", VARIANTS[5])),
        (candidate("bfloat16-sdpa"), candidate("float32-sdpa")),
    ],
    ids=[
        "exact before compatible",
        "fa3 before sdpa",
        "sdpa before what is unknown",
        "plain before labelled",
        "the GPU before the CPU",
        "the higher CPU level",
        "the nearer CUDA",
        "the nearer sm",
        "a known level before an unknown one",
        "then by id",
    ],
)
def test_what_goes_first(better: Candidate, worse: Candidate) -> None:
    assert rank([worse, better]) == [better, worse]


def test_an_asked_recipe_is_met_with_its_label_or_not_at_all() -> None:
    plain, labelled = candidate("bfloat16-fa3"), candidate("bfloat16-fa3+decode")
    assert rank([plain, labelled], labelled.recipe) == [labelled]
    assert rank([labelled], plain.recipe) == []


def test_quantized_only_when_asked_for() -> None:
    quantized = candidate("bfloat16-sdpa-int8wo")
    assert rank([quantized]) == []
    assert rank([quantized], quantized.recipe) == [quantized]
