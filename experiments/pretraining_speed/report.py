"""From results/*.json to the table in README.md and plot.png; `python report.py` makes both anew."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import PAGES, plot_pairs, write_between_marks

HERE = Path(__file__).parent
BEST_PAGES = next(iter(PAGES))  # with which both sides are fastest: the claim is about these
NOT_RUN = "not run"


def spread(result: dict[str, Any]) -> tuple[float, float]:
    """Smallest and largest ratio of a size's pairs."""
    ratios = [pair["ratio"] for pair in result["pairs"]]
    return min(ratios), max(ratios)


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One row a model: what the table shows."""
    table = []
    for size in result["sizes"]:
        median, (low, high) = size["median"], spread(size)
        table.append(
            [
                f"CPU, GPT {size['model']} ({size['batch']} x {size['length']} tokens), pages of {size['pages']}",
                "at least 1.00" if size["pages"] == BEST_PAGES else "",
                f"**{median['ratio']:.2f}** ({low:.2f} to {high:.2f})",
                f"{median['jax']:,.0f}",
                f"{median['torch']:,.0f}",
            ]
        )
    return table


def page_rows(result: dict[str, Any]) -> list[str]:
    """The table of what the pages do: faults a step and busy cores, those in the kernel in brackets."""
    lines = ["| model | pages | dsjax: faults a step | busy cores | torch: faults a step | busy cores |"]
    lines.append("|---" * 6 + "|")
    for size in result["sizes"]:
        cells = [size["model"], size["pages"]]
        for side in ("jax", "torch"):
            busy, kernel, faults = (size["median"][f"{side}_{name}"] for name in ("cores", "kernel_cores", "faults"))
            cells += [f"{faults:,.0f}", f"{busy:.2f} ({kernel:.2f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def print_table(result: dict[str, Any]) -> None:
    """The table, for the terminal."""
    header = ["model", "target", "dsjax / torch", "dsjax tokens/s", "torch tokens/s"]
    table = [header, *([cell.replace("*", "") for cell in row] for row in rows(result))]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def newest(kind: str, holds: str) -> dict[str, Any] | None:
    """The latest result of a kind ('cpu', 'gpu') that holds an entry; the GPU's stages have files of their own."""
    results = [json.loads(file.read_text()) for file in (HERE / "results").glob(f"{kind}-*.json")]
    return max((each for each in results if holds in each), key=lambda each: each["when"], default=None)


def gpu_lines(result: dict[str, Any] | None) -> list[str]:
    """The two rows of the GPU table."""
    if result is None:
        return [f"| GPU, GPT-3 1.3B, bf16: model FLOPs utilisation | at least 55% | {NOT_RUN} | | |",
                f"| GPU, GPT-3 1.3B, bf16: against torch.compile | at least 1.00 | {NOT_RUN} | | |"]  # fmt: skip
    best = result["best"]
    speeds = f"{best['jax']['tokens_per_second']:,.0f} | {best['torch']['tokens_per_second']:,.0f} |"
    ratio = best["jax"]["tokens_per_second"] / best["torch"]["tokens_per_second"]
    return [
        f"| GPU, GPT-3 1.3B, bf16: model FLOPs utilisation | at least 55% | **{best['jax']['mfu']:.1%}** | {speeds}",
        f"| GPU, GPT-3 1.3B, bf16: against torch.compile | at least 1.00 | **{ratio:.2f}** | {speeds}",
    ]


def report() -> None:
    """Rewrite README.md between its marks, and the plot."""
    cpu, gpu = newest("cpu", "sizes"), newest("gpu", "best")
    lines = ["| claim | target | ours: median (spread) | dsjax tokens/s | torch tokens/s |", "|---|---|---|---|---|"]
    if cpu:
        lines += [f"| {' | '.join(row)} |" for row in rows(cpu)]
    lines += gpu_lines(gpu)
    if cpu:
        about = cpu["sizes"][0]["about"]
        versions = about["jax"]["versions"] | about["torch"]["versions"]
        worst = max(size["check"]["largest_relative_difference"] for size in cpu["sizes"])
        others = max(size["median"]["other_cores"] for size in cpu["sizes"])
        lines += [
            "",
            f"CPU: {cpu['when']}, {cpu['machine']['cpu']}, {cpu['threads']} threads each; jax {versions['jax']}, "
            f"torch {versions['torch']} with {about['torch']['optimizer']}; {len(cpu['sizes'][0]['pairs'])} pairs of "
            f"blocks of {cpu['steps_per_block']} steps; other programs took {others:.2f} cores; largest relative "
            f"difference of the first five losses {worst:.0e}.",
            "",
            *page_rows(cpu),
            "",
            "![tokens per second of every pair of blocks](plot.png)",
        ]
        panels = [
            (f"GPT {size['model']}, {size['pages']}: {size['median']['ratio']:.2f}x", size["pairs"])
            for size in cpu["sizes"]
        ]
        plot_pairs(panels, {"jax": "dsjax", "torch": "PyTorch, eager"}, HERE / "plot.png")
    write_between_marks(HERE / "README.md", lines)


if __name__ == "__main__":
    report()
