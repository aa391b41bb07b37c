"""The made-up members of the referee's timing: what they promise, and a small run through both stages."""

import numpy as np
import pytest

pytest.importorskip("scipy")

from emodistill.benchmarks.referee_time import LABEL_RATES, made_up_members, time_referee
from emodistill.metrics import micro_f1


def test_members_have_the_rates_and_get_worse_one_by_one() -> None:
    members, labels, fold_ids = made_up_members(3, 20_000)
    np.testing.assert_allclose(labels.mean(axis=0), LABEL_RATES, rtol=0.2)
    assert np.bincount(fold_ids).tolist() == [4000] * 5
    scores = [micro_f1(labels, member.oof >= 0) for member in members]
    assert scores[0] > scores[1] > scores[2] > 0.5


def test_both_stages_are_timed() -> None:
    seconds = time_referee(2, 400)
    assert list(seconds) == ["combine", "inspect"]
    for stage in seconds.values():
        assert stage["wall_s"] > 0
        assert stage["processor_s"] > 0
