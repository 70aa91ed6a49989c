from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigParser

from bundle.errors import InputError
from bundle.study.arms import Arm, Pretraining, Stage, read_study, write_overlay

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"quick": {"seeds": [0, 1], "settings": {"max_epochs": 2}}}


def study(folder, arms, stages=STAGES):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"stages": stages, "arms": arms}, sort_keys=False))
    return path


def test_an_arm_starts_from_another(tmp_path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("{}\n")
    arms = {
        "first": {"files": ["a.yaml"], "lr": 1.0, "norm": "batch"},
        "second": {"from": "first", "norm": "group"},
        "third": {"from": "second", "files": ["b.yaml"], "lr": 2.0},
        7: None,
    }
    stages, found = read_study(study(tmp_path, arms))
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    assert stages == {"quick": Stage([0, 1], (), {"max_epochs": 2})}
    assert found == {
        "first": Arm((a,), {"lr": 1.0, "norm": "batch"}),
        "second": Arm((a,), {"lr": 1.0, "norm": "group"}),
        "third": Arm((a, b), {"lr": 2.0, "norm": "group"}),
        "7": Arm((), {}),
    }
    assert list(found) == ["first", "second", "third", "7"]


def test_a_stage_whose_name_is_a_number_is_called_by_it(tmp_path):
    stages, _ = read_study(study(tmp_path, {"a": None}, {60: {"seeds": [0], "settings": {}}}))
    assert list(stages) == ["60"]


@pytest.mark.parametrize(
    "arm", [{True: 1}, {"pretrain": {"files": ["pre.yaml"], 5: 1}}], ids=["a setting", "one of the pre-training"]
)
def test_a_setting_that_yaml_reads_as_no_text_is_refused(tmp_path, arm):
    (tmp_path / "pre.yaml").write_text("{}\n")
    with pytest.raises(InputError, match="is read as (bool|int) and is no setting: put it in quotes"):
        read_study(study(tmp_path, {"a": arm}))
    with pytest.raises(InputError, match="is read as bool and is no setting"):
        read_study(study(tmp_path, {"a": None}, {"quick": {"seeds": [0], "settings": {False: 1}}}))


def test_an_arm_takes_over_the_pre_training_of_the_one_it_starts_from(tmp_path):
    for name in ("pre.yaml", "more.yaml"):
        (tmp_path / name).write_text("{}\n")
    arms = {
        "first": {"lr": 1.0, "pretrain": {"files": ["pre.yaml"], "max_epochs": 30}},
        "same": {"from": "first"},
        "other": {"from": "first", "pretrain": {"files": ["pre.yaml", "more.yaml"]}},
        "none": {"from": "first", "pretrain": None},
    }
    _, found = read_study(study(tmp_path, arms))
    pre, more = str(tmp_path / "pre.yaml"), str(tmp_path / "more.yaml")
    assert found == {
        "first": Arm((), {"lr": 1.0}, Pretraining((pre,), {"max_epochs": 30})),
        "same": Arm((), {"lr": 1.0}, Pretraining((pre,), {"max_epochs": 30})),
        "other": Arm((), {"lr": 1.0}, Pretraining((pre, more), {})),
        "none": Arm((), {"lr": 1.0}, None),
    }


def test_files_do_not_depend_on_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("{}\n")
    study(tmp_path, {"one": {"files": ["a.yaml"]}})
    monkeypatch.chdir(tmp_path)
    assert read_study("study.yaml")[1]["one"].files == (str(tmp_path / "a.yaml"),)


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        ({"b": {"from": "a"}, "a": {}}, "arm b starts from 'a', and there is no such arm above it"),
        ({"a": {"files": ["none.yaml"]}}, "arm a names a file that is not there: .*none.yaml"),
        ({"a": {"pretrain": {"files": ["none.yaml"]}}}, "arm a names a file that is not there: .*none.yaml"),
        ({"a": {"pretrain": {"max_epochs": 3}}}, r"`pretrain` of arm a needs `files`, such as \[pretrain.yaml\]"),
        ({"a": {"pretrain": True}}, "`pretrain` of arm a needs `files`"),
        ({"../a": {}}, "'../a' is no name for an arm"),
        ({"overlays": {}}, "'overlays' is no name for an arm"),
        ({"locked": {}}, "'locked' is no name for an arm"),
        ({"a": {"from": ["b"]}}, r"arm a starts from \['b'\], and there is no such arm"),
        ({"a": {"files": "a.yaml"}}, r"`files` of arm a is a list of file names, such as \[a.yaml\], not 'a.yaml'"),
        ({"a": {"files": [3]}}, "`files` of arm a is a list of file names"),
        ({"a": {"files": None}}, "`files` of arm a is a list of file names"),
        (["a"], r"is no study \(AttributeError\): it needs `stages` \(name: seeds, settings\) and `arms`"),
        ({"a": "soft"}, r"is no study \(ValueError\)"),
    ],
)
def test_a_bad_study_is_refused_in_a_sentence(tmp_path, arms, sentence):
    path = study(tmp_path, arms)
    with pytest.raises(InputError, match=sentence):
        read_study(path)


@pytest.mark.parametrize(
    "text", [None, "stages: [", "arms: {a: {}}", "stages: {q: {seeds: 0, settings: {}}}\narms: {}", "7"]
)
def test_another_file_is_no_study(tmp_path, text):
    if text is not None:
        (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=r"s\.yaml is no study"):
        read_study(tmp_path / "s.yaml")


@pytest.mark.parametrize("seeds", ["[0, 0]", "'01'", "[x]", "[]", "[-1]", "[true]"])
def test_seeds_are_different_whole_numbers(tmp_path, seeds):
    (tmp_path / "s.yaml").write_text(f"stages: {{q: {{seeds: {seeds}, settings: {{}}}}}}\narms: {{a: {{}}}}")
    with pytest.raises(InputError, match="`seeds` of stage q are different whole numbers"):
        read_study(tmp_path / "s.yaml")


def test_a_stage_has_overlays_of_the_folder_too(tmp_path):
    (tmp_path / "a.yaml").write_text("{}\n")
    path = study(tmp_path, {"one": {}}, {"quick": {**STAGES["quick"], "files": ["a.yaml"]}})
    assert read_study(path)[0]["quick"] == Stage([0, 1], (str(tmp_path / "a.yaml"),), {"max_epochs": 2})
    for files, sentence in (
        (["none.yaml"], "stage quick names a file that is not there: .*none.yaml"),
        ("a.yaml", "`files` of stage quick is a list of file names"),
    ):
        path = study(tmp_path, {"one": {}}, {"quick": {**STAGES["quick"], "files": files}})
        with pytest.raises(InputError, match=sentence):
            read_study(path)
    path = study(tmp_path, {"one": {}}, {"quick": {**STAGES["quick"], "file": ["a.yaml"]}})
    with pytest.raises(InputError, match="stage quick has 'file'; it may have seeds, files and settings"):
        read_study(path)


def test_the_studys_own_arms_set_known_keys():
    train = yaml.safe_load((ROOT / "configs" / "train.yaml").read_text())
    stages, arms = read_study(ROOT / "configs" / "study.yaml")
    assert {"before", "after", "default"} <= arms.keys()
    for one in (*stages.values(), *arms.values()):
        assert {key.split("::")[0] for key in one.settings} <= train.keys()
    merged = {name: (arm.files, repr(sorted(arm.settings.items())), repr(arm.pretrain)) for name, arm in arms.items()}
    assert len(set(merged.values())) == len(arms), "two arms are the same"


def test_an_overlay_says_what_was_given_and_is_left_alone_when_nothing_changed(tmp_path):
    settings = {"lr": 1.0e-4, "image_size": [64, 32], "encoder": {"_target_": "bundle.ConvEncoder"}, "cache_dir": None}
    path = tmp_path / "overlays" / "a.yaml"
    write_overlay(settings, path, "the arm a")
    assert path.read_text().startswith("# the arm a\n")
    assert ConfigParser.load_config_file(str(path)) == settings
    before = path.stat().st_mtime_ns
    write_overlay(settings, path, "the arm a")
    assert path.stat().st_mtime_ns == before
    write_overlay({}, path, "the arm a")
    assert ConfigParser.load_config_file(str(path)) == {}
