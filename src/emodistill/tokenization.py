"""Texts to token ids, the same ids on every path: training, export, Python runtime.

A tokenizer is a `tokenizers.Tokenizer` on which neither padding nor truncation is ever set: those settings belong to
the object and not to a call, and changing them while another thread encodes fails ("Already borrowed"). Cutting
happens here, on the ids.

One rule for special tokens that a user types: they are control tokens, as the Hugging Face fast tokenizers have it.
"[SEP]" inside a message is the closing token's id; "[sep]" and "[NAME]" are ordinary pieces.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from emodistill.errors import ConfigError, EncoderError, InputError

__all__ = ["encode", "load_tokenizer", "shrink_vocabulary"]

_TOKENIZER_FILES = "tokenizer.json, vocab.txt, or vocab.json with merges.txt"

# Special tokens by family of tokenizer, where tokenizer_config.json does not name others.
_BERT_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_MPNET_SPECIALS = {
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "[UNK]",
    "mask_token": "<mask>",
}
_ROBERTA_SPECIALS = _MPNET_SPECIALS | {"unk_token": "<unk>"}

# Settings of tokenizer_config.json that override those of tokenizer.json's BertNormalizer.
_NORMALIZER_KEYS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Load the tokenizer of an encoder, checkpoint or bundle folder, without padding and truncation.

    Parameters
    ----------
    folder
        Holds tokenizer.json; or vocab.txt (the WordPiece of BERT, DistilBERT and MPNet; lower-casing and accents as
        tokenizer_config.json says, else lower-cased); or vocab.json and merges.txt (RoBERTa's byte-level BPE).

    Returns
    -------
    tokenizers.Tokenizer
        Puts one token before and one after every text.

    Raises
    ------
    EncoderError
        If there are no tokenizer files, one is damaged, or the tokenizer does not enclose a text in two tokens.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = _tokenizer_from_json(folder / "tokenizer.json", settings)
    elif (folder / "vocab.txt").is_file():
        tokenizer = _build_wordpiece(folder, settings)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = _build_byte_level_bpe(folder, settings)
    else:
        raise EncoderError(f"{folder} holds no tokenizer: expected {_TOKENIZER_FILES}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    n_enclosing = len(tokenizer.encode("").ids)
    if n_enclosing != 2:
        raise EncoderError(
            f"the tokenizer in {folder} adds {n_enclosing} tokens to a text, not one before and one after it: "
            "use the tokenizer of a bert, distilbert, roberta or mpnet encoder"
        )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], max_length_tokens: int) -> list[NDArray[np.int32]]:
    """Turn texts into token ids, enclosing tokens included.

    Safe to call from many threads on one tokenizer: it sets nothing on it.

    Parameters
    ----------
    tokenizer
        From `load_tokenizer`.
    texts
        Any strings, empty ones too; a text without tokens gives the two enclosing tokens. Half a surrogate pair
        (possible in JSON escapes) counts as U+FFFD, the replacement character.
    max_length_tokens
        At least 3. Longer rows are cut; the closing token stays their last.

    Returns
    -------
    list of int32 arrays
        One per text, in order, of shape (n_tokens,) with 2 <= n_tokens <= max_length_tokens.

    Raises
    ------
    ConfigError
        If `max_length_tokens` is below 3.
    InputError
        If `texts` is a single string or holds something that is not a string.
    """
    if max_length_tokens < 3:
        raise ConfigError(f"max_length_tokens is {max_length_tokens}: at least 3 are needed to hold one token of text")
    if isinstance(texts, str):
        raise InputError("texts is a single string: put it in a list")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"texts[{i}] is a {type(text).__name__}, not a string: convert or leave out such rows")
    try:
        encodings = _encodings(tokenizer, texts)
    except (TypeError, UnicodeEncodeError):  # no UTF-8 for half a surrogate pair
        encodings = _encodings(tokenizer, [_without_half_surrogates(text) for text in texts])
    return [_cut(encoding.ids, max_length_tokens) for encoding in encodings]


def shrink_vocabulary(tokenizer_json: str, keep_ids: Iterable[int]) -> tuple[str, NDArray[np.int32]]:
    """Cut a WordPiece vocabulary to the pieces that are needed, and number them anew.

    Special tokens and pieces of a single character stay in any case, so that a word whose pieces were cut is spelled
    with shorter ones instead of becoming unknown. A text all of whose pieces are kept gets the same pieces as before:
    matching is greedy, longest first, and the longest match is still there. (A word that was unknown before is promised
    nothing: shorter pieces may now spell it.)

    Parameters
    ----------
    tokenizer_json
        Content of tokenizer.json.
    keep_ids
        Ids to keep, in any order, repeats allowed.

    Returns
    -------
    new_tokenizer_json
        The same tokenizer over the smaller vocabulary, padding and truncation taken out.
    old_ids
        int32 array of shape (new_vocab_size,), ascending: row i of the new embedding is row ``old_ids[i]`` of the old.

    Raises
    ------
    EncoderError
        If the tokenizer is not a WordPiece, or an id is not in its vocabulary.
    """
    spec = _parse_json_object(tokenizer_json, "the tokenizer")
    kind = (spec.get("model") or {}).get("type")
    if kind != "WordPiece":
        raise EncoderError(f"the vocabulary of a {kind} tokenizer cannot be cut, only that of WordPiece: keep it whole")
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    added: list[dict[str, Any]] = spec.get("added_tokens") or []
    known = set(vocabulary.values()) | {token["id"] for token in added}
    kept = {int(i) for i in keep_ids}
    if not kept <= known:
        raise EncoderError(f"id {min(kept - known)} is not in the tokenizer's vocabulary of {len(known)} pieces")

    prefix = spec["model"].get("continuing_subword_prefix", "##")
    kept |= {i for piece, i in vocabulary.items() if len(piece.removeprefix(prefix)) == 1}
    kept |= {token["id"] for token in added}
    kept |= {vocabulary[piece] for piece in (spec["model"]["unk_token"],) if piece in vocabulary}
    kept |= set(_post_processor_ids(spec.get("post_processor")))
    old_ids = np.array(sorted(kept), dtype=np.int32)
    new_id = {int(old): new for new, old in enumerate(old_ids)}

    spec["model"]["vocab"] = {piece: new_id[i] for piece, i in vocabulary.items() if i in new_id}
    for token in added:
        token["id"] = new_id[token["id"]]
    _renumber_post_processor(spec.get("post_processor"), new_id)
    spec["padding"] = spec["truncation"] = None
    return json.dumps(spec, ensure_ascii=False), old_ids


def _encodings(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """Encode one text in this thread: waking the tokenizer's pool for it can take longer than the text."""
    if len(texts) == 1:
        return [tokenizer.encode(texts[0])]
    return list(tokenizer.encode_batch_fast(list(texts)))


def _cut(ids: list[int], max_length_tokens: int) -> NDArray[np.int32]:
    if len(ids) > max_length_tokens:
        ids = [*ids[: max_length_tokens - 1], ids[-1]]
    return np.array(ids, dtype=np.int32)


def _without_half_surrogates(text: str) -> str:
    """Join surrogate pairs to the character they stand for and replace lonely halves."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _tokenizer_from_json(path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Read tokenizer.json; tokenizer_config.json overrides its normalizer, as it does in transformers."""
    text = path.read_text(encoding="utf-8")
    normalizer = _parse_json_object(text, str(path)).get("normalizer") or {}
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise EncoderError(f"{path} cannot be read as a tokenizer ({error}): fetch it again") from error
    if normalizer.get("type") == "BertNormalizer":
        arguments = {key: value for key, value in normalizer.items() if key != "type"}
        overrides = {ours: settings[theirs] for theirs, ours in _NORMALIZER_KEYS.items() if theirs in settings}
        if arguments | overrides != arguments:
            tokenizer.normalizer = normalizers.BertNormalizer(**(arguments | overrides))
    return tokenizer


def _build_wordpiece(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer of BERT and DistilBERT, or of MPNet, from vocab.txt."""
    path = folder / "vocab.txt"
    # Not splitlines(): a piece may be a character that Unicode counts as a line end.
    pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocabulary = {piece.removesuffix("\r"): i for i, piece in enumerate(pieces)}
    is_mpnet = _is_mpnet(folder, settings, vocabulary)
    specials = _special_tokens(settings, _MPNET_SPECIALS if is_mpnet else _BERT_SPECIALS, vocabulary, path)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=specials["unk_token"], max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        clean_text=True,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _enclose(tokenizer, specials, add_prefix_space=False)
    _add_specials(tokenizer, specials, mask_eats_space=is_mpnet)
    _add_listed_tokens(tokenizer, folder)
    return tokenizer


def _build_byte_level_bpe(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer of RoBERTa from vocab.json and merges.txt."""
    try:
        vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises nothing narrower
        raise EncoderError(
            f"vocab.json and merges.txt in {folder} cannot be read ({error}): fetch them again"
        ) from error
    specials = _special_tokens(settings, _ROBERTA_SPECIALS, vocabulary, folder / "vocab.json")
    add_prefix_space = bool(settings.get("add_prefix_space", False))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    _enclose(tokenizer, specials, add_prefix_space=add_prefix_space)
    _add_specials(tokenizer, specials, mask_eats_space=True)
    _add_listed_tokens(tokenizer, folder)
    return tokenizer


def _enclose(tokenizer: Tokenizer, specials: Mapping[str, str], *, add_prefix_space: bool) -> None:
    vocabulary = tokenizer.get_vocab()
    sep, cls = ((specials[key], vocabulary[specials[key]]) for key in ("sep_token", "cls_token"))
    tokenizer.post_processor = processors.RobertaProcessing(
        sep, cls, trim_offsets=True, add_prefix_space=add_prefix_space
    )


def _add_specials(tokenizer: Tokenizer, specials: Mapping[str, str], *, mask_eats_space: bool) -> None:
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True, lstrip=mask_eats_space and key == "mask_token")
            for key, token in specials.items()
        ]
    )


def _add_listed_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Add the tokens of added_tokens.json, where old checkpoints keep what was added after pre-training."""
    path = folder / "added_tokens.json"
    if not path.is_file():
        return
    listed = _parse_json_object(path.read_text(encoding="utf-8"), str(path))
    for token, token_id in sorted(listed.items(), key=lambda item: int(item[1])):
        tokenizer.add_tokens([AddedToken(token, normalized=True)])
        if tokenizer.token_to_id(token) != token_id:
            raise EncoderError(
                f"{path} numbers '{token}' {token_id}, but the vocabulary beside it ends elsewhere: "
                "save the tokenizer again as tokenizer.json"
            )


def _special_tokens(
    settings: Mapping[str, Any], defaults: Mapping[str, str], vocabulary: Mapping[str, int], path: Path
) -> dict[str, str]:
    """Return the special tokens in the order of their ids; a mask token may be absent."""
    found = {}
    for key, default in defaults.items():
        value = settings.get(key, default)
        token = str(value["content"] if isinstance(value, Mapping) else value)
        if token in vocabulary:
            found[key] = token
        elif key != "mask_token":
            raise EncoderError(f"{path} lacks the special token '{token}' ({key}): the vocabulary is another model's")
    return dict(sorted(found.items(), key=lambda item: vocabulary[item[1]]))


def _is_mpnet(folder: Path, settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> bool:
    config = folder / "config.json"
    if config.is_file():
        family = _parse_json_object(config.read_text(encoding="utf-8"), str(config)).get("model_type")
        if family is not None:
            return bool(family == "mpnet")
    if "tokenizer_class" in settings:
        return str(settings["tokenizer_class"]).startswith("MPNet")
    return "<s>" in vocabulary


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return special_tokens_map.json and tokenizer_config.json, the latter winning; empty where absent."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            content = _parse_json_object(path.read_text(encoding="utf-8"), str(path))
            settings |= {key: value for key, value in content.items() if not (key.endswith("_token") and value is None)}
    return settings


def _parse_json_object(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise EncoderError(f"{where} is not JSON (line {error.lineno}: {error.msg}): fetch it again") from error
    if not isinstance(content, dict):
        raise EncoderError(f"{where} holds no JSON object: fetch it again")
    return content


def _post_processor_ids(processor: Mapping[str, Any] | None) -> list[int]:
    if not processor:
        return []
    if processor["type"] == "TemplateProcessing":
        return [i for token in processor["special_tokens"].values() for i in token["ids"]]
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return [processor["sep"][1], processor["cls"][1]]
    if processor["type"] == "Sequence":
        return [i for part in processor["processors"] for i in _post_processor_ids(part)]
    if processor["type"] == "ByteLevel":
        return []
    raise EncoderError(f"post-processor '{processor['type']}' of the tokenizer is unknown: keep the vocabulary whole")


def _renumber_post_processor(processor: dict[str, Any] | None, new_id: Mapping[int, int]) -> None:
    """Replace ids in place; the type was checked by `_post_processor_ids`."""
    if not processor:
        return
    if processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [new_id[i] for i in token["ids"]]
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        for key in ("sep", "cls"):
            processor[key] = [processor[key][0], new_id[processor[key][1]]]
    elif processor["type"] == "Sequence":
        for part in processor["processors"]:
            _renumber_post_processor(part, new_id)
