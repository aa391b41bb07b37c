"""Students: what they are cut from, what they never see, and that they learn from logits."""

import json

import numpy as np
import pytest
from models import PIECES, write_encoder_folder
from tokenizers import Tokenizer

from emodistill.checkpoints import load_checkpoint, load_encoder_weights
from emodistill.distill.students import (
    STUDENT_PRESETS,
    StudentConfig,
    draw_transfer_rows,
    held_out_rows,
    student_start,
    train_student,
)
from emodistill.errors import ConfigError

LABELS = ("gratitude", "remorse")
WORD = "embeddings.word_embeddings.weight"


def rows(n):
    generator = np.random.default_rng(0)
    words = ["thank", "you", "sorry", "love", "great", "lol", "a"]
    texts = [" ".join(generator.choice(words, generator.integers(2, 7))) for _ in range(n)]
    labels = np.array([["thank" in text, "sorry" in text] for text in texts], np.int8)
    return texts, labels


def test_a_student_starts_from_the_chosen_layers(tmp_path):
    encoder = write_encoder_folder(tmp_path, n_layers=3)
    _, weights = load_encoder_weights(encoder)
    start = student_start(
        StudentConfig(layers=(0, 2), vocabulary_size=None, max_length_tokens=8), encoder, ["thank you"], LABELS
    )
    assert start.config.n_layers == 2
    np.testing.assert_array_equal(start.weights["layer.1.output.weight"], weights["layer.2.output.weight"])
    assert start.weights["embeddings.position_embeddings.weight"].shape == (8, 16)
    with pytest.raises(ConfigError, match="wants layer 3, but 'minilm-l6' has 3 layers"):
        student_start(StudentConfig(layers=(0, 3)), encoder, ["a"], LABELS)


def test_rare_pieces_are_cut_and_their_rows_follow(tmp_path):
    encoder = write_encoder_folder(tmp_path)
    _, weights = load_encoder_weights(encoder)
    # 8 pieces stay in any case: 5 special ones and the single characters ".", "a", "##s"; room for two more.
    student = StudentConfig(layers=(0,), vocabulary_size=10)
    start = student_start(student, encoder, ["sorry sorry sorry", "love love", "thank"], LABELS)
    tokenizer = Tokenizer.from_str(start.tokenizer_json)
    assert set(tokenizer.get_vocab()) == {*PIECES[:5], ".", "a", "##s", "sorry", "love"}
    row = start.weights[WORD][tokenizer.token_to_id("sorry")]
    np.testing.assert_array_equal(row, weights[WORD][PIECES.index("sorry")])
    assert tokenizer.encode("thank").tokens == ["[CLS]", "[UNK]", "[SEP]"]


def test_a_factorized_table_of_full_rank_is_exact(tmp_path):
    encoder = write_encoder_folder(tmp_path)
    _, weights = load_encoder_weights(encoder)
    start = student_start(StudentConfig(layers=(0,), vocabulary_size=None, embedding_size=13), encoder, ["a"], LABELS)
    # 14 rows around their mean have rank 13, so 13 directions hold all of them.
    rebuilt = start.weights[WORD] @ start.weights["embeddings.projection.weight"].T
    np.testing.assert_allclose(rebuilt + start.weights["embeddings.projection.bias"], weights[WORD], atol=1e-5)


def test_the_held_out_tenth_is_fixed_and_stratified():
    texts, labels = rows(400)
    held_out = held_out_rows(texts, labels)
    assert 30 <= len(held_out) <= 60
    np.testing.assert_array_equal(held_out, held_out_rows(texts, labels))
    assert np.abs(labels[held_out].mean(0) - labels.mean(0)).max() < 0.05


def test_a_student_learns_the_teacher_not_the_labels(tmp_path):
    pytest.importorskip("tensorflow")
    encoder = write_encoder_folder(tmp_path / "encoder")
    texts, labels = rows(300)
    teacher = np.where(labels[:, ::-1], 4.0, -4.0).astype(np.float32)  # says the opposite label
    student = StudentConfig(
        layers=(0, 1), vocabulary_size=None, epochs=6, batch_size=8, learning_rate=3e-3, hard_weight=0.0,
        distillation_temperature=1.0, dropout_rate=0.0, attention_dropout_rate=0.0, precision="float32",
    )  # fmt: skip
    train_student(
        student,
        encoder_dir=encoder,
        texts=texts,
        hard_targets=labels,
        soft_logits=teacher,
        transfer_texts=["thank you", "sorry a"],
        transfer_logits=np.array([[-4, 4], [4, -4]], np.float32),
        label_names=LABELS,
        evaluation_texts={"dev": ["thank you lol", "sorry great"]},
        work_dir=tmp_path / "student",
    )
    with np.load(tmp_path / "student" / "logits.npz") as saved:
        assert ((saved["dev"] > 0) == [[False, True], [True, False]]).all()
        np.testing.assert_array_equal(saved["held_out_rows"], held_out_rows(texts, labels))
        agreement = ((saved["held_out"] > 0) == (teacher[saved["held_out_rows"]] > 0)).mean()
    assert agreement > 0.9
    assert load_checkpoint(tmp_path / "student").label_names == LABELS


@pytest.mark.parametrize("compression", ["quantization_aware", "pruned", "clustered"])
def test_a_compressed_student_says_what_it_gained(tmp_path, compression):
    pytest.importorskip("tensorflow_model_optimization")
    encoder = write_encoder_folder(tmp_path / "encoder", hidden_size=32)
    texts, labels = rows(120)
    student = StudentConfig(
        layers=(0, 1), vocabulary_size=None, pooling="cls", epochs=6, batch_size=8, learning_rate=3e-3,
        precision="float32", compression=compression, sparsity=0.6, n_clusters=6,
    )  # fmt: skip
    folder = tmp_path / "student"
    train_student(
        student, encoder_dir=encoder, texts=texts, hard_targets=labels,
        soft_logits=np.where(labels, 4.0, -4.0).astype(np.float32), transfer_texts=["thank you"],
        transfer_logits=np.array([[4, -4]], np.float32), label_names=LABELS,
        evaluation_texts={"dev": ["thank you lol", "sorry great"]}, work_dir=folder,
    )  # fmt: skip
    gained = json.loads((folder / "compression.json").read_text())
    weights = load_checkpoint(folder).weights
    assert gained["compression"] == compression
    assert gained["sparsity"] == pytest.approx(0.6 if compression == "pruned" else 0.0, abs=0.01)
    assert (gained["distinct_values"] <= 6) == (compression == "clustered")
    if compression != "quantization_aware":
        assert gained["gzip_bytes_after"]["float16"] < 0.9 * gained["gzip_bytes_before"]["float16"]
    assert (folder / "activation_ranges.json").is_file() == (compression == "quantization_aware")
    assert len(np.unique(weights["layer.0.output.weight"])) <= gained["distinct_values"]
    with np.load(folder / "logits.npz") as saved:
        assert ((saved["dev"] > 0) == [[True, False], [False, True]]).all()
    assert not list(folder.glob("compression/checkpoint*"))


def test_teacher_logits_of_other_texts_are_refused(tmp_path):
    texts, labels = rows(30)
    with pytest.raises(ConfigError, match=r"the teacher's logits \(29 train, 0 transfer rows\) do not fit"):
        train_student(
            StudentConfig(), encoder_dir=tmp_path, texts=texts, hard_targets=labels,
            soft_logits=np.zeros((29, 2), np.float32), transfer_texts=[], transfer_logits=np.zeros((0, 2), np.float32),
            label_names=LABELS, evaluation_texts={}, work_dir=tmp_path,
        )  # fmt: skip


def test_a_table_of_settings_starts_from_its_preset():
    assert StudentConfig.from_mapping({"name": "nano", "epochs": 2}).layers == STUDENT_PRESETS["nano"].layers
    with pytest.raises(ConfigError, match="student setting 'depth' is unknown: known are "):
        StudentConfig.from_mapping({"name": "tiny", "depth": 3})
    for setting, value in (
        ("hard_weight", 2),
        ("hidden_weight", -1),
        ("compression", "zip"),
        ("sparsity", 1.0),
        ("epochs", 0),
        ("dropout_rate", 1),
        ("precision", "half"),
    ):
        with pytest.raises(ConfigError, match=rf"student 'tiny': {setting} = '?{value}'? is out of range"):
            StudentConfig(**{setting: value})


def test_transfer_rows_are_drawn_in_proportion_to_their_largest_probability() -> None:
    logits = np.log(np.array([[0.6 / 0.4, 0.01], [0.2 / 0.8, 0.01], [0.01, 0.2 / 0.8]])).astype(np.float32)
    assert draw_transfer_rows(logits, 3, seed=0).tolist() == draw_transfer_rows(logits, 9, seed=0).tolist() == [0, 1, 2]
    assert draw_transfer_rows(logits[:0], 9, seed=0).tolist() == []
    first = np.array([draw_transfer_rows(logits, 1, seed=seed)[0] for seed in range(4000)])
    shares = np.bincount(first, minlength=3) / len(first)
    # weights 0.6, 0.2, 0.2 add to 1; the standard error of a share of 0.6 in 4,000 draws is 0.008
    np.testing.assert_allclose(shares, [0.6, 0.2, 0.2], atol=0.03)
    both = draw_transfer_rows(logits, 2, seed=1)
    assert len(set(both.tolist())) == 2
    assert both.tolist() == draw_transfer_rows(logits, 2, seed=1).tolist()
