"""What is to be built, for which kind of host, and the key that says whether it already is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import msgspec

from hubaoti.artifact.kernel_pin import KernelPin
from hubaoti.artifact.schema import Build, Target, compute_key
from hubaoti.compiler.attention import choose_kernels
from hubaoti.compiler.flash_attention import WIDEST, refuse_fa3
from hubaoti.compiler.graph_plans import GraphPlan
from hubaoti.compiler.inductor import choose_inductor_options
from hubaoti.compiler.plan import Plan, add_fa3_graphs
from hubaoti.compiler.reports import join_errors
from hubaoti.compiler.request import CompileRequest
from hubaoti.errors import BadRequest
from hubaoti.runtime.attention_ops import FA3
from hubaoti.runtime.call_template import collect_template_words, takes_containers

# Of what hubaoti puts into graphs beside a model's code: attention, caches, quantized weights,
# templates. It is raised when one of them changes, so that no key stands for two programs; of what
# a change does not touch the version stays, so that what is built already is found.
_VERSION = 2
_CAREFUL = 3  # looks at the numbers that choose rows, and carries what is left in containers
_BY_ITSELF = 4  # of a layout: takes inputs of any strides


@dataclass(frozen=True, slots=True)
class Job:
    """A plan and all that its key is made of; `key` says whether it is already built.

    `pins` are the kernels that its graphs may call, and `widest` the widest heads that these take;
    neither is in the key: a kernel that was built anew answers the same graphs.
    """

    plan: Plan
    build: Build
    target: Target
    pins: tuple[KernelPin, ...] = ()
    widest: int = WIDEST

    @classmethod
    def of(
        cls, plan: Plan, request: CompileRequest, target: Target, attention: str = "sdpa"
    ) -> Job:
        """The job that a request asks for, of one kind of host and one attention.

        Where that is sdpa it is whatever the model has.
        """
        return cls(plan, describe_build(plan, request, target, attention), target)

    @property
    def gpu(self) -> str:
        """The GPU that it is for, and how attention is computed there if not as everywhere."""
        return f"sm{self.target.sm}" + f"-{FA3}" * (self.build.attention == FA3)

    @property
    def key(self) -> str:
        """The sha256 of program, build and target."""
        return compute_key(self.plan.source.program, self.build, self.target)


@dataclass(frozen=True, slots=True)
class Jobs:
    """The jobs of a request, and why others cannot be.

    `left_out` are of targets that have another job, so that a bundle serves them; `refused` are of
    those that have none.
    """

    jobs: tuple[Job, ...]
    left_out: tuple[BadRequest, ...]
    refused: tuple[BadRequest, ...]


def make_jobs(plan: Plan, request: CompileRequest, targets: Sequence[Target]) -> Jobs:
    """The jobs of a request, one for each target and attention.

    Raises:
        BadRequest: none can be.
    """
    jobs, refused = list[Job](), list[tuple[Target, BadRequest]]()
    plans = {"sdpa": plan, FA3: add_fa3_graphs(plan) if FA3 in request.attentions else plan}
    for target, attention in product(targets, request.attentions or ("sdpa",)):
        refusal = refuse_fa3(target, plan.source.dtype) if attention == FA3 else None
        if refusal is not None:
            refused.append((target, refusal))
        else:
            jobs.append(Job.of(plans[attention], request, target, attention))
    if not jobs:
        raise join_errors([error for _, error in refused])
    served = [job.target for job in jobs]
    return Jobs(
        jobs=(*jobs,),
        left_out=tuple(error for target, error in refused if target in served),
        refused=tuple(error for target, error in refused if target not in served),
    )


def describe_build(
    plan: Plan, request: CompileRequest, target: Target, attention: str = "sdpa"
) -> Build:
    """The options, as the manifest and the key have them."""
    return Build(
        regions=plan.source.regions,
        dims={name: (sizes.low, sizes.high, sizes.step) for name, sizes in plan.dims.items()},
        dtype=plan.source.dtype,
        attention=plan.source.attention if attention == "sdpa" else attention,
        quantization=request.quantize,
        mode=request.mode,
        buckets=tuple(
            {name: (sizes.low, sizes.high) for name, sizes in bucket.items()}
            for bucket in request.buckets
        ),
        options={**choose_inductor_options(target), **cast("dict[str, Any]", request.inductor)},
        version=_choose_build_version(plan),
        layout=request.layout or msgspec.UNSET,  # type: ignore[arg-type]
        kernels=choose_kernels(plan.source.dtype, target.sm, attention)
        if target.sm
        else msgspec.UNSET,
    )


def _choose_build_version(plan: Plan) -> int:
    """The version of what is put into the graphs of a plan."""
    if plan.source.layout is not None:
        return _BY_ITSELF
    # As users call a model's own forward: positions left out, flags that say nothing given or not.
    as_called = plan.source.program.task == "forward" and not plan.source.live
    return _CAREFUL if as_called or any(map(_needs_care, plan.units)) else _VERSION


def _needs_care(unit: GraphPlan) -> bool:
    """Whether a graph takes numbers that may choose rows, floats that were told from whole numbers
    only since, or what its module may write into."""
    cache = unit.face.cache
    inputs = [
        each for index, each in enumerate(unit.face.inputs) if not cache or index != cache.position
    ]
    chosen = any(each.values == "position" or each.values.startswith("any<") for each in inputs)
    template = unit.face.template
    return chosen or "float" in collect_template_words(template) or takes_containers(template)
