"""Signatures of bundles: who has built one, which its checksums do not say.

The manifest, which has the checksums of all other entries, is signed with Ed25519 (RFC 8032); the signature is a field
of the manifest. Keys are PEM files as OpenSSL writes them: ``openssl genpkey -algorithm ed25519 -out key.pem``,
``openssl pkey -in key.pem -pubout -out key.pub.pem``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BuildError, BundleError, GfTvmError
from ..files import read_limited

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "signature"
ALGORITHM = "ed25519"
# Of a PEM file; a key has 120 bytes.
_MAX_PEM = 64 << 10


def make_key(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Make a pair of keys: ``path``, which only its owner may read, and ``NAME.pub.pem`` beside it, to be given away.

    Raises:
        BuildError: one of the files exists or cannot be written, or cryptography is not installed.
    """
    ed25519, serialization = _library(BuildError)
    private = Path(path)
    public = private.with_name(f"{private.name.removesuffix('.pem')}.pub.pem")
    key = ed25519.Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    known = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for file, data, mode in ((private, secret, 0o600), (public, known, 0o644)):
        try:
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as opened:
                opened.write(data)
        except OSError as error:
            raise BuildError(f"cannot write the key {str(file)!r}: {error.strerror or error}") from None
    return private, public


def private_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    """Read a key to sign with. Raises BuildError."""
    ed25519, serialization = _library(BuildError)
    try:
        key = serialization.load_pem_private_key(read_limited(path, _MAX_PEM), None)
    except OSError as error:
        raise BuildError(f"cannot read the key {os.fspath(path)!r}: {error.strerror or error}") from None
    except (ValueError, TypeError, _unsupported()):  # TypeError: it has a password
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise BuildError(
            f"{os.fspath(path)!r} is not an Ed25519 private key in PEM without a password; "
            "make one with gf-tvm build --make-key FILE"
        )
    found: Ed25519PrivateKey = key
    return found


def public_keys(paths: Iterable[str | os.PathLike[str]]) -> list[Ed25519PublicKey]:
    """Read the keys of those who are trusted. Raises BundleError."""
    ed25519, serialization = _library(BundleError)
    keys = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        try:
            key = serialization.load_pem_public_key(read_limited(path, _MAX_PEM))
        except OSError as error:
            raise BundleError(f"cannot read the key {os.fspath(path)!r}: {error.strerror or error}") from None
        except (ValueError, TypeError, _unsupported()):
            key = None
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise BundleError(f"{os.fspath(path)!r} is not an Ed25519 public key in PEM (FILE.pub.pem)")
        keys.append(key)
    return keys


def signed(manifest: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """The manifest with its signature."""
    return {
        **manifest,
        SIGNATURE: {
            "algorithm": ALGORITHM,
            "key": key.public_key().public_bytes_raw().hex(),
            "value": key.sign(_text(manifest)).hex(),
        },
    }


def check(label: str, manifest: Mapping[str, Any], keys: Iterable[Ed25519PublicKey]) -> None:
    """Raise BundleError unless one of ``keys`` has signed the manifest; ``label`` is the bundle's name."""
    from cryptography.exceptions import InvalidSignature

    signature = manifest.get(SIGNATURE)
    if signature is None:
        raise BundleError(f"{label}: is not signed, and only bundles of trusted keys are to be loaded")
    try:
        if signature["algorithm"] != ALGORITHM:
            raise ValueError
        by, value = bytes.fromhex(signature["key"]), bytes.fromhex(signature["value"])
    except (KeyError, TypeError, ValueError):
        raise BundleError(f"{label}: its signature is damaged or of another kind than {ALGORITHM}") from None
    for key in keys:
        if key.public_bytes_raw() == by:
            try:
                key.verify(value, _text(manifest))
            except InvalidSignature:
                raise BundleError(f"{label}: was altered after it was signed") from None
            return
    raise BundleError(f"{label}: was signed with the key {by.hex()[:16]}…, which is none of the trusted ones")


def _text(manifest: Mapping[str, Any]) -> bytes:
    """What is signed: the manifest's values, however the file spells them."""
    values = {name: value for name, value in manifest.items() if name != SIGNATURE}
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode("ascii")


def _library(error: type[GfTvmError]) -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise error("signatures need cryptography: pip install 'gf-tvm[sign]'") from None
    return ed25519, serialization


def _unsupported() -> type[Exception]:
    from cryptography.exceptions import UnsupportedAlgorithm

    return UnsupportedAlgorithm
