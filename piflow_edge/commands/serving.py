"""Commands for people with a browser: `serve` and `web`."""

import logging
from pathlib import Path

import click

from .options import (
    BUNDLE_PATH,
    FOLDER,
    JSON,
    RUNTIME_OF_BROWSERS,
    TRUSTED_KEYS,
    command,
    emit,
    engine_options,
    engine_settings,
    say,
    settings_options,
)


def _read_key(context, parameter, file: Path | None) -> str | None:
    """The key in a file: what is typed on a command line, every user of the machine can read."""
    try:
        return file and file.read_text(encoding="ascii").strip()
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{file} holds an API key in ASCII: {error}") from error


@command()
@click.argument("bundles", nargs=-1, required=True, **BUNDLE_PATH)
@settings_options(
    "limits", "piflow_edge.runtime.serve.limits:ServeSettings", {"allowed_hosts": "allowed_host"}
)
@click.option("--api-key-file", "api_key", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              callback=_read_key, help="File with a key that callers must send.")  # fmt: skip
@click.option("--onnxruntime-web", "runtime", type=FOLDER,
              help="Folder dist of that npm package: then the page can draw in the browser too, and gives the bundles "
              "to everybody.")  # fmt: skip
@engine_options
@click.option("--precision", help="One of each bundle's; else its first.")
@TRUSTED_KEYS
def serve(bundles, limits, api_key, runtime, engine, device, threads, cores, precision, trusted_keys):
    """Answer requests for images over HTTP, and show a page to ask for them.

    BUNDLES are folders, or emoji or digits, which come with piflow-edge. Requests that come together are drawn
    together. Prints the address on stdout; Ctrl-C stops it.

    \b
    Example:
      piflow-edge serve digits
      curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' -d '{"prompt": "3"}'
    """
    from contextlib import ExitStack
    from dataclasses import replace

    from piflow_edge.runtime.loading import load
    from piflow_edge.runtime.serve import require_packages

    require_packages()
    from piflow_edge.runtime.serve.web_server import build_server, name_address, open_socket

    limits = replace(limits, api_key=api_key)
    if not limits.is_local and api_key is None:
        say(f"anybody who reaches {limits.host} can ask for images; --api-key-file asks for a key")
    logging.basicConfig(level=logging.WARNING, format="piflow-edge: %(message)s")
    settings = engine_settings(engine, device, threads, cores)
    with ExitStack() as closing:
        socket = closing.enter_context(open_socket(limits))
        generators = [
            closing.enter_context(load(bundle, precision=precision, trusted_keys=trusted_keys, **settings))
            for bundle in bundles
        ]
        for generator in generators:
            say(f"{generator!r}")
        address = name_address(socket)
        build_server(generators, limits, lambda: click.echo(address), runtime).run(sockets=[socket])


@command()
@click.argument("bundles", nargs=-1, required=True, **BUNDLE_PATH)
@click.option("--out", type=FOLDER, required=True, help="The folder for a web server.")
@click.option("--onnxruntime-web", "runtime", type=FOLDER, default=RUNTIME_OF_BROWSERS,
              help="Folder dist of that npm package.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the folder at --out.")
@TRUSTED_KEYS
@JSON
def web(bundles, out, runtime, overwrite, trusted_keys, as_json):
    """Write a page that draws in the browser, as a folder that any web server can serve.

    It takes the bundles, the page and ONNX Runtime's files for browsers, which npm install onnxruntime-web brings.

    \b
    Example:
      piflow-edge web digits --out site
      python -m http.server --directory site
    """
    from piflow_edge.bundle.folder import Bundle
    from piflow_edge.runtime.serve.page_folder import write_folder

    opened = [Bundle(bundle, trusted_keys=trusted_keys) for bundle in bundles]
    folder = write_folder(opened, runtime, out, overwrite=overwrite)
    if as_json:
        emit({"folder": str(folder), "bundles": [bundle.name for bundle in opened]})
    else:
        click.echo(folder)
