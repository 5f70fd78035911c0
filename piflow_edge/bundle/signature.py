"""Who made a bundle: an Ed25519 signature over the bytes of `bundle.json`, in `bundle.sig` beside it.

The manifest holds the SHA-256 of every other file, so that a signature over it covers the bundle. Keys are files in
PEM, as OpenSSL makes them:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub.pem

A signature by a key that nobody said to trust shows that the bundle is whole, not whose it is: whoever alters a bundle
can sign it anew. Importing this module does not import `cryptography`, the package of the `sign` extra.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from piflow_edge.errors import BundleError, MissingExtraError, SigningKeyError
from piflow_edge.system.files import sha256

from .manifest import SIGNATURE

# bundle.sig holds 96 bytes in hexadecimal; anything this large is no signature.
SIGNATURE_LIMIT = 1 << 12

_VERSION = 1
# What stands before the 32 bytes of every Ed25519 public key in DER (RFC 8410, section 4): hashed with it, the
# fingerprint is that of `openssl pkey -pubin -in key.pub.pem -outform DER | sha256sum`.
_DER_PREFIX = bytes.fromhex("302a300506032b6570032100")

# A public key: a file, or its content in PEM.
TrustedKey = str | os.PathLike[str] | bytes


@dataclass(frozen=True)
class Signature:
    """What is known of a bundle's signature.

    `fingerprint`: of the key, "sha256:" and the SHA-256 of its DER form. `verified`: whether the signature was checked;
    False where `cryptography` is not installed. `trusted`: whether the key is one of those the caller trusts.
    """

    fingerprint: str
    verified: bool
    trusted: bool

    def __str__(self) -> str:
        if not self.verified:
            return f"{self.fingerprint}, not checked: get 'piflow-edge[sign]'"
        return f"{self.fingerprint}, valid" + (", a trusted key" if self.trusted else "")


class SigningKey:
    """A private key, read before a long job so that a bad one is found first.

    Args:
        path: file with an Ed25519 private key in PEM, without a password.

    Raises:
        SigningKeyError: `path` is not such a file.
        MissingExtraError: `cryptography` is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        ed25519, serialization = _cryptography()
        try:
            key = serialization.load_pem_private_key(_content(path), password=None)
        except (ValueError, TypeError, _unsupported_error()) as error:  # TypeError: it has a password
            raise SigningKeyError(
                f"{path} is not a private key in PEM without a password: {error}; make one with: "
                "openssl genpkey -algorithm ed25519 -out key.pem"
            ) from error
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise SigningKeyError(
                f"a bundle is signed with an Ed25519 key; {path} holds a key of another kind. Make one with: "
                "openssl genpkey -algorithm ed25519 -out key.pem"
            )
        self._key = key
        self._public = key.public_key().public_bytes_raw()

    @property
    def fingerprint(self) -> str:
        """See `Signature`."""
        return _fingerprint(self._public)

    def sign(self, manifest: bytes) -> bytes:
        """The content of `bundle.sig` for the bytes of a `bundle.json`."""
        return _SignatureFile(
            _VERSION, "ed25519", self._public.hex(), self._key.sign(manifest).hex()
        ).to_bytes()


@dataclass(frozen=True)
class _SignatureFile:
    """All of `bundle.sig`, in order. `public_key`, `signature`: 32 and 64 bytes in hexadecimal."""

    format_version: int
    algorithm: str
    public_key: str
    signature: str

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def check_signature(
    manifest: bytes, signed: bytes | None, place: Path, trusted_keys: Sequence[TrustedKey] | None
) -> Signature | None:
    """Hold a signature against the bytes of a `bundle.json`.

    Args:
        manifest: the bytes of `bundle.json`.
        signed: the bytes of `bundle.sig`, or None where there is none.
        place: named in errors.
        trusted_keys: as in `load`.

    Returns:
        What is known of it; None for a bundle that is not signed.

    Raises:
        BundleError: the signature does not fit. With `trusted_keys` also: there is none, or by another key.
        SigningKeyError: one of `trusted_keys` is not a public key.
        MissingExtraError: `trusted_keys` are given and `cryptography` is not installed.
    """
    trusted = None if trusted_keys is None else _fingerprints(trusted_keys)
    if signed is None:
        if trusted is not None:
            raise BundleError(
                f"{place} is not signed, and only bundles signed by {_list_fingerprints(trusted)} are trusted; get "
                "the signed one"
            )
        return None
    content = _parse(signed, place)
    public = bytes.fromhex(content.public_key)
    fingerprint = _fingerprint(public)
    try:
        ed25519, _ = _cryptography()
    except MissingExtraError:
        return Signature(fingerprint, verified=False, trusted=False)  # with trusted keys it was raised above
    from cryptography.exceptions import InvalidSignature

    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(public)
        key.verify(bytes.fromhex(content.signature), manifest)
    except (InvalidSignature, ValueError) as error:
        raise BundleError(
            f"{place / SIGNATURE} does not fit its bundle.json: one of them was altered; copy the bundle again, or "
            "delete the signature and sign again"
        ) from error
    if trusted is not None and fingerprint not in trusted:
        raise BundleError(
            f"{place} is signed by {fingerprint}, which is not trusted; trusted are {_list_fingerprints(trusted)}"
        )
    return Signature(fingerprint, verified=True, trusted=trusted is not None)


def _parse(signed: bytes, place: Path) -> _SignatureFile:
    try:
        content = _SignatureFile(**json.loads(signed))
        public, signature = bytes.fromhex(content.public_key), bytes.fromhex(content.signature)
    except (ValueError, TypeError, RecursionError) as error:
        raise BundleError(
            f"{place / SIGNATURE} is not a signature: {error}; copy the bundle again"
        ) from error
    ours = _SignatureFile(_VERSION, "ed25519", public.hex(), signature.hex())
    # Byte for byte, as bundle.json: neither a space nor a capital letter may differ.
    if signed != ours.to_bytes() or (len(public), len(signature)) != (32, 64):
        raise BundleError(
            f"{place / SIGNATURE} is not an Ed25519 signature of version {_VERSION}; copy the bundle again, or use the "
            "release that signed it"
        )
    return content


def _fingerprints(keys: Sequence[TrustedKey]) -> list[str]:
    ed25519, serialization = _cryptography()
    if isinstance(keys, (str, bytes, os.PathLike)):
        raise SigningKeyError(f"trusted_keys is a list of public keys; put {keys!r} into one")
    prints = []
    for key in keys:
        name = "a trusted key" if isinstance(key, bytes) else os.fspath(key)
        try:
            public = serialization.load_pem_public_key(key if isinstance(key, bytes) else _content(key))
        except (ValueError, _unsupported_error()) as error:
            raise SigningKeyError(
                f"{name} is not a public key in PEM: {error}; make it of the private key with: "
                "openssl pkey -in key.pem -pubout -out key.pub.pem"
            ) from error
        if not isinstance(public, ed25519.Ed25519PublicKey):
            raise SigningKeyError(
                f"a bundle is signed with an Ed25519 key; {name} holds a key of another kind"
            )
        prints.append(_fingerprint(public.public_bytes_raw()))
    return prints


def _content(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 16)  # a key takes some 120 bytes
    except OSError as error:
        raise SigningKeyError(f"the key {path} cannot be read: {error.strerror}") from error


def _fingerprint(public: bytes) -> str:
    return "sha256:" + sha256(_DER_PREFIX + public)


def _list_fingerprints(fingerprints: list[str]) -> str:
    return ", ".join(fingerprints) or "nobody (the list of trusted keys is empty)"


def _cryptography():
    """Its modules for Ed25519 and for PEM."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtraError(
            "signatures need cryptography; get it with: pip install 'piflow-edge[sign]'"
        ) from error
    return ed25519, serialization


def _unsupported_error():
    from cryptography.exceptions import UnsupportedAlgorithm

    return UnsupportedAlgorithm
