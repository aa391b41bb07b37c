"""optimum-onnx on the same student: O1, O2, O3 and none, times its dynamic int8 settings.

A worker of `benchmarks/export_bench.py`:  python optimum_bench.py SPEC.json
The student has no class of its own in transformers (mean pooling, no tanh), so its PyTorch twin is exported as optimum
exports a BERT: torch.onnx, then ORTOptimizer, then ORTQuantizer. Each file answers behind the bare tokenizer and a
bare session, the fastest way there is; the rows "as documented" go through transformers' tokenizer and
ORTModelForSequenceClassification.

optimum-onnx 0.1 stops when it quantizes its own O2 and O3 files, because it does not pass ONNX Runtime's quantizer a
type for tensors behind fused operators. We pass it, so that its best files take part; "helped" lists them. Static
quantization needs the datasets library and is not among the settings.
"""

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from optimum.onnxruntime import ORTModelForSequenceClassification, ORTOptimizer, ORTQuantizer
from optimum.onnxruntime import quantization as optimum_quantization
from optimum.onnxruntime.configuration import AutoOptimizationConfig, AutoQuantizationConfig
from student_torch import load_student
from tokenizers import Tokenizer
from transformers import BertConfig, PreTrainedTokenizerFast, pipeline

sys.path.append(str(Path(__file__).resolve().parents[1]))
from worker import serve, text_handlers

LEVELS = ("none", "O1", "O2", "O3")
INT8 = {
    "avx512_vnni": lambda: AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False),
    "avx512_vnni per channel": lambda: AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True),
    "avx2": lambda: AutoQuantizationConfig.avx2(is_static=False, per_channel=False),
    "avx2 per channel": lambda: AutoQuantizationConfig.avx2(is_static=False, per_channel=True),
}


class QuantizerOfFusedGraphs(ONNXQuantizer):
    """ONNX Runtime's quantizer, told that a tensor of unknown type holds floats."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        settings["extra_options"] = {**settings["extra_options"], "DefaultTensorType": TensorProto.FLOAT}
        super().__init__(*arguments, **settings)


class SessionText:
    """One of optimum's files behind the bare tokenizer and a bare session."""

    def __init__(self, path: Path, tokenizer: Tokenizer, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = {item.name for item in self.session.get_inputs()}
        self.tokenizer = tokenizer

    def encode(self, text: str) -> dict[str, np.ndarray]:
        """Return what the session is fed."""
        ids = np.array([self.tokenizer.encode(text).ids], np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        return {name: array for name, array in feeds.items() if name in self.names}

    def run(self, encoded: dict[str, np.ndarray]) -> np.ndarray:
        """Return logits, float32 (1, n_labels)."""
        return self.session.run(["logits"], encoded)[0]

    def __call__(self, text: str) -> np.ndarray:
        """Answer a text."""
        return self.run(self.encode(text))


class DocumentedText:
    """The same through optimum's model class and transformers' tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, max_length_tokens: int) -> None:
        self.model, self.tokenizer, self.max_length_tokens = model, tokenizer, max_length_tokens

    def encode(self, text: str) -> Any:
        """Return tensors."""
        return self.tokenizer(text, return_tensors="pt", truncation=True, max_length=self.max_length_tokens)

    def run(self, encoded: Any) -> np.ndarray:
        """Return logits."""
        with torch.inference_mode():
            return self.model(**encoded).logits.numpy()

    def __call__(self, text: str) -> np.ndarray:
        """Answer a text."""
        return self.run(self.encode(text))


def export_student(checkpoint: Path, folder: Path) -> None:
    """Write model.onnx and the config that optimum's classes read."""
    student, config = load_student(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    ids = torch.randint(5, student.encoder.config.vocab_size, (2, 9))
    axes = {0: "batch_size", 1: "sequence_length"}
    torch.onnx.export(
        student,
        (ids, torch.ones_like(ids)),
        str(folder / "model.onnx"),
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "logits": {0: "batch_size"}},
        opset_version=17,
        dynamo=False,
    )
    theirs = BertConfig(**{**student.encoder.config.to_dict(), "id2label": config["id2label"]})
    theirs.problem_type = "multi_label_classification"
    theirs.architectures = ["BertForSequenceClassification"]
    theirs.save_pretrained(folder)
    shutil.copy(checkpoint / "tokenizer.json", folder / "tokenizer.json")


def build_files(checkpoint: Path, work: Path) -> dict[str, Path]:
    """Export, optimize and quantize; return name -> ONNX file."""
    optimum_quantization.ONNXQuantizer = QuantizerOfFusedGraphs
    files = {}
    base = work / "none"
    export_student(checkpoint, base)
    for level in LEVELS:
        folder = work / level
        if level != "none":
            optimizer = ORTOptimizer.from_pretrained(ORTModelForSequenceClassification.from_pretrained(base))
            optimizer.optimize(save_dir=folder, optimization_config=getattr(AutoOptimizationConfig, level)())
        (path,) = folder.glob("*.onnx")
        files[f"optimum {level} fp32"] = path
        for name, make in INT8.items():
            quantized = work / f"{level}-{name.replace(' ', '-')}"
            quantizer = ORTQuantizer.from_pretrained(folder, file_name=path.name)
            quantizer.quantize(save_dir=quantized, quantization_config=make())
            (files[f"optimum {level} int8 {name}"],) = quantized.glob("*.onnx")
    return files


def main() -> None:
    """Serve timing requests."""
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    checkpoint, texts = Path(spec["checkpoint"]), spec["texts"]
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(spec["max_length_tokens"])
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / "tokenizer.json"),
        pad_token="[PAD]",
        model_input_names=["input_ids", "attention_mask"],
    )
    files = build_files(checkpoint, Path(spec["work"]) / "optimum")
    models: dict[str, Any] = {name: SessionText(path, tokenizer, spec["threads"]) for name, path in files.items()}

    def load_documented(name: str, threads: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = files[name]
        # Optimized and quantized folders hold the config as optimum copied it there.
        return ORTModelForSequenceClassification.from_pretrained(
            path.parent, file_name=path.name, session_options=options
        )

    def add_documented(name: str) -> str:
        key = f"{name} (as documented)"
        models[key] = DocumentedText(load_documented(name, spec["threads"]), fast_tokenizer, spec["max_length_tokens"])
        return key

    def throughput(name: str, batch_size: int, threads: int, n_texts: int) -> dict[str, Any]:
        pipe = pipeline(
            "text-classification",
            model=load_documented(name, threads),
            tokenizer=fast_tokenizer,
            top_k=None,
            function_to_apply="sigmoid",
        )
        settings = {"batch_size": batch_size, "truncation": True, "max_length": spec["max_length_tokens"]}
        pipe(texts[:32], **settings)
        start = perf_counter()
        answers = pipe(spec["throughput_texts"][:n_texts], **settings)
        seconds = perf_counter() - start
        order = list(pipe.model.config.id2label.values())
        by_name = [{entry["label"]: entry["score"] for entry in answer} for answer in answers]
        return {"seconds": seconds, "probabilities": [[scores[label] for label in order] for scores in by_name]}

    versions = {name: metadata.version(name) for name in ("optimum-onnx", "onnxruntime", "transformers")}
    serve(
        {
            **text_handlers(models, texts),
            "add_documented": add_documented,
            "throughput": throughput,
            "helped": lambda: [name for name in files if " int8 " in name and name.split()[1] in ("O2", "O3")],
            "sizes": lambda: {name: path.stat().st_size for name, path in files.items()},
            "versions": lambda: versions,
        }
    )


if __name__ == "__main__":
    main()
