"""The encoder against Hugging Face's PyTorch models, through committed outputs (fixtures/make_encoder_fixtures.py)."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("tf_keras")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

from emodistill.checkpoints import load_encoder_weights  # noqa: E402
from emodistill.encoder_graph import build_classifier, get_weights, hidden_state_names, set_weights  # noqa: E402
from emodistill.encoders import cached_encoder  # noqa: E402
from emodistill.errors import ArtifactError, EncoderError  # noqa: E402
from emodistill.tokenization import encode, load_tokenizer  # noqa: E402

ENCODERS = Path(__file__).parent / "fixtures" / "encoders"
FAMILIES = ("bert", "distilbert", "mpnet", "roberta")
TOLERANCE = 1e-4
SENTENCE = "Thanks for the reply, I really appreciate it! So sorry for your loss, [NAME]."


def encoder_of(folder, **kwargs):
    config, weights = load_encoder_weights(folder)
    model = build_classifier(config, 2, **kwargs)
    set_weights(model, config, weights)
    return config, weights, model


def last_hidden_states(model, config, ids, mask):
    layer = model.get_layer(hidden_state_names(config)[-1])
    states = keras.Model(model.inputs, layer.output)([ids, mask]).numpy()
    return states.reshape(*ids.shape, config.hidden_size)


def largest_difference(states, outputs):
    real = outputs["attention_mask"].astype(bool)
    return float(np.abs(states[real] - outputs["last_hidden_state"][real]).max())


@pytest.fixture(params=FAMILIES)
def folder(request):
    return ENCODERS / request.param


def test_hidden_states_equal_pytorch(folder):
    config, _, model = encoder_of(folder)
    with np.load(folder / "outputs.npz", allow_pickle=False) as outputs:
        states = last_hidden_states(model, config, outputs["input_ids"], outputs["attention_mask"])
        assert float(outputs["last_hidden_state"].std()) > 0.3  # the fixture is at a real scale
        assert largest_difference(states, outputs) < TOLERANCE


def test_every_weight_matters_to_the_fixture(folder):
    """Shuffling any one weight array moves the outputs: a wrong name or a transposed square matrix cannot hide."""
    config, weights, model = encoder_of(folder)
    rng = np.random.default_rng(0)
    with np.load(folder / "outputs.npz", allow_pickle=False) as outputs:
        for name, array in weights.items():
            if "attention.key.bias" in name:
                continue  # adds the same number to every score of a query: softmax forgets it
            flat = array.reshape(-1).copy()
            rng.shuffle(flat)
            set_weights(model, config, weights | {name: flat.reshape(array.shape)})
            states = last_hidden_states(model, config, outputs["input_ids"], outputs["attention_mask"])
            assert largest_difference(states, outputs) > 100 * TOLERANCE, name


def test_each_row_alone_and_unpadded_equals_pytorch(folder):
    config, _, model = encoder_of(folder)
    with np.load(folder / "outputs.npz", allow_pickle=False) as outputs:
        for ids, mask, expected in zip(*(outputs[key] for key in outputs.files), strict=True):
            n = int(mask.sum())
            states = last_hidden_states(model, config, ids[None, :n], mask[None, :n])
            assert np.abs(states[0] - expected[:n]).max() < TOLERANCE


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_logits_are_the_head_over_the_pooled_pytorch_states(folder, pooling):
    config, weights, model = encoder_of(folder, pooling=pooling)
    rng = np.random.default_rng(0)
    head = {
        "classifier.weight": rng.normal(size=(2, config.hidden_size)).astype(np.float32),
        "classifier.bias": rng.normal(size=2).astype(np.float32),
    }
    set_weights(model, config, weights | head)
    with np.load(folder / "outputs.npz", allow_pickle=False) as outputs:
        mask = outputs["attention_mask"]
        states = outputs["last_hidden_state"]  # zero on padding, so the plain sum is the masked sum
        pooled = states[:, 0] if pooling == "cls" else states.sum(1) / mask.sum(1, keepdims=True)
        expected = pooled @ head["classifier.weight"].T + head["classifier.bias"]
        np.testing.assert_allclose(model([outputs["input_ids"], mask]).numpy(), expected, atol=10 * TOLERANCE)


def test_bfloat16_stays_near(folder):
    config, _, model = encoder_of(folder, precision="bfloat16")
    with np.load(folder / "outputs.npz", allow_pickle=False) as outputs:
        states = last_hidden_states(model, config, outputs["input_ids"], outputs["attention_mask"])
        real = outputs["attention_mask"].astype(bool)
        difference = states[real] - outputs["last_hidden_state"][real]
        # bfloat16 keeps 8 bits: a relative step of 1/256 per product, over some twenty products.
        assert float(np.sqrt(np.mean(difference**2))) < 0.1
        assert float(np.sqrt(np.mean(difference**2))) > TOLERANCE  # it really is another precision


def test_weights_come_back_as_they_were_loaded(folder):
    config, weights, model = encoder_of(folder)
    returned = get_weights(model, config)
    assert set(returned) - set(weights) == {"classifier.weight", "classifier.bias"}
    for name, array in weights.items():
        np.testing.assert_array_equal(returned[name], array)


def copy_with(folder, target, change):
    """Copy a checkpoint with its dictionary of weights changed."""
    shutil.copytree(folder, target)
    tensors = safetensors_numpy.load_file(target / "model.safetensors")
    safetensors_numpy.save_file(change(tensors), target / "model.safetensors")
    return target


def test_a_missing_weight_is_an_error(folder, tmp_path):
    name = next(n for n in safetensors_numpy.load_file(folder / "model.safetensors") if "layer.1" in n)
    without = copy_with(folder, tmp_path / "e", lambda t: {n: a for n, a in t.items() if n != name})
    with pytest.raises(EncoderError, match=r"lacks weights: layer\.1\."):
        load_encoder_weights(without)


def test_an_unexpected_weight_is_an_error(folder, tmp_path):
    extra = copy_with(folder, tmp_path / "e", lambda t: t | {"encoder.adapter.weight": np.zeros(3, np.float32)})
    with pytest.raises(EncoderError, match=r"has unexpected weights: encoder\.adapter\.weight"):
        load_encoder_weights(extra)


def test_a_deeper_checkpoint_than_its_config_is_an_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "e")
    path = tmp_path / "e" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["n_layers" if config["model_type"] == "distilbert" else "num_hidden_layers"] = 1
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(EncoderError, match="has unexpected weights"):
        load_encoder_weights(tmp_path / "e")


def test_a_misshapen_weight_is_an_error(folder, tmp_path):
    def cut(tensors):
        name = next(n for n in tensors if n.endswith("word_embeddings.weight"))
        return tensors | {name: tensors[name][:-1].copy()}

    with pytest.raises(EncoderError, match="has misshapen weights"):
        load_encoder_weights(copy_with(folder, tmp_path / "e", cut))


def test_published_forms_of_names_load_the_same(folder, tmp_path):
    """Checkpoints saved with a head carry the family as prefix; the first BERT calls its norms gamma and beta."""
    family = folder.name

    def rename(tensors):
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {}
        for name, array in tensors.items():
            for new_end, old_end in old.items() if family == "bert" else ():
                name = name.replace(new_end, old_end)
            renamed[f"{family}.{name}"] = array
        head = "vocab_projector.bias" if family == "distilbert" else "lm_head.bias"
        head = "cls.predictions.bias" if family == "bert" else head
        return renamed | {head: np.zeros(60, np.float32)}

    _, expected = load_encoder_weights(folder)
    _, weights = load_encoder_weights(copy_with(folder, tmp_path / "e", rename))
    assert set(weights) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(weights[name], array)


def test_a_cut_file_is_an_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "e")
    path = tmp_path / "e" / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(ArtifactError, match="is damaged"):
        load_encoder_weights(tmp_path / "e")


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["minilm-l6", "mpnet-base"])
def test_the_published_encoder_equals_pytorch_on_one_sentence(name):
    folder = cached_encoder(name)
    if folder is None:
        pytest.skip(f"{name} is not in the cache: run  emodistill encoder fetch {name}")
    if name == "mpnet-base" and not os.environ.get("EMODISTILL_TEST_LARGE"):
        pytest.skip("440 MB of weights: set EMODISTILL_TEST_LARGE=1 to load them")
    with np.load(ENCODERS / f"{name}.npz", allow_pickle=False) as outputs:
        ids = encode(load_tokenizer(folder), [SENTENCE], 128)[0]
        np.testing.assert_array_equal(ids, outputs["input_ids"][0])
        config, _, model = encoder_of(folder)
        states = last_hidden_states(model, config, ids[None], outputs["attention_mask"])
        assert largest_difference(states, outputs) < TOLERANCE
