"""Token ids against the written cases, and the laws that encode and shrink_vocabulary keep.

Ids by hand come from line numbers of cases/D18_vocab.txt, counted from 0: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3,
[MASK] 4, "." 7, thank 17, you 19, so 20, a 35, x 51, ##x 52, 😂 56.
"""

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from emodistill.errors import ConfigError, EncoderError, InputError
from emodistill.tokenization import encode, load_tokenizer, shrink_vocabulary

CASES = Path(__file__).parent / "cases"
FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
UNK, CLS, SEP, MASK, THANK, YOU, X, CONTINUED_X = 1, 2, 3, 4, 17, 19, 51, 52


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(CASES / "D18_vocab.txt", folder / "vocab.txt")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def ids(tokenizer, *texts, max_length_tokens=512):
    return [row.tolist() for row in encode(tokenizer, list(texts), max_length_tokens)]


@pytest.mark.parametrize("case", ["D18_expected.json", "D19_expected.json"])
def test_accents_case_and_typed_special_tokens_give_the_expected_ids(tokenizer, case):
    rows = json.loads((CASES / case).read_text(encoding="utf-8"))
    assert ids(tokenizer, *(row["text"] for row in rows)) == [row["ids"] for row in rows]


def test_texts_without_tokens_give_the_two_enclosing_ones(tokenizer):
    with (CASES / "D20_empty_texts.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    assert len(texts) == 8
    assert ids(tokenizer, *texts) == [[CLS, SEP]] * 5 + [[CLS, UNK, SEP], [CLS, 7, SEP], [CLS, THANK, YOU, SEP]]


def test_long_texts_are_cut_before_the_closing_token(tokenizer):
    with (CASES / "D21_long.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["id"]: row["text"] for row in csv.DictReader(file)}
    for max_length_tokens in (3, 64, 512):
        for row in encode(tokenizer, list(rows.values()), max_length_tokens):
            assert len(row) <= max_length_tokens
            assert (row[0], row[-1]) == (CLS, SEP)
    got = dict(zip(rows, ids(tokenizer, *rows.values()), strict=True))
    assert got["words600"] == got["words600_tail"] == [CLS, *[THANK] * 510, SEP]
    assert got["words510"] == [CLS, *[THANK] * 510, SEP]  # 512 ids: exactly full, nothing cut
    assert got["words509"] == [CLS, *[THANK] * 509, SEP]
    assert got["word101"] == [CLS, UNK, SEP]  # over 100 characters a word is one unknown
    assert got["word100"] == [CLS, X, *[CONTINUED_X] * 99, SEP]


def test_a_typed_closing_token_does_not_confuse_the_cut(tokenizer):
    # ids before the cut: [CLS] thank [SEP] you you [SEP]
    assert ids(tokenizer, "thank [SEP] you you", max_length_tokens=4) == [[CLS, THANK, SEP, SEP]]
    assert ids(tokenizer, "thank [SEP] you you", max_length_tokens=5) == [[CLS, THANK, SEP, YOU, SEP]]


def test_half_a_surrogate_pair_counts_as_the_replacement_character(tokenizer):
    # json.loads makes such strings; BERT's cleaning drops U+FFFD. A whole pair is the character it stands for.
    assert ids(tokenizer, "thank \ud83d you", "thank you\udc00") == [[CLS, THANK, YOU, SEP]] * 2
    assert ids(tokenizer, "\ud83d\ude02", "😂", "a\ud83d") == [[CLS, 56, SEP], [CLS, 56, SEP], [CLS, 35, SEP]]


def test_nul_and_control_characters_are_dropped_not_the_rest_of_the_text(tokenizer):
    assert ids(tokenizer, "thank\0 you", "\x07thank you\x1b") == [[CLS, THANK, YOU, SEP]] * 2


@pytest.mark.parametrize("seed", range(20))
def test_a_batch_equals_its_rows_and_keeps_within_the_length(tokenizer, seed):
    rng = np.random.default_rng(seed)
    alphabet = [
        "thank",
        "you",
        " ",
        " ",
        "x",
        "[SEP]",
        "é",
        "İ",
        "ﬁ",
        "😂",
        "爱",
        "\n",
        "\0",
        "\ud83d",
        "ZZ",
        "'",
        "<s>",
    ]
    texts = ["".join(rng.choice(alphabet, rng.integers(0, 20))) for _ in range(8)]
    max_length_tokens = int(rng.integers(3, 13))
    for text, row in zip(texts, encode(tokenizer, texts, max_length_tokens), strict=True):
        assert row.dtype == np.int32
        whole = encode(tokenizer, [text], 512)[0]
        np.testing.assert_array_equal(row, encode(tokenizer, [text], max_length_tokens)[0])
        assert len(row) == min(len(whole), max_length_tokens)
        assert row.tolist() == [*whole[: len(row) - 1], SEP]


def test_sixteen_threads_get_the_sequential_ids(tokenizer):
    texts = ["thank you " * n for n in range(1, 65)]
    expected = [ids(tokenizer, text, max_length_tokens=8 + i) for i, text in enumerate(texts)]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(10):
            got = pool.map(lambda i: ids(tokenizer, texts[i], max_length_tokens=8 + i), range(len(texts)))
            assert list(got) == expected


@pytest.mark.parametrize("wrong", [None, float("nan"), 3, ("thank", "you")])
def test_what_is_no_text_is_refused_by_its_place(tokenizer, wrong):
    with pytest.raises(InputError, match=r"texts\[1\] is a \w+, not a string"):
        encode(tokenizer, ["thank you", wrong], 16)


def test_a_single_string_and_a_length_without_room_are_refused(tokenizer):
    with pytest.raises(InputError, match="put it in a list"):
        encode(tokenizer, "thank you", 16)
    with pytest.raises(ConfigError, match="max_length_tokens is 2"):
        encode(tokenizer, ["thank you"], 2)


def test_padding_and_truncation_of_the_file_are_taken_off(tokenizer, tmp_path):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_padding(length=16)
    other.enable_truncation(4)
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.padding, loaded.truncation) == (None, None)
    assert ids(loaded, "thank you so good") == [[CLS, THANK, YOU, 20, 55, SEP]]


def test_settings_beside_the_vocabulary_are_obeyed(folder, tmp_path):
    # vocab.txt alone lower-cases; with do_lower_case false "Thank" is unknown and the accent stays.
    shutil.copy(folder / "vocab.txt", tmp_path / "vocab.txt")
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps({"do_lower_case": False}), encoding="utf-8")
    assert ids(load_tokenizer(tmp_path), "Thank you café") == [[CLS, UNK, YOU, UNK, SEP]]
    settings_file.write_text(json.dumps({"do_lower_case": False, "strip_accents": True}), encoding="utf-8")
    assert ids(load_tokenizer(tmp_path), "Thank you café") == [[CLS, UNK, YOU, 13, SEP]]
    # The same settings override a tokenizer.json beside them, as transformers' fast tokenizers do.
    load_tokenizer(folder).save(str(tmp_path / "tokenizer.json"))
    assert ids(load_tokenizer(tmp_path), "Thank you café") == [[CLS, UNK, YOU, 13, SEP]]


def test_a_vocabulary_with_unicode_line_ends_or_crlf_keeps_its_numbers(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2028", "\x85", "thank"]
    for line_end in ("\n", "\r\n"):
        (tmp_path / "vocab.txt").write_bytes((line_end.join(pieces) + line_end).encode())
        assert ids(load_tokenizer(tmp_path), "thank") == [[2, 6, 3]]


def test_added_tokens_of_an_old_checkpoint_are_kept(folder, tmp_path):
    n_pieces = len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
    shutil.copy(folder / "vocab.txt", tmp_path / "vocab.txt")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[NAME]": n_pieces}), encoding="utf-8")
    assert ids(load_tokenizer(tmp_path), "thank you [NAME]!") == [[CLS, THANK, YOU, n_pieces, 9, SEP]]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[NAME]": n_pieces + 1}), encoding="utf-8")
    with pytest.raises(EncoderError, match=r"numbers '\[NAME\]'"):
        load_tokenizer(tmp_path)


def test_folders_without_a_usable_tokenizer_are_refused(folder, tmp_path):
    with pytest.raises(EncoderError, match=r"holds no tokenizer: expected tokenizer\.json, vocab\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[SEP]\nthank\n", encoding="utf-8")
    with pytest.raises(EncoderError, match=r"lacks the special token '\[CLS\]'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ', encoding="utf-8")
    with pytest.raises(EncoderError, match=r"tokenizer\.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Abacus"}}', encoding="utf-8")
    with pytest.raises(EncoderError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
    spec = json.loads(load_tokenizer(folder).to_str()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(EncoderError, match="adds 0 tokens to a text"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("family", ["mpnet", "roberta"])
def test_other_families_give_the_ids_of_their_hugging_face_tokenizers(family):
    rows = json.loads((FIXTURES / family / "expected.json").read_text(encoding="utf-8"))
    assert ids(load_tokenizer(FIXTURES / family), *(row["text"] for row in rows)) == [row["ids"] for row in rows]


class TestShrinkVocabulary:
    TEXTS = ("thank you", "Café, thank you so!", "don't", "thanks [SEP] sorry", "[MASK] thanks[PAD]", "stra", "")

    def test_kept_texts_encode_to_the_mapped_ids(self, tokenizer):
        old_rows = encode(tokenizer, self.TEXTS, 32)
        keep = {int(i) for row in old_rows for i in row}
        text, old_ids = shrink_vocabulary(tokenizer.to_str(), keep)
        small = Tokenizer.from_str(text)
        assert len(old_ids) == small.get_vocab_size() < tokenizer.get_vocab_size()
        for old_row, new_row in zip(old_rows, encode(small, self.TEXTS, 32), strict=True):
            np.testing.assert_array_equal(old_ids[new_row], old_row)

    def test_every_piece_keeps_its_own_row(self, tokenizer):
        text, old_ids = shrink_vocabulary(tokenizer.to_str(), [THANK, YOU])
        old, new = tokenizer.get_vocab(), Tokenizer.from_str(text).get_vocab()
        assert {piece: int(old_ids[i]) for piece, i in new.items()} == {piece: old[piece] for piece in new}
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        singles = [piece for piece in old if len(piece.removeprefix("##")) == 1]
        assert sorted(new) == sorted({*specials, *singles, "thank", "you"})
        assert old_ids.dtype == np.int32

    def test_a_word_that_was_cut_is_spelled_not_unknown(self, folder, tmp_path):
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "d", "go", "##o", "##d"]
        (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
        text, old_ids = shrink_vocabulary(load_tokenizer(tmp_path).to_str(), [6])
        assert old_ids.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
        # good -> go ##o ##d, now at places 5, 6, 7
        assert ids(Tokenizer.from_str(text), "good") == [[2, 5, 6, 7, 3]]

    @pytest.mark.parametrize("processor", ["TemplateProcessing", "BertProcessing", "RobertaProcessing", "Sequence"])
    def test_enclosing_tokens_follow_their_new_numbers(self, tmp_path, processor):
        pieces = ["drop", "[PAD]", "[UNK]", "[CLS]", "cut", "[SEP]", "thank"]
        (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
        spec = json.loads(load_tokenizer(tmp_path).to_str())
        ends = {"sep": ["[SEP]", 5], "cls": ["[CLS]", 3]}
        roberta = {"type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": False, **ends}
        template = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        template.append({"SpecialToken": {"id": "[SEP]", "type_id": 0}})
        spec["post_processor"] = {
            "TemplateProcessing": {
                "type": "TemplateProcessing",
                "single": template,
                "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {
                    name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (("[CLS]", 3), ("[SEP]", 5))
                },
            },
            "BertProcessing": {"type": "BertProcessing", **ends},
            "RobertaProcessing": roberta,
            "Sequence": {"type": "Sequence", "processors": [roberta]},
        }[processor]
        assert ids(Tokenizer.from_str(json.dumps(spec)), "thank") == [[3, 6, 5]]
        text, old_ids = shrink_vocabulary(json.dumps(spec), [6])
        assert old_ids.tolist() == [1, 2, 3, 5, 6]
        assert ids(Tokenizer.from_str(text), "thank [UNK]") == [[2, 4, 1, 3]]

    def test_ids_outside_and_other_tokenizers_are_refused(self, tokenizer):
        with pytest.raises(EncoderError, match="id 9000 is not in the tokenizer's vocabulary"):
            shrink_vocabulary(tokenizer.to_str(), [THANK, 9000])
        with pytest.raises(EncoderError, match="vocabulary of a BPE tokenizer cannot be cut"):
            shrink_vocabulary(json.dumps({"model": {"type": "BPE"}}), [1])
