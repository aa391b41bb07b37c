"""What a run consists of, what is there already, and about how long the rest takes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from emodistill.artifacts import Piece, file_sha256, fingerprint, piece_state
from emodistill.cli.run_folder import RunFolder
from emodistill.encoders import KNOWN_ENCODERS
from emodistill.errors import ArtifactError, ConfigError, InputError
from emodistill.metrics import parse_metric

if TYPE_CHECKING:
    from emodistill.distill.students import StudentConfig
    from emodistill.ensemble.variants import VariantConfig

__all__ = ["EmbeddingsPlan", "MemberPlan", "Plan", "StagePlan", "encoder_identity"]

Stage = Literal["train", "combine", "distill", "export", "bench", "submit"]

# Rows a second, forward and backward, measured on 2 cores with AVX-512 and bf16, texts of about 19 tokens.
EXAMPLES_PER_SECOND = {"minilm-l6": 170.0, "mpnet-base": 27.0}
PREDICTION_SPEEDUP = 3.0  # a forward pass alone
TFIDF_SECONDS_PER_THOUSAND_ROWS = 2.5
HEAD_SECONDS_PER_THOUSAND_ROWS = 0.5

ENSEMBLE_LAYOUT = 2  # counts up when the files in the ensemble's folder change


@dataclass(frozen=True, kw_only=True)
class MemberPlan:
    """One member: a variant trained without one fold."""

    variant: "VariantConfig"
    fold: int
    variant_fingerprint: str
    fingerprint: str
    folder: Path

    @property
    def name(self) -> str:
        """Name of the member: ``VARIANT fold K``."""
        return f"{self.variant.name} fold {self.fold}"

    @property
    def state(self) -> Piece:
        """What is there now."""
        return piece_state(self.folder, self.fingerprint)


@dataclass(frozen=True, kw_only=True)
class EmbeddingsPlan:
    """All texts of the run, embedded by the encoder of variants of kind "head"."""

    fingerprint: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One piece of the run, for the table of a dry run."""

    stage: Stage
    name: str
    state: str
    reason: str
    seconds: float | None  # about how long it takes; 0 when done, None when unknown


class Plan:
    """The pieces of a run and their fingerprints.

    Parameters
    ----------
    run : RunFolder
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    @classmethod
    def checked(cls, run: RunFolder) -> Self:
        """Return the plan of a run, after making sure that its settings are right and fit its data.

        Raises
        ------
        ConfigError
            If a variant, a student, the metric or the rule cannot be.
        """
        from emodistill.ensemble.referee import RULES

        settings = run.settings.combine
        parse_metric(settings.metric, run.data.label_names)
        if settings.rule not in ("auto", *RULES):
            raise ConfigError(f"rule '{settings.rule}' is unknown: choose auto, {', '.join(RULES)}")
        plan = cls(run)
        _ = plan.variants, plan.students  # made here, so that a wrong one is found before any work
        return plan

    # ------------------------------------------------------------ settings

    @cached_property
    def variants(self) -> "list[VariantConfig]":
        """The variants in the order of the settings; one without a seed of its own gets seed + position."""
        from emodistill.ensemble.variants import VariantConfig

        settings = self.run.settings
        return [
            VariantConfig.from_mapping({"seed": settings.seed + position, **variant})
            for position, variant in enumerate(settings.variants)
        ]

    @cached_property
    def students(self) -> "list[StudentConfig]":
        """The students in the order of the settings."""
        from emodistill.distill.students import StudentConfig

        settings = self.run.settings
        return [StudentConfig.from_mapping({"seed": settings.seed, **student}) for student in settings.students]

    # ------------------------------------------------------------ pieces

    @cached_property
    def members(self) -> list[MemberPlan]:
        """All members, variants in the order of the settings, folds inside."""
        run, data = self.run, self.run.data
        split = fingerprint(run.fold_ids)
        members = []
        for variant in self.variants:
            own = fingerprint("variant", {**variant.fingerprint_parts(), "encoder": self._encoder_of(variant)})
            for fold in run.settings.folds_of({"name": variant.name, "folds": variant.folds or self._all_folds}):
                whole = fingerprint("member", own, fold, data.train_fingerprint, split, data.rows_fingerprint)
                members.append(
                    MemberPlan(
                        variant=variant,
                        fold=fold,
                        variant_fingerprint=own,
                        fingerprint=whole,
                        folder=run.member_folder(variant.name, fold),
                    )
                )
        return members

    def embeddings_of(self, variant: "VariantConfig") -> EmbeddingsPlan:
        """Return the embeddings that the members of a variant of kind "head" are fitted on, in all folds."""
        data = self.run.data
        how = {setting: getattr(variant, setting) for setting in ("pooling", "max_length_tokens", "precision")}
        texts = fingerprint(data.train_rows, data.rows_fingerprint)
        whole = fingerprint("embeddings", encoder_identity(variant.encoder), how, texts)
        encoder = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(variant.encoder).name)
        own = fingerprint(encoder_identity(variant.encoder), how)[:8]
        return EmbeddingsPlan(fingerprint=whole, folder=self.run.embeddings_folder(f"{encoder}-{own}"))

    def select_members(self, only: Sequence[str] = (), folds: Sequence[int] = ()) -> list[MemberPlan]:
        """Return the members of some variants and folds; all without arguments."""
        names = self.run.settings.variant_names
        for name in only:
            if name not in names:
                raise ConfigError(f"variant '{name}' is unknown: this run has {', '.join(names)}")
        for fold in folds:
            if fold not in self._all_folds:
                raise ConfigError(f"fold {fold} is unknown: this run has 0 to {self.run.settings.n_folds - 1}")
        return [
            member
            for member in self.members
            if (not only or member.variant.name in only) and (not folds or member.fold in folds)
        ]

    @cached_property
    def finished_members(self) -> list[MemberPlan]:
        """The members that are there, whole and fresh, when this is first asked."""
        return [member for member in self.members if member.state.is_done]

    @cached_property
    def combined_members(self) -> list[MemberPlan]:
        """The finished members that the ensemble is made of."""
        return _with_a_second_fold(self.finished_members)

    def need_members(self) -> list[MemberPlan]:
        """Return the members of the ensemble; refuse when there are none."""
        if not self.combined_members:
            raise ArtifactError(f"{self.run.path} has no finished member: run  emodistill train {self.run.path}  first")
        return self.combined_members

    def need_ensemble(self) -> str:
        """Return the fingerprint of the ensemble of the finished members; refuse when it is missing or stale."""
        wanted = self.ensemble_fingerprint(self.need_members())
        found = piece_state(self.run.ensemble_folder, wanted)
        if not found.is_done:
            raise ArtifactError(
                f"the ensemble of {self.run.path} is {found.state} ({found.reason}): "
                f"run  emodistill combine {self.run.path}  first"
            )
        return wanted

    def need_teacher(self) -> str:
        """Return the fingerprint of what teaches the students: a file that was named for it, or the ensemble."""
        teacher = self.run.teacher_file
        if teacher is None:
            return self.need_ensemble()
        path, scale = teacher
        if not path.is_file():
            raise InputError(
                f"the teacher's file {path} of this run is gone: put it back, name another with "
                f"emodistill distill {self.run.path} --teacher-logits FILE, or go back to the ensemble with "
                "--teacher-logits ensemble"
            )
        data = self.run.data
        return fingerprint(
            "teacher", file_sha256(path), scale, data.train_fingerprint, data.rows_fingerprint, sorted(data.ids)
        )

    def ensemble_fingerprint(self, members: Sequence[MemberPlan]) -> str:
        """Name the ensemble of some members under the settings of this run."""
        dev_labels = self.run.data.dev_labels
        return fingerprint(
            "ensemble",
            ENSEMBLE_LAYOUT,
            asdict(self.run.settings.combine),
            [member.fingerprint for member in members],
            *([] if dev_labels is None else [dev_labels]),
        )

    def student_fingerprint(self, student: "StudentConfig", teacher: str) -> str:
        """Name a student of an ensemble or another teacher."""
        own = {**student.fingerprint_parts(), "encoder": encoder_identity(student.encoder)}
        return fingerprint("student", own, teacher)

    def bundle_fingerprint(self, student: str) -> str:
        """Name the bundle of a student, given the student's fingerprint."""
        return fingerprint("bundle", asdict(self.run.settings.export), student)

    def report_fingerprint(self, ensemble: str, bundles: Sequence[str]) -> str:
        """Name the report."""
        return fingerprint("report", asdict(self.run.settings.bench), ensemble, list(bundles))

    def logits_fingerprint(self, ensemble: str, bundles: Sequence[str]) -> str:
        """Name the saved logits: those of all finished members, of the ensemble and of the students."""
        members = [member.fingerprint for member in self.finished_members]
        return fingerprint("logits", members, ensemble, list(bundles))

    def submissions_fingerprint(self, ensemble: str, bundles: Sequence[str]) -> str:
        """Name the submissions; the test file's further columns are part of them."""
        test = self.run.data_record.get("test")
        return fingerprint("submissions", ensemble, list(bundles), test and test["fingerprint"])

    # ------------------------------------------------------------ the table of a dry run

    def stages(self) -> list[StagePlan]:
        """Return every piece with its state and about how long it takes to make."""
        rows = [self._row("train", member.name, member.state, self.member_seconds(member)) for member in self.members]
        ensemble = self.ensemble_fingerprint(_with_a_second_fold(self.members))
        rows.append(self._row("combine", "ensemble", piece_state(self.run.ensemble_folder, ensemble), 60.0))
        teacher = ensemble if self.run.teacher_file is None else self.need_teacher()
        bundles = []
        for student in self.students:
            own = self.student_fingerprint(student, teacher)
            bundles.append(self.bundle_fingerprint(own))
            student_state = piece_state(self.run.student_folder(student.name), own)
            rows.append(self._row("distill", f"student {student.name}", student_state, self._student_seconds(student)))
            bundle_state = piece_state(self.run.bundle_folder(student.name), bundles[-1])
            rows.append(self._row("export", f"bundle {student.name}", bundle_state, 60.0))
        report_state = piece_state(self.run.report_folder, self.report_fingerprint(ensemble, bundles))
        rows.append(self._row("bench", "report", report_state, 60.0))
        logits = piece_state(self.run.logits_folder, self.logits_fingerprint(ensemble, bundles))
        rows.append(self._row("submit", "logits", logits, 30.0 * len(bundles)))
        if self.run.paths.test is not None:
            submissions = piece_state(self.run.submissions_folder, self.submissions_fingerprint(ensemble, bundles))
            rows.append(self._row("submit", "submissions", submissions, 5.0))
        return rows

    def _row(self, stage: Stage, name: str, piece: Piece, seconds: float | None) -> StagePlan:
        recorded = self.run.seconds.get(name, seconds)
        return StagePlan(
            stage=stage,
            name=name,
            state=piece.state,
            reason=piece.reason,
            seconds=0.0 if piece.is_done else recorded,
        )

    def _student_seconds(self, student: "StudentConfig") -> float | None:
        """Estimate by the share of the encoder's layers; the rows are nine tenths of train and the transfer texts.

        Where states or relations are matched, the whole encoder runs beside the student, forward alone.
        """
        speed = EXAMPLES_PER_SECOND.get(student.encoder)
        if speed is None:
            return None
        n_unlabeled = len(self.run.data.evaluation_texts.get("unlabeled", []))
        n_rows = 0.9 * len(self.run.data.train_texts) + min(student.transfer_texts, n_unlabeled)
        n_layers = KNOWN_ENCODERS[student.encoder].n_layers
        beside = n_layers / PREDICTION_SPEEDUP if student.hidden_weight or student.relation_weight else 0.0
        return n_rows * student.epochs / speed * (len(student.layers) + beside) / n_layers

    def member_seconds(self, member: MemberPlan) -> float | None:
        """Estimate how long the training of a member takes, from its siblings or the rows; None when unknown."""
        data, n_folds = self.run.data, self.run.settings.n_folds
        of_same_variant: list[float] = [
            seconds for name, seconds in self.run.seconds.items() if name.rpartition(" fold ")[0] == member.variant.name
        ]
        if of_same_variant:
            return max(of_same_variant)
        n_train = len(data.train_texts) * (n_folds - 1) / n_folds
        if member.variant.kind == "tfidf":
            return TFIDF_SECONDS_PER_THOUSAND_ROWS * n_train / 1000
        if member.variant.kind == "head":
            return HEAD_SECONDS_PER_THOUSAND_ROWS * n_train / 1000
        speed = EXAMPLES_PER_SECOND.get(member.variant.encoder)
        if speed is None:
            return None
        n_predicted = len(data.train_texts) - n_train + sum(len(texts) for texts in data.evaluation_texts.values())
        n_trained = n_train * (1 + member.variant.joined_texts) * member.variant.epochs
        return n_trained / speed + n_predicted / (speed * PREDICTION_SPEEDUP)

    @property
    def _all_folds(self) -> tuple[int, ...]:
        return tuple(range(self.run.settings.n_folds))

    @staticmethod
    def _encoder_of(variant: "VariantConfig") -> str:
        return "" if variant.kind == "tfidf" else encoder_identity(variant.encoder)


def _with_a_second_fold(members: Sequence[MemberPlan]) -> list[MemberPlan]:
    """Leave out variants of a single fold where others have more.

    Combining is judged on the rows that all predicted, by other folds than those it was fitted on.
    """
    n_folds = Counter(member.variant.name for member in members)
    needed = min(2, max(n_folds.values(), default=0))
    return [member for member in members if n_folds[member.variant.name] >= needed]


def encoder_identity(encoder: str) -> str:
    """Name an encoder by what it is: a known one or one of the hub by its name, a folder by its files' contents."""
    folder = Path(encoder).expanduser()
    if encoder in KNOWN_ENCODERS or not folder.is_dir():
        return encoder
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt"))
    return fingerprint({path.name: file_sha256(path) for path in files})
