"""An archive unpacks to the bundle it was packed from, or to nothing."""

import os
import random
import stat
import struct
import zipfile

import pytest

from piflow_edge.bundle.archive import pack, unpack
from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.signing import sign_bundle
from piflow_edge.errors import BundleError
from tests.bundle.test_signature import write_keys

pytestmark = pytest.mark.torch


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_refused(archive, tmp_path, words, **settings):
    """It is refused, and nothing of it is left anywhere."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=words):
        unpack(archive, tmp_path / "new" / "out", **settings)
    left = set(tmp_path.rglob("*")) - set(before)
    assert left <= {tmp_path / "new"}  # the folder above, which stays empty


def write_zip(tmp_path, entries):
    """An archive with these (name or ZipInfo, content), in order."""
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
    return tmp_path / "made.zip"


def in_order(folder):
    return sorted(contents(folder).items())


@pytest.mark.parametrize("signed", [False, True])
def test_an_archive_unpacks_to_the_same_files(bundle, tmp_path, signed):
    private, public = write_keys(tmp_path, "ours")
    trusted_keys = [public] if signed else None
    if signed:
        sign_bundle(bundle, private)
    pack(bundle, tmp_path / "a.zip")
    unpacked = unpack(tmp_path / "a.zip", tmp_path / "new" / "out", trusted_keys=trusted_keys)
    assert contents(unpacked.folder) == contents(bundle)
    assert (unpacked.signature is not None) == signed


def test_packing_is_the_same_every_time(bundle, tmp_path):
    pack(bundle, tmp_path / "a.zip")
    for file in bundle.iterdir():
        os.utime(file, (1e9, 1e9))
        file.chmod(0o600)
    pack(bundle, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_what_is_there_is_not_replaced(bundle, tmp_path):
    pack(bundle, tmp_path / "a.zip")
    with pytest.raises(BundleError, match="exists"):
        pack(bundle, tmp_path / "a.zip")
    pack(bundle, tmp_path / "a.zip", overwrite=True)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("there", "link"):
        with pytest.raises(BundleError, match="exists"):
            unpack(tmp_path / "a.zip", tmp_path / place)


def test_an_altered_bundle_is_not_packed(bundle, tmp_path):
    (bundle / "LICENSE").write_text("yours")
    with pytest.raises(BundleError, match="checksum"):
        pack(bundle, tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()


def test_a_plain_stored_archive_unpacks_too(bundle, tmp_path):
    archive = write_zip(tmp_path, in_order(bundle))
    assert contents(unpack(archive, tmp_path / "out").folder) == contents(bundle)


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/b", "a/", "..", "a\\b", "C:x", "x\0y", "", "café", " x", "a" * 3 + "\n"],
)
def test_names_that_lead_elsewhere_are_refused(bundle, tmp_path, name):
    placeholder = "q" * max(len(name.encode()), 1)
    data = write_zip(tmp_path, [*in_order(bundle), (placeholder, b"x")]).read_bytes()
    if name:  # put in afterwards: zipfile would mend some of them
        assert data.count(placeholder.encode()) >= 2
        data = data.replace(placeholder.encode(), name.encode())
        (tmp_path / "made.zip").write_bytes(data)
    else:
        write_zip(tmp_path, [*in_order(bundle), (zipfile.ZipInfo("", (1980, 1, 1, 0, 0, 0)), b"x")])
    assert_refused(tmp_path / "made.zip", tmp_path, "leads out")


def with_attributes(name, attributes):
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, attributes
    return entry


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_other_things_are_refused(bundle, tmp_path, kind):
    others = [(name, data) for name, data in in_order(bundle) if name != "LICENSE"]
    link = with_attributes("LICENSE", (kind | 0o777) << 16)
    assert_refused(write_zip(tmp_path, [*others, (link, b"/etc/passwd")]), tmp_path, "is a link")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["LICENSE", "license"])
def test_a_name_twice_is_refused(bundle, tmp_path, name):
    assert_refused(write_zip(tmp_path, [*in_order(bundle), (name, b"x")]), tmp_path, "there twice")


def test_what_is_not_listed_or_missing_is_refused(bundle, tmp_path):
    entries = in_order(bundle)
    assert_refused(write_zip(tmp_path, [*entries, ("x.py", b"x")]), tmp_path, "x.py does not belong")
    for missing, words in [("LICENSE", "LICENSE is missing"), ("bundle.json", "holds no bundle")]:
        left = [(name, data) for name, data in entries if name != missing]
        assert_refused(write_zip(tmp_path, left), tmp_path, words)
    assert_refused(write_zip(tmp_path, []), tmp_path, "holds no bundle")


def test_sizes_other_than_the_listed_are_refused(bundle, tmp_path):
    for change in (lambda data: data + b" ", lambda data: data[:-1]):
        entries = [(name, change(data) if name == "LICENSE" else data) for name, data in in_order(bundle)]
        assert_refused(write_zip(tmp_path, entries), tmp_path, r"LICENSE, bundle\.json")
    huge = [(name, data if name != "bundle.json" else b" " * (1 << 21)) for name, data in in_order(bundle)]
    assert_refused(write_zip(tmp_path, huge), tmp_path, "bundle.json has 2097152 bytes")


def test_another_content_of_the_same_size_is_refused(bundle, tmp_path):
    entries = [(name, data[::-1] if name == "LICENSE" else data) for name, data in in_order(bundle)]
    assert_refused(write_zip(tmp_path, entries), tmp_path, "LICENSE .* does not match its checksum")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries_are_refused(bundle, tmp_path, method):
    with zipfile.ZipFile(tmp_path / "made.zip", "w", method) as archive:
        for name, data in in_order(bundle):
            archive.writestr(name, data)
    assert_refused(tmp_path / "made.zip", tmp_path, "is compressed")


# Where fields stand in an entry of the table of contents (APPNOTE.TXT 6.3.10, section 4.3.12).
FLAGS, METHOD, PACKED_SIZE, SIZE, OFFSET = 8, 10, 20, 24, 42


def with_field(data, name, field, value, kind):
    """An archive in which the table of contents says something else of one entry."""
    data = bytearray(data)
    (start,) = struct.unpack_from("<L", data, len(data) - 6)
    at = data.index(name.encode(), start) - 46
    assert data[at : at + 4] == b"PK\1\2"
    struct.pack_into(kind, data, at + field, value)
    return bytes(data)


def test_encrypted_entries_are_refused(bundle, tmp_path):
    archive = write_zip(tmp_path, in_order(bundle))
    archive.write_bytes(with_field(archive.read_bytes(), "LICENSE", FLAGS, 1, "<H"))
    assert_refused(archive, tmp_path, "is encrypted")


def test_overlapping_entries_are_refused(bundle, tmp_path):
    archive = write_zip(tmp_path, in_order(bundle))
    data = archive.read_bytes()
    for field in (SIZE, PACKED_SIZE):
        data = with_field(data, "LICENSE", field, len(data) - 1, "<L")
    archive.write_bytes(data)
    assert_refused(archive, tmp_path, "overlap")


def move_places(data, offset):
    """Bytes of an archive to stand after `offset` others, with every place in it told anew."""
    data = bytearray(data)
    count, (table,) = (
        struct.unpack_from("<H", data, len(data) - 12)[0],
        struct.unpack_from("<L", data, len(data) - 6),
    )
    struct.pack_into("<L", data, len(data) - 6, table + offset)
    for _ in range(count):
        lengths = struct.unpack_from("<3H", data, table + 28)
        (place,) = struct.unpack_from("<L", data, table + OFFSET)
        struct.pack_into("<L", data, table + OFFSET, place + offset)
        table += 46 + sum(lengths)
    return bytes(data)


def with_comment(data, comment):
    return data[:-2] + struct.pack("<H", len(comment)) + comment


def with_gap(data):
    """Bytes between the entries and the table of contents, which its end takes into account."""
    (table,) = struct.unpack_from("<L", data, len(data) - 6)
    data = data[:table] + b"gap" + data[table:]
    return data[:-6] + struct.pack("<L", table + 3) + data[-2:]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"x" + data,
        lambda data: b"#!/bin/sh\nrm -rf ~\n" + move_places(data, 19),
        lambda data: (
            data + move_places(data, len(data))
        ),  # two archives: the first one for who reads from the beginning
        lambda data: data + data,
        lambda data: data + b"x",
        lambda data: data + bytes(22),
        lambda data: with_comment(data, b"a comment"),
        lambda data: with_comment(data, b"short") + b"and more",
        lambda data: with_comment(data, data[-22:]),
        with_gap,
    ],
)
def test_bytes_that_belong_to_no_entry_are_refused(bundle, tmp_path, change):
    pack(bundle, tmp_path / "a.zip")
    data = change((tmp_path / "a.zip").read_bytes())
    (tmp_path / "a.zip").write_bytes(data)
    assert_refused(tmp_path / "a.zip", tmp_path, r"is not as piflow-edge pack writes it|is not a whole \.zip")


def test_an_entry_of_which_the_table_knows_nothing_is_refused(bundle, tmp_path):
    """Who reads from the beginning would unpack it."""
    archive = write_zip(tmp_path, [*in_order(bundle), ("LICENSE-2", b"mine")])
    data = archive.read_bytes()
    (table,) = struct.unpack_from("<L", data, len(data) - 6)
    at = data.index(b"LICENSE-2", table) - 46
    end = data[-22:]
    count, size = struct.unpack_from("<HL", end, 10)
    data = data[:at] + end[:8] + struct.pack("<HHL", count - 1, count - 1, size - 55) + end[16:]
    archive.write_bytes(data)
    with zipfile.ZipFile(archive) as whole:
        assert whole.namelist() == [name for name, _ in in_order(bundle)]
    assert_refused(archive, tmp_path, "bytes before")


# Where fields stand in the header of an entry, and values that are not those of the table of contents.
@pytest.mark.parametrize(
    ("place", "kind", "value"),
    [(6, "<H", 8), (8, "<H", 8), (14, "<L", 1), (18, "<L", 1), (22, "<L", 1), (28, "<H", 1)],
)
def test_an_entry_that_says_other_than_the_table_is_refused(bundle, tmp_path, place, kind, value):
    pack(bundle, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        start = archive.getinfo("LICENSE").header_offset
    data = bytearray((tmp_path / "a.zip").read_bytes())
    struct.pack_into(kind, data, start + place, value)
    (tmp_path / "a.zip").write_bytes(data)
    assert_refused(tmp_path / "a.zip", tmp_path, "other facts of 'LICENSE'")


def test_extra_fields_are_refused(bundle, tmp_path):
    entry = zipfile.ZipInfo("LICENSE")
    entry.extra = struct.pack("<HHB", 0x5455, 1, 0)  # times of change, as other programs add
    entries = [(entry if name == "LICENSE" else name, data) for name, data in in_order(bundle)]
    assert_refused(write_zip(tmp_path, entries), tmp_path, "other facts of 'LICENSE'")


def test_numbers_of_64_bits_are_no_hindrance(bundle, tmp_path, monkeypatch):
    """As archives of 2 GiB and more have them."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    pack(bundle, tmp_path / "a.zip")
    assert b"PK\6\6" in (tmp_path / "a.zip").read_bytes()
    assert contents(unpack(tmp_path / "a.zip", tmp_path / "out").folder) == contents(bundle)
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes() + b"x")
    assert_refused(tmp_path / "a.zip", tmp_path, r"after its table of contents|is not a whole \.zip")


def test_a_table_of_contents_without_end_is_refused(tmp_path):
    """32768 entries in 1.5 MB: zipfile lists all that there are, at ten times their size."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    table = (entry + b"x") * (1 << 15)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1 << 15, 1 << 15, len(table), 0, 0)
    (tmp_path / "many.zip").write_bytes(table + end)
    assert_refused(tmp_path / "many.zip", tmp_path, "table of contents")


def test_an_archive_by_somebody_else_is_refused_before_it_is_unpacked(bundle, tmp_path, monkeypatch):
    (private, _), (_, public) = write_keys(tmp_path, "theirs"), write_keys(tmp_path, "ours")
    pack(bundle, tmp_path / "unsigned.zip")
    sign_bundle(bundle, private)
    pack(bundle, tmp_path / "signed.zip")
    monkeypatch.setattr(
        "piflow_edge.bundle.archive.new_folder", lambda folder: pytest.fail("it was unpacked")
    )
    assert_refused(tmp_path / "unsigned.zip", tmp_path, "not signed", trusted_keys=[public])
    assert_refused(tmp_path / "signed.zip", tmp_path, "is not trusted", trusted_keys=[public])


def test_what_is_no_archive_is_refused(tmp_path):
    assert_refused(tmp_path / "nowhere.zip", tmp_path, "cannot be read")
    assert_refused(tmp_path, tmp_path, "cannot be read")
    for data in (b"", b"PK\5\6", b"x" * 100, b"PK\5\6" + b"\xff" * 18):
        (tmp_path / "x.zip").write_bytes(data)
        assert_refused(tmp_path / "x.zip", tmp_path, "not a whole .zip")


def test_damaged_archives_are_refused_or_unpack_to_the_same(bundle, tmp_path):
    """Half of the damage goes to the table of contents and the end, where zipfile reads what to do."""
    pack(bundle, tmp_path / "a.zip")
    data, expected, chance = (tmp_path / "a.zip").read_bytes(), contents(bundle), random.Random(0)
    (table,) = struct.unpack_from("<L", data, len(data) - 6)
    caught = 0
    for trial in range(200):
        damaged = bytearray(data)
        place = chance.randrange(table if trial % 2 else 0, len(data))
        if trial % 10 == 0:
            del damaged[place:]
        else:
            damaged[place] ^= chance.randrange(1, 256)
        (tmp_path / "b.zip").write_bytes(damaged)
        try:
            out = unpack(tmp_path / "b.zip", tmp_path / f"out{trial}")
        except BundleError:
            caught += 1
        else:  # a date, an owner or a mode, which are not used
            assert contents(out.folder) == expected
    assert caught > 100
    assert Bundle(bundle).read("LICENSE") == expected["LICENSE"]
