"""The published schema says of bundle.json what the dataclasses say."""

import json
from importlib.resources import files

import pytest

from piflow_edge.bundle.schema import bundle_schema, schema_text

COMMAND = "python -m piflow_edge.bundle.schema > piflow_edge/bundle/bundle.schema.json"


def problems(body):
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    validator.check_schema(bundle_schema())
    return [
        f"{'/'.join(map(str, e.absolute_path))}: {e.message}"
        for e in validator(bundle_schema()).iter_errors(body)
    ]


def test_the_published_file_is_that_of_the_dataclasses():
    published = files("piflow_edge.bundle").joinpath("bundle.schema.json").read_text(encoding="utf-8")
    assert published == schema_text(), f"the dataclasses have changed; run: {COMMAND}"


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["shared_bundle", "latent_bundle"])
def test_what_export_writes_fits(request, kind):
    assert problems(json.loads((request.getfixturevalue(kind) / "bundle.json").read_text())) == []


@pytest.mark.torch
@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(colour="red"),
        lambda body: body["policy"].update(colour="red"),
        lambda body: body.pop("latent"),
        lambda body: body.pop("sha256"),
        lambda body: body.update(sha256="x"),
        lambda body: body.update(format_version=99),
        lambda body: body["schedule"].update(nfe="two"),
        lambda body: body["schedule"].update(h=None),
        lambda body: body["policy"].update(kind="dx"),
        lambda body: body.update(precisions=[True]),
        lambda body: body["networks"].update(decoder={}),
        lambda body: body["files"].update(LICENSE={"sha256": "0"}),
        lambda body: body.update(conditioning="0123456789"),
    ],
)
def test_what_the_runtime_refuses_does_not_fit(shared_bundle, change):
    body = json.loads((shared_bundle / "bundle.json").read_text())
    change(body)
    assert len(problems(body)) >= 1
