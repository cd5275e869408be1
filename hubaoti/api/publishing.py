"""The verbs that reach a Hub: push bundles, pull what fits this host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti.api.filling import FillOptions, Missing, pull_or_compile
from hubaoti.api.repos import find_host
from hubaoti.artifact.bundle import Bundle, find_bundles
from hubaoti.artifact.variant import Recipe
from hubaoti.errors import BadRequest, HubaotiError, NotBuiltHere
from hubaoti.flags import require_flags
from hubaoti.host.probe import Host
from hubaoti.hub.layout import ArtifactPath, RepoRef
from hubaoti.mirror import Mirror, PullOrigin
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import Settings

if TYPE_CHECKING:
    from hubaoti.hub.choice import Pulled
    from hubaoti.hub.push import Commit


def push(  # noqa: PLR0913 - a face of keywords
    bundles: Bundle | str | Path | Sequence[Bundle | str | Path],
    repo: str,
    *,
    tag: str | None = None,
    label: str | None = None,
    private: bool = False,
    layout: str | None = None,
    as_is: bool = False,
    move_tag: bool = False,
    replace: bool = False,
    sign: str | Path | None = None,
    certificates: str | Path | None = None,
    trust_config: str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> Commit:
    """Publish a bundle, or several, in one commit; the repo is made when there is none.

    A folder of bundles stands for all that it holds. What the repo has already is not sent again;
    where one bundle cannot be pushed, none is. With the layout `zerogpu` a bundle goes to the
    branch `zerogpu/<recipe>/<variant>`, as a `package/` that `spaces.aoti_load` and `aokit` read.

    A tag that names another commit is moved with `move_tag`; a path that holds an artifact of
    another key is taken with `replace`.

    Whoever trusts the owner of the repo runs what it holds. So what this machine did not build is
    published only `as_is`. With `sign`, the path of a private EC key, each gets a signature that
    holds at its path of this repo alone; what lies there without one gets it, and is not sent
    again. `certificates` are those of the key, its own first; or `sign` is "sigstore", whose
    services a `trust_config` names.

    Raises:
        NotBuiltHere: this machine did not build a bundle, and `as_is` does not say so.
        MissingDependency: it is to be signed, and the extra `sign` is not installed.
        BadRequest: the graphs do not answer without hubaoti, as that layout's loaders ask them;
            several bundles are for that layout, or for one path; or the key is none.
        BadManifest: what is given is no bundle, or a folder holds something else than bundles.
        DigestMismatch: a file of the bundle is not the one its manifest names.
        Conflict: the path or the tag is taken; AuthFailed, HubUnreachable: of the Hub.
    """
    from hubaoti.hub.push import Destination, push_bundles
    from hubaoti.hub.signing import Signing

    require_flags(private=private, as_is=as_is, move_tag=move_tag, replace=replace)
    settings = settings or Settings.from_env()
    given = [bundles] if isinstance(bundles, Bundle | str | Path) else bundles
    _require_bundles(given)
    found = [bundle for each in given for bundle in _read_bundles(each)]
    for bundle in found:
        bundle.refuse_exported()  # before it is asked who built it: no --as-is would publish it
    place = Destination(
        RepoRef.parse(repo),
        tag=tag,
        label=label,
        private=private,
        layout=layout,
        move_tag=move_tag,
        replace=replace,
        signing=None if sign is None else Signing.parse(sign, certificates, trust_config),
    )
    if not as_is:
        _require_built(found, place.repo, settings)
    commit = push_bundles(found, place, settings, progress)
    _record_pushed(found, commit, settings)
    return commit


def _record_pushed(bundles: Sequence[Bundle], commit: Commit, settings: Settings) -> None:
    """Remember that what was pushed may leave the mirror: a pull brings it back.

    What was pushed is, whether that can be remembered or not.
    """
    if commit.branch is None:  # what lies on a branch for other loaders, no pull brings
        where = PullOrigin(settings.endpoint, commit.repo, commit.commit)
        with suppress(HubaotiError), Mirror.open(settings.mirror) as mirror:
            mirror.usage.record_pushed((each.manifest.digest for each in bundles), where)


def _require_built(bundles: Sequence[Bundle], repo: RepoRef, settings: Settings) -> None:
    """See that this machine built what is published in somebody's name.

    Raises:
        NotBuiltHere: it did not build one.
    """
    with Mirror.open(settings.mirror) as mirror:
        for bundle in bundles:
            digest = bundle.manifest.digest
            if mirror.index.is_built(digest):
                continue
            owners = dict.fromkeys(each.publisher for each in mirror.index.list_origins(digest))
            whose = f"{' and '.join(owners)} published it" if owners else "nobody knows who did"
            raise NotBuiltHere(
                f"{bundle.path} (artifact {digest[:12]}) was not built on this machine: {whose}. "
                f"Whoever trusts {repo.owner} would run it",
                hint="publish it all the same with --as-is (as_is=True), or compile it here with "
                "--force (force=True): without, compile takes what is found",
            )


def _require_bundles(given: object) -> None:
    """See that what is to be pushed is bundles, or their folders.

    Raises:
        BadRequest: it is not.
    """
    each_is = isinstance(given, Iterable) and all(
        isinstance(each, Bundle | str | Path) for each in given
    )
    if not each_is:
        raise BadRequest(
            f"a {type(given).__name__} is no bundle, and no list of them",
            hint="give what hubaoti.compile returned, or its folder, or several",
        )


def _read_bundles(given: Bundle | str | Path) -> list[Bundle]:
    if given == "":
        raise BadRequest("'' names no bundle", hint="name its folder; . is the one that you are in")
    return [given] if isinstance(given, Bundle) else find_bundles(Path(given))


def pull(  # noqa: PLR0913 - a face of keywords
    repo: str,
    *,
    recipe: str | None = None,
    path: str | None = None,
    trust: bool = False,
    allow_rollback: bool = False,
    locked: bool | str | Path = False,
    host: Host | str | Path | None = None,
    missing: str | None = None,
    model: str | Path | None = None,
    push_back: bool = False,
    sign: str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> Pulled:
    """The artifact of `owner/name[@revision]` that fits this host best, verified, in the mirror.

    A revision is a branch, a tag, a commit, versions (`v1`, `~=1.2`) or the digest of one artifact
    (`sha256:…`), of which `trust` trusts nothing else. Or the one at `path`, its
    `<recipe>/<variant>`, which needs no torch to be fetched. A tag that moved, or a branch that
    went back, since it was last seen here is taken with `allow_rollback`. With `locked` nothing is
    taken but what a lockfile says: `hubaoti.lock`, that of `HUBAOTI_LOCK`, or the one that is
    named; no list is asked for, and what was pulled before needs no network. For another `host` it
    is a file such as `hubaoti doctor --json` writes there.

    With `missing="compile"`, what no artifact fits is compiled here, once a machine: with the task,
    dims and options of the repo's others, which needs trust in their publisher, of the model that
    they name, else the card, or of `model`. With `push_back` the repo gets it, signed where `sign`
    says with what, as of `push`; where it cannot, a note says so, and it can be used here.

    Raises:
        NoModel: it is to be compiled, and nothing says of which model; else as `compile`.
        NotLocked, LockMismatch, BadLock: of the lockfile. NoVersion: the repo has none such.
        BadRequest: a name is malformed, or the file describes no host.
        NoMatch: none fits, with every reason; NoArtifact: the repo has none, or none at `path`.
        Untrusted: its publisher is not trusted here; `trust=True` remembers that it is. Blocked.
        RepoMoved: the repo has another name now; RolledBack: its revision went back.
        Unsigned, BadSignature: its publisher has to sign here, and signed nothing of it.
    """
    from hubaoti.hub.pull import pull_artifact

    require_flags(trust=trust, allow_rollback=allow_rollback, push_back=push_back)
    settings, ref = settings or Settings.from_env(), RepoRef.parse(repo)
    wanted = None if recipe is None else Recipe.parse(recipe)
    options: FillOptions = {
        "missing": missing,
        "model": model,
        "push_back": push_back,
        "sign": sign,
    }
    if fill := Missing.parse(options):
        _refuse_unfilled({"path": path, "locked": locked, "host": host})
        return pull_or_compile(
            ref,
            settings,
            fill,
            recipe=wanted,
            trust=trust,
            allow_rollback=allow_rollback,
            progress=progress,
        )
    return pull_artifact(
        ref,
        settings,
        find_host(host, settings),
        recipe=wanted,
        place=None if path is None else ArtifactPath.parse(path),
        trust=trust,
        allow_rollback=allow_rollback,
        locked=locked,
        progress=progress,
    )


def _refuse_unfilled(named: Mapping[str, object]) -> None:
    """See that beside `missing` nothing names one artifact, or another host.

    Raises:
        BadRequest: it does.
    """
    for name, value in named.items():
        if value:
            raise BadRequest(
                f"{name} is asked for, and what is missing is to be compiled: that is of this host",
                hint="leave one of them out",
            )
