"""Why options of inductor are not for users: words for who asks, and no rule.

What may be set is the list in `inductor_options.py`, whatever stands here: an option in neither is
refused too, because hubaoti does not know it.
"""

from __future__ import annotations

from hubaoti.compiler.inductor import ALONE, WEIGHTLESS

UNKNOWN = "hubaoti does not know what it changes"
# By how names start; the first that fits is the reason.
_REFUSED = {
    "hubaoti sets it for every build": (*WEIGHTLESS, *ALONE),
    "hubaoti sets it for the target": (
        "cpp.simdlen",
        "cpp.march",
        "cpp.vec_isa_ok",
        "cpp.dynamic_threads",
        "pre_grad_custom_pass",
        "joint_custom_",
        "post_grad_custom_",
        "_pre_fusion_custom_pass",
        "_post_fusion_custom_pass",
    ),
    "it computes with weights while compiling, and a graph holds none": (
        "freezing",
        "cpp.enable_concat_linear",
        "enable_linear_binary_folding",
    ),
    "hubaoti lays out the package": (
        "aot_inductor.",
        "aot_inductor_mode.",
        "cpp_wrapper",
        "fx_wrapper",
        "enable_autograd_for_aot",
    ),
    "a graph would read past its inputs unnoticed": (
        "assume_aligned_inputs",
        "assume_32bit_indexing",
    ),
    "no graph is replayed by inductor": (
        "cudagraph",
        "autotune_cudagraph",
        "force_disable_cudagraph",
        "graph_partition",
        "triton.cudagraph",
        "triton.force_cudagraph",
        "triton.skip_cudagraph",
        "triton.fast_path_cudagraph",
        "triton.slow_path_cudagraph",
    ),
    "hubaoti does not build for that backend": (
        "rocm.",
        "xpu.",
        "halide.",
        "mtia.",
        "cpu_backend",
        "cuda_backend",
        "tpu_backend",
        "xpu_backend",
    ),
    "it is of distributed training": (
        "aten_distributed_optimizations.",
        "bucket_",
        "collective_",
        "_collective",
        "_fuse_ddp",
        "_micro_pipeline",
        "distributed_max_autotune",
        "pipeline_max_autotune",
        "dedup_reduce_scatters",
        "inter_node_bw",
        "intra_node_bw",
    ),
    "it is for debugging inductor, and changes no graph": (
        "trace.",
        "test_configs.",
        "lookup_table.",
        "autoheuristic_",
        "debug",
        "profile",
        "log_",
        "verbose_progress",
        "disable_progress",
        "developer_warnings",
        "warn_",
        "enabled_metric_tables",
        "benchmark_harness",
        "benchmark_kernel",
        "generate_intermediate_hooks",
        "comment_origin",
        "save_args",
        "reorder_for_peak_memory_debug",
        "cpp.enable_kernel_profile",
        "cpp.inject_",
        "triton.inject_",
        "triton.debug_",
        "triton.proton_",
        "cuda.enable_debug_info",
        "cutlass.enable_debug_info",
    ),
    "it names what is on this machine": (
        "cpp.cxx",
        "cuda.cuda_cxx",
        "cuda.arch",
        "cuda.version",
        "cuda.cutlass_dir",
        "cutlass.cutlass_dir",
        "global_cache_dir",
        "torchinductor_worker_logpath",
    ),
    "it is how a build is done, not what is built": (
        "fx_graph_cache",
        "fx_graph_remote_cache",
        "autotune_local_cache",
        "autotune_remote_cache",
        "bundled_autotune_remote_cache",
        "remote_gemm_autotune_cache",
        "search_autotune_cache",
        "autotune_in_subproc",
        "autotune_multi_device",
        "max_autotune_subproc_",
        "compile_worker_",
        "worker_",
        "quiesce_",
        "precompilation_timeout",
        "file_lock_timeout",
        "use_static_cuda_launcher",
        "strict_static_cuda_launcher",
        "triton.store_cubin",
    ),
}
# Of options of GPU kernels, those that on a CPU choose a layout for weights.
_PACKING = {
    "max_autotune",
    "max_autotune_gemm",
    "max_autotune_gemm_backends",
    "max_autotune_gemm_search_space",
}


def reason_to_refuse(name: str) -> str:
    """Why an option that is not in the list cannot be set."""
    found = (reason for reason, starts in _REFUSED.items() if name.startswith(starts))
    return next(found, UNKNOWN)


def reason_for_a_cpu(name: str) -> str:
    """Why an option of GPU kernels cannot be set for a graph of a CPU."""
    if name in _PACKING:
        return "it packs weights while compiling, and a graph holds none"
    return "it is of GPU kernels, and this graph is for a CPU"
