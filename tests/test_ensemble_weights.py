"""Member weights: laws that any averaging obeys, and data in which the right weights are known."""

import numpy as np
import pytest
import threadpoolctl

from emodistill.ensemble import weights as weights_module
from emodistill.ensemble.weights import (
    average_logits,
    greedy_weights,
    selection_order,
    stacked_weights,
    uniform_weights,
)
from emodistill.errors import InputError
from emodistill.metrics import micro_f1, parse_metric
from emodistill.thresholds import decide, probabilities_to_logits, search_shared_threshold, sigmoid

MICRO = parse_metric("micro_f1")


def signal(seed: int = 0, n_rows: int = 3000, rates: tuple[float, ...] = (0.3, 0.2, 0.1)) -> tuple:
    """Return labels, and logits that are right but for a noise of one logit."""
    generator = np.random.default_rng(seed)
    truth = (generator.random((n_rows, len(rates))) < rates).astype(np.int8)
    logits = np.where(truth, 1.5, -2.0) + generator.normal(0, 1.0, truth.shape)
    return truth, logits, generator


def noisy_members(*deviations: float) -> tuple[np.ndarray, np.ndarray]:
    truth, logits, generator = signal()
    members = [logits + generator.normal(0, deviation, logits.shape) for deviation in deviations]
    return np.stack(members).astype(np.float32), truth


def test_weighted_mean_by_hand() -> None:
    stack = np.array([[[1.0, 4.0]], [[3.0, 0.0]]], np.float32)
    weights = np.array([[0.25, 0.5], [0.75, 0.5]])
    # 0.25*1 + 0.75*3 = 2.5; 0.5*4 + 0.5*0 = 2
    np.testing.assert_allclose(average_logits(stack, weights), [[2.5, 2.0]])


def test_missing_members_leave_their_weight_to_those_present() -> None:
    nan = np.nan
    stack = np.array([[[1.0], [nan], [nan], [2.0]], [[3.0], [3.0], [nan], [nan]], [[5.0], [6.0], [nan], [4.0]]])
    weights = np.array([[0.5], [0.5], [0.0]])
    # row 0: (1 + 3) / 2; row 1: only the second has weight; row 2: nobody; row 3: only the first has weight
    np.testing.assert_allclose(average_logits(stack.astype(np.float32), weights), [[2.0], [3.0], [nan], [2.0]])
    # where all that predicted have weight 0, their plain mean
    unweighted = average_logits(stack[1:, 3:].astype(np.float32), np.array([[1.0], [0.0]]))
    np.testing.assert_allclose(unweighted, [[4.0]])


@pytest.mark.parametrize("n_members", [1, 3])
def test_equal_members_average_to_themselves_under_all_weights(n_members: int) -> None:
    truth, logits, _ = signal()
    stack = np.repeat(logits[None].astype(np.float32), n_members, axis=0)
    every = [
        uniform_weights(n_members, 3),
        greedy_weights(stack, truth, MICRO, n_rounds=4),
        stacked_weights(stack, truth),
        stacked_weights(stack, truth, per_label=True),
    ]
    for weights in every:
        assert weights.shape == (n_members, 3)
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(axis=0), 1)
        np.testing.assert_allclose(average_logits(stack, weights), stack[0], rtol=1e-5)
    np.testing.assert_allclose(stacked_weights(stack, truth), 1 / n_members, atol=1e-6)


@pytest.mark.parametrize("per_label", [False, True])
def test_permuting_members_permutes_weights(per_label: bool) -> None:
    stack, truth = noisy_members(0.5, 1.0, 3.0)
    order = [2, 0, 1]
    straight = stacked_weights(stack, truth, per_label=per_label)
    permuted = stacked_weights(stack[order], truth, per_label=per_label)
    np.testing.assert_allclose(permuted, straight[order], atol=2e-3)
    greedy = greedy_weights(stack, truth, MICRO)
    np.testing.assert_allclose(greedy_weights(stack[order], truth, MICRO), greedy[order])


def test_stacking_finds_the_weights_that_generated_the_labels() -> None:
    generator = np.random.default_rng(0)
    stack = generator.normal(0, 2, (3, 40_000, 1)).astype(np.float32)
    logits = 1.5 * stack[0] + 0.5 * stack[1] - 1.0  # weights 0.75, 0.25, 0 of a scale of 2
    truth = (generator.random(logits.shape) < sigmoid(logits)).astype(np.int8)
    weights = stacked_weights(stack, truth, shared_strength=0.0)
    np.testing.assert_allclose(weights[:, 0], [0.75, 0.25, 0.0], atol=0.02)


def test_noise_gets_little_weight_and_the_better_member_most() -> None:
    stack, truth = noisy_members(0.3, 2.0, 2.0)
    stack[2] = np.random.default_rng(9).normal(0, 2, stack[2].shape)  # knows nothing
    stacked, greedy = stacked_weights(stack, truth), greedy_weights(stack, truth, MICRO)
    for weights in (stacked, greedy):
        assert weights[0, 0] > 0.8
        assert weights[2, 0] < 0.06  # greedy selection picks it by chance once in about 20 rounds
        assert (weights == weights[:, :1]).all()  # shared by all labels


def test_strength_draws_towards_uniform_and_labels_towards_shared() -> None:
    stack, truth = noisy_members(0.3, 2.0)
    np.testing.assert_allclose(stacked_weights(stack, truth, shared_strength=1e9), 0.5, atol=1e-3)
    shared = stacked_weights(stack, truth)
    drawn = stacked_weights(stack, truth, per_label=True, label_strength=1e9)
    np.testing.assert_allclose(drawn, shared, atol=1e-3)


def test_per_label_weights_find_who_is_good_at_what() -> None:
    stack, truth = noisy_members(0.3, 0.3)
    noise = np.random.default_rng(1).normal(0, 2, stack.shape[1:]).astype(np.float32)
    stack[0, :, 0], stack[1, :, 1] = noise[:, 0], noise[:, 1]  # the first is blind for label 0, the second for label 1
    weights = stacked_weights(stack, truth, per_label=True)
    assert weights[0, 0] < 0.1
    assert weights[1, 1] < 0.1
    truth[:, 2] = 0
    absent = stacked_weights(stack, truth, per_label=True)
    np.testing.assert_allclose(absent[:, 2], stacked_weights(stack, truth)[:, 2])


def test_greedy_selection_is_at_least_as_good_as_the_best_member() -> None:
    stack, truth = noisy_members(0.5, 0.6, 0.7, 4.0)

    def best(logits: np.ndarray) -> float:
        probabilities = sigmoid(logits)
        return micro_f1(truth, decide(probabilities, search_shared_threshold(truth, probabilities)))

    combined = best(average_logits(stack, greedy_weights(stack, truth, MICRO)))
    assert combined > max(best(member) for member in stack)


def test_selection_order_starts_with_the_best_and_ends_with_noise() -> None:
    stack, truth = noisy_members(2.0, 0.3, 1.0)
    stack[0] = np.random.default_rng(9).normal(0, 2, stack[0].shape)
    assert selection_order(stack, truth, MICRO) == [1, 2, 0]


def test_nan_and_misfitting_shapes_are_refused() -> None:
    stack, truth = noisy_members(0.3, 2.0)
    stack[0, 5] = np.nan
    with pytest.raises(InputError, match="without NaN"):
        stacked_weights(stack, truth)
    with pytest.raises(InputError, match=r"truth \(2999, 3\)"):
        greedy_weights(np.zeros((2, 3000, 3), np.float32), truth[:-1], MICRO)


def test_probabilities_become_finite_logits() -> None:
    logits = probabilities_to_logits([0.0, 0.25, 1.0])
    np.testing.assert_allclose(logits, [-13.8155, np.log(1 / 3), 13.8155], atol=1e-3)
    np.testing.assert_allclose(sigmoid(probabilities_to_logits([0.1, 0.9])), [0.1, 0.9], rtol=1e-6)


def test_mean_of_probabilities_by_hand() -> None:
    # sigmoid(ln 3) = 0.75 and sigmoid(-ln 3) = 0.25. Plain: (0.75 + 0.25) / 2 = 0.5, logit 0. With weights 0.2 and 0.8:
    # 0.15 + 0.2 = 0.35
    stack = np.log(3.0) * np.array([[[1.0, 1.0]], [[-1.0, -1.0]]], np.float32)
    weights = np.array([[0.5, 0.2], [0.5, 0.8]])
    averaged = average_logits(stack.astype(np.float32), weights, space="probabilities")
    np.testing.assert_allclose(sigmoid(averaged), [[0.5, 0.35]], rtol=1e-5)
    # a sure member counts for no more than its probability: 0.5 * 1 + 0.5 * 0.1 = 0.55, where logits would say 0.999
    sure = np.array([[[20.0]], [[np.log(0.1 / 0.9)]]], np.float32)
    np.testing.assert_allclose(
        sigmoid(average_logits(sure, weights[:, :1], space="probabilities")), [[0.55]], rtol=1e-4
    )
    assert sigmoid(average_logits(sure, weights[:, :1]))[0, 0] > 0.999
    sure[0] = np.nan
    np.testing.assert_allclose(sigmoid(average_logits(sure, weights[:, :1], space="probabilities")), [[0.1]], rtol=1e-4)


def test_stacking_uses_one_thread_of_blas_and_gives_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def blas_threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]

    seen: list[list[int]] = []
    fit = weights_module.minimize

    def watch(*arguments: object, **options: object) -> object:
        seen.append(blas_threads())
        return fit(*arguments, **options)

    monkeypatch.setattr(weights_module, "minimize", watch)
    stack, truth = noisy_members(0.3, 2.0)
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        if not blas_threads() or max(blas_threads()) < 2:
            pytest.skip("this BLAS has one thread only")
        stacked_weights(stack, truth)
        assert max(blas_threads()) == 2
    assert max(seen[0]) == 1
