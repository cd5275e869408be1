"""What a repo lacks for this host is compiled here, as its other artifacts were, and pushed to it.

So the first machine of a kind does the work, and all others of its kind find it in the repo.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from packaging.version import Version

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.variant import Recipe
from hubaoti.errors import BadRequest, HubaotiError, NoArtifact, NoMatch, NoModel, RepoNotFound
from hubaoti.flags import require_flags
from hubaoti.folder_trees import remove_tree
from hubaoti.host.extras import require
from hubaoti.host.probe import Host, probe_host
from hubaoti.hub.layout import ArtifactPath, RepoRef, artifact_path
from hubaoti.mirror import Mirror
from hubaoti.mirror.folders import make_private
from hubaoti.mirror.rows import Signed
from hubaoti.progress import Progress
from hubaoti.settings import Settings

if TYPE_CHECKING:
    from hubaoti.artifact.bundle import Bundle
    from hubaoti.hub.catalog import Catalog
    from hubaoti.hub.choice import Pulled
    from hubaoti.hub.client import HubClient
    from hubaoti.hub.pull import Puller

_FA3, _FA3_SM = "fa3", 90
_DEFAULT_ATTENTIONS = {"sdpa", "eager"}  # attentions that a model has by itself


class FillOptions(TypedDict, total=False):
    """What `pull` takes of what is missing; its docstring says more."""

    missing: str | None
    model: str | Path | None
    push_back: bool
    sign: str | Path | None


def make_fill_options(
    missing: str | None, push_back: bool, model: str | Path | None = None
) -> FillOptions:
    """What `attach`, `load` and `run` were told of what is missing, as `pull` takes it."""
    require_flags(push_back=push_back)
    if missing is None and not push_back:
        return {}
    return {"missing": missing, "push_back": push_back, "model": model}


@dataclass(frozen=True, slots=True)
class Missing:
    """That what a repo lacks is compiled: of a `model`, else of the one that the repo names.

    With `push_back` the repo gets it, signed with the key in the file `sign`, if there is one.
    """

    model: str | None = None
    push_back: bool = False
    sign: str | Path | None = None

    @classmethod
    def parse(cls, options: FillOptions) -> Missing | None:
        """What is asked for; None where what is missing is refused, as it is by default.

        Raises:
            BadRequest: the word is unknown, or others are there without it.
        """
        word, model = options.get("missing"), options.get("model")
        push_back, sign = options.get("push_back", False), options.get("sign")
        if sign is not None:
            _require_signing(sign, push_back)
        if word is None:
            if push_back or model is not None:
                unread = "to be pushed back" if push_back else f"of {str(model)!r:.120}"
                raise BadRequest(
                    f"what is missing is {unread}, and nothing is compiled",
                    hint='add --missing compile (missing="compile"), or leave it out',
                )
            return None
        if word != "compile":
            raise BadRequest(
                f"unknown word for what is missing: {word!r:.40}", hint="there is compile"
            )
        return cls(None if model is None else str(model), push_back, sign)


def _require_signing(sign: str | Path, push_back: bool) -> None:
    """See that what is to be signed is pushed, and can be signed, before anything is compiled.

    Raises:
        BadRequest: it is not, or the key is none.
        MissingDependency: the extra `sign` is not installed.
    """
    from hubaoti.hub.signing import Signing

    if not push_back:
        raise BadRequest(
            "what is pushed back is to be signed, and nothing is",
            hint="add --push-back (push_back=True), or leave the key out",
        )
    Signing.parse(sign, None, None)


def pull_or_compile(  # noqa: PLR0913 - a face of keywords
    ref: RepoRef,
    settings: Settings,
    missing: Missing,
    *,
    recipe: Recipe | None,
    trust: bool,
    allow_rollback: bool,
    progress: Progress,
) -> Pulled:
    """The artifact of a repo that fits this host best; where none fits, one that is compiled here.

    It has the dims and options of the repo's others, which is asked of their publisher's trust, and
    one process of this machine compiles it. That it could not be pushed back is a note.

    Raises:
        NoModel: nothing says of which model it would be.
        Untrusted, Unsigned: the repo's artifacts are of somebody whose options are not taken here.
        HubaotiError: as `pull` and `compile`.
    """
    from hubaoti.hub.pull import Puller, fingerprint

    _refuse_named(ref, missing, settings)
    host = probe_host(settings)
    with Mirror.open(settings.mirror) as mirror:
        puller = Puller(
            mirror,
            settings,
            host,
            recipe=recipe,
            trust=trust,
            allow_rollback=allow_rollback,
            progress=progress,
        )
        try:
            return puller.pull(ref)
        except (NoMatch, NoArtifact) as error:
            lacks = isinstance(error, NoArtifact)
            problem = "holds no artifact" if lacks else "has nothing that fits this host"
            progress(f"{ref} {problem}")
        asked = f"{settings.endpoint} {ref} {recipe} {missing.model} {fingerprint(host)}"
        work = hashlib.sha256(asked.encode()).hexdigest()
        with compile_alone(work, mirror, settings, progress) as output:
            try:  # who was faster may have pushed it
                return puller.pull(ref)
            except (NoMatch, NoArtifact):
                return _compile_missing(puller, ref, missing, output)


def _refuse_named(ref: RepoRef, missing: Missing, settings: Settings) -> None:
    """See that what is asked for could be anything that is compiled now.

    Raises:
        BadRequest: it is one artifact, or one version, that nothing can be added to.
    """
    named = f"the artifact {ref.digest[:12]}" if ref.digest else ""
    if settings.lock is not None:
        named = "what a lockfile says (HUBAOTI_LOCK)"
    if named:
        raise BadRequest(
            f"{named} is taken or nothing, so nothing is compiled in its place",
            hint="leave --missing out, or name the repo alone",
        )
    if missing.push_back and ref.revision is not None:
        raise BadRequest(
            f"what is pushed back goes to the default branch of {ref.repo}, and {ref.revision} "
            "would not have it",
            hint=f"pull {ref.repo}, or leave --push-back out",
        )


@contextmanager
def compile_alone(
    work: str, mirror: Mirror, settings: Settings, progress: Progress
) -> Iterator[Path]:
    """Around a compile that one process of this machine does at a time: where its bundle lies.

    The bundle leaves with the block; the report of a compile that failed stays beside it.
    """
    folder = settings.home / "fill"
    make_private(folder)
    output = folder / work[:16]
    with mirror.leases.alone(f"fill-{work}", progress):
        try:
            yield output
        finally:
            remove_tree(output, ignore_errors=True)


def _compile_missing(puller: Puller, ref: RepoRef, missing: Missing, output: Path) -> Pulled:
    """Compile what a repo lacks, have it in the mirror, and push it where that is asked for."""
    from hubaoti.api.building import Means
    from hubaoti.api.compiling import build_model
    from hubaoti.hub.catalog import read_catalog

    require("pull --missing compile", "compile")
    commit = puller.pin_commit(ref)
    required = puller.find_required(ref)
    catalog = read_catalog(puller.client, ref.repo, commit, required=required)
    device = _choose_device(puller.host)
    pattern = choose_pattern(catalog, puller.recipe, device)
    if pattern is not None:
        _require_options(puller, ref, catalog, pattern)
    model, revision = _choose_model(missing, catalog, pattern, puller.client)
    options = read_build_options(catalog.readable[pattern], device, puller.host) if pattern else {}
    options |= read_recipe(puller.recipe)
    puller.progress(f"compiling {model} for {ref.repo}")
    # What others built is of use here, and nothing that this machine publishes.
    means = Means(puller.settings, puller.progress, own=missing.push_back)
    bundle = build_model(model, output, means, device, revision=revision, **options)
    like = puller.recipe or (pattern.recipe if pattern else None)
    place = artifact_path(bundle.manifest, like.label if like else None)
    if puller.recipe not in {None, place.recipe}:
        raise BadRequest(
            f"{model} compiles to {place.recipe} here, and {puller.recipe} is asked for",
            hint=f"ask for --recipe {place.recipe}",
        )
    return _describe_compiled(puller, ref, commit, bundle, place, missing)


def _describe_compiled(
    puller: Puller,
    ref: RepoRef,
    commit: str,
    bundle: Bundle,
    place: ArtifactPath,
    missing: Missing,
) -> Pulled:
    """What was compiled, or found, as a pull gives it; pushed where that is asked for."""
    from hubaoti.api.attaching import put
    from hubaoti.hub.choice import Considered, Pulled

    manifest, mirror = bundle.manifest, puller.mirror
    mirror.leases.hold(manifest.digest)
    artifact = mirror.artifact(manifest.digest) or put(bundle, mirror)
    verdict = puller.judge(manifest.requires)
    considered = (Considered(place, manifest, verdict),)
    notes, pushed = tuple[str, ...](), True
    if missing.push_back:
        commit, note, pushed = _push_back(puller, ref, commit, bundle, place, missing.sign)
        notes = (note,)
    built = mirror.index.is_built(manifest.digest)
    facts = (artifact, ref, commit, place, verdict, considered, notes)
    return Pulled(*facts, from_mirror=not built, compiled=built, is_kept_back=not pushed)


def _push_back(
    puller: Puller,
    ref: RepoRef,
    commit: str,
    bundle: Bundle,
    place: ArtifactPath,
    sign: str | Path | None,
) -> tuple[str, str, bool]:
    """The commit of a repo that has what was compiled, what is to be said of the push, and whether
    the repo has it now.

    What could not be pushed can be used here all the same. Another machine of this kind may have
    been faster, and keeps the path.
    """
    from hubaoti.api.publishing import push

    try:
        there = find_in_repo(puller.client, ref.repo, place)
        if there is not None and there.key == bundle.manifest.key:
            return commit, f"another machine pushed {place} meanwhile; this one stays here", True
        made = push(
            bundle,
            ref.repo,
            label=place.recipe.label,
            sign=sign,
            settings=puller.settings,
            progress=puller.progress,
        )
    except HubaotiError as error:
        return commit, f"it is not pushed to {ref.repo}: {error} ({error.hint})", False
    return made.commit, f"pushed to {ref.repo} at {made.commit}", True


def find_in_repo(
    client: HubClient, repo: str, place: ArtifactPath, branch: str | None = None
) -> Manifest | None:
    """What a branch of a repo, by default its own, has at a path now; None where any of it is not.

    Raises:
        BadManifest: it cannot be read. AuthFailed, HubUnreachable: of the Hub.
    """
    from hubaoti.hub.catalog import read_catalog

    try:
        catalog = read_catalog(client, repo, client.resolve(repo, branch), only=place)
    except RepoNotFound:
        return None
    there = catalog.artifacts.get(place)
    if there is None or isinstance(there, Manifest):
        return there
    raise there


def choose_pattern(catalog: Catalog, recipe: Recipe | None, device: str) -> ArtifactPath | None:
    """The artifact as which a missing one is made: of the recipe, for the device, the newest torch.

    None where a repo has none that can be read.
    """

    def rank(place: ArtifactPath) -> tuple[Any, ...]:
        same = place.recipe == recipe if recipe else place.recipe.quantization is None
        plain = place.recipe.label is None
        torch = Version(place.variant.torch)
        return same, place.variant.device == device, plain, torch, str(place)

    return max(catalog.readable, key=rank, default=None)


def _require_options(puller: Puller, ref: RepoRef, catalog: Catalog, pattern: ArtifactPath) -> None:
    """See that the options of a repo's publisher are taken here: they say what is compiled."""
    signer = catalog.signers.get(pattern)
    where = puller.client.endpoint, ref.repo, str(pattern)
    signed = [Signed(*where, str(signer))] if signer else []
    what = f"the options of {pattern} in {ref.repo}"
    puller.require_publisher(ref, what, f"commit {catalog.commit}", signed)


def _choose_model(
    missing: Missing, catalog: Catalog, pattern: ArtifactPath | None, client: HubClient
) -> tuple[str, str | None]:
    """The model to compile, and its revision: the one that is named, else the repo's own.

    Raises:
        NoModel: none is, and the repo says of none that the Hub has.
    """
    from hubaoti.hub.card import find_base_model, read_base_model

    made_of = ""
    if pattern is not None:
        manifest = catalog.readable[pattern]
        known, source = find_base_model(manifest), manifest.source
        if known is not None and missing.model in {None, known}:
            return known, source.commit
        made_of = f", but that it was made of {source.model!r:.120}, which the Hub has not"
    if found := missing.model or read_base_model(client, catalog):
        return found, None
    raise NoModel(
        f"what {catalog.repo} lacks cannot be compiled: nothing says of which model{made_of}",
        hint="name it with --model: a Hub id or a folder; a module from Python is compiled by "
        "hubaoti.compile(module, calls=...)",
    )


def read_build_options(manifest: Manifest, device: str, host: Host) -> dict[str, Any]:
    """What `compile` was asked for when an artifact was made, as far as another device has it."""
    from hubaoti.compiler.options import list_given

    build = manifest.build
    has_fa3 = device == "cuda" and any(gpu.sm == _FA3_SM for gpu in host.gpus[:1])
    return {
        "task": manifest.program.task,
        "dims": build.dims,
        "buckets": build.buckets,
        "regions": build.regions,
        "dtype": build.dtype,
        "attention": _FA3 if build.attention == _FA3 and has_fa3 else None,
        "mode": build.mode,
        "inductor": list_given(build.options, device),
        "layout": build.layout or None,
    }


def read_recipe(recipe: Recipe | None) -> dict[str, Any]:
    """A recipe as options of `compile`, none without one; its label is for the push."""
    if recipe is None:
        return {}
    attention = None if recipe.attention in _DEFAULT_ATTENTIONS else recipe.attention
    return {"dtype": recipe.dtype, "attention": attention, "quantize": recipe.quantization}


def _choose_device(host: Host) -> str:
    """What is compiled for: the GPU of a host that has one, and a torch for it; else the CPU."""
    return "cuda" if host.gpus and host.torch is not None and host.torch.cuda else "cpu"
