"""Bundles that are whole and well sealed, and whose graphs reach for what is not theirs."""

import dataclasses

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import manifest_bytes
from piflow_edge.bundle.sections import FileSpec
from piflow_edge.system.files import sha256

from .protobuf import entry, fields_of, message


def seal(folder, name, data):
    """Write a file of a bundle, and the manifest that goes with it."""
    manifest = Bundle(folder).manifest
    (folder / name).write_bytes(data)
    files = {**manifest.files, name: FileSpec(sha256(data), len(data))}
    networks = {key: _list_beside(network, name) for key, network in manifest.networks.items()}
    seal_manifest = dataclasses.replace(manifest, files=files, networks=networks)
    (folder / "bundle.json").write_bytes(manifest_bytes(seal_manifest))


def _list_beside(network, name):
    """The network with a new file of weights beside the graph that it is named for."""
    files = {
        precision: [*listed, name] if f"{listed[0]}.data" == name and name not in listed else listed
        for precision, listed in network.files.items()
    }
    return dataclasses.replace(network, files=files)


def move_weight_out(model, location):
    """The model with its first weight of 1 KiB or more in the file `location`, and what is to lie there."""
    moved = None
    fields = []
    for number, value in fields_of(model):
        if number == 7:
            graph = []
            for kind, part in fields_of(value):
                if kind == 5 and moved is None:
                    tensor = fields_of(part)
                    values = dict(tensor).get(9, b"")
                    if len(values) >= 1024:
                        moved = values
                        kept = [field for field in tensor if field[0] != 9]
                        part = message(*kept, entry("location", location), (14, 1))
                graph.append((kind, part))
            value = message(*graph)
        fields.append((number, value))
    return message(*fields), moved
