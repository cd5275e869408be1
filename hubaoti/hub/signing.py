"""The one door to model-signing: a manifest and its statement signed, or a signature verified.

It takes a second to import, so it is imported when something is signed, or has to be.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec

from hubaoti.artifact import manifest as manifests
from hubaoti.artifact import statement as statements
from hubaoti.disk import explain_disk_errors
from hubaoti.errors import BadRequest, BadSignature, HubaotiError, first_line
from hubaoti.host.extras import require
from hubaoti.hub.keys import derive_public_key, read_root
from hubaoti.mirror.signer import Keys, Signer, digest

SIGSTORE = "sigstore"  # what is named in place of a key
UNREADABLE = "nobody who can be read"
_KEY = re.compile(r"[0-9a-f]{64}")
_ONE_AT_A_TIME = Lock()  # nothing says that its libraries may be loaded by several threads


@dataclass(frozen=True, slots=True)
class Signing:
    """With what is signed: a private EC key in PEM, alone or with the certificates of it.

    `certificates` are in one PEM file, that of the key first. Without a key it is sigstore: whoever
    logs in, or is known to the CI that this runs in, by `trust_config` or its public instance.
    """

    key: Path | None
    certificates: Path | None = None
    trust_config: Path | None = None

    @classmethod
    def parse(
        cls, key: str | Path, certificates: str | Path | None, trust_config: str | Path | None
    ) -> Signing:
        """What was asked for.

        Raises:
            BadRequest: sigstore is asked for with certificates, or a key with its configuration;
                the key is none; a file cannot be read, or is none of what it should be.
            MissingDependency: the extra `sign` is not installed.
        """
        require("signing", "sign")
        if str(key) == SIGSTORE:
            if certificates is not None:
                raise BadRequest("sigstore makes its own certificate", hint="leave yours out")
            return cls(None, None, _read_first(trust_config))
        if trust_config is not None:
            hint = f"sign with --sign {SIGSTORE}, or leave it out"
            raise BadRequest("a trust configuration is sigstore's, and a key needs none", hint=hint)
        derive_public_key(Path(key))
        return cls(Path(key), _read_first(certificates))

    @property
    def is_plain_key(self) -> bool:
        """Whether it is a key alone, whose signatures it knows again."""
        return self.key is not None and self.certificates is None


def _read_first(path: str | Path | None) -> Path | None:
    """A file that libraries read whole, of whatever size it is, once it was seen to be small."""
    if path is not None:
        read_root(Path(path))
    return None if path is None else Path(path)


class _Certificate(msgspec.Struct, rename="camel"):
    """A certificate of a signature, in DER."""

    raw_bytes: bytes


class _Chain(msgspec.Struct):
    """Certificates, the signer's own first."""

    certificates: list[_Certificate]


class _PublicKey(msgspec.Struct):
    """A key by its sha256."""

    hint: str


class _Material(msgspec.Struct, rename="camel"):
    """What a signature says of its signer, one of these."""

    public_key: _PublicKey | None = None
    x509_certificate_chain: _Chain | None = None
    certificate: _Certificate | None = None


class _Claim(msgspec.Struct, rename="camel"):
    """Of a sigstore bundle what names its signer."""

    verification_material: _Material


def sign(manifest: bytes, statement: bytes, by: Signing) -> bytes:
    """A signature of both, as a sigstore bundle.

    Raises:
        BadRequest: key and certificates cannot be used, or sigstore did not sign.
    """
    with _ONE_AT_A_TIME, _lay_out(manifest, statement) as (folder, path):
        from model_signing.signing import Config

        try:
            _choose_signer(Config(), by).sign(folder, path)
        except Exception as error:  # of the libraries below it, or of sigstore's services
            raise BadRequest(
                f"nothing could be signed: {first_line(error)}",
                hint="see that the key is an EC key, and that its certificate is the first of the "
                "certificates; for sigstore, that its services can be reached",
            ) from error
        return path.read_bytes()


def _choose_signer(config: Any, by: Signing) -> Any:
    if by.key is None:
        ambient = {"use_ambient_credentials": True, "trust_config": by.trust_config}
        return config.use_sigstore_signer(**ambient)
    if by.certificates is None:
        return config.use_elliptic_key_signer(private_key=by.key)
    return config.use_certificate_signer(  # the first of the file, and all, of which none may lack
        private_key=by.key,
        signing_certificate=by.certificates,
        certificate_chain=[by.certificates],
    )


def verify(
    manifest: bytes, statement: bytes, signature: bytes, signer: Signer, keys: Keys, whose: str
) -> None:
    """See that a signer signed these very bytes. `whose` is the publisher, for messages.

    Raises:
        BadSignature: he did not.
        HubaotiError: his public key or root is not here, or verifies nothing.
        MissingDependency: the extra `sign` is not installed.
    """
    require("a signature", "sign")
    root = signer.key or signer.root
    trusted = None if root is None else keys.find(root, whose)
    if problem := _find_problem(manifest, statement, signature, signer, trusted):
        raise BadSignature(
            f"not signed by {signer.describe()}: {problem}",
            hint=f"nothing of it was opened; ask {whose}, or pull what they signed",
        )


def is_signed_by(manifest: bytes, statement: bytes, signature: bytes, by: Signing) -> bool:
    """Whether a private key, without certificates, signed these very bytes."""
    assert by.key is not None
    public = derive_public_key(by.key)
    signer = Signer(key=digest(public))
    return _find_problem(manifest, statement, signature, signer, public) is None


def _find_problem(
    manifest: bytes, statement: bytes, signature: bytes, signer: Signer, trusted: bytes | None
) -> str | None:
    """Why it is no signature of a signer, whose key or root is `trusted`; None where it is.

    Raises:
        HubaotiError: nothing can be verified by that key or root.
    """
    with _ONE_AT_A_TIME, _lay_out(manifest, statement) as (folder, path):
        path.write_bytes(signature)
        anchor = folder.parent / "trusted"
        anchor.write_bytes(trusted or b"")
        verifier = _choose_verifier(signer, anchor if trusted else None)
        try:
            _refuse_other(signature, signer)
            verifier.set_hashing_config(_make_hashing()).verify(folder, path)
        except Exception as error:  # whatever a library says of bytes from outside, they are wrong
            problem = first_line(error)
            return "it is of other bytes" if problem.startswith("Signature mism") else problem
    return None


def _choose_verifier(signer: Signer, trusted: Path | None) -> Any:
    from model_signing.verifying import Config

    try:
        if signer.key is not None:
            return Config().use_elliptic_key_verifier(public_key=trusted)
        if signer.issuer is None:
            return Config().use_certificate_verifier(certificate_chain=[trusted])
        return Config().use_sigstore_verifier(
            identity=signer.identity, oidc_issuer=signer.issuer, trust_config=trusted
        )
    except Exception as error:  # of whichever library reads it, or fetches sigstore's own root
        raise HubaotiError(
            f"signatures by {signer} cannot be verified here: {first_line(error)}",
            hint="see that the key or the root is the right one; without a root sigstore's public "
            "one is fetched, which takes a network",
        ) from error


def _make_hashing() -> Any:
    """How the two files are hashed: both, and whole, whatever a signature says that it covers.

    model-signing leaves out what a signature names in `ignore_paths`: one that names both files
    would be good for all others.
    """
    from model_signing import hashing

    class Whole(hashing.Config):  # type: ignore[misc]
        def add_ignored_paths(self, **_: object) -> None:
            """Leave nothing out."""

    return Whole().use_file_serialization(hashing_algorithm="sha256")


def _refuse_other(signature: bytes, signer: Signer) -> None:
    """Refuse a signature that says itself that it is somebody else's, before it is computed with.

    Of a certificate, model-signing asks on what it hangs, and not whose it is: that is asked here.

    Raises:
        ValueError: it is.
    """
    if signer.issuer is not None:
        return  # sigstore's own verifier asks all of it
    from sigstore_models.bundle.v1 import Bundle

    found = json.loads(signature)
    found["verificationMaterial"].setdefault("tlogEntries", [])
    material = Bundle.from_dict(found).verification_material
    if signer.key is not None:
        hint = material.public_key.hint if material.public_key else None
        if hint != signer.key:
            raise ValueError(f"it is by the key {hint}")
        return
    chain = material.x509_certificate_chain
    named = _list_identities(chain.certificates[0].raw_bytes) if chain else []
    if signer.identity not in named:
        raise ValueError(f"it is by a certificate of {' and '.join(named) or 'nobody'}")


def read_claim(signature: bytes) -> str:
    """Whose signature it says itself that it is: a key's beginning, or an identity.

    Nothing of it is verified, and what it says is anybody's text.
    """
    try:
        material = msgspec.json.decode(signature, type=_Claim).verification_material
        if material.public_key is not None:
            key = material.public_key.hint
            return f"key {key[:12]}" if _KEY.fullmatch(key) else UNREADABLE
        chain = material.x509_certificate_chain
        first = chain.certificates[0] if chain else material.certificate
        named = _list_identities(first.raw_bytes) if first else []
        return " and ".join(named) or UNREADABLE
    except Exception:  # whatever a library says of bytes from outside, or where the extra lacks
        return UNREADABLE


def _list_identities(certificate: bytes) -> list[str]:
    """For whom a certificate was made, by its alternative names."""
    from cryptography import x509

    extensions = x509.load_der_x509_certificate(certificate).extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    kinds = (x509.RFC822Name, x509.UniformResourceIdentifier, x509.DNSName)
    return [str(each) for kind in kinds for each in names.get_values_for_type(kind)]


@contextmanager
def _lay_out(manifest: bytes, statement: bytes) -> Iterator[tuple[Path, Path]]:
    """A folder of the two files, as model-signing takes them, and a path for the signature."""
    temporary = Path(tempfile.gettempdir())
    with (
        explain_disk_errors(temporary),
        tempfile.TemporaryDirectory(prefix="hubaoti-signing-", dir=temporary) as work,
    ):
        folder = Path(work) / "signed"
        folder.mkdir()
        (folder / manifests.FILENAME).write_bytes(manifest)
        (folder / statements.FILENAME).write_bytes(statement)
        yield folder, Path(work) / statements.SIGNATURE


# msgspec learns a type when it is first used, and two threads that meet there end the process.
msgspec.json.Decoder(_Claim)
