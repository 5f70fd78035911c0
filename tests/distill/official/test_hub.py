"""Hub ids: what they mean, what is known of the published students, and what is said without a connection."""

import socket

import pytest

from piflow_edge.distill.official.hub import HubPlace, check_on_hub, find_files, parse_hub_id
from piflow_edge.distill.official.published import STUDENTS, find_published
from piflow_edge.distill.sources import load_student
from piflow_edge.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("Lakonik/pi-FLUX.1:gmflux_k8_piid_4step", HubPlace("Lakonik/pi-FLUX.1", "gmflux_k8_piid_4step")),
        ("Qwen/Qwen-Image", HubPlace("Qwen/Qwen-Image", "")),
        ("org/repo:a/b", HubPlace("org/repo", "a/b")),
        ("module:function", None),
        ("package.module:function", None),
        ("C:\\models\\x", None),
        ("/srv/models:x", None),
        ("a/b/c", None),
        ("../models/x", None),
        ("org/repo:../../etc", None),
    ],
)
def test_what_a_text_means_on_the_hub(text, place):
    assert parse_hub_id(text) == place


def test_what_is_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "repo" / "inside").mkdir(parents=True)
    assert find_files("org/repo:inside").samefile(tmp_path / "org" / "repo" / "inside")
    monkeypatch.setattr(
        "piflow_edge.distill.official.hub._import_hub", lambda *a: pytest.fail("asked the hub")
    )
    check_on_hub("org/repo:inside", "a network")
    with pytest.raises(CheckpointError, match=r"nothing at nowhere; .*FOLDER:subfolder"):
        find_files("nowhere")


def test_without_a_connection_the_way_to_fetch_it_elsewhere_is_told(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected to the network"))
    with pytest.raises(
        CheckpointError, match=r"hf download Lakonik/pi-Flow-ImageNet --include \"gmdit.*give FOLDER/gmdit"
    ):
        load_student("Lakonik/pi-Flow-ImageNet:gmdit_k32_imagenet_piid_1step")


@pytest.mark.parametrize("downloaded", [True, False])
def test_the_hub_is_asked_once_and_only_for_what_was_not_downloaded(monkeypatch, downloaded):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def find(repo, local_files_only):
        assert local_files_only
        if not downloaded:
            raise FileNotFoundError(repo)

    def answer(self, repo, timeout):
        asked.append((repo, timeout))
        raise ConnectionError("no route to the hub\nand much more")

    monkeypatch.setattr(hub, "snapshot_download", find)
    monkeypatch.setattr(hub.HfApi, "model_info", answer)
    if downloaded:
        check_on_hub("org/encoder", "a text encoder")
        assert not asked
    else:
        with pytest.raises(
            CheckpointError, match=r"does not give a text encoder of that name: no route to the hub$"
        ):
            check_on_hub("org/encoder", "a text encoder")
        assert asked == [("org/encoder", 10)]


def test_the_published_students_are_known_by_hub_id_and_by_folder(tmp_path):
    assert len({student.hub_id for student in STUDENTS}) == 12
    for student in STUDENTS:
        assert find_published(student.hub_id) is student
        assert find_published(str(tmp_path / student.subfolder)) is student
    known = {student.subfolder: student for student in STUDENTS}
    flux = known["gmflux_k8_piid_8step"]
    assert (flux.nfes, flux.or_more, flux.guidance) == ((8,), False, 3.5)
    assert known["gmqwen_k8_piid_4step"].or_more and known["gmflux2_k8_piid_4step"].or_more
    assert known["gmdit_k32_imagenet_piid_1step"].num_timesteps == 1000
    assert known["gmrepa_k32_imagenet_piid_2step"].nfes == (2,)
    assert find_published("runs/mine") is None


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("piflow_edge.distill.official.hub._download", lambda *a: pytest.fail("downloaded"))
    with pytest.raises(CheckpointError, match="there is none at runs/student-1"):
        load_student("runs/student-1")
