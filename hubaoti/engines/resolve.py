"""The artifact of a model: in the mirror, else in the repos that an engine was told of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hubaoti import api
from hubaoti.api.finding import list_allowed
from hubaoti.artifact.manifest import Manifest
from hubaoti.errors import BadRequest, HubaotiError, OtherProgram
from hubaoti.host.match import judge
from hubaoti.host.probe import Host
from hubaoti.host.rank import Candidate, rank
from hubaoti.hub.client import HubClient
from hubaoti.hub.kernel_choice import KernelTrial
from hubaoti.hub.kernels import bring_kernels
from hubaoti.hub.lockfile import find_lock
from hubaoti.mirror import Artifact, Mirror
from hubaoti.mirror.trust import Trust
from hubaoti.program.model_files import read_json, refuse_other_program
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import Settings

ENGINE_TASKS = ("generate", "embed")
# What artifacts of a task are for, and who asks them.
_USES = {
    "embed": 'it makes vectors of texts: hubaoti run --text, or engine.load(…, task="embed")',
    "generate": 'it goes on with prompts: hubaoti run --prompt, or engine.load(…, task="generate")',
    "classify": "it gives each text its scores: hubaoti run --text",
    "logits": "it gives each text its logits: hubaoti run --text",
    "forward": "it serves blocks of a module: hubaoti.attach",
}
_DTYPE_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What graphs are wanted for: a model's folder and task, on a device of a host.

    A `dtype` or a `quantization` that is asked for is a condition.
    """

    folder: Path
    task: str
    device: str
    host: Host
    dtype: str | None = None
    quantization: str | None = None

    def require(self, manifest: Manifest) -> None:
        """See that an artifact serves it.

        Raises:
            OtherProgram, BadRequest: why it does not.
        """
        if manifest.program.task != self.task:
            raise explain_other_task(manifest, self.folder.name, self.task)
        if manifest.target.device != self.device.partition(":")[0]:
            raise BadRequest(
                f"the artifact was built for {manifest.target.device}, the model is on "
                f"{self.device}",
                hint=f"load the model on {manifest.target.device}",
            )
        if self.dtype not in (None, manifest.build.dtype):
            raise BadRequest(
                f"the artifact computes in {manifest.build.dtype}, not in {self.dtype}",
                hint="ask for its dtype, or for none",
            )
        refuse_other_program(self.folder, manifest.program)

    def accepts(self, manifest: Manifest) -> bool:
        """Whether an artifact serves it."""
        try:
            self.require(manifest)
        except (OtherProgram, BadRequest):
            return False
        return True


def explain_other_task(manifest: Manifest, name: str, task: str) -> BadRequest:
    """Why an artifact of another task does not serve a model, and what that artifact is for."""
    return BadRequest(
        f"the artifact was built for {manifest.program.task}, an engine has {name} to {task}",
        hint=f"{_USES.get(manifest.program.task, _USES['forward'])}; for this, compile one with "
        f"--task {task}",
    )


def read_dtype(folder: Path) -> str:
    """The dtype in which a model is loaded, as its config says; float32 where it does not."""
    config = read_json(folder / "config.json")
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(name).removeprefix("torch.")


def choose_task(folder: Path) -> str:
    """What an engine has a model for, as its files say: to generate, or else to embed."""
    named = read_json(folder / "config.json").get("architectures") or ()
    names = " ".join(map(str, named)) if isinstance(named, list) else ""
    decodes = "ForCausalLM" in names or "LMHead" in names
    return "generate" if decodes and not (folder / "modules.json").is_file() else "embed"


def find_in_mirror(wanted: Wanted, settings: Settings) -> Artifact | None:
    """The best artifact of the mirror for a model; a quantized one only where that is wanted.

    One whose kernel cannot be had is taken where there is no other.

    Raises:
        KernelDigestMismatch: a kernel was to be fetched again, and has other bytes.
        BadLock: the lockfile of `HUBAOTI_LOCK`, which has to name it, cannot be read.
    """
    kind, _, number = wanted.device.partition(":")
    gpu = int(number or 0) if kind == "cuda" else None
    with Mirror.open(settings.mirror) as mirror:
        lock = find_lock(False, settings)
        fitting = {
            each.digest: each
            for each in list_allowed(mirror, mirror.ls())
            if (lock is None or lock.holds(each.digest)) and wanted.accepts(each.manifest)
        }
        ranked = _rank_fitting(fitting, wanted, gpu)
        best = next(iter(ranked), None)
        if lock is None:  # which says what is taken
            trial = _make_trial(mirror, settings)
            best = next((each for each in ranked if trial.brings(each.manifest)), best)
        if best is not None:
            mirror.leases.hold(best.digest)  # it is opened soon
    return best


def _make_trial(mirror: Mirror, settings: Settings) -> KernelTrial:
    """Whether kernels of what is in the mirror are there, too, or come without more ado."""

    def bring(manifest: Manifest) -> None:
        if manifest.requires.kernels:
            trust = Trust(settings.trust)
            bring_kernels(manifest, mirror, HubClient(settings), trust, report_nothing)

    return KernelTrial(bring, lambda _: None, is_free=True, is_offline=True)


def _rank_fitting(
    fitting: Mapping[str, Artifact], wanted: Wanted, gpu: int | None
) -> list[Artifact]:
    """Those of some artifacts that fit the GPU that is wanted, the best first."""
    same = [
        Candidate(each.recipe, each.variant, judge(each.requires, wanted.host, gpu), digest)
        for digest, each in ((digest, found.manifest) for digest, found in fitting.items())
        if each.recipe.quantization == wanted.quantization
    ]
    # Quantized ones answer something else, so they are ranked only by their recipe's name.
    recipes = sorted({each.recipe for each in same}, key=str) if wanted.quantization else [None]
    return [fitting[each.id] for recipe in recipes for each in rank(same, recipe)]


def find_in_repos(
    wanted: Wanted, repos: Sequence[str], trust: bool, settings: Settings, progress: Progress
) -> tuple[Artifact | None, list[str]]:
    """The first artifact of some repos that serves a model, and why those before it do not."""
    reasons: list[str] = []
    for repo in repos:
        try:
            artifact = api.pull(repo, trust=trust, settings=settings, progress=progress).artifact
            wanted.require(artifact.manifest)
            return artifact, reasons
        except HubaotiError as error:
            reasons.append(f"{repo}: {error}")
    return None, reasons


def _list_weight_files(folder: Path) -> list[Path]:
    """The files that a model's weights are loaded from: those of its index, or the only one."""
    listed = read_json(folder / "model.safetensors.index.json").get("weight_map")
    if isinstance(listed, dict):
        return [folder / str(name) for name in sorted({*map(str, listed.values())})]
    only = folder / "model.safetensors"
    return [only] if only.is_file() else sorted(folder.glob("*.safetensors"))


def estimate_weight_bytes(folder: Path, dtype: str | None) -> int:
    """The memory that a model's weights will take, as the headers of its files say; 0 if unknown.

    With a `dtype`, numbers of other widths are made into it.
    """
    bits = {"float32": 32, "bfloat16": 16, "float16": 16}.get(dtype or "", 0)
    total = 0
    for file in _list_weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    each = opened.get_slice(name)
                    kind = each.get_dtype()
                    own = bits if bits and "F" in kind else _DTYPE_BITS.get(kind, 8)
                    total += math.prod(each.get_shape()) * own // 8
        except (SafetensorError, OSError):
            continue  # who loads it says so
    return total
