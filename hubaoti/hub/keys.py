"""EC keys in PEM: a pair is made, and what is given as a public key or as certificates is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hubaoti.disk import explain_disk_errors, read_small
from hubaoti.errors import BadRequest, OutputExists
from hubaoti.host.extras import require
from hubaoti.mirror.signer import LARGEST_KEY, digest

_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # those that model-signing signs with
_HINT = "make a pair with: hubaoti trust keygen NAME, which writes NAME.pem and NAME.pub"
_ROOT_HINT = (
    "give the certificate of the authority that signed the signers' own, or what sigstore calls a "
    "ClientTrustConfig"
)


def make_key_pair(private: Path) -> tuple[Path, str]:
    """Write a new private key, which only this user may read, and its public one beside it.

    The public key's path, and its sha256 by which others name it.

    Raises:
        BadRequest: there is no such folder. OutputExists: one of the files is there already.
        MissingDependency: the extra `sign` is not installed.
    """
    require("a key", "sign")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    if not private.parent.is_dir():
        raise BadRequest(f"there is no folder {private.parent}", hint="make it, or name another")
    public = private.with_suffix(".pub")
    for path in (private, public):
        if path.exists():
            raise OutputExists(
                f"{path} exists", hint="name another one: a key that is lost is lost"
            )
    made = ec.generate_private_key(ec.SECP256R1())
    secret = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    content = _encode_public(made.public_key())
    with explain_disk_errors(private.parent, remedy="name another folder"):
        for path, text, mode in ((private, secret, 0o600), (public, content, 0o644)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(text)
    return public, digest(content)


def read_public_key(path: Path) -> bytes:
    """A public key as PEM, spelled as model-signing spells it: its sha256 is the key's name.

    Raises:
        BadRequest: it is none, or of another kind than those that sign here.
    """
    require("a key", "sign")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        found = load_pem_public_key(_read(path))
    except ValueError as error:
        raise BadRequest(f"{path} is no public key in PEM", hint=_HINT) from error
    if not isinstance(found, ec.EllipticCurvePublicKey) or found.curve.name not in _CURVES:
        raise BadRequest(f"{path} is no EC key of {', '.join(_CURVES)}", hint=_HINT)
    return _encode_public(found)


def derive_public_key(path: Path) -> bytes:
    """The public key of a private one, as `read_public_key` gives it.

    Raises:
        BadRequest: it is no private EC key, or is encrypted.
    """
    require("a key", "sign")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(_read(path), None)
    except (ValueError, TypeError) as error:  # TypeError where it has a password
        raise BadRequest(
            f"{path} is no private key in PEM, or has a password", hint=_HINT
        ) from error
    if not isinstance(found, ec.EllipticCurvePrivateKey) or found.curve.name not in _CURVES:
        raise BadRequest(f"{path} is no EC key of {', '.join(_CURVES)}", hint=_HINT)
    return _encode_public(found.public_key())


def read_root(path: Path) -> bytes:
    """What identities hang on: certificates in PEM, or sigstore's trust configuration, as it is.

    Raises:
        BadRequest: it is neither.
    """
    content = _read(path, _ROOT_HINT)
    if b"-----BEGIN CERTIFICATE-----" not in content and not content.lstrip().startswith(b"{"):
        raise BadRequest(
            f"{path} is no certificate in PEM, and no trust configuration in JSON", hint=_ROOT_HINT
        )
    return content


def _encode_public(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    found: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return found


def _read(path: Path, hint: str = _HINT) -> bytes:
    """A small file that somebody named."""
    try:
        return read_small(path, LARGEST_KEY)
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}", hint=hint) from error
