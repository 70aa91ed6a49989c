"""The documentation is held against what it describes: settings, files, commands, links."""

import ast
import dataclasses
import os
import re
import shlex
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml

from bundle.settings import shipped_config
from tests.study.results_tables import MARKED, filled

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORKFLOWS = ("train", "pretrain", "calibrate", "evaluate", "inference")
KEY_ROW = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \|([^|]*)\|([^|]*)\|([^|]*)\|$")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FOUNDING = (
    "fold max_epochs batch_size bag_size sampling_strategy label_smoothing "
    "temperature_start temperature_end grad_clip amp"
)


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())


def documented(name: str) -> dict[str, str]:
    """Key → default, from the tables under the heading of a config in docs/configuration.md."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    section = re.search(rf"^## {name}\.yaml\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert section is not None, name
    rows = [match.groups() for line in section[1].splitlines() if (match := KEY_ROW.match(line))]
    keys = [row[0] for row in rows]
    assert len(keys) == len(set(keys)), "a key is documented twice"
    return {row[0]: row[1] for row in rows}


def shown(value: Any) -> Any:
    """A value of a config as the tables show it: definitions by their target, lists of steps by their length."""
    if isinstance(value, dict):
        return value.get("_target_", "section")
    if isinstance(value, list) and value and all(isinstance(v, dict) or str(v)[:1] in "$@" for v in value):
        return f"{len(value)} step{'s' if len(value) > 1 else ''}"
    return value


def at(settings: dict[str, Any], key: str) -> Any:
    """The value under a key such as a::b, which in an overlay may stand as it is."""
    if key in settings:
        return settings[key]
    value: Any = settings
    for part in key.split("::"):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_setting_is_documented_with_its_default(name):
    settings, rows = config(name), documented(name)
    assert set(rows) >= settings.keys()
    assert {key for key in rows if "::" not in key or key in settings} == settings.keys()
    for key, cell in rows.items():
        value = shown(at(settings, key))
        assert (cell if isinstance(value, str) else yaml.safe_load(cell)) == value, key
        if value is not None and not isinstance(value, str):
            assert type(yaml.safe_load(cell)) is type(value), key


def test_the_tables_of_results_are_those_of_their_files():
    page, folder = (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), ROOT / "docs" / "results"
    assert page.count("<!-- table: ") == len(MARKED.findall(page)) > 5
    assert filled(page, folder) == page, "run python -m tests.study.results_tables"
    spoilt = page.replace("| .958 (", "| .985 (", 1)
    assert spoilt != page == filled(spoilt, folder)


def test_a_changed_default_would_be_noticed():
    """The comparison above must see a wrong number, a wrong kind and a missing key."""
    settings, rows = config("train"), documented("train")
    assert yaml.safe_load(rows["lr"]) == settings["lr"] != yaml.safe_load("1e-4")  # text to YAML
    assert yaml.safe_load(rows["bag_size"]) == 64
    assert KEY_ROW.match("| `lr` | `1.0e-4` | rate | number | peak |")
    assert shown(settings["preparation"]) == f"{len(settings['preparation'])} steps"


def choices(settings: dict[str, Any], *path: str) -> set[str]:
    return set(at(settings, "::".join(path)))


def test_the_allowed_words_are_those_of_the_config():
    text = (ROOT / "docs" / "configuration.md").read_text()
    train = config("train")
    options = {
        "selection": choices(train, "network_def", "selection", "options"),
        "sampling_strategy": choices(train, "sampling", "options"),
        "temperature_schedule": choices(train, "temperature", "schedule", "options"),
        "bag_loss": choices(train, "loss", "bag_loss", "options"),
    }
    from bundle.data.orientation import SLICING_AXES
    from bundle.evaluation.scores import SCORES
    from bundle.model.encoder import NORMS

    options |= {"norm": set(NORMS), "best_metric": set(SCORES), "slicing_axis": set(SLICING_AXES)}
    for key, words in options.items():
        (row,) = [match for line in text.splitlines() if (match := KEY_ROW.match(line)) and match[1] == key]
        assert set(re.findall(r"`([^`]+)`", row[4])) == words, key


def test_what_the_weights_fix_and_what_a_resume_may_change_is_documented():
    from bundle.recipe import RECIPE_KEYS, TRUSTED_MODULES
    from bundle.settings import NOT_PART_OF_A_RUN

    text = (ROOT / "docs" / "configuration.md").read_text()
    fixed = re.search(r"The recipe is what the weights mean:\n(.*?)\.\n", text, re.DOTALL)
    assert set(re.findall(r"`([^`]+)`", fixed[1])) == set(RECIPE_KEYS)
    trusted = re.search(r"from\nthese modules:(.*?)and what `trusted_modules`", text, re.DOTALL)
    assert set(re.findall(r"`([^`]+)`", trusted[1])) == set(TRUSTED_MODULES)
    free = re.search(r"These may change freely:(.*?)\.\n", text, re.DOTALL)
    assert set(re.findall(r"`([^`]+)`", free[1])) == set(NOT_PART_OF_A_RUN) - {"initialize", "run", "finalize"}


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """The language ("" without one) and the text of every fenced block of a page."""
    parts = re.split(r"^```(.*)\n", page.read_text(), flags=re.MULTILINE)
    assert len(parts) % 4 == 1, f"{page.name} has a fence that does not close"
    assert not any(parts[3::4]), f"{page.name} opens a fence within a block"
    return list(zip(parts[1::4], parts[2::4], strict=True))


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        kept = [c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
        found.add("".join(kept).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page):
    for link in LINK.findall(re.sub(r"`[^`\n]+`", "", prose(page))):
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, anchor = link.partition("#")
        path = page if not target else (page.parent / target).resolve()
        assert path.exists(), link
        assert path.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(path), link


def commands(page: Path) -> list[list[str]]:
    """The words of each command line in a page's code blocks that are bash or name no language."""
    found = []
    for language, block in code_blocks(page):
        if language not in ("", "bash"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip()
            if line.startswith(("scripts/", "python -m monai.bundle", ".venv/bin/python")):
                found.append(shlex.split(line, comments=True))
    return found


def shipped(name: str) -> Path:
    """The file of the repository behind a config's name; packages hold the YAML configs as JSON."""
    path = ROOT / name
    return path if path.is_file() else path.with_suffix(".yaml")


def config_files(words: list[str]) -> list[str]:
    given = words[words.index("--config_file") + 1]
    return ast.literal_eval(given) if given.startswith("[") else [given]


def with_imports(module: Path) -> str:
    """The source of a module, and of those that it imports from its own folder or from one in it."""
    source = module.read_text()
    names = re.findall(r"^from \.(\w[\w.]*) import", source, re.MULTILINE)
    paths = [module.parent / f"{name.replace('.', '/')}.py" for name in names]
    return source + "".join(path.read_text() for path in paths if path.exists())


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


def test_the_pages_show_commands():
    assert {page.name for page, _ in COMMANDS} >= {"README.md", "configuration.md", "your_data.md"}
    assert any("configs/evaluate.yaml" in " ".join(words) for _, words in COMMANDS)


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda item: item.stem if isinstance(item, Path) else "")
def test_commands_name_scripts_files_and_settings_that_exist(page, words):
    if words[0].startswith("scripts/"):
        script = ROOT / words[0]
        assert script.is_file()
        assert os.access(script, os.X_OK)
        text = script.read_text()
        module = re.search(r"-m ((?:bundle|tests)\.[\w.]+)", text)
        source = with_imports(ROOT / f"{module[1].replace('.', '/')}.py") if module else text
        # A study hands settings of the configs on.
        settings = shipped_config(ROOT / "configs", ("train", "evaluate")) if "add_options" in source else {}
        for option in (word for word in words[1:] if word.startswith("--")):
            known = f'"{option}"' in source or option in text or option.removeprefix("--") in settings
            assert known, f"{words[0]} knows no {option}"
        return
    if "--config_file" not in words:
        return
    files = config_files(words)
    for name in files:
        assert not name.startswith("configs/") or shipped(name).is_file(), name
    if "run" not in words:
        return  # the other commands of monai.bundle have options of their own
    ours = [name for name in files if name.startswith("configs/")]
    assert ours, words
    known: set[str] = set()
    for name in ours:
        known |= yaml.safe_load(shipped(name).read_text()).keys()
    options = [word[2:] for word in words if word.startswith("--")]
    for option in options:
        assert option.split("::")[0] in known | {"config_file", "logging_file"}, option


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "docs" / "configuration.md"], ids=["README", "configuration"]
)
def test_the_founding_studys_run_is_one_line(page):
    wanted = FOUNDING.split()
    lines = [words for words in commands(page) if {f"--{key}" for key in wanted} <= set(words)]
    assert len(lines) == 1
    train = config("train")
    for key in wanted:
        assert key in train
        given = yaml.safe_load(lines[0][lines[0].index(f"--{key}") + 1])
        assert isinstance(given, type(train[key])), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_yaml_examples_parse_and_set_known_keys(page):
    known = {key for name in WORKFLOWS for key in config(name)}
    for example in (yaml.safe_load(block) for language, block in code_blocks(page) if language == "yaml"):
        assert {key.lstrip("+").split("::")[0] for key in example} <= known


def test_configs_named_in_the_pages_exist():
    for page in PAGES:
        for name in re.findall(r"(?<![\w/])configs/[\w]+\.(?:yaml|json|conf)\b", page.read_text()):
            assert shipped(name).is_file(), f"{page.name}: {name}"


def test_every_overlay_is_listed():
    text = (ROOT / "docs" / "configuration.md").read_text()
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.name}`" in text or f"## {path.name}" in text, path.name


def test_it_says_what_it_is_not_for():
    for page in (ROOT / "README.md", ROOT / "docs" / "README.md", ROOT / "docs" / "your_data.md"):
        assert "not for diagnosis" in page.read_text().lower(), page


# --- docs/reader.md ---

# Codes that the code puts together: f"{what}_absent", f"bad_{what}".
COMPOSED = {
    "position_absent", "orientation_absent", "bad_position", "bad_orientation", "bad_sform", "bad_affine",
}  # fmt: skip
CODE = re.compile(r"[a-z]+(?:_[a-z0-9]+)*")


def codes_in_the_code() -> set[str]:
    """Every literal that is a reason code: the first argument of a refusal, or the first entry of a rule."""
    found = set(COMPOSED)
    for path in (ROOT / "bundle").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            heads: list[ast.expr] = []
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in ("Refusal", "refuse_where", "_several"):
                    heads = [node.args[0]]
            elif isinstance(node, ast.Tuple) and path.name in ("dicom_checks.py", "dicom_contrast.py"):
                heads = node.elts[:1] if len(node.elts) == 3 else []
            for head in heads:
                options = (head.body, head.orelse) if isinstance(head, ast.IfExp) else (head,)
                texts = {o.value for o in options if isinstance(o, ast.Constant) and isinstance(o.value, str)}
                found |= set(filter(CODE.fullmatch, texts))
    return found


def test_every_reason_code_is_explained():
    text = (ROOT / "docs" / "reader.md").read_text()
    section = re.search(r"^## Reason codes\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = [line for line in section[1].splitlines() if line.startswith("| `")]
    explained = [code for row in rows for code in re.findall(r"`([a-z_0-9]+)`", row.split("|")[1])]
    assert len(explained) == len(set(explained)), "a code is explained twice"
    codes = codes_in_the_code()
    assert codes == set(explained)
    assert all(len(row.split("|")) == 5 and row.split("|")[3].strip() for row in rows)


def test_the_defaults_in_the_config_are_those_of_the_policy():
    from bundle.data.policy import ReaderPolicy, SeriesRules

    given = config("train")["reader_policy"]
    rules = given.pop("series")
    assert (given.pop("_target_"), rules.pop("_target_")) == ("bundle.ReaderPolicy", "bundle.SeriesRules")
    assert ReaderPolicy(**given, series=SeriesRules(**rules)) == ReaderPolicy()
    assert {*given, "series"} == {field.name for field in dataclasses.fields(ReaderPolicy)}
    assert set(rules) == {field.name for field in dataclasses.fields(SeriesRules)}


def test_everything_undetectable_is_listed():
    from tests.data.dicom_faults import UNDETECTABLE

    text = (ROOT / "docs" / "reader.md").read_text()
    for name, fault in UNDETECTABLE.items():
        assert f"| {name} | {fault.reason} |" in text
