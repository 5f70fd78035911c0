"""A signature is either right, by a key that is trusted, or it stops the bundle from opening."""

import json
import subprocess
import sys

import pytest

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.signing import sign_bundle
from piflow_edge.errors import BundleError, MissingExtraError, SigningKeyError
from piflow_edge.system.files import sha256

pytestmark = pytest.mark.torch


def write_keys(folder, name, kind="ed25519", password=None):
    """A private key and its public key as files in PEM."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    key = (
        ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    )
    pem = serialization.Encoding.PEM
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, lock))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path):
    return write_keys(tmp_path, "ours")


@pytest.fixture
def others(tmp_path):
    return write_keys(tmp_path, "theirs")


def test_a_signed_bundle_opens_for_those_who_trust_its_key(bundle, keys, others):
    fingerprint = sign_bundle(bundle, keys[0]).fingerprint
    trusting = Bundle(bundle, trusted_keys=[others[1], keys[1]]).signature
    assert (trusting.fingerprint, trusting.verified, trusting.trusted) == (fingerprint, True, True)
    assert Bundle(bundle, trusted_keys=[keys[1].read_bytes()]).signature.trusted
    indifferent = pf.load(bundle).bundle.signature
    assert (indifferent.fingerprint, indifferent.verified, indifferent.trusted) == (fingerprint, True, False)


def test_the_fingerprint_is_the_hash_of_the_der_form(bundle, keys):
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    public = load_pem_public_key(keys[1].read_bytes())
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert sign_bundle(bundle, keys[0]).fingerprint == "sha256:" + sha256(der)


def test_the_signature_is_a_plain_one_over_the_manifest(bundle, keys):
    sign_bundle(bundle, keys[0])
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = json.loads((bundle / "bundle.sig").read_text())
    public = load_pem_public_key(keys[1].read_bytes())
    public.verify(bytes.fromhex(content["signature"]), (bundle / "bundle.json").read_bytes())


@pytest.mark.parametrize("trusted", ["theirs", "nobody"])
def test_another_key_is_refused(bundle, keys, others, trusted):
    sign_bundle(bundle, keys[0])
    with pytest.raises(BundleError, match="not trusted"):
        pf.load(bundle, trusted_keys=[others[1]] if trusted == "theirs" else [])


@pytest.mark.parametrize("trusted", ["ours", "nobody"])
def test_an_unsigned_bundle_is_refused_where_a_key_is_asked_for(bundle, keys, trusted):
    with pytest.raises(BundleError, match="is not signed"):
        pf.load(bundle, trusted_keys=[keys[1]] if trusted == "ours" else [])
    assert pf.load(bundle).bundle.signature is None


def test_a_signature_of_another_bundle_is_refused(bundle, keys):
    from tests.bundle.test_bundle import edit

    sign_bundle(bundle, keys[0])
    edit(bundle, lambda body: body.update(name="other"))  # whole in itself, but not what was signed
    for trusted_keys in (None, [keys[1]]):
        with pytest.raises(BundleError, match="does not fit"):
            pf.load(bundle, trusted_keys=trusted_keys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("ed25519", "none"), "not an Ed25519 signature"),
        (
            lambda text: text.replace('"format_version": 1', '"format_version": true'),
            "not an Ed25519 signature",
        ),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "not an Ed25519 signature"),
        (lambda text: text.upper(), "is not a signature"),
        (lambda text: text.replace('"signature": "', '"signature": "0'), "is not a signature"),
        (lambda text: text.replace('"signature": "', '"signature": "00'), "not an Ed25519 signature"),
        (lambda text: text + " ", "not an Ed25519 signature"),
        (lambda text: "[" * 4000, "is not a signature"),
        (lambda text: "[]", "is not a signature"),
        (lambda text: "x" * 5000, "is not a signature"),
    ],
)
def test_a_file_that_is_no_signature_is_refused(bundle, keys, change, words):
    sign_bundle(bundle, keys[0])
    (bundle / "bundle.sig").write_text(change((bundle / "bundle.sig").read_text()))
    with pytest.raises(BundleError, match=words):
        pf.load(bundle)


def test_signing_again_replaces_the_signature(bundle, keys, others):
    sign_bundle(bundle, others[0])
    sign_bundle(bundle, keys[0])
    assert Bundle(bundle, trusted_keys=[keys[1]]).signature.trusted


def test_an_altered_bundle_is_not_signed(bundle, keys):
    (bundle / "LICENSE").write_text("yours")
    with pytest.raises(BundleError, match="checksum"):
        sign_bundle(bundle, keys[0])
    assert not (bundle / "bundle.sig").exists()


def test_keys_that_are_none_are_refused(bundle, keys, tmp_path):
    locked, _ = write_keys(tmp_path, "locked", password=b"secret")
    private, public = write_keys(tmp_path, "curve", kind="p256")
    for key, words in [
        (locked, "without a password"),
        (private, "of another kind"),
        (keys[1], "not a private key"),
        (tmp_path / "nowhere", "cannot be read"),
    ]:
        with pytest.raises(SigningKeyError, match=words):
            sign_bundle(bundle, key)
    for trusted, words in [
        ([public], "of another kind"),
        ([keys[0]], "not a public key"),
        ([b"?"], "not a public key"),
        ([tmp_path / "nowhere"], "cannot be read"),
        (keys[1], "put .* into one"),
        (str(keys[1]), "put .* into one"),
    ]:
        with pytest.raises(SigningKeyError, match=words):
            pf.load(bundle, trusted_keys=trusted)
    assert not (bundle / "bundle.sig").exists()


def test_without_cryptography_only_a_trusted_key_cannot_be_checked(bundle, keys, monkeypatch):
    fingerprint = sign_bundle(bundle, keys[0]).fingerprint
    for module in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, module, None)
    signature = Bundle(bundle).signature
    assert (signature.fingerprint, signature.verified, signature.trusted) == (fingerprint, False, False)
    assert "not checked" in str(signature)
    with pytest.raises(MissingExtraError, match=r"piflow-edge\[sign\]"):
        pf.load(bundle, trusted_keys=[keys[1]])
    with pytest.raises(MissingExtraError, match=r"piflow-edge\[sign\]"):
        sign_bundle(bundle, keys[0])


def test_an_unsigned_bundle_opens_without_loading_cryptography(shared_bundle):
    code = "import sys, piflow_edge; piflow_edge.load(sys.argv[1]); sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(shared_bundle)]).returncode == 0


def test_export_signs(tmp_path, keys):
    from piflow_edge.bundle.signature import SigningKey
    from piflow_edge.export.to_bundle import export_bundle
    from tests.conftest import make_student

    export_bundle(make_student(nfe=1), tmp_path / "signed", signing_key=SigningKey(keys[0]))
    assert Bundle(tmp_path / "signed", trusted_keys=[keys[1]]).signature.trusted
