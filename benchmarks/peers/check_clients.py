"""Read a bundle as other people's Python does: transformers' pipeline around optimum-onnx's model class.

    python check_clients.py BUNDLE CASES.json

Token ids, label names and probabilities must be those of CASES.json (`python -m emodistill.benchmarks.clients`). Ends
with one JSON line; exits 1 on a difference.
"""

import json
import sys
from pathlib import Path

import numpy as np
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline

LARGEST_DIFFERENCE = 1e-4


def main() -> None:
    """Compare and report."""
    bundle, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    texts, settings = cases["texts"], {"truncation": True, "max_length": cases["max_length_tokens"]}
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    found_ids = [tokenizer(text, **settings)["input_ids"] for text in texts]
    other_ids = [text for text, found, ids in zip(texts, found_ids, cases["ids"], strict=True) if found != ids]
    differences = {}
    for graph, expected in cases["probabilities"].items():
        path = Path(graph)
        model = ORTModelForSequenceClassification.from_pretrained(
            bundle, subfolder=str(path.parent), file_name=path.name
        )
        # No activation is named: it has to follow from the bundle's problem_type.
        classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
        answers = [{entry["label"]: entry["score"] for entry in classify([text], **settings)[0]} for text in texts]
        found = np.array([[answer[label] for label in cases["label_names"]] for answer in answers])
        differences[graph] = float(np.abs(found - np.array(expected)).max())
    report = {"texts": len(texts), "other_ids": other_ids, "max_probability_difference": differences}
    print(json.dumps(report))
    sys.exit(bool(other_ids) or max(differences.values()) > LARGEST_DIFFERENCE)


if __name__ == "__main__":
    main()
