"""Our graphs against PyTorch, optimum-onnx and TF-IDF: the same student, texts and lengths, in turns, in one run.

    python -m emodistill.benchmarks.export_bench --checkpoint STUDENT --bundle BUNDLE --texts dev.csv \\
        --peers-python .venv-peers/bin/python --out benchmarks/results/export/tiny.json

Each library answers in a process and environment of its own (see `worker`), one thread, one unpadded text per call. A
first short round finds the fastest settings of each peer; then all that is left takes turns for several rounds. Without
`--peers-python` only our side runs.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from emodistill.artifacts import write_json
from emodistill.benchmarks.latency import BundleModel, TextModel, summarize_times
from emodistill.benchmarks.machine import describe_machine, machine_record
from emodistill.benchmarks.worker import Worker, WorkerError, serve, start_worker, text_handlers
from emodistill.checkpoints import load_checkpoint
from emodistill.data import read_dataset, read_texts
from emodistill.errors import InputError
from emodistill.runtime import Classifier
from emodistill.thresholds import sigmoid

__all__ = ["Contender", "choose_fastest", "compare_export", "time_in_turns"]

PEERS = Path(__file__).parent / "peers"
PORTABLE = "onnx/model.onnx"
TFIDF = "TF-IDF + logistic regression"
KEPT_PER_GROUP = 2
DECISION_THRESHOLD = 0.5


@dataclass(frozen=True)
class Contender:
    """A model, and the process that answers for it."""

    name: str
    worker: Worker
    group: str


def time_in_turns(
    contenders: Sequence[Contender], n_items: int, *, n_rounds: int, n_warmup: int, part: str = "whole", seed: int = 0
) -> dict[str, npt.NDArray[np.float64]]:
    """Time contenders on the same items, in turns.

    Parameters
    ----------
    contenders : sequence of Contender
    n_items : int
        Texts, known to the workers by index.
    n_rounds : int
        In each, every contender goes through all items once, in an order that all contenders share.
    n_warmup : int
        Calls of each contender, in each round, before the clock counts.
    part : {"whole", "graph"}
        With the tokenizer, or without.
    seed : int
        Of the orders.

    Returns
    -------
    dict of str to float64 array of shape (n_rounds, n_items)
        Milliseconds, in the order of the items.
    """
    generator = np.random.default_rng(seed)
    times = {contender.name: np.empty((n_rounds, n_items)) for contender in contenders}
    for turn in range(n_rounds):
        items = generator.permutation(n_items)
        for index in generator.permutation(len(contenders)):
            contender = contenders[index]
            ask = {"name": contender.name, "items": items.tolist(), "n_warmup": n_warmup, "part": part}
            times[contender.name][turn, items] = contender.worker.ask("time", **ask)
    return times


def choose_fastest(
    contenders: Sequence[Contender], median_ms: Mapping[str, float], n_kept: int = KEPT_PER_GROUP
) -> list[Contender]:
    """Keep the fastest of each group, in the order in which they came; our own group is kept whole."""
    kept = []
    for contender in contenders:
        rivals = sorted(
            (other for other in contenders if other.group == contender.group), key=lambda c: median_ms[c.name]
        )
        if contender.group == "ours" or contender in rivals[:n_kept]:
            kept.append(contender)
    return kept


def compare_export(
    spec: Mapping[str, Any], *, peers_python: Path | None, n_rounds: int, n_warmup: int, n_throughput_texts: int
) -> dict[str, Any]:
    """Run the whole comparison.

    Parameters
    ----------
    spec : mapping
        "checkpoint", "bundle", "texts", "threads", "max_length_tokens", "work", and "train" or None.
    peers_python : Path or None
        Interpreter of the peers' environment.
    n_rounds, n_warmup : int
        See `time_in_turns`.
    n_throughput_texts : int
        Texts of the throughput comparison on two threads; 0 leaves it out.

    Returns
    -------
    dict
        Plain JSON values: "models" by name, "ratios", "throughput", "versions".
    """
    n_items = len(spec["texts"])
    with ExitStack() as stack:
        contenders, workers = _start_workers(stack, spec, peers_python)
        few = min(n_items, 40)
        first = time_in_turns(contenders, few, n_rounds=1, n_warmup=n_warmup, seed=1)
        medians = {name: float(np.median(times)) for name, times in first.items()}
        finalists = choose_fastest(contenders, medians)
        if optimum := workers.get("optimum"):
            best = min((c for c in finalists if c.group.startswith("optimum int8")), key=lambda c: medians[c.name])
            documented = optimum.ask("add_documented", name=best.name)
            finalists.append(Contender(documented, optimum, "optimum as documented"))
        whole = time_in_turns(finalists, n_items, n_rounds=n_rounds, n_warmup=n_warmup)
        graph = time_in_turns(finalists, n_items, n_rounds=n_rounds, n_warmup=n_warmup, part="graph")
        sizes: dict[str, int] = workers["ours"].ask("sizes")
        if optimum:
            sizes |= optimum.ask("sizes")
        models = {}
        for contender in finalists:
            name = contender.name
            models[name] = {
                "group": contender.group,
                "with_tokenizing": asdict(summarize_times(whole[name], n_warmup=n_warmup)),
                "without_tokenizing": asdict(summarize_times(graph[name], n_warmup=n_warmup)),
                "size_bytes": sizes.get(name),
                **_compare_answers(contender, workers["ours"], n_items),
            }
        return {
            "models": models,
            "first_round_median_ms": {name: round(value, 4) for name, value in medians.items()},
            "ratios": _ratios(models, workers["ours"].ask("default")),
            "throughput": _throughput(workers, models, n_throughput_texts) if n_throughput_texts else None,
            "versions": {name: worker.ask("versions") for name, worker in workers.items()},
        }


def _start_workers(
    stack: ExitStack, spec: Mapping[str, Any], peers_python: Path | None
) -> tuple[list[Contender], dict[str, Worker]]:
    work = Path(spec["work"])
    path = work / "spec.json"
    write_json(path, spec)
    commands = {"ours": [sys.executable, "-m", "emodistill.benchmarks.export_bench", "--serve", str(path)]}
    if peers_python is not None:
        if not PEERS.is_dir():
            raise InputError(f"{PEERS} is missing: run the comparison from a checkout, where the peers' scripts are")
        commands["torch"] = [str(peers_python), str(PEERS / "torch_inference.py"), str(path)]
        commands["optimum"] = [str(peers_python), str(PEERS / "optimum_bench.py"), str(path)]
    workers = {
        name: stack.enter_context(start_worker(command, work / f"{name}.log")) for name, command in commands.items()
    }
    helped = set(workers["optimum"].ask("helped")) if "optimum" in workers else set()
    contenders = [
        Contender(name, worker, "ours" if key == "ours" and name != TFIDF else _group(name, helped))
        for key, worker in workers.items()
        for name in worker.ask("names")
    ]
    return contenders, workers


def _group(name: str, helped: set[str]) -> str:
    """Name what a peer's model competes with: models of one library, size and precision."""
    if name == TFIDF:
        return name
    if name.startswith("torch"):
        return name.rpartition(" ")[0]  # the two ways of attention compete
    precision = "int8" if " int8 " in name else "fp32"
    return f"optimum {precision}" + (" helped" if name in helped else "")


def _compare_answers(contender: Contender, ours: Worker, n_items: int) -> dict[str, Any]:
    """Compare logits with the portable fp32 graph's; None for a model of other weights."""
    other_weights = contender.name == TFIDF or "distilroberta" in contender.name
    if other_weights or PORTABLE not in ours.ask("names"):
        return {"max_logit_difference": None, "changed_decisions": None}
    items = list(range(n_items))
    expected = np.array(ours.ask("logits", name=PORTABLE, items=items))
    found = np.array(contender.worker.ask("logits", name=contender.name, items=items))
    # At 0.5 for all, because thresholds belong to a graph, and a peer's graph has none.
    changed = (sigmoid(expected) >= DECISION_THRESHOLD) != (sigmoid(found) >= DECISION_THRESHOLD)
    return {
        "max_logit_difference": round(float(np.abs(expected - found).max()), 6),
        "changed_decisions": int(changed.sum()),
    }


def _ratios(models: Mapping[str, Mapping[str, Any]], default: str) -> dict[str, float]:
    """Divide our default graph's median by the best median of each group of peers."""

    def median(name: str) -> float:
        value: float = models[name]["with_tokenizing"]["p50_ms"]
        return value

    groups = {str(model["group"]) for model in models.values()} - {"ours"}
    best = {group: min(median(name) for name, model in models.items() if model["group"] == group) for group in groups}
    return {f"{default} / best {group}": round(median(default) / best[group], 4) for group in sorted(groups)}


def _throughput(workers: Mapping[str, Worker], models: Mapping[str, Any], n_texts: int) -> dict[str, Any]:
    """Texts per second on two threads: our classifier, and optimum's model in a transformers pipeline, in turns."""
    default = workers["ours"].ask("default")
    requests: dict[str, tuple[Worker, dict[str, Any]]] = {default: (workers["ours"], {"name": default})}
    if "optimum" in workers:
        in_use = [name for name, model in models.items() if model["group"].startswith("optimum ")]
        for name in (n for n in in_use if "documented" not in n):
            for batch_size in (1, 32):
                key = f"{name}, pipeline, batches of {batch_size}"
                requests[key] = (workers["optimum"], {"name": name, "batch_size": batch_size})
    reference = np.array(workers["ours"].ask("throughput", name=PORTABLE, threads=2, n_texts=n_texts)["probabilities"])
    rates: dict[str, list[float]] = {key: [] for key in requests}
    changed = {}
    for _ in range(3):
        for key, (worker, arguments) in requests.items():
            answer = worker.ask("throughput", threads=2, n_texts=n_texts, **arguments)
            rates[key].append(n_texts / answer["seconds"])
            found = np.array(answer["probabilities"]) >= DECISION_THRESHOLD
            changed[key] = int((found != (reference >= DECISION_THRESHOLD)).sum())
    return {
        key: {"texts_per_second": round(float(np.median(rates[key])), 1), "changed_decisions": changed[key]}
        for key in requests
    }


# ---------------------------------------------------------------- our side of the pipe


def _serve_ours(path: Path) -> None:
    spec = json.loads(path.read_text(encoding="utf-8"))
    bundle, texts = Path(spec["bundle"]), spec["texts"]
    default = Classifier.load(bundle, threads=1).graph_name
    settings = json.loads((bundle / "emodistill.json").read_text(encoding="utf-8"))
    models: dict[str, TextModel] = {name: BundleModel(bundle, graph=name) for name in settings["graphs"]}
    sizes = {name: (bundle / name).stat().st_size for name in models}
    if spec["train"]:
        from emodistill.benchmarks.baseline import TfidfBaseline

        train = read_dataset(Path(spec["train"]))
        assert train.labels is not None
        baseline = TfidfBaseline.fit(train.texts, train.labels)
        models[TFIDF], sizes[TFIDF] = baseline, baseline.size_bytes

    def throughput(name: str, threads: int, n_texts: int) -> dict[str, Any]:
        classifier = Classifier.load(bundle, graph=name, threads=threads)
        classifier.score(texts[:32])
        start = perf_counter()
        scores = classifier.score(spec["throughput_texts"][:n_texts])
        seconds = perf_counter() - start
        return {"seconds": seconds, "probabilities": sigmoid(scores.logits).tolist()}

    handlers: dict[str, Callable[..., Any]] = {
        "throughput": throughput,
        "default": lambda: default,
        "sizes": lambda: sizes,
        "versions": lambda: machine_record(threads=spec["threads"])["versions"],
    }
    serve(text_handlers(models, texts) | handlers)


def _print_table(report: Mapping[str, Any]) -> None:
    head = ("model", "p50 ms", "p95 ms", "graph alone", "size MB", "max diff", "changed")
    print(f"{head[0]:58}" + "".join(f"{text:>12}" for text in head[1:]))
    for name, model in sorted(report["models"].items(), key=lambda entry: entry[1]["with_tokenizing"]["p50_ms"]):
        whole, alone = model["with_tokenizing"], model["without_tokenizing"]
        size = f"{model['size_bytes'] / 1e6:.1f}" if model["size_bytes"] else "-"
        difference = "-" if model["max_logit_difference"] is None else f"{model['max_logit_difference']:.4f}"
        changed = "-" if model["changed_decisions"] is None else str(model["changed_decisions"])
        cells = (
            f"{whole['p50_ms']:.3f}",
            f"{whole['p95_ms']:.3f}",
            f"{alone['p50_ms']:.3f}",
            size,
            difference,
            changed,
        )
        print(f"{name:58}" + "".join(f"{cell:>12}" for cell in cells))
    for name, ratio in report["ratios"].items():
        print(f"{name}: {ratio:.3f}")
    for name, entry in (report["throughput"] or {}).items():
        print(f"{name}: {entry['texts_per_second']:.0f} texts/s on 2 threads, {entry['changed_decisions']} changed")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare a bundle's graphs with PyTorch, optimum-onnx and TF-IDF on the same student."""
    parser = argparse.ArgumentParser(prog="python -m emodistill.benchmarks.export_bench", description=main.__doc__)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help="student's checkpoint folder")
    parser.add_argument("--bundle", type=Path, help="the bundle that was made from it")
    parser.add_argument("--texts", type=Path, help="file with a text column, such as dev.csv")
    parser.add_argument("--train", type=Path, help="labelled file, to fit TF-IDF + logistic regression on")
    parser.add_argument("--peers-python", type=Path, help="interpreter of the peers' environment (make peers)")
    parser.add_argument("--limit", type=int, default=300, help="texts at most, spread evenly over the file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--throughput-texts", type=int, default=0, help="texts of the two-thread comparison; 0: none")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    if given.serve:
        _serve_ours(given.serve)
        return
    if not (given.checkpoint and given.bundle and given.texts):
        parser.error("--checkpoint, --bundle and --texts are needed")
    texts = read_texts(given.texts).texts
    chosen = [texts[i] for i in np.linspace(0, len(texts) - 1, min(given.limit, len(texts))).astype(int).tolist()]
    with tempfile.TemporaryDirectory() as work:
        spec = {
            "checkpoint": given.checkpoint.absolute(),
            "bundle": given.bundle.absolute(),
            "texts": chosen,
            "throughput_texts": texts[: given.throughput_texts],
            "train": given.train.absolute() if given.train else None,
            "threads": 1,
            "max_length_tokens": load_checkpoint(given.checkpoint).max_length_tokens,
            "work": work,
        }
        report = compare_export(
            spec,
            peers_python=given.peers_python.absolute() if given.peers_python else None,
            n_rounds=given.rounds,
            n_warmup=given.warmup,
            n_throughput_texts=min(given.throughput_texts, len(texts)),
        )
    report = {"machine": machine_record(threads=1), "texts": {"file": given.texts.name, "n": len(chosen)}, **report}
    _print_table(report)
    print(describe_machine(report["machine"]))
    if given.out:
        write_json(given.out, report)
        print(given.out)


if __name__ == "__main__":
    try:
        main()
    except (InputError, WorkerError) as error:
        sys.exit(str(error))
