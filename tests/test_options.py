"""Options: every option of this torch is known, refused with a reason, or spelled one way."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor import config

from hubaoti.artifact.canonical import encode_canonical
from hubaoti.artifact.schema import Target
from hubaoti.compiler import options as options_module
from hubaoti.compiler.inductor import ALONE, WEIGHTLESS, choose_inductor_options
from hubaoti.compiler.options import (
    ANY_DEVICE,
    GPU_KERNELS,
    MODES,
    merge_options,
    options_of_mode,
    refuse_option,
)
from hubaoti.errors import BadRequest

ALL = torch._inductor.list_options()
ALLOWED = [name for name in ALL if refuse_option(name, "cuda") is None]


def parsed(*texts: str) -> dict[str, Any]:
    return merge_options("default", texts, "cuda")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("max_autotune=true", True),
        ("max_autotune=True", True),
        (" max_autotune = TRUE ", True),
        ("epilogue_fusion=false", False),
        ("max_fusion_size=128", 128),
        ("cpp.threads=4", 4),
        ("min_overlap_ratio=2", 2.0),
        ("triton.max_tiles=2", 2),
        ("triton.multi_kernel=1", 1),
        ("memory_pool=combined", "combined"),
        ("max_autotune_gemm_backends=ATEN,TRITON", "ATEN,TRITON"),
        ("layout_opt_default=0", "0"),
        ("multi_kernel_hints=[64, 256]", [64, 256]),
        ('reorder_for_compute_comm_overlap_passes=["sink_waits"]', ["sink_waits"]),
        ('post_grad_fusion_options={"batch_linear": {"min_fuse_set_size": 3}}', None),
    ],
)
def test_a_word_is_read_by_the_type_of_its_option(text: str, value: Any) -> None:
    name, _, spelled = text.partition("=")
    assert parsed(text) == {name.strip(): json.loads(spelled) if value is None else value}


def test_none_is_a_value_where_torch_has_it() -> None:
    assert parsed("combo_kernel_peak_memory_pct_threshold=none") == {
        "combo_kernel_peak_memory_pct_threshold": None
    }


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("max_autotune=1", "true or false"),
        ("max_autotune=", "true or false"),
        ("max_autotune=yes", "true or false"),
        ("max_autotune=none", "true or false"),
        ("max_fusion_size=64.5", "whole number"),
        ("max_fusion_size=true", "whole number"),
        ("max_fusion_size=99999999999999999999", "whole number"),
        ("min_overlap_ratio=NaN", "a number"),
        ("min_overlap_ratio=Infinity", "a number"),
        ("triton.max_tiles=many", "whole number or none"),
        ("triton.multi_kernel=7", "0, 1, 2, 3"),
        ("memory_pool=sea", "combined"),
        ("disabled_passes=/etc/passwd", "a word"),
        ("disabled_passes=a b", "a word"),
        ("multi_kernel_hints=[1, true]", "a list"),
        ("multi_kernel_hints=64", "a list"),
        ("post_grad_fusion_options=[]", "a table"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_type_wanted(text: str, wanted: str) -> None:
    with pytest.raises(BadRequest, match="cannot be") as caught:
        parsed(text)
    assert wanted in caught.value.hint


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("max_autotunes", "max_autotune"),
        ("max-autotune", "max_autotune"),
        ("persistent_reductions", "triton.persistent_reductions"),
        ("epilog_fusion", "epilogue_fusion"),
    ],
)
def test_an_unknown_option_is_refused_with_the_near_ones(name: str, near: str) -> None:
    with pytest.raises(BadRequest, match="has no option") as caught:
        parsed(f"{name}=true")
    assert near in caught.value.hint


def test_an_option_that_is_like_no_other_is_refused_with_where_to_look() -> None:
    with pytest.raises(BadRequest, match="qqqq") as caught:
        parsed("qqqq=1")
    assert "list_options" in caught.value.hint


@pytest.mark.parametrize("text", ["max_autotune", "=true", "", "max_autotune:true"])
def test_a_malformed_option_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadRequest, match="malformed") as caught:
        parsed(text)
    assert "--inductor max_autotune=true" in caught.value.hint


def test_an_option_is_given_once() -> None:
    with pytest.raises(BadRequest, match="twice"):
        parsed("max_autotune=true", "max_autotune=true")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "every build") for name in (*WEIGHTLESS, *ALONE)),
        ("cpp.simdlen", "target"),
        ("cpp.march", "target"),
        ("cpp.dynamic_threads", "target"),
        ("post_grad_custom_post_pass", "target"),
        ("joint_custom_pre_pass", "target"),
        ("freezing", "weights"),
        ("cpp.weight_prepack", "hubaoti sets it"),
        ("cpp.enable_concat_linear", "weights"),
        ("aot_inductor.output_path", "package"),
        ("aot_inductor.package", "package"),
        ("aot_inductor.force_mmap_weights", "package"),
        ("aot_inductor.custom_op_libs", "package"),
        ("aot_inductor.embed_kernel_binary", "package"),
        ("cpp_wrapper", "package"),
        ("assume_aligned_inputs", "unnoticed"),
        ("triton.cudagraphs", "replayed"),
        ("rocm.arch", "backend"),
        ("cpu_backend", "backend"),
        ("trace.enabled", "debugging"),
        ("trace.upload_tar", "debugging"),
        ("debug", "debugging"),
        ("triton.inject_relu_bug_TESTING_ONLY", "debugging"),
        ("profile_bandwidth_output", "debugging"),
        ("cpp.cxx", "machine"),
        ("cuda.cuda_cxx", "machine"),
        ("cuda.arch", "machine"),
        ("global_cache_dir", "machine"),
        ("cutlass.cutlass_dir", "machine"),
        ("fx_graph_remote_cache", "how a build"),
        ("autotune_remote_cache", "how a build"),
        ("fx_graph_cache", "how a build"),
        ("worker_start_method", "how a build"),
        ("inductor_choices_class", "Python"),
        ("external_matmul", "Python"),
    ],
)
def test_what_is_not_for_users_is_refused_with_its_reason(name: str, reason: str) -> None:
    assert name in ALL
    with pytest.raises(BadRequest, match=reason) as caught:
        merge_options("default", {name: True}, "cuda")
    assert name in str(caught.value)


class NewerTorch:
    """Inductor's config as a torch may have it that nobody has read yet."""

    new = {"fuse_everything": True, "triton.faster_reductions": False, "epilogue_fusion_last": True}

    def get_config_copy(self) -> dict[str, Any]:
        return config.get_config_copy() | self.new

    def get_type(self, name: str) -> Any:
        return bool if name in self.new else config.get_type(name)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NewerTorch.new)
def test_what_a_new_torch_brings_is_refused(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options_module, "_declared", NewerTorch())
    with pytest.raises(BadRequest, match="does not know what it changes") as caught:
        merge_options("default", {name: True}, device)
    assert name in str(caught.value)
    assert "leave it out" in caught.value.hint
    assert "inductor_options.toml" in caught.value.hint
    assert merge_options("default", {"max_fusion_size": 128}, device) == {"max_fusion_size": 128}


def test_a_refused_option_that_hubaoti_does_not_know_is_refused_with_the_near_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options_module, "_declared", NewerTorch())
    with pytest.raises(BadRequest, match="epilogue_fusion_last") as caught:
        parsed("epilogue_fusion_last=true")
    assert "near ones: epilogue_fusion" in caught.value.hint


def test_a_listed_option_whose_values_became_python_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(NewerTorch, "get_type", lambda self, name: type)
    monkeypatch.setattr(options_module, "_declared", NewerTorch())
    with pytest.raises(BadRequest, match="Python"):
        parsed("max_fusion_size=128")


@pytest.mark.parametrize(
    ("device", "listed"), [("cpu", ANY_DEVICE), ("cuda", ANY_DEVICE | GPU_KERNELS)]
)
def test_what_is_for_users_is_what_is_listed_and_this_torch_has(
    device: str, listed: frozenset[str]
) -> None:
    assert {name for name in ALL if refuse_option(name, device) is None} == listed & {*ALL}


def test_an_option_is_listed_once_and_is_not_one_that_hubaoti_sets() -> None:
    assert not ANY_DEVICE & GPU_KERNELS
    assert not (ANY_DEVICE | GPU_KERNELS) & {*WEIGHTLESS, *ALONE}
    for device in ("cpu", "cuda"):
        target = Target(device=device, os="linux", level="x86_64_v3", torch="2.13.0", git="b" * 40)
        assert not (ANY_DEVICE | GPU_KERNELS) & {*choose_inductor_options(target)}


def test_no_path_of_this_machine_can_be_an_option() -> None:
    """By their defaults, too: what torch itself fills with a path is no option of ours."""
    defaults = config.get_config_copy()
    paths = [name for name in ALLOWED if isinstance(defaults[name], str) and "/" in defaults[name]]
    assert paths == []


def test_most_of_what_shapes_kernels_is_for_users() -> None:
    wanted = {"max_autotune", "coordinate_descent_tuning", "use_fast_math", "shape_padding"}
    wanted |= {"cpp.threads", "cpp.min_chunk_size", "combo_kernels"}
    wanted |= {"triton.persistent_reductions", "triton.multi_kernel", "cutlass.use_fast_math"}
    assert wanted <= {*ALLOWED}


def test_every_allowed_option_is_json_and_none_at_its_default() -> None:
    defaults = config.get_config_copy()
    given = {name: defaults[name] for name in ALLOWED}
    assert merge_options("default", given, "cuda") == {}
    assert all(encode_canonical(value) for value in given.values())


def test_two_spellings_of_one_value_are_one() -> None:
    assert parsed("max_autotune=true") == merge_options("default", {"max_autotune": True}, "cuda")
    assert parsed("min_overlap_ratio=2") == parsed("min_overlap_ratio=2.0")
    assert parsed("multi_kernel_hints=[1,2]") == merge_options(
        "default", {"multi_kernel_hints": (1, 2)}, "cuda"
    )
    first, second = (
        parsed("max_autotune=true", "combo_kernels=true"),
        parsed("combo_kernels=true", "max_autotune=true"),
    )
    assert [*first] == [*second]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_autotune", "true"),
        ("max_autotune", 1),
        ("max_fusion_size", "64"),
        ("max_fusion_size", True),
        ("min_overlap_ratio", float("inf")),
        ("disabled_passes", "../passes"),
        ("memory_pool", lambda: "combined"),
        ("multi_kernel_hints", {1, 2}),
        ("post_grad_fusion_options", {1: {}}),
        ("post_grad_fusion_options", {"batch_linear": {"kind": object()}}),
    ],
)
def test_python_values_are_taken_as_they_are(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=name):
        merge_options("default", {name: value}, "cuda")


@given(st.sampled_from(ALLOWED), st.text(max_size=8) | st.integers().map(str))
def test_whatever_is_accepted_can_be_said_again(name: str, text: str) -> None:
    try:
        options = parsed(f"{name}={text}")
    except BadRequest as error:
        assert error.hint
    else:
        assert merge_options("default", json.loads(encode_canonical(options)), "cuda") == options


def test_a_cpu_graph_has_no_options_of_gpu_kernels() -> None:
    with pytest.raises(BadRequest, match="CPU"):
        merge_options("default", ["triton.multi_kernel=1"], "cpu")
    with pytest.raises(BadRequest, match="packs weights"):
        merge_options("default", ["max_autotune=true"], "cpu")
    assert merge_options("default", ["cpp.min_chunk_size=64"], "cpu") == {"cpp.min_chunk_size": 64}


def test_modes_are_what_a_graph_can_have_of_torch_s() -> None:
    tuned = {"max_autotune": True, "coordinate_descent_tuning": True}
    assert options_of_mode("max-autotune", "cuda:0") == tuned
    assert options_of_mode("max-autotune", "cpu") == {}
    for device in ("cpu", "cuda"):
        assert options_of_mode("default", device) == {}
        assert options_of_mode("reduce-overhead", device) == {}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_s_options_could_have_been_given_one_by_one(mode: str) -> None:
    for device in ("cpu", "cuda"):
        options = options_of_mode(mode, device)
        assert merge_options("default", options, device) == options


def test_what_is_given_overrides_the_mode_even_with_a_default() -> None:
    assert merge_options("max-autotune", ["max_autotune=false"], "cuda") == {
        "coordinate_descent_tuning": True
    }
    assert merge_options("max-autotune", {}, "cuda") == options_of_mode("max-autotune", "cuda")
    assert merge_options("default", ["cpp.threads=2"], "cpu") == {"cpp.threads": 2}


def test_an_unknown_mode_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadRequest, match="lite") as caught:
        options_of_mode("lite", "cpu")
    assert all(mode in caught.value.hint for mode in MODES)


def test_inductor_takes_what_was_accepted() -> None:
    options = parsed("max_fusion_size=128", "multi_kernel_hints=[64]", "memory_pool=none")
    with config.patch(options):
        assert config.max_fusion_size == 128
        assert config.memory_pool == "none"
