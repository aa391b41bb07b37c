"""The count of multiply-adds in the profile, worked out by hand."""

import pytest

pytest.importorskip("onnx")

from emodistill.benchmarks.profile_graph import int8_multiply_adds
from emodistill.encoder_config import EncoderConfig


def test_multiply_adds_of_three_minilm_layers():
    config = EncoderConfig(
        family="bert", vocab_size=9, hidden_size=384, n_layers=3, n_heads=12, intermediate_size=1536, max_positions=9
    )
    # A layer: 4 x 384^2 + 2 x 384 x 1536 = 1,769,472 a token; 20 tokens and 3 layers.
    assert int8_multiply_adds(config, "mean", 20) == 3 * 20 * 1_769_472
    # The last layer's keys and values for 20 tokens (2 x 384^2 each), the rest for one.
    assert int8_multiply_adds(config, "cls", 20) == 2 * 20 * 1_769_472 + 20 * 294_912 + 1_474_560


def test_a_factorized_table_adds_its_projection():
    config = EncoderConfig(
        family="bert", vocab_size=9, hidden_size=8, n_layers=1, n_heads=2, intermediate_size=16, max_positions=9,
        embedding_size=4,
    )  # fmt: skip
    # 5 tokens: projection 5 x 4 x 8, layer 5 x (4 x 64 + 2 x 128).
    assert int8_multiply_adds(config, "mean", 5) == 160 + 5 * 512
