"""Why a call is answered by the module itself and not by a graph: the reasons, and what to do."""

from __future__ import annotations

from hubaoti.errors import BadInput, KernelFailed

# By their names, which stand in `Attachment.stats` and in files of misses: do not rename.
ADVICE = {
    "tracing": "torch.compile, export and jit trace the module itself; leave them out where graphs "
    "answer",
    "gradients": "call it under torch.inference_mode() or torch.no_grad()",
    "training": "call model.eval()",
    "autocast": "leave torch.autocast out; a graph computes in the dtype of its recipe",
    "transforms": "graphs know nothing of torch.func's transforms and of forward gradients",
    "modes": "a torch dispatch or function mode wants to see every operation",
    "subclass": "give plain tensors",
    "weights": "load the weights onto the device and in the dtype that the graphs were built for; "
    "the module is served again from then on",
    "adapters": "merge the adapters: model.merge_and_unload()",
    "changed": "its parts are not those it was attached with: detach, and attach again",
    "hooks": "hooks on modules inside of a compiled region would not run: hook the region itself",
    "outputs": "leave output_attentions and output_router_logits out where graphs answer; hidden "
    "states of whole blocks are collected around them",
    "arguments": "call it as it was called when it was compiled",
    "cache": 'generate with cache_implementation="static"; calls without a cache are answered by '
    "graphs that were compiled with --task forward",
    "layer": "compile it with --task forward, and call it without a cache: use_cache=False",
    "capture": "the CUDA graph is replayed with the module's own work in it; call the model once, "
    "over a static cache, before the same call is captured",
    "window": "no graph is for a window that is full: compile with a cache dim that reaches it",
    "device": "move the inputs to the module's device",
    "dtype": "give inputs of the dtype that the recipe names, and masks of sdpa attention",
    "shape": "hubaoti compile --from-misses proposes dims and buckets for what "
    "attachment.save_misses(FILE) wrote",
    "layout": "give the cache's own tensors, contiguous and not views",
    "overlap": "give what is written in place a memory of its own",
    "values": "see that ids are below the vocabulary's size",
    "differs": "the graph answers otherwise than this module: compile the module itself",
    "main": "call it in a function that has @spaces.GPU",
    "unopened": "this process answers without graphs; what to do is said above",
    "failed": "the graph failed while it ran; see that its inputs are what its manifest says",
    "kernel": "attach graphs that call no kernel, of the same repo if it has them: "
    'hubaoti.attach(model, hubaoti.pull(repo, recipe="bfloat16-sdpa")); or compile them with '
    "--attention sdpa",
}


WITHOUT_CACHE = "call it without a cache: use_cache=False"  # of graphs that have none
LONGER_CACHE = "make a longer cache: max_cache_len"


class CannotServe(Exception):
    """No graph can answer a call: one of the reasons above, and what was found.

    `advice` says what to do to have such calls answered by a graph, for a message's hint: that of
    the reason, where who knows better gives none.
    """

    def __init__(
        self, reason: str, detail: str, sizes: dict[str, int] | None = None, advice: str = ""
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.sizes = sizes or {}
        self.advice = advice or ADVICE[reason]


def explain_failure(error: BadInput | KernelFailed) -> CannotServe:
    """Why a graph cannot answer a call in which it failed, or a kernel that it calls."""
    return CannotServe("kernel" if isinstance(error, KernelFailed) else "failed", f"{error}")
