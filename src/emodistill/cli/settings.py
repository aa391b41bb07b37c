"""Settings of a run: a preset, changed by a TOML file, changed by flags; checked once, before any work.

A file looks like this; everything in it is optional::

    preset = "standard"          # what the rest changes
    seed = 7
    n_folds = 5

    [[variants]]                 # replaces the preset's variants; fields of VariantConfig, and `folds`
    name = "minilm-a"
    encoder = "minilm-l6"
    epochs = 3

    [[students]]                 # replaces the preset's students; fields of StudentConfig
    name = "tiny"

    [combine]                    # changes single values of the preset
    metric = "macro_f1"

    [data]                       # for flags that are not given; relative to the file's own folder
    train = "train.csv"

`[combine]`, `[export]` and `[bench]` hold the fields of the dataclasses below.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from emodistill.errors import ConfigError

__all__ = [
    "PRESETS",
    "BenchSettings",
    "CombineSettings",
    "ExportSettings",
    "RunSettings",
    "load_settings",
    "parse_override",
    "read_data_paths",
]

DEFAULT_PRESET = "standard"
MAX_FOLDS = 20
DATA_NAMES = ("train", "dev", "test", "unlabeled")

_MINILM_A = {"name": "minilm-a", "encoder": "minilm-l6", "seed": 1, "learning_rate": 1.5e-4, "epochs": 3}
_MINILM_B = {
    "name": "minilm-b",
    "encoder": "minilm-l6",
    "seed": 2,
    "learning_rate": 2.5e-4,
    "epochs": 3,
    "layerwise_decay": 0.85,
    "dropout_rate": 0.15,
    "pooling": "cls",
}
_MPNET = {
    "name": "mpnet-a",
    "encoder": "mpnet-base",
    "seed": 11,
    "learning_rate": 8e-5,
    "epochs": 3,
    "layerwise_decay": 0.9,
    "folds": [0, 1, 2],
}
_TFIDF = {"name": "tfidf", "kind": "tfidf", "seed": 3}
_MPNET_HEAD = {"name": "mpnet-head", "kind": "head", "encoder": "mpnet-base", "seed": 4}

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "n_folds": 2,
        "variants": [_MINILM_A, _MINILM_B],
        "students": [{"name": "tiny", "epochs": 4, "relation_weight": 0.0, "transfer_texts": 20_000}],
    },
    "standard": {
        "n_folds": 5,
        "variants": [_MINILM_A, _MINILM_B, _TFIDF],
        "students": [{"name": "tiny"}],
    },
    "best": {
        "n_folds": 5,
        "variants": [_MPNET, _MINILM_A, _MINILM_B, _TFIDF, _MPNET_HEAD],
        "students": [{"name": "small"}, {"name": "tiny"}, {"name": "nano"}],
        "ship": "tiny",
    },
}


@dataclass(frozen=True, kw_only=True)
class CombineSettings:
    """How member predictions become one."""

    metric: str = "micro_f1"  # "micro_f1", "macro_f1", "label:NAME" or "f_beta:B"
    rule: str = "auto"  # "auto" leaves the choice to the referee; a rule's name forces it, and its price is told

    def __post_init__(self) -> None:
        for name in ("metric", "rule"):
            if not getattr(self, name):
                raise ConfigError(f"combine.{name} is empty: leave it out for the default")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """How a student becomes a bundle."""

    opset: int | None = None  # of the portable graphs; None: the latest that was tested
    fast_precisions: tuple[str, ...] = ("int8-static", "int8-dynamic")  # the first that passes its limits is kept
    weight_bits: int = 7  # 7 is right on every processor; 8 saturates on some
    shared_threshold: bool = True  # one for all labels, or one each
    max_f1_loss: float = 0.003  # micro-F1 that an int8 graph may lose against Keras, in [0, 1]
    verify_cpu: str | None = None  # "haswell": also answer under an emulated AVX2 processor

    def __post_init__(self) -> None:
        object.__setattr__(self, "fast_precisions", tuple(self.fast_precisions))
        if self.opset is not None and not 11 <= self.opset <= 26:
            raise ConfigError(f"export.opset is {self.opset}: give a number between 11 and 26, or leave it out")
        if self.weight_bits not in (7, 8):
            raise ConfigError(f"export.weight_bits is {self.weight_bits}: give 7 or 8")
        if not 0 <= self.max_f1_loss <= 1:
            raise ConfigError(f"export.max_f1_loss is {self.max_f1_loss}: give a share between 0 and 1")
        if self.verify_cpu not in (None, "haswell"):
            raise ConfigError(f"export.verify_cpu is '{self.verify_cpu}': only 'haswell' can be emulated")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How latency is measured."""

    n_texts: int = 500  # real texts, one at a time
    n_repeats: int = 3  # passes over them
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("n_texts", "n_repeats", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bench.{name} is {getattr(self, name)}: give a number from 1 on")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything that decides what a run makes, besides its data.

    Attributes
    ----------
    variants, students : tuple of mappings
        As written in the file; `ensemble.variants` and `distill.students` check their fields. A variant's `folds`
        (which folds to train, all by default) belongs to the run and is checked here.
    ship : str
        Name of the student that is offered first; empty: the first of `students`.
    """

    preset: str = DEFAULT_PRESET
    seed: int = 0  # of folds, and of variants and students that name none of their own; >= 0
    n_folds: int = 5  # 2 to 20
    variants: tuple[Mapping[str, Any], ...] = ()
    students: tuple[Mapping[str, Any], ...] = ()
    ship: str = ""
    use_dev: bool = False  # final members see train + dev; then no dev score
    training_processes: int | None = None  # members trained side by side; None: what cores and memory allow
    combine: CombineSettings = field(default_factory=CombineSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    bench: BenchSettings = field(default_factory=BenchSettings)

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed is {self.seed!r}: give a whole number from 0 on")
        if not 2 <= self.n_folds <= MAX_FOLDS:
            raise ConfigError(f"n_folds is {self.n_folds}: give a number from 2 to {MAX_FOLDS}")
        if self.training_processes is not None and self.training_processes < 1:
            raise ConfigError(f"training_processes is {self.training_processes}: give a number from 1 on")
        _check_names("variants", self.variants)
        _check_names("students", self.students)
        if not self.variants:
            raise ConfigError("there are no variants: add a [[variants]] table with a name and an encoder")
        for variant in self.variants:
            self.folds_of(variant)
        if self.ship and self.ship not in self.student_names:
            raise ConfigError(f"ship is '{self.ship}': the students are {', '.join(self.student_names) or 'none'}")

    @property
    def variant_names(self) -> tuple[str, ...]:
        """Names of the variants, in the order in which they are trained."""
        return tuple(str(variant["name"]) for variant in self.variants)

    @property
    def student_names(self) -> tuple[str, ...]:
        """Names of the students."""
        return tuple(str(student["name"]) for student in self.students)

    @property
    def shipped_student(self) -> str | None:
        """Name of the student that is offered first; None when there are no students."""
        return self.ship or next(iter(self.student_names), None)

    def folds_of(self, variant: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the folds that a variant is trained on, ascending."""
        folds = variant.get("folds", range(self.n_folds))
        if not isinstance(folds, Sequence) or not folds or any(fold not in range(self.n_folds) for fold in folds):
            raise ConfigError(
                f"variant '{variant['name']}': folds is {folds!r}, "
                f"expected a list of numbers from 0 to {self.n_folds - 1}"
            )
        return tuple(sorted(set(folds)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def changed(self, overrides: Sequence[tuple[str, Any]]) -> Self:
        """Return these settings with some changed; a name may be dotted."""
        return self.from_dict(_merge(self.to_dict(), _nest(overrides)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build settings from plain values; an unknown name is an error that lists the known ones."""
        given = dict(values)
        return _build(
            cls,
            {
                **given,
                "variants": tuple(given.get("variants", ())),
                "students": tuple(given.get("students", ())),
                "combine": _build(CombineSettings, given.get("combine", {}), "combine."),
                "export": _build(ExportSettings, given.get("export", {}), "export."),
                "bench": _build(BenchSettings, given.get("bench", {}), "bench."),
            },
        )


def load_settings(
    preset: str | None = None,
    config_path: Path | None = None,
    overrides: Sequence[tuple[str, Any]] = (),
) -> RunSettings:
    """Put a preset, a file and flags together.

    Parameters
    ----------
    preset : str, optional
        Name in `PRESETS`; over the file's own `preset`.
    config_path : Path, optional
        TOML file.
    overrides : sequence of (name, value)
        From flags; a name may be dotted, as in ``combine.metric``.

    Returns
    -------
    RunSettings

    Raises
    ------
    ConfigError
        If a name is unknown, a value is out of range or the file is no TOML.
    """
    from_file = {} if config_path is None else _read_toml(config_path)
    from_file.pop("data", None)
    name = preset or from_file.get("preset", DEFAULT_PRESET)
    if name not in PRESETS:
        raise ConfigError(f"preset '{name}' is unknown: the presets are {', '.join(PRESETS)}")
    try:
        merged = _merge(_merge({**PRESETS[name]}, from_file), _nest(overrides))
        return RunSettings.from_dict({**merged, "preset": name})
    except ConfigError as error:
        if config_path is None:
            raise
        raise ConfigError(f"{config_path}: {error}") from error


def read_data_paths(config_path: Path) -> dict[str, Path]:
    """Return the data files that a settings file names under `[data]`, relative paths seen from its folder.

    Raises
    ------
    ConfigError
        If a name is not train, dev, test or unlabeled, or its value is not a path.
    """
    table = _read_toml(config_path).get("data", {})
    if not isinstance(table, Mapping):
        raise ConfigError(f'{config_path}: data is {table!r}: write a table [data] with train = "FILE"')
    for name, value in table.items():
        if name not in DATA_NAMES:
            raise ConfigError(f"{config_path}: data.{name} is unknown: known are {', '.join(DATA_NAMES)}")
        if not isinstance(value, str):
            raise ConfigError(f"{config_path}: data.{name} is {value!r}: expected the path of a file")
    return {name: config_path.parent / Path(value).expanduser() for name, value in table.items()}


def parse_override(text: str) -> tuple[str, Any]:
    """Read ``NAME=VALUE`` of a flag; the value is TOML, and a bare word is taken as a string.

    Examples
    --------
    >>> parse_override("combine.metric=macro_f1")
    ('combine.metric', 'macro_f1')
    >>> parse_override("n_folds=3")
    ('n_folds', 3)
    """
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise ConfigError(f"'{text}' is no setting: write NAME=VALUE, for example combine.metric=macro_f1")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


Settings = TypeVar("Settings")


def _build(kind: type[Settings], values: Any, prefix: str = "") -> Settings:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')} is {values!r}: expected a table of settings")
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ConfigError(f"setting '{prefix}{unknown[0]}' is unknown: known are {', '.join(known)}")
    for name, value in values.items():
        _check_type(f"{prefix}{name}", value, known[name].type)
    return kind(**values)


def _check_type(name: str, value: Any, expected: Any) -> None:
    """Refuse what TOML can hold and a field cannot; a whole number may stand for a float."""
    plain: dict[Any, tuple[type, ...]] = {
        int: (int,),
        float: (int, float),
        str: (str,),
        bool: (bool,),
        int | None: (int, type(None)),
        str | None: (str, type(None)),
    }
    kinds = plain.get(expected)
    if kinds is None:
        return
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ConfigError(f"{name} is {value!r}: expected {' or '.join(kind.__name__ for kind in kinds)}")


def _check_names(key: Literal["variants", "students"], tables: tuple[Mapping[str, Any], ...]) -> None:
    seen: set[str] = set()
    for position, table in enumerate(tables):
        if not isinstance(table, Mapping) or not isinstance(table.get("name"), str) or not table["name"]:
            raise ConfigError(f'{key}[{position}] has no name: add  name = "..."')
        name = table["name"]
        if not all(character.isalnum() or character in "-_" for character in name):
            raise ConfigError(f"{key}: the name '{name}' becomes a folder: use letters, digits, '-' and '_'")
        if name in seen:
            raise ConfigError(f"{key}: the name '{name}' is given twice")
        seen.add(name)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change a table: single values inside tables, lists as a whole."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _nest(overrides: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for dotted, value in overrides:
        *parents, last = dotted.split(".")
        table = nested
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    return nested


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as handle:
            return tomllib.load(handle)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: give a TOML file, or leave --config out") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
