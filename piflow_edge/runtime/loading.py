"""Opening an exported student. What that takes is imported when `load` is called, so that `pf.load` costs nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from piflow_edge.engines import DEFAULT_OPTIONS, EngineOptions

if TYPE_CHECKING:
    from piflow_edge.bundle.signature import TrustedKey

    from .generator import Generator

log = logging.getLogger(__name__)


def load(
    bundle: str | os.PathLike[str],
    engine: str = "auto",
    precision: str | None = None,
    device: str | None = None,
    *,
    options: EngineOptions = DEFAULT_OPTIONS,
    trusted_keys: Sequence[TrustedKey] | None = None,
) -> Generator:
    """Open an exported student.

    Args:
        bundle: the bundle's folder, or "emoji" or "digits", bundles that come with the package.
        engine: "auto", the fastest that can run here, or the name of a backend; see `engines.open_engine`.
        precision: one of the bundle's ("fp32"); None is its first.
        device: what the backend runs on, such as "cpu", "cuda" or "cuda:1"; None is its best.
        options: threads and memory; `keep="one"` for models whose networks do not fit into memory together.
        trusted_keys: public keys in PEM, as files or as bytes: only a bundle that one of them signed is opened, and
            with an empty list none is. None opens unsigned bundles too; a signature that is there must still fit,
            which is checked where the `sign` extra is installed.

    Returns:
        A generator: call it to make images. Its `engine.choice` says why that engine runs. `close`, or
        a `with` block, frees its memory.

    Raises:
        BundleError: not a bundle, or altered, or not signed by one of the `trusted_keys`.
        SigningKeyError: one of the `trusted_keys` is not an Ed25519 public key.
        EngineError: the engine cannot run here.
        MissingExtraError: the engine's package is not installed, or `trusted_keys` are given and `cryptography` is not.
    """
    from piflow_edge.bundle.folder import Bundle, find_bundle

    from .generator import Generator
    from .residence.opening import open_networks

    opened = Bundle(find_bundle(bundle), trusted_keys=trusted_keys)
    engines = open_networks(opened, engine, precision, device, options)
    try:
        generator = Generator(opened, engines, precision, options)
    except BaseException:
        for one in engines.values():
            one.close()
        raise
    log.info("bundle %r runs on %s (%s)", opened.name, generator.engine.name, generator.engine.device)
    return generator
