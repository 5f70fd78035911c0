"""The main job end to end, with training cut to a few steps: everything but the quality is as in the real thing."""

import json

import numpy as np
import pytest

from tests.commands.command_line import run
from tests.commands.test_docs import ROOT, from_a_checkout

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
    assert page.count("data:image/png;base64,") == 12  # emoji, real images and seven contenders
    assert page.index("Emoji from prompts") < page.index("<h2>Pictures</h2>")
    assert 'src="http' not in page and "href=" not in page
    assert len(list(folder.glob("*.png"))) == 13
    figures = json.loads((folder / "evaluation.json").read_text())
    assert f"<td>{figures['scores'][0]['fid']:#.4g}</td>" in page


@from_a_checkout
def test_emoji_stand_beside_the_teacher_and_what_it_learnt_from(monkeypatch):
    from piflow_edge.commands import demo_emoji
    from piflow_edge.conditioning.mapping import count_of

    asked = []

    class Teacher:
        def __init__(self, conditioner):
            self.conditioner, self.sample_shape = conditioner, (3, 64, 64)

        def sample(self, noise, conditioning, steps, *, guidance_scale):
            asked.append((steps, guidance_scale, count_of(conditioning)))
            return 0 * noise

    monkeypatch.setattr(
        demo_emoji, "open_source", lambda source, style, students, data: Teacher(data.conditioner)
    )
    monkeypatch.setattr(demo_emoji, "KNOWN", ("fox", "turtle", "red apple"))
    monkeypatch.setattr(demo_emoji, "NEW", ("blue cat", "happy cat"))
    monkeypatch.setattr(demo_emoji, "NUM_SEEDS", 2)
    sources = demo_emoji.EmojiSources(ROOT, ROOT / "benchmarks" / "data" / "noto_emoji_64.npz")
    section = demo_emoji.draw_emoji(sources)
    known, new, varied, rollout = section.pictures.values()
    assert {(50, 2.0, 3), (4, 2.0, 2), (1, 2.0, 1)} <= set(asked)
    # Real images, the teacher in 50, 4, 2 and 1 steps, the student; of what is no caption there is no real image.
    assert [round(sheet.height / 128, 1) for sheet in (known, new, varied)] == [6.3, 5.3, 5.3]
    assert "teacher, 50 steps: " in section.notes[1] and "text encoder included: " in section.notes[1]
    # The fox of the first column is the data's, and that of the last row is drawn: orange, on white.
    left = known.width - 3 * 130
    for row in (0, 5):
        fox = np.asarray(known.crop((left, 22 + row * 130, left + 128, 150 + row * 130)), float)
        assert fox[5, 5].min() > 220 and fox[80:90, 50:80, 0].mean() > fox[80:90, 50:80, 2].mean() + 60
    assert rollout.height > 2 * 64


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
