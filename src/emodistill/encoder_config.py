"""The shape of a BERT-family encoder, read from and written to Hugging Face's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from emodistill.errors import EncoderError

__all__ = ["FAMILIES", "EncoderConfig"]

FAMILIES = ("bert", "distilbert", "mpnet", "roberta")

_DISTILBERT_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Architecture of one encoder: post-norm transformer layers with exact gelu.

    Parameters
    ----------
    family
        One of `FAMILIES`: it decides on position rules, segment embeddings and relative attention.
    vocab_size, hidden_size, n_layers, n_heads, intermediate_size
        Sizes; `hidden_size` is a multiple of `n_heads`.
    max_positions
        Rows of the position table (for roberta and mpnet this includes the offset `pad_token_id + 1`).
    type_vocab_size
        Rows of the segment table; 0 where the family has none.
    layer_norm_eps
        Added to the variance.
    pad_token_id
        Id that fills short rows of a batch.
    relative_attention_buckets
        Rows of mpnet's shared relative-position table; 0 elsewhere.
    embedding_size
        Width of the word table; smaller than `hidden_size` when it is factorized (then a projection follows).

    Raises
    ------
    EncoderError
        If the family is unknown or the sizes do not fit each other.
    """

    family: str
    vocab_size: int
    hidden_size: int
    n_layers: int
    n_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    relative_attention_buckets: int = 0
    embedding_size: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise EncoderError(f"encoder family '{self.family}' is unknown: known are {', '.join(FAMILIES)}")
        if self.embedding_size == 0:
            object.__setattr__(self, "embedding_size", self.hidden_size)
        if self.hidden_size % self.n_heads:
            raise EncoderError(f"hidden_size {self.hidden_size} is not a multiple of n_heads {self.n_heads}")
        if (self.family == "mpnet") != (self.relative_attention_buckets > 0):
            raise EncoderError("relative_attention_buckets is for the family mpnet, and mpnet needs it")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.n_heads

    @property
    def position_offset(self) -> int:
        """Position id of a row's first token."""
        return self.pad_token_id + 1 if self.family in ("roberta", "mpnet") else 0

    @property
    def max_length_tokens(self) -> int:
        """Longest row that the position table can hold."""
        return self.max_positions - self.position_offset

    @property
    def n_parameters(self) -> int:
        """Number of weights, without a classifier."""
        d, e, i = self.hidden_size, self.embedding_size, self.intermediate_size
        embeddings = self.vocab_size * e + (self.max_positions + self.type_vocab_size) * d + 2 * d
        factor = (e + 1) * d if e != d else 0
        layer = 4 * (d * d + d) + 2 * d * i + i + d + 4 * d
        return embeddings + factor + self.n_layers * layer + self.relative_attention_buckets * self.n_heads

    def with_layers(self, n_layers: int) -> "EncoderConfig":
        """Return the same shape with another depth."""
        return replace(self, n_layers=n_layers)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "EncoderConfig":
        """Read the shape from the content of a Hugging Face config.json.

        Raises
        ------
        EncoderError
            If the family is unknown, a size is missing, or the encoder has parts that we do not compute
            (another activation, relative positions in a BERT).
        """
        family = str(config.get("model_type", "missing"))
        if family not in FAMILIES:
            raise EncoderError(
                f"encoder family '{family}' (model_type in config.json) is unknown: known are {', '.join(FAMILIES)}"
            )
        names = _DISTILBERT_KEYS if family == "distilbert" else {}

        def value(key: str, default: Any = None) -> Any:
            found = config.get(names.get(key, key), default)
            if found is None:
                raise EncoderError(f"config.json of the {family} encoder lacks '{names.get(key, key)}'")
            return found

        if value("hidden_act", "gelu") != "gelu":
            raise EncoderError(f"activation '{value('hidden_act')}' is not supported: only exact 'gelu' is")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise EncoderError(f"position_embedding_type '{config['position_embedding_type']}' is not supported")
        return cls(
            family=family,
            vocab_size=int(value("vocab_size")),
            hidden_size=int(value("hidden_size")),
            n_layers=int(value("num_hidden_layers")),
            n_heads=int(value("num_attention_heads")),
            intermediate_size=int(value("intermediate_size")),
            max_positions=int(value("max_position_embeddings")),
            type_vocab_size=int(config.get("type_vocab_size", 2)) if family in ("bert", "roberta") else 0,
            layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
            pad_token_id=int(config.get("pad_token_id", 1 if family in ("roberta", "mpnet") else 0)),
            relative_attention_buckets=int(config.get("relative_attention_num_buckets", 32))
            if family == "mpnet"
            else 0,
            embedding_size=int(config.get("embedding_size", 0)),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the shape in the keys of Hugging Face's config.json."""
        names = _DISTILBERT_KEYS if self.family == "distilbert" else {}
        common = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "intermediate_size": self.intermediate_size,
            "hidden_act": "gelu",
        }
        config: dict[str, Any] = {"model_type": self.family, "vocab_size": self.vocab_size}
        config |= {names.get(key, key): value for key, value in common.items()}
        config |= {
            "max_position_embeddings": self.max_positions,
            "layer_norm_eps": self.layer_norm_eps,
            "pad_token_id": self.pad_token_id,
        }
        if self.type_vocab_size:
            config["type_vocab_size"] = self.type_vocab_size
        if self.relative_attention_buckets:
            config["relative_attention_num_buckets"] = self.relative_attention_buckets
        if self.embedding_size != self.hidden_size:
            config["embedding_size"] = self.embedding_size
        return config
