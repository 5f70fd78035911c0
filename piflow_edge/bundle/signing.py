"""Signing a bundle that is on disk."""

import os

from piflow_edge.system.files import write_atomic

from .folder import Bundle
from .manifest import SIGNATURE
from .signature import Signature, SigningKey


def sign_bundle(folder: str | os.PathLike[str], key: str | os.PathLike[str]) -> Signature:
    """Sign a bundle in place, after checking all its files. An earlier signature is replaced.

    Args:
        folder: the bundle.
        key: file with an Ed25519 private key in PEM, without a password.

    Raises:
        BundleError: not a bundle, or altered, or with a graph that `Bundle.check_graphs` refuses.
        SigningKeyError: `key` is not such a file.
        MissingExtraError: `cryptography` is not installed.
    """
    private = SigningKey(key)
    bundle = Bundle(folder)
    bundle.check_graphs()
    write_atomic(bundle.folder / SIGNATURE, private.sign(bundle.manifest_bytes))
    return Signature(private.fingerprint, verified=True, trusted=False)
