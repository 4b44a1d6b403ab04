"""Do batches of a curriculum come as fast as a bare numpy loop copies the same rows?

    .venv/bin/python experiments/data_pipeline/run.py          results/<packing>.json, plot.png, the table in README.md
    .venv/bin/python experiments/data_pipeline/run.py --dry    prints the table, writes nothing

All ways of reading take turns in one process. When other programs take more than a tenth of a core, nothing is written.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from bare import Clusters, Copies, Windows  # noqa: E402
from side_by_side import MOST_OTHER_CORES, busy_seconds, machine, write_between_marks  # noqa: E402

from dsjax.config.load import from_dict  # noqa: E402
from dsjax.data.config import CurriculumConfig, DataConfig  # noqa: E402
from dsjax.data.corpus.build import Corpus, build_corpus  # noqa: E402
from dsjax.data.curriculum.analyze import open_index  # noqa: E402
from dsjax.data.curriculum.draw import Curriculum  # noqa: E402
from dsjax.data.rows.mixture import Rows  # noqa: E402
from dsjax.data.rows.pack import PackIndex  # noqa: E402
from dsjax.data.rows.pipeline import Batches  # noqa: E402

COPY, LOOP = "known rows, copied", "plain curriculum loop"


def check_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Both sides must give the same arrays, else there is no figure."""
    for key, value in ours.items():
        if not (np.array_equal(value, theirs[key]) and value.dtype == theirs[key].dtype):
            raise SystemExit(f"the two sides differ in {key}: no figure")


def timed(batches: Iterator[Any], count: int) -> float:
    """Seconds that so many batches take."""
    began = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    return time.perf_counter() - began


def measure(settings: dict[str, Any], data: DataConfig, corpus: Corpus) -> dict[str, Any]:
    """All ways of reading one packing."""
    size, count, prefetch = settings["rows"], settings["batches"], settings["prefetch"]
    rows = Rows.of(corpus, data, split="train")
    began = time.perf_counter()
    index = open_index(corpus, rows, config=data, metrics=["vocab_rarity"])
    seconds = time.perf_counter() - began
    growth = from_dict(CurriculumConfig, settings["curriculum"]).difficulty
    make = lambda: Curriculum(index.values, growth, batch_size=size)
    curriculum = make()
    store = corpus.train[0]
    how = {"pack": data.pack, "isolate_documents": data.isolate_documents}
    packed = PackIndex.build(store.offsets, data.sequence_length, **how)
    copy: Callable = Copies(store, packed) if data.isolate_documents else Windows(store, data.sequence_length)
    last = packed.num_rows - 2  # a stream's last row is not whole, which windows cannot have
    known = [np.minimum(curriculum.rows(step * size + np.arange(size)), last) for step in range(count)]
    for numbers in known[:50]:
        check_equal(rows.read(np.zeros(size, np.int64), numbers), copy(numbers))

    turns = []
    for _ in range(settings["turns"]):
        turn = {COPY: timed((copy(numbers) for numbers in known), count)}
        visible = [curriculum.visible(step) for step in range(count)]
        clusters = Clusters(index.values["vocab_rarity"], visible, size)
        turn[LOOP] = timed((copy(np.minimum(clusters(), last)) for _ in range(count)), count)
        for threads in settings["threads"]:
            with Batches(rows, batch_size=size, threads=threads, prefetch=prefetch, order=make()) as batches:
                timed(batches, 2 * prefetch)
                turn[f"dsjax, threads {threads}"] = timed(batches, count)
        turns.append({name: count / taken for name, taken in turn.items()})
    began = time.perf_counter()
    make().rows(settings["resume_at_draw"] + np.arange(size))
    resumed = time.perf_counter() - began
    return {
        "batches_per_second": {name: statistics.median(turn[name] for turn in turns) for name in turns[0]},
        "against_copy": {name: sorted(turn[name] / turn[COPY] for turn in turns) for name in turns[0] if name != COPY},
        "rows_in_all": rows.num_rows,
        "pieces_a_row": len(packed.pieces) / packed.num_rows,
        "index_tokens_per_second": rows.num_rows * data.sequence_length / seconds,
        "resume_seconds": resumed,
        "turns": turns,
    }


def table(results: dict[str, dict[str, Any]], target: float) -> list[str]:
    """Markdown: one row for each way of reading."""
    lines = [
        "| packing | read by | batches/s | against copying known rows: median (least to most) |",
        "|---|---|---|---|",
    ]
    for packing, result in results.items():
        for name, rate in result["batches_per_second"].items():
            ratios = result["against_copy"].get(name)
            shown = "1" if ratios is None else f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            lines.append(f"| {packing} | {name} | {rate:,.0f} | {shown} |")
    first = next(iter(results.values()))
    lines += [
        "",
        f"Target: {target} with {max(first['settings']['threads'])} threads. First batch of a run resumed at draw "
        f"{first['settings']['resume_at_draw']:,}: {first['resume_seconds']:.1f} s. Measuring vocab_rarity: "
        f"{first['index_tokens_per_second'] / 1e6:,.0f} M tokens/s. {first['machine']['cpu']}, "
        f"{first['machine']['cores']} cores.",
    ]
    return lines


def plot(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Batches per second of every way of reading."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 1.6 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for ax, (packing, result) in zip(axes, results.items(), strict=True):
        rates = result["batches_per_second"]
        ax.barh(list(rates), list(rates.values()), color=["0.6" if "dsjax" not in name else "C0" for name in rates])
        ax.set(title=packing, xlabel="batches/s", xscale="log")
        ax.invert_yaxis()
    FigureCanvasAgg(figure).print_png(str(file), metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--turns", type=int, help="fewer turns than config.yaml says")
    options = parser.parse_args()
    settings = yaml.safe_load((HERE / "config.yaml").read_text())
    settings["turns"] = options.turns or settings["turns"]
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        for packing, how in settings["packings"].items():
            data = from_dict(DataConfig, how | {"sequence_length": settings["tokens"], "cache_dir": cache})
            corpus = build_corpus(data, progress=True)
            before, began, own = busy_seconds(), time.perf_counter(), time.process_time()
            results[packing] = measure(settings, data, corpus)
            others = busy_seconds() - before - (time.process_time() - own)
            about = {"other_cores": max(0.0, others) / (time.perf_counter() - began), "settings": settings}
            results[packing] |= {**about, "machine": machine()}
    lines = table(results, settings["target"])
    print("\n".join(lines))
    busy = max(result["other_cores"] for result in results.values())
    if options.dry or busy > MOST_OTHER_CORES:
        print(f"nothing written; other programs kept {busy:.2f} cores busy (at most {MOST_OTHER_CORES} to be recorded)")
        return
    (HERE / "results").mkdir(exist_ok=True)
    for packing, result in results.items():
        (HERE / "results" / f"{packing}.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(results, HERE / "plot.png")
    write_between_marks(HERE / "README.md", lines)


if __name__ == "__main__":
    main()
