"""Signatures as they lie in repos: made for a push, and verified before a manifest is parsed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.statement import (
    FILENAME,
    LARGEST_SIGNATURE,
    LARGEST_STATEMENT,
    SIGNATURE,
    Statement,
)
from hubaoti.errors import BadSignature, DigestMismatch, RepoNotFound
from hubaoti.hub.bounds import TooLong
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import ArtifactPath
from hubaoti.hub.records import Entry
from hubaoti.hub.signing import UNREADABLE, Signing, is_signed_by, read_claim, sign, verify
from hubaoti.mirror.rows import Signed
from hubaoti.mirror.signer import Keys, Signer
from hubaoti.mirror.trust import Trust, ask_to_sign, refuse_unsigned

_LARGEST = {FILENAME: LARGEST_STATEMENT, SIGNATURE: LARGEST_SIGNATURE}


@dataclass(frozen=True, slots=True)
class RequiredSigners:
    """Of whom one has to sign what a publisher publishes here, and where their keys lie."""

    owner: str
    signers: tuple[Signer, ...]
    keys: Keys

    @classmethod
    def of(cls, trust: Trust, endpoint: str, owner: str) -> RequiredSigners | None:
        """Those that trust.toml names; None where a name is enough."""
        signers = trust.read().list_signers(endpoint, owner)
        return cls(owner, signers, trust.keys) if signers else None

    def find_known(self, known: Iterable[Signed], client: HubClient, repo: str, path: str) -> bool:
        """Whether one of them is known to have signed what lies at a path of a repo.

        Raises:
            Unsigned: nobody is, and offline no signature can be asked for.
        """
        names = {str(signer) for signer in self.signers}
        where = (client.endpoint, repo, path)
        if any((s.endpoint, s.repo, s.path) == where and s.signer in names for s in known):
            return True
        if client.is_offline:
            hint = "it is here, and HF_HUB_OFFLINE is set: without that, its signature is asked for"
            raise refuse_unsigned(f"{path} of {repo}", self.owner, self.signers, hint)
        return False

    def verify(self, manifest: bytes, statement: bytes, signature: bytes) -> Signer:
        """Who of them signed these bytes.

        Raises:
            BadSignature: nobody did.
        """
        problems = []
        for signer in self.signers:
            try:
                verify(manifest, statement, signature, signer, self.keys, self.owner)
            except BadSignature as error:
                problems.append(error)
            else:
                return signer
        raise BadSignature("; ".join(map(str, problems)), hint=problems[0].hint)


@dataclass(frozen=True, slots=True)
class CommitSignatures:
    """The signatures of a commit of a repo; `files` is None where nobody listed it."""

    client: HubClient
    repo: str
    commit: str
    files: Mapping[str, Entry] | None

    def read(self, place: ArtifactPath) -> tuple[bytes, bytes] | None:
        """What lies beside an artifact: its statement, and the signature; None where one lacks.

        Raises:
            BadSignature: one is larger than any. DigestMismatch: the endpoint gives other bytes.
        """
        found = []
        for name, largest in _LARGEST.items():
            content = self._read_file(place.file(name), largest)
            if content is None:
                return None
            found.append(content)
        return found[0], found[1]

    def read_claim(self, place: ArtifactPath) -> str:
        """Who says to have signed an artifact that has a signature, as `signing.read_claim`."""
        try:
            content = self._read_file(place.file(SIGNATURE), LARGEST_SIGNATURE)
        except (BadSignature, DigestMismatch):
            return UNREADABLE
        return UNREADABLE if content is None else read_claim(content)

    def _read_file(self, path: str, largest: int) -> bytes | None:
        """One file that is no larger than this; None where there is none."""
        try:
            if self.files is None:
                return self.client.download(self.repo, self.commit, path, largest).read_bytes()
            entry = self.files.get(path)
            if entry is not None and entry.size > largest:
                raise TooLong
            return None if entry is None else self.client.fetch(self.repo, self.commit, entry)
        except RepoNotFound:
            return None
        except TooLong:
            raise BadSignature(
                f"{path} of {self.repo} is too large: at most {largest} bytes are read",
                hint="ask its publisher to push it again with --sign",
            ) from None

    def verify(
        self, place: ArtifactPath, manifest: bytes, required: RequiredSigners, what: str = ""
    ) -> tuple[Signer, bytes]:
        """Who signed a manifest, of which nothing was parsed yet, and the statement beside it.

        `what` names it, where a refusal does not stand beside its path.

        Raises:
            Unsigned: nobody did. BadSignature: nobody of those who have to.
        """
        found = self.read(place)
        if found is None:
            hint = ask_to_sign(required.owner)
            raise refuse_unsigned(what, required.owner, required.signers, hint)
        statement, signature = found
        return required.verify(manifest, statement, signature), statement

    def require_statement(self, place: ArtifactPath, manifest: Manifest, statement: bytes) -> None:
        """See that what was signed is this artifact, here.

        Raises:
            BadSignature: it was signed for another repo or path, or is another artifact.
        """
        expected = Statement.of(self.repo, str(place), manifest)
        if problem := expected.describe_other(statement):
            raise BadSignature(
                f"{place} of {self.repo} was signed as something else: {problem}",
                hint="somebody may have copied it here; ask its publisher",
            )

    def make_missing(
        self, place: ArtifactPath, manifest: Manifest, by: Signing | None, is_there: bool
    ) -> dict[str, bytes]:
        """The statement and the signature that an artifact still lacks, by their names.

        Nothing where nobody asked for them, or where what lies there has good ones by this key.

        Raises:
            BadRequest: it cannot be signed.
        """
        if by is None or (is_there and self._is_signed(place, manifest, by)):
            return {}
        statement = Statement.of(self.repo, str(place), manifest).to_json()
        return {FILENAME: statement, SIGNATURE: sign(manifest.to_json(), statement, by)}

    def _is_signed(self, place: ArtifactPath, manifest: Manifest, by: Signing) -> bool:
        """Whether an artifact has a good signature by a key; of certificates nobody asks."""
        expected, found = Statement.of(self.repo, str(place), manifest).to_json(), None
        if by.is_plain_key:
            with suppress(BadSignature):  # too large for one
                found = self.read(place)
        if found is None or found[0] != expected:
            return False
        return is_signed_by(manifest.to_json(), *found, by)
