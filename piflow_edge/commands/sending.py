"""Commands about sending a bundle to somebody, or to a server: `sign`, `pack`, `unpack`, `triton`."""

from pathlib import Path

import click

from .options import BUNDLE, FOLDER, JSON, TRUSTED_KEYS, command, emit


@command()
@click.argument(
    "bundle", type=click.Path(path_type=Path)
)  # not BUNDLE: the one of the package is not signed in place
@click.option("--key", type=click.Path(dir_okay=False, path_type=Path), required=True,
              help="Ed25519 private key in PEM, without a password.")  # fmt: skip
@JSON
def sign(bundle, key, as_json):
    """Sign a bundle in place, after checking all its files.

    Make a pair of keys with: openssl genpkey -algorithm ed25519 -out key.pem, and: openssl pkey -in key.pem -pubout
    -out key.pub.pem. Whoever has the second can check the bundle with --trusted-key.

    \b
    Example:
      piflow-edge sign demo/bundles/digits-nfe1 --key key.pem
    """
    from piflow_edge.bundle.signing import sign_bundle

    signature = sign_bundle(bundle, key)
    if as_json:
        emit({"bundle": str(bundle), "fingerprint": signature.fingerprint})
    else:
        click.echo(signature.fingerprint)


@command()
@BUNDLE
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The .zip to write."
)
@click.option("--overwrite", is_flag=True, help="Replace the file at --out.")
@JSON
def pack(bundle, out, overwrite, as_json):
    """Write a bundle as one .zip: the same bytes for the same bundle.

    \b
    Example:
      piflow-edge pack demo/bundles/digits-nfe1 --out digits-nfe1.zip
    """
    from piflow_edge.bundle.archive import pack

    packed = pack(bundle, out, overwrite=overwrite)
    if as_json:
        emit({"file": str(out), "bundle": packed.name, "size": out.stat().st_size})
    else:
        click.echo(out)


@command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=FOLDER, required=True, help="Folder of the bundle; must not exist.")
@TRUSTED_KEYS
@JSON
def unpack(file, out, trusted_keys, as_json):
    """Unpack a .zip of `pack`, whoever it came from; nothing is left behind unless every file matched its checksum.

    \b
    Example:
      piflow-edge unpack digits-nfe1.zip --out digits-nfe1 --trusted-key key.pub.pem
    """
    from piflow_edge.bundle.archive import unpack

    bundle = unpack(file, out, trusted_keys=trusted_keys)
    if as_json:
        signature = vars(bundle.signature) if bundle.signature else None
        emit({"folder": str(out), "bundle": bundle.name, "signature": signature})
    else:
        click.echo(out)


@command()
@BUNDLE
@click.option(
    "--out", type=FOLDER, required=True, help="The model repository; the model becomes a folder in it."
)
@click.option("--nfe", type=click.IntRange(min=1), help="Network calls per image; else the bundle's.")
@click.option("--precision", help="One of the bundle's; else its first.")
@click.option("--max-batch", type=click.IntRange(min=1), default=64, help="Images in one run.")
@TRUSTED_KEYS
@JSON
def triton(bundle, out, nfe, precision, max_batch, trusted_keys, as_json):
    """Write the sampler graph as a model for NVIDIA Triton: noise and labels in, latents and images out.

    The bundle must have the graph: export it with --sampler-graph.

    \b
    Example:
      piflow-edge triton bundles/digits --out models --nfe 1
    """
    from piflow_edge.bundle.folder import Bundle
    from piflow_edge.runtime.triton import write_model

    opened = Bundle(bundle, trusted_keys=trusted_keys)
    model = write_model(opened, out, nfe=nfe, precision=precision, max_batch=max_batch)
    if as_json:
        emit({"model": model.name, "folder": str(model)})
    else:
        click.echo(model)
