"""Other people's clients of a bundle: what they must answer, and whether they do.

    python -m emodistill.benchmarks.clients --bundle DIR --peers-python .venv-peers/bin/python --node benchmarks/peers

Writes token ids and uncalibrated probabilities of some texts, hands them with the bundle to a transformers pipeline on
optimum-onnx and to onnxruntime-node with @huggingface/transformers, and prints what each found. The texts are hard on
tokenizers: accents, control tokens typed by a user, emptiness, emoji, more tokens than the model reads.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emodistill.artifacts import read_json, write_json
from emodistill.runtime import Classifier
from emodistill.thresholds import sigmoid
from emodistill.tokenization import encode, load_tokenizer

__all__ = ["HARD_TEXTS", "check_clients", "write_cases"]

PEERS = Path(__file__).parent / "peers"
HARD_TEXTS = (
    "Thanks for the reply! I appreciate your input.",
    "Café naïve résumé über straße",
    "so sorry [SEP] I never meant that [PAD] [MASK]",
    "[NAME] is the best [RELIGION] teacher",
    "",
    "   ",
    "\t",
    "\u00a0\u200b",
    "😂😂😂",
    "I'm proud of you — don't 'quote' me… okay?",
    "北京 and ไทย and हिन्दी",
    "a" * 101,
    "word " * 300,
)


def write_cases(bundle: Path, texts: Sequence[str], path: Path) -> None:
    """Write what a client must find.

    Parameters
    ----------
    bundle : Path
        A bundle folder.
    texts : sequence of str
    path : Path
        JSON file: texts, ids, label_names, max_length_tokens, and probabilities (sigmoid of the logits, before our
        calibration, which other clients do not know) by graph. Graphs that other clients need not run are left out.
    """
    settings = read_json(bundle / "emodistill.json")
    portable = [name for name, graph in settings["graphs"].items() if graph["portable"]]
    max_length_tokens = settings["max_length_tokens"]
    # One text per call, as a dynamically quantized graph picks its scales for the whole batch.
    logits = {name: _logits_one_by_one(Classifier.load(bundle, graph=name, threads=1), texts) for name in portable}
    write_json(
        path,
        {
            "texts": list(texts),
            "ids": [ids.tolist() for ids in encode(load_tokenizer(bundle), texts, max_length_tokens)],
            "label_names": settings["label_names"],
            "max_length_tokens": max_length_tokens,
            "probabilities": {name: [sigmoid(row).tolist() for row in rows] for name, rows in logits.items()},
        },
    )


def check_clients(
    bundle: Path,
    *,
    peers_python: Path | None = None,
    node_folder: Path | None = None,
    texts: Sequence[str] = HARD_TEXTS,
) -> dict[str, dict[str, Any]]:
    """Run the clients on a bundle.

    Parameters
    ----------
    bundle : Path
    peers_python : Path, optional
        Interpreter with optimum-onnx and transformers; without it that client is left out.
    node_folder : Path, optional
        Folder whose node_modules holds onnxruntime-node and @huggingface/transformers; without it that client is
        left out.
    texts : sequence of str

    Returns
    -------
    dict
        By client: "agrees", and what it printed ("texts", "other_ids", "max_probability_difference") or its "error".
    """
    reports = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        cases = work / "cases.json"
        write_cases(bundle, texts, cases)
        if peers_python is not None:
            script = PEERS / "check_clients.py"
            reports["optimum-onnx"] = _run([str(peers_python), str(script), str(bundle.absolute()), str(cases)], work)
        if node_folder is not None:
            # Node looks for packages beside the script, so the script goes where they are linked to.
            (work / "check_client.mjs").write_bytes((PEERS / "check_client.mjs").read_bytes())
            (work / "node_modules").symlink_to((node_folder / "node_modules").absolute())
            command = ["node", str(work / "check_client.mjs"), str(bundle.absolute()), str(cases)]
            reports["onnxruntime-node"] = _run(command, work)
    return reports


def _run(command: Sequence[str], folder: Path) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    lines = done.stdout.strip().splitlines()
    try:
        return {"agrees": done.returncode == 0, **json.loads(lines[-1])}
    except (IndexError, ValueError):
        return {"agrees": False, "error": done.stderr.strip()[-1000:]}


def _logits_one_by_one(classifier: Classifier, texts: Sequence[str]) -> list[Any]:
    return [classifier.predict_logits([text])[0] for text in texts]


def main(arguments: Sequence[str] | None = None) -> None:
    """Check a bundle with other people's clients."""
    parser = argparse.ArgumentParser(prog="python -m emodistill.benchmarks.clients", description=main.__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--peers-python", type=Path, help="interpreter of the peers' environment (make peers)")
    parser.add_argument("--node", type=Path, help="folder that holds node_modules (make peers)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    python = given.peers_python.absolute() if given.peers_python else None
    reports = check_clients(given.bundle, peers_python=python, node_folder=given.node)
    if given.out:
        write_json(given.out, reports)
    print(json.dumps(reports, indent=2, ensure_ascii=False))
    sys.exit(not all(report["agrees"] for report in reports.values()))


if __name__ == "__main__":
    main()
