"""Settings: preset, then file, then flags; and every mistake in one sentence before any work."""

from pathlib import Path

import pytest

from emodistill.cli.settings import PRESETS, RunSettings, load_settings, parse_override, read_data_paths
from emodistill.distill.students import StudentConfig
from emodistill.ensemble.variants import VariantConfig
from emodistill.errors import ConfigError

TOML = """
preset = "fast"
seed = 7
n_folds = 3
[data]
train = "rows/train.csv"
dev = "/data/dev.csv"
[[variants]]
name = "mine"
epochs = 1
folds = [2, 0]
[combine]
metric = "macro_f1"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "c.toml").write_text(TOML)
    return tmp_path / "c.toml"


def test_a_file_changes_its_preset_and_flags_change_both(config: Path) -> None:
    settings = load_settings(None, config, [("seed", 8), ("bench.threads", 2)])
    assert (settings.preset, settings.seed, settings.n_folds) == ("fast", 8, 3)
    assert settings.variant_names == ("mine",)  # lists are replaced as a whole
    assert settings.student_names == ("tiny",)  # from the preset
    assert settings.combine.metric == "macro_f1"
    assert settings.bench.threads == 2
    assert settings.bench.n_texts == 500
    assert settings.folds_of(settings.variants[0]) == (0, 2)


def test_a_preset_on_the_command_line_is_over_the_one_in_the_file(config: Path) -> None:
    assert load_settings("best", config).student_names == ("small", "tiny", "nano")


def test_data_paths_are_seen_from_the_file(config: Path, tmp_path: Path) -> None:
    assert read_data_paths(config) == {"train": tmp_path / "rows/train.csv", "dev": Path("/data/dev.csv")}


def test_settings_survive_run_json(config: Path) -> None:
    import json

    settings = load_settings(None, config)
    assert RunSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    changed = settings.changed([("combine.metric", "micro_f1")])
    assert (changed.combine.metric, changed.seed) == ("micro_f1", 7)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_down_to_its_variants_and_students(preset: str) -> None:
    settings = load_settings(preset)
    for variant in settings.variants:
        VariantConfig.from_mapping(variant)
    for student in settings.students:
        StudentConfig.from_mapping(student)
    assert settings.shipped_student == "tiny"


def test_the_fast_preset_covers_every_row_with_two_variants() -> None:
    settings = load_settings("fast")
    assert len(settings.variants) == 2
    assert all(settings.folds_of(variant) == (0, 1) for variant in settings.variants)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("epoch", 3)], "setting 'epoch' is unknown: known are preset, seed"),
        ([("combine.metrics", "x")], "setting 'combine.metrics' is unknown: known are metric, rule"),
        ([("seed", -1)], "seed is -1: give a whole number"),
        ([("seed", "abc")], "seed is 'abc': expected int"),
        ([("seed", True)], "seed is True: expected int"),
        ([("n_folds", 1)], "n_folds is 1: give a number from 2"),
        ([("n_folds", 2.5)], "n_folds is 2.5: expected int"),
        ([("use_dev", 1)], "use_dev is 1: expected bool"),
        ([("combine", 3)], "combine is 3: expected a table"),
        ([("export.max_f1_loss", 2)], r"export\.max_f1_loss is 2: give a share"),
        ([("export.opset", 5)], r"export\.opset is 5"),
        ([("export.verify_cpu", "z80")], "only 'haswell'"),
        ([("bench.threads", 0)], r"bench\.threads is 0"),
        ([("ship", "huge")], "ship is 'huge': the students are tiny"),
        ([("variants", [])], "there are no variants"),
        ([("variants", [{"encoder": "x"}])], r"variants\[0\] has no name"),
        ([("variants", [{"name": "a"}, {"name": "a"}])], "the name 'a' is given twice"),
        ([("variants", [{"name": "../a"}])], r"the name '\.\./a' becomes a folder"),
        ([("variants", [{"name": "a", "folds": [5]}])], r"variant 'a': folds is \[5\], expected .* from 0 to 4"),
        ([("variants", [{"name": "a", "folds": []}])], r"folds is \[\]"),
        ([("students", [{"name": "a/b"}])], "becomes a folder"),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(overrides: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings("standard", None, overrides)


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="'quick' is unknown: the presets are fast, standard, best"):
        load_settings("quick")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed = ", r"c\.toml is no TOML"),
        ("sed = 1", r"c\.toml: setting 'sed' is unknown"),
        ("[combine]\nmetric = ''", r"c\.toml: combine\.metric is empty"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_settings(None, tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data = 'x'", "write a table"),
        ("[data]\nvalid = 'x'", r"data\.valid is unknown: known are train, dev"),
        ("[data]\ntrain = 1", r"data\.train is 1: expected the path"),
    ],
)
def test_a_mistake_in_the_data_table_names_the_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_data_paths(tmp_path / "c.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml does not exist"):
        load_settings(None, tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n_folds=3", ("n_folds", 3)),
        ("export.max_f1_loss = 0.01", ("export.max_f1_loss", 0.01)),
        ("use_dev=true", ("use_dev", True)),
        ("combine.metric=label:pride", ("combine.metric", "label:pride")),
        ('ship="tiny"', ("ship", "tiny")),
        ("combine.metric=a=b", ("combine.metric", "a=b")),
    ],
)
def test_an_assignment_is_read_as_toml_and_a_bare_word_as_text(text: str, expected: tuple) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["seed", "=3", ""])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write NAME=VALUE"):
        parse_override(text)
