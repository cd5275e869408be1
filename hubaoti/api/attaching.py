"""The verbs that give a module its graphs, and take them away."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hubaoti.api.filling import FillOptions, make_fill_options
from hubaoti.api.publishing import pull
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME
from hubaoti.errors import BadRequest
from hubaoti.flags import require_flags
from hubaoti.host.extras import require
from hubaoti.mirror import Artifact, Mirror
from hubaoti.mirror.policy import trust_artifact
from hubaoti.mirror.trust import Trust
from hubaoti.progress import Progress, report_nothing
from hubaoti.runtime.first_open import require_sound
from hubaoti.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from hubaoti.attachment.attach import Attachment
    from hubaoti.hub.choice import Pulled

_Given: TypeAlias = "Artifact | Pulled | Bundle | Path | str"
_IN_FOLDERS = ("./", "../", "/", "~")  # what begins like this can be no repo's name


def attach(  # noqa: PLR0913 - a face of keywords
    module: nn.Module,
    artifact: Artifact | Pulled | Bundle | Path | str,
    *,
    strict: bool = False,
    quantize: bool = False,
    cuda_graphs: bool = False,
    trust: bool = False,
    locked: bool | str | Path = False,
    missing: str | None = None,
    push_back: bool = False,
    ops: Sequence[str] = (),
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> Attachment:
    """Have an artifact's graphs answer for the regions of a module; all else about it stays.

    `artifact` is one of the mirror, a bundle or its folder, or a repo to pull; a text that begins
    with ./, ../, / or ~ is a folder, and any other a repo. What this machine did not build is
    opened where somebody who is trusted published it; `trust` says so once, of a repo's publisher,
    or of a bundle by its digest. With `locked` nothing is attached but what a lockfile says, as
    `pull` has it. Of a repo, what is `missing` for this host can be compiled, and pushed back, as
    `pull` has it. The module's tensors are bound by reference. What no graph serves is answered by
    the module itself, counted, and warned of once for each reason; with `strict` it raises
    `NotServed`. A module that has no config, or other code than was compiled, or of which code or
    attributes were patched, answers the first call of each graph itself, and the graph's answer is
    compared. Of a PeftModel it is the model within.

    Of an artifact that was compiled with `--quantize`, the graphs make quantized weights of the
    module's, which then has both. With `quantize`, the module gives its own up and is smaller: what
    it answers itself is of the quantized weights too, and stays so after `detach`.

    With `cuda_graphs`, decoding steps over a static cache are captured in CUDA graphs and replayed:
    the first step over a cache runs, the second is captured, and up to eight of them are kept, each
    with memory of its own for what it computes, which `stats` tells. A step that cannot be captured
    runs as without, and says why.

    `ops` are modules of the caller's that register the ops which graphs call, as "my.ops". They are
    imported here, and wherever a graph is tried before it is opened here.

    Raises:
        Untrusted: it was not built here, and nobody who is trusted published it. Blocked: it may
            not run here.
        NotLocked, LockMismatch, BadLock: it is not what the lockfile says.
        OtherProgram: the module's config says that it computes something else.
        MissingConstant: it lacks tensors that the graphs need, or has them in another dtype; the
            first are named, nothing was touched.
        AlreadyAttached: it has graphs already.
        BadRequest: `quantize` is asked of an artifact without quantized weights, or of layers that
            are no plain Linears; `cuda_graphs` of graphs that are no decoder's blocks on a GPU;
            what is given is no module, or no artifact.
        NoMatch: the module is on a GPU of another kind than the artifact is for.
        DigestMismatch: the mirror's copy was changed; it is in quarantine, pull it again.
        Quarantined: a graph crashed or differed when it was first opened, in its own process.
        MissingOps, NotTried, CannotOpen: it could not be opened there, and is not opened here.
        NotEnoughMemory: there is too little to try it, or for a CUDA graph.
    """
    require_flags(strict=strict, quantize=quantize, cuda_graphs=cuda_graphs)
    settings = settings or Settings.from_env()
    if settings.graphs:
        require("attach", "run")
    from hubaoti.attachment import attach as runtime
    from hubaoti.attachment.served_modules import find_module_device
    from hubaoti.program.adapters import unwrap_peft
    from hubaoti.program.identity import matches_program
    from hubaoti.program.source_scan import use_scan_cache
    from hubaoti.runtime.gpus import computes

    runtime.require_module(module)
    if not settings.graphs:
        return runtime.attach_nothing(module)
    module = unwrap_peft(module)
    fill = make_fill_options(missing, push_back)
    found = get_artifact(artifact, trust, settings, progress, locked, fill)
    manifest = found.manifest
    if cuda_graphs:
        runtime.require_steps(module, manifest)
    with Mirror.open(settings.mirror) as mirror:
        with use_scan_cache(mirror.index):
            known = matches_program(module, manifest.program, manifest.is_whole)
        progress("open")
        device = find_module_device(module, manifest.target.device)
        require_kernels(found, mirror, settings, progress)
        require_sound(found, mirror, device, progress, ops)
    tries = not known and computes(device)  # where nothing computes, nothing can be compared
    attached = runtime.attach_graphs(
        module,
        runtime.Parts(manifest, found.path, found.graph_folder),
        strict=strict,
        tries=tries,
        quantize=quantize,
    )
    if cuda_graphs:
        attached.replay_steps(device)
    return attached


def detach(module: nn.Module) -> None:
    """Give a module everything back that `attach` took.

    Raises:
        NotAttached: nothing was attached to it. BadRequest: it is no module.
    """
    from hubaoti.attachment import attach as runtime
    from hubaoti.program.adapters import unwrap_peft

    runtime.require_module(module)
    runtime.detach_graphs(unwrap_peft(module))


def get_artifact(
    artifact: _Given,
    trust: bool,
    settings: Settings,
    progress: Progress,
    locked: bool | str | Path = False,
    fill: FillOptions | None = None,
) -> Artifact:
    """An artifact of the mirror, by whatever it is called.

    With `trust`, a repo's publisher is trusted from now on; of all else, this very artifact. With
    `locked` it has to stand in a lockfile. `fill` says what becomes of what a repo lacks.

    Raises:
        NotLocked: it does not.
        Untrusted, Blocked: its code may not run here.
        BadRequest: it is no artifact, or called by a folder's name as a text, which is a repo's;
            or `fill` is said of what is no repo; else as `pull`.
        BadManifest: a folder is no bundle.
    """
    require_flags(trust=trust)
    artifact = _read_folder(artifact)
    fill = fill or {}
    if fill and not isinstance(artifact, str):
        raise BadRequest(
            "what is missing is to be compiled, and here is an artifact: nothing is missing",
            hint="leave it out, or name the repo as owner/name",
        )
    _require_locked(artifact, locked, settings)
    if isinstance(artifact, Artifact):
        return artifact
    if isinstance(artifact, Path):
        artifact = Bundle.read(artifact)
    if isinstance(artifact, str):
        _refuse_folder(artifact)
        where: dict[str, Any] = {"settings": settings, "progress": progress}
        artifact = pull(artifact, trust=trust, locked=locked, **fill, **where)
    if isinstance(artifact, Bundle):
        with Mirror.open(settings.mirror) as mirror:
            _require_allowed(artifact.manifest.digest, trust, mirror)
            mirror.leases.hold(artifact.manifest.digest)  # it is opened soon
            return mirror.artifact(artifact.manifest.digest) or put(artifact, mirror)
    found = getattr(artifact, "artifact", artifact)
    if not isinstance(found, Artifact):
        raise BadRequest(
            f"a {type(found).__name__} is no artifact",
            hint="give the artifact that hubaoti.pull returned, a bundle, its folder as a "
            "pathlib.Path, or a repo's name",
        )
    if trust:  # else whoever opens it asks
        with Mirror.open(settings.mirror) as mirror:
            _require_allowed(found.digest, trust, mirror)
    return found


def _read_folder(artifact: _Given) -> _Given:
    """The folder that a text names, if it can be no repo's name; else what was given."""
    if not isinstance(artifact, str) or not artifact:
        return artifact
    if not f"{artifact}/".startswith(_IN_FOLDERS):
        return artifact
    path = Path(artifact)
    try:
        return path.expanduser()
    except RuntimeError:  # nobody of that name has a home: then there is no such folder
        return path


def _refuse_folder(name: str) -> None:
    """See that a text is meant as the name of a repo.

    Raises:
        BadRequest: here is a bundle of that name.
    """
    here = Path(name)
    if (here / FILENAME).is_file() or (name.count("/") != 1 and here.is_dir()):
        raise BadRequest(
            f"{name!r:.120} names a repo of the Hub, and here is a folder of that name",
            hint=f"for the bundle in it give {'./' + name!r:.120}, or pathlib.Path",
        )


def _require_locked(artifact: _Given, locked: bool | str | Path, settings: Settings) -> None:
    """See that an artifact that is here already stands in the lockfile that is gone by, if any is.

    Raises:
        NotLocked: it does not. BadLock: the lockfile cannot be read.
    """
    if isinstance(artifact, str) or not (locked or settings.lock):  # a pull asks by itself
        return
    from hubaoti.hub.lockfile import find_lock

    found = Bundle.read(artifact) if isinstance(artifact, Path) else artifact
    held: Any = getattr(found, "artifact", found)
    lock = find_lock(locked, settings)
    if lock is not None and isinstance(held, Artifact | Bundle):
        lock.require(held.manifest.digest)


def _require_allowed(digest: str, trust: bool, mirror: Mirror) -> None:
    """See that an artifact may be opened here; with `trust` it may from now on."""
    if trust and not mirror.decide(digest).allowed:
        trust_artifact(mirror, digest)
    mirror.require_allowed(digest)


def require_kernels(
    artifact: Artifact, mirror: Mirror, settings: Settings, progress: Progress
) -> None:
    """See that the kernels that an artifact calls are here, and may run: what is missing is pulled.

    Raises:
        Untrusted, KernelMissing, KernelDigestMismatch, DiskFull: as `hub.kernels.bring_kernels`.
    """
    if artifact.manifest.requires.kernels:
        from hubaoti.hub.client import HubClient
        from hubaoti.hub.kernels import bring_kernels

        client, trust = HubClient(settings), Trust(settings.trust)
        bring_kernels(artifact.manifest, mirror, client, trust, progress)


def put(bundle: Bundle, mirror: Mirror) -> Artifact:
    """A bundle's files in the mirror, each hashed on its way."""
    files = {file.path: bundle.path / file.path for file in bundle.manifest.all_files()}
    return mirror.put(bundle.manifest, files)
