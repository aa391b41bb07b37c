"""From texts to embeddings: pooled states of a pretrained encoder that stays as it is."""

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tf_keras as keras
from numpy.typing import NDArray

from emodistill.checkpoints import load_encoder_weights
from emodistill.encoder_graph import build_classifier, set_weights
from emodistill.progress import Progress
from emodistill.tokenization import encode, load_tokenizer
from emodistill.training import predict_logits

__all__ = ["embed_texts"]


def embed_texts(
    encoder_dir: Path,
    texts: Mapping[str, Sequence[str]],
    *,
    pooling: str = "mean",
    max_length_tokens: int = 128,
    precision: str = "bfloat16",
    progress_factory: Callable[..., Progress] = Progress,
    description: str = "embedding",
) -> dict[str, NDArray[np.float32]]:
    """Embed texts, those of like length together.

    Parameters
    ----------
    encoder_dir
        Hugging Face folder of the encoder.
    texts
        Texts by name.
    pooling, precision
        See `encoder_graph.build_classifier`.
    max_length_tokens
        Longer texts are cut, at the encoder's own limit at the latest.
    progress_factory, description
        Make the progress line.

    Returns
    -------
    dict of str to float32 array of shape (n_texts, hidden_size)
        Not normalized.
    """
    config, weights = load_encoder_weights(encoder_dir)
    classifier = build_classifier(
        config,
        1,
        pooling=pooling,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        classifier_dropout_rate=0.0,
        precision=precision,
    )
    unused = {"classifier.weight": np.zeros((1, config.hidden_size), np.float32)}
    set_weights(classifier, config, {**weights, **unused, "classifier.bias": np.zeros(1, np.float32)})
    encoder = keras.Model(classifier.inputs, classifier.get_layer("pooling").output)
    tokenizer = load_tokenizer(encoder_dir)
    limit = min(max_length_tokens, config.max_length_tokens)
    embeddings = {}
    with progress_factory(description, sum(map(len, texts.values())), "texts") as progress:
        for name, some_texts in texts.items():
            token_ids = encode(tokenizer, some_texts, limit)
            embeddings[name] = predict_logits(encoder, token_ids, pad_token_id=config.pad_token_id, progress=progress)
    del classifier, encoder
    keras.backend.clear_session()
    gc.collect()
    return embeddings
