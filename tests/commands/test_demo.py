"""The main job end to end, with training cut to a few steps: everything but the quality is as in the real thing."""

import json

import pytest

from tests.commands.command_line import run

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run("demo", "--out", folder, "--iterations", 3, "--images", 200, "--json")


def test_it_scores_the_teacher_and_every_student(demo):
    answer = json.loads(demo[1].stdout)
    names = [score["name"] for score in answer["scores"]]
    teachers = [f"teacher, {steps} step{'s' if steps > 1 else ''}" for steps in (50, 1, 2, 4)]
    assert names == [*teachers, "digits-nfe1", "digits-nfe2", "digits-nfe4"]
    assert [score["network_calls"] for score in answer["scores"]] == [50, 1, 2, 4, 1, 2, 4]
    full = answer["scores"][0]
    assert full["fid_ratio"] == full["diversity_ratio"] == 1 and full["mse"] == 0
    assert all(score["ms_per_image"] > 0 for score in answer["scores"])
    assert answer["conditions"]["images"] == 200


def test_the_report_stands_alone_with_its_pictures_beside_it(demo):
    folder = demo[0] / "report"
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8  # real images and seven contenders
    assert 'src="http' not in page and "href=" not in page
    assert len(list(folder.glob("*.png"))) == 9
    figures = json.loads((folder / "evaluation.json").read_text())
    assert f"<td>{figures['scores'][0]['fid']:#.4g}</td>" in page


def test_its_bundles_are_whole(demo):
    for nfe in (1, 2, 4):
        bundle = demo[0] / "bundles" / f"digits-nfe{nfe}"
        assert json.loads(run("verify", bundle, "--json").stdout)["passed"]
        assert "UCI" in (bundle / "LICENSE").read_text()


def test_the_same_command_goes_on_where_it_was(demo):
    done = run("demo", "--out", demo[0], "--iterations", 3, "--images", 200, "--json")
    before, after = (json.loads(text)["scores"] for text in (demo[1].stdout, done.stdout))
    for figure in ("fid", "diversity", "mse"):
        assert [s[figure] for s in before] == [s[figure] for s in after]


def test_other_settings_in_the_same_folder_are_refused(demo):
    assert "other settings" in run("demo", "--out", demo[0], "--seed", 4, code=2).stderr
