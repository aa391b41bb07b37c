"""The referee and the combination, on data in which it is known what should be kept."""

import json

import numpy as np
import pytest

from emodistill.ensemble.combination import Combination, MemberLogits, combine, combine_by_rules, fold_average_shift
from emodistill.ensemble.referee import RULES, Recipe, Referee, Verdict, render_steps
from emodistill.errors import ConfigError, InputError
from emodistill.metrics import micro_f1, parse_metric
from emodistill.thresholds import decide, sigmoid

N_ROWS, N_FOLDS = 3000, 5
NAMES = ("anger", "joy", "pride")
RATES = (0.25, 0.15, 0.05)


def truth_and_signal(seed: int = 0, n_rows: int = N_ROWS) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    generator = np.random.default_rng(seed)
    truth = (generator.random((n_rows, len(RATES))) < RATES).astype(np.int8)
    return truth, np.where(truth, 2.0, -3.0) + generator.normal(0, 1.2, truth.shape), generator


def make(*deviations: float, seed: int = 0, scale: float = 1.0) -> tuple[list[MemberLogits], np.ndarray, np.ndarray]:
    truth, signal, generator = truth_and_signal(seed)
    members = [
        MemberLogits(f"m{i}", (scale * (signal + generator.normal(0, sd, signal.shape))).astype(np.float32))
        for i, sd in enumerate(deviations)
    ]
    return members, truth, (np.arange(N_ROWS) % N_FOLDS).astype(np.int8)


def noise_member(name: str, seed: int = 7) -> MemberLogits:
    return MemberLogits(name, np.random.default_rng(seed).normal(-2, 2, (N_ROWS, len(NAMES))).astype(np.float32))


def step(combination: Combination, name: str):
    return next(s for s in combination.steps if s.name == name)


def test_members_that_are_equal_keep_to_the_simplest_weights() -> None:
    members, truth, folds = make(0.5)
    twins = [members[0], MemberLogits("twin", members[0].oof)]
    combination = combine(twins, truth, folds, NAMES)
    assert combination.recipe.weights == "uniform"
    np.testing.assert_allclose(combination.oof_logits, members[0].oof, rtol=1e-6)
    np.testing.assert_array_equal(combination.member_weights, 0.5)


def test_noise_is_weighed_down_and_the_gain_is_real() -> None:
    members, truth, folds = make(0.3)
    combination = combine([*members, noise_member("noise")], truth, folds, NAMES)
    kept = [s.name for s in combination.steps if s.kept]
    assert combination.recipe.weights in ("greedy", "shared", "per_label")
    assert "uniform" in kept
    assert combination.member_weights[0].min() > 0.9
    best = step(combination, combination.rule)
    assert best.gain is not None
    assert best.gain.low > 0
    # the price of forcing the simplest rule is what the steps gained
    forced = combine([*members, noise_member("noise")], truth, folds, NAMES, rule="uniform")
    assert forced.price is not None
    assert forced.price.high < 0
    assert forced.rule == "uniform"
    assert any("was forced" in note for note in forced.notes)


def test_good_members_of_one_kind_refuse_learned_weights() -> None:
    members, truth, folds = make(0.8, 0.8, 0.8)
    combination = combine(members, truth, folds, NAMES)
    assert combination.recipe.weights == "uniform"
    for name in ("greedy_weights", "shared_weights", "per_label_weights"):
        assert not step(combination, name).kept
        assert "includes 0" in step(combination, name).reason or "worse" in step(combination, name).reason


def test_badly_scaled_probabilities_keep_the_plug_in_threshold() -> None:
    truth, signal, _ = truth_and_signal()
    shifted = MemberLogits("shifted", (0.5 * signal - 1.0).astype(np.float32))  # 0.5 is far from the best threshold
    folds = (np.arange(N_ROWS) % N_FOLDS).astype(np.int8)
    combination = combine([shifted], truth, folds, NAMES)
    assert combination.rule == "shared_plug_in"
    assert len(set(combination.thresholds.tolist())) == 1
    assert "one member" in step(combination, "shared_weights").reason
    assert step(combination, "shared_weights").score is None
    cross_fitted = micro_f1(truth, combination.cross_fitted_decisions)
    assert cross_fitted == pytest.approx(step(combination, "shared_plug_in").score)
    assert cross_fitted > micro_f1(truth, decide(sigmoid(shifted.oof), 0.5)) + 0.02


def test_a_member_that_is_sure_and_wrong_keeps_the_mean_of_probabilities() -> None:
    truth, signal, generator = truth_and_signal()
    folds = (np.arange(N_ROWS) % N_FOLDS).astype(np.int8)
    calm = [MemberLogits(f"calm{i}", (0.7 * signal).astype(np.float32)) for i in range(3)]
    # Sure of everything and wrong in one of ten: in logits it outvotes the three others together, in probabilities not.
    wrong = generator.random(truth.shape) < 0.1
    loud = MemberLogits("loud", np.where(wrong == truth, -14.0, 14.0).astype(np.float32))
    combination = combine([*calm, loud], truth, folds, NAMES)
    gain = step(combination, "uniform_probabilities").gain
    assert gain is not None
    assert gain.low > 0
    assert step(combination, "shared_plug_in").space == "probabilities"  # on top of what was kept
    assert combination.recipe.space == combination.space
    forced = combine([*calm, loud], truth, folds, NAMES, rule="uniform_probabilities")
    mean = np.mean([sigmoid(member.oof) for member in (*calm, loud)], axis=0)
    np.testing.assert_allclose(forced.probabilities(forced.oof_logits), mean, atol=1e-5)
    again = Combination.from_json(json.loads(json.dumps(forced.to_json())))
    assert again.space == "probabilities"
    applied = again.apply({member.name: member.oof for member in (*calm, loud)}, fold_average=False)
    np.testing.assert_array_equal(applied, forced.oof_logits)


@pytest.mark.parametrize(
    ("n_rows", "n_better", "reason"),
    [(40_000, 8, "below 0.0005"), (400, 8, "only 8 rows"), (400, 20, "lies above 0")],
)
def test_a_gain_that_is_too_small_or_of_too_few_rows_is_refused(n_rows: int, n_better: int, reason: str) -> None:
    # Half of the rows are positive. At 0.5 n_better of them are missed, at the plug-in threshold none: with
    # h = n_rows / 2 the F1 goes from 2 (h - n_better) / (2 h - n_better) to 1. That is a gain of 8 / 40,000, 8 / 400
    # or 20 / 400, nearly; each interval lies above 0, as 8 rows are in all resamples but one in e^8 = 2981.
    truth = (np.arange(n_rows) % 2).astype(np.int8)[:, None]
    logits = np.where(truth, 4.0, -4.0).astype(np.float32)
    positives = np.flatnonzero(truth)
    logits[positives[np.linspace(0, len(positives) - 1, n_better).astype(int)]] = -0.3
    folds = (np.arange(n_rows) % 4 // 2).astype(np.int8)
    referee = Referee(logits[None], truth, folds, parse_metric("micro_f1"), 0)
    plug_in = next(s for s in referee.judge().steps if s.name == "shared_plug_in")
    assert plug_in.gain is not None
    assert plug_in.gain.low > 0
    assert plug_in.gain.difference == pytest.approx(1 - 2 * (n_rows / 2 - n_better) / (n_rows - n_better))
    assert reason in plug_in.reason
    assert plug_in.kept == (reason == "lies above 0")


def test_decisions_of_a_fold_do_not_depend_on_its_own_labels() -> None:
    members, truth, folds = make(0.5, 2.0)
    stack = np.stack([m.oof for m in members])
    changed = truth.copy()
    changed[folds == 2] = 1 - changed[folds == 2]
    for recipe in [*RULES.values(), Recipe("per_label", "per_label")]:
        first, second = (
            Referee(stack, labels, folds, parse_metric("micro_f1"), 0).cross_fit(recipe) for labels in (truth, changed)
        )
        np.testing.assert_array_equal(first[folds == 2], second[folds == 2])
    # and they do depend on the labels of the others
    assert (first != second).any()


def test_scores_on_pure_noise_are_not_better_than_chance() -> None:
    generator = np.random.default_rng(3)
    truth = (generator.random((400, 3)) < 0.25).astype(np.int8)
    members = [MemberLogits(f"m{i}", generator.normal(0, 1, truth.shape).astype(np.float32)) for i in range(4)]
    folds = (np.arange(400) % 5).astype(np.int8)
    combination = combine(members, truth, folds, NAMES, rule="per_label_weights")
    tuned = micro_f1(truth, combination.decide(combination.oof_logits))
    chance = 2 * 0.25 / 1.25  # all-yes: precision 0.25, recall 1
    assert micro_f1(truth, combination.cross_fitted_decisions) < chance + 0.03
    assert tuned > micro_f1(truth, combination.cross_fitted_decisions) - 0.03


@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_can_be_forced_and_survives_json(rule: str) -> None:
    members, truth, folds = make(0.4, 1.5)
    combination = combine(members, truth, folds, NAMES, rule=rule)
    assert combination.recipe == RULES[rule]
    np.testing.assert_allclose(combination.member_weights.sum(axis=0), 1)
    again = Combination.from_json(json.loads(json.dumps(combination.to_json())))
    assert again.to_json() == combination.to_json()
    logits = {m.name: m.oof for m in members}
    np.testing.assert_array_equal(again.apply(logits), combination.oof_logits)
    np.testing.assert_array_equal(again.decide(again.apply(logits)), combination.decide(combination.oof_logits))
    assert (combination.calibration is None) == (rule in ("uniform", "uniform_probabilities"))


def test_rules_together_are_what_each_is_alone() -> None:
    members, truth, folds = make(0.4, 1.5)
    together = combine_by_rules(members, truth, folds, NAMES)
    assert list(together) == ["auto", *RULES]
    for rule in ("auto", "shared_searched", "per_label_weights"):
        alone = combine(members, truth, folds, NAMES, rule=rule)
        assert together[rule].to_json() == alone.to_json()
        np.testing.assert_array_equal(together[rule].cross_fitted_decisions, alone.cross_fitted_decisions)
    assert together["auto"].price is None


def test_permuting_members_permutes_the_weights() -> None:
    members, truth, folds = make(0.4, 1.5, 1.0)
    straight = combine(members, truth, folds, NAMES, rule="shared_weights")
    permuted = combine(members[::-1], truth, folds, NAMES, rule="shared_weights")
    np.testing.assert_allclose(permuted.member_weights[::-1], straight.member_weights, atol=2e-3)


def test_a_member_of_some_folds_only_limits_the_rows_that_are_fitted() -> None:
    members, truth, folds = make(0.4, 0.6)
    partial = members[1].oof.copy()
    partial[folds >= 3] = np.nan
    combination = combine([members[0], MemberLogits("partial", partial)], truth, folds, NAMES)
    assert combination.n_fitted_rows == N_ROWS * 3 // 5
    assert set(folds[combination.cross_fitted_rows].tolist()) == {0, 1, 2}
    assert len(combination.cross_fitted_decisions) == combination.n_fitted_rows
    assert any("partial 3" in note for note in combination.notes)
    np.testing.assert_allclose(combination.oof_logits[folds >= 3], members[0].oof[folds >= 3], rtol=1e-6)
    both = (members[0].oof + members[1].oof) / 2
    if combination.recipe.weights == "uniform":
        np.testing.assert_allclose(combination.oof_logits[folds < 3], both[folds < 3], rtol=1e-5, atol=1e-6)


def test_one_fold_in_common_chooses_nothing() -> None:
    members, truth, folds = make(0.4, 0.6)
    first, second = members[0].oof.copy(), members[1].oof.copy()
    first[folds > 1] = np.nan
    second[(folds == 0) | (folds > 1)] = np.nan
    combination = combine([MemberLogits("a", first), MemberLogits("b", second)], truth, folds, NAMES)
    assert combination.rule == "uniform"
    assert [s.kept for s in combination.steps] == [True] + [False] * 7
    assert "needs two" in step(combination, "shared_plug_in").reason
    second[:] = np.nan
    second[folds == 4] = 0
    with pytest.raises(InputError, match="common fold"):
        combine([MemberLogits("a", first), MemberLogits("b", second)], truth, folds, NAMES)


@pytest.mark.parametrize("metric", ["macro_f1", "label:joy", "f_beta:0.5"])
def test_other_targets(metric: str) -> None:
    members, truth, folds = make(0.4, 1.5)
    combination = combine(members, truth, folds, NAMES, metric=metric)
    baseline = step(combination, "uniform").score
    assert baseline is not None
    assert step(combination, combination.rule).score >= baseline
    forced = combine(members, truth, folds, NAMES, metric=metric, rule="shared_plug_in")
    assert (len(set(forced.thresholds.tolist())) == 1) == (metric == "f_beta:0.5")  # the others: each label's own half


def test_precision_target_raises_thresholds() -> None:
    members, truth, folds = make(1.5)
    by_beta = [
        combine(members, truth, folds, NAMES, metric=f"f_beta:{beta}", rule="shared_plug_in").thresholds[0]
        for beta in (0.5, 1, 2)
    ]
    assert by_beta[0] > by_beta[1] > by_beta[2]


def test_an_absent_label_changes_nothing_for_the_others() -> None:
    members, truth, folds = make(0.4, 1.5)
    truth[:, 2] = 0
    combination = combine(members, truth, folds, NAMES)
    assert np.isfinite(combination.thresholds).all()
    assert np.isfinite(combination.member_weights).all()
    none = combine(members, np.zeros_like(truth), folds, NAMES)
    assert none.rule == "uniform"
    assert "no row is positive" in step(none, "shared_plug_in").reason
    json.dumps(none.to_json(), allow_nan=False)


def test_average_of_folds_is_brought_back_to_the_rate_of_one_fold() -> None:
    # one label, 8 texts. Each of two folds says 4 positives; their average says 2. Between the 4th and 5th highest
    # averages, -0.5 and -1.5, lies -1: a bias of 1 for all labels together and for this one alone.
    single = np.array([[4, 4, 1, 1, -3, -3, -6, -6], [4, 4, -2, -2, 0, 0, -6, -6]], float)[:, :, None]
    average = single.mean(axis=0)
    assert average.ravel().tolist() == [4, 4, -0.5, -0.5, -1.5, -1.5, -6, -6]
    shift = fold_average_shift(single, average)
    assert shift.single_fold_rate.tolist() == [0.5]
    assert shift.fold_average_rate.tolist() == [0.25]
    assert shift.is_corrected
    np.testing.assert_allclose(shift.bias, [1.0])
    assert shift.corrected_rate.tolist() == [0.5]
    same = fold_average_shift(np.repeat(average[None], 2, axis=0), average)
    assert not same.is_corrected
    np.testing.assert_array_equal(same.bias, 0)
    unlearned = fold_average_shift(single, average, is_learned=False)
    assert not unlearned.is_corrected
    np.testing.assert_array_equal(unlearned.bias, 0)
    assert "not learned" in unlearned.note


def with_folds(n_texts: int, fold_noise: float) -> tuple[list[MemberLogits], np.ndarray, np.ndarray, np.ndarray]:
    """One member whose folds differ by noise; its dev texts come with labels that only the test sees."""
    truth, signal, generator = truth_and_signal(1)
    dev_truth, dev_signal, _ = truth_and_signal(2, n_texts)
    oof = signal + generator.normal(0, fold_noise, signal.shape)
    by_fold = dev_signal + generator.normal(0, fold_noise, (N_FOLDS, *dev_signal.shape))
    member = MemberLogits(
        "m",
        oof.astype(np.float32),
        {"dev": by_fold.mean(axis=0).astype(np.float32)},
        {"dev": by_fold.astype(np.float32)},
    )
    return [member], truth, (np.arange(N_ROWS) % N_FOLDS).astype(np.int8), dev_truth


def test_correcting_the_average_helps_on_new_texts() -> None:
    members, truth, folds, dev_truth = with_folds(20_000, fold_noise=1.5)
    combination = combine(members, truth, folds, NAMES, rule="shared_plug_in")
    average = members[0].evaluation["dev"]
    corrected = micro_f1(dev_truth, combination.decide(combination.apply({"m": average})))
    plain = micro_f1(dev_truth, combination.decide(combination.apply({"m": average}, fold_average=False)))
    assert combination.shift is not None
    assert combination.shift.is_corrected
    assert corrected > plain + 0.003
    assert any("without labels" in note for note in combination.notes)
    rates = combination.shift.corrected_rate - combination.shift.single_fold_rate
    assert np.abs(rates).max() < 0.005
    uniform = combine(members, truth, folds, NAMES, rule="uniform")
    assert uniform.shift is not None
    assert not uniform.shift.is_corrected


def test_thresholds_per_label_fall_back_where_the_average_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Verdict(name="per_label_thresholds", recipe=RULES["per_label_thresholds"], steps=())
    monkeypatch.setattr(Referee, "judge", lambda self: kept)
    members, truth, folds = make(0.5)
    oof = members[0].oof
    unmeasured = combine(members, truth, folds, NAMES)
    assert unmeasured.recipe == RULES["shared_plug_in"]
    assert unmeasured.rule == "shared_plug_in"
    assert len(set(unmeasured.thresholds.tolist())) == 1
    assert any("fall back" in note for note in unmeasured.notes)
    forced = combine(members, truth, folds, NAMES, rule="per_label_thresholds")
    assert forced.recipe == RULES["per_label_thresholds"]  # who forces a rule gets it
    by_fold = np.repeat(oof[None], 2, axis=0)
    measured = combine([MemberLogits("m0", oof, {"dev": oof}, {"dev": by_fold}, (0, 1))], truth, folds, NAMES)
    assert measured.rule == "per_label_thresholds"
    assert len(set(measured.thresholds.tolist())) == 3
    assert measured.shift is not None
    assert "within noise" in measured.shift.note  # both folds say what their average says
    one_fold = oof.copy()
    one_fold[folds > 0] = np.nan
    single = combine([MemberLogits("m0", one_fold)], truth, folds, NAMES)  # nothing is averaged: nothing to fear
    assert single.rule == "per_label_thresholds"


def test_the_test_set_is_never_used_to_measure() -> None:
    members, truth, folds, _ = with_folds(200, fold_noise=1.5)
    member = members[0]
    renamed = MemberLogits(
        "m", member.oof, {"test": member.evaluation["dev"]}, {"test": member.evaluation_by_fold["dev"]}
    )
    assert combine([renamed], truth, folds, NAMES).shift is None


def test_same_seed_same_combination() -> None:
    members, truth, folds = make(0.4, 1.5)
    first, second = (combine(members, truth, folds, NAMES, seed=3).to_json() for _ in range(2))
    assert first == second


def test_table_of_steps_says_what_was_kept() -> None:
    members, truth, folds = make(0.3)
    combination = combine([*members, noise_member("noise")], truth, folds, NAMES)
    lines = render_steps(combination.steps).splitlines()
    assert len(lines) == 2 + len(RULES)
    assert all(name in line for name, line in zip(RULES, lines[2:], strict=True))
    assert "kept" in lines[2]
    assert any("refused" in line for line in lines)


def test_what_does_not_fit_is_refused() -> None:
    members, truth, folds = make(0.4, 0.6)
    with pytest.raises(ConfigError, match="auto, uniform"):
        combine(members, truth, folds, NAMES, rule="best")
    with pytest.raises(InputError, match="same name"):
        combine([members[0], members[0]], truth, folds, NAMES)
    with pytest.raises(InputError, match="no member"):
        combine([], truth, folds, NAMES)
    with pytest.raises(InputError, match="do not fit"):
        combine(members, truth[:-1], folds[:-1], NAMES)
    with pytest.raises(InputError, match=r"m0 \(3000, 3\), short \(2, 3\)"):
        combine([members[0], MemberLogits("short", members[1].oof[:2])], truth, folds, NAMES)
    combination = combine(members, truth, folds, NAMES, rule="uniform")
    with pytest.raises(InputError, match="member m1"):
        combination.apply({"m0": members[0].oof})
