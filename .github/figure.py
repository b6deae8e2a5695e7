"""Draw success, path KL and λ of several runs of trqam.py over its TRQAM updates.

    pip install matplotlib
    python .github/figure.py runs/cube-single-play/seed{0,1,2}    writes .github/learning.png

A thin line is a run, the thick one their mean where all of them have the same steps.
"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator


def curve(folder: Path, table: str, name: str) -> dict:
    """Thousands of steps after pretraining -> value, of a run's train.csv or eval.csv."""
    with open(folder / "eval.csv") as file:
        start = next(int(row["step"]) for row in csv.DictReader(file) if row["phase"] == "pretrain")
    with open(folder / table) as file:
        rows = [row for row in csv.DictReader(file) if row[name]]
    steps = ((int(row["step"]) - start) / 1000 for row in rows)
    return {step: float(row[name]) for step, row in zip(steps, rows, strict=True) if step >= 0}


def main(folders: list[Path]) -> None:
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
    figure, axes = plt.subplots(1, 3, figsize=(14.4, 3.8), layout="constrained")
    episodes = [f"{n:g}" for n in curve(folders[0], "eval.csv", "episodes").values()]
    success = f"success, % of {episodes[len(episodes) // 2]} episodes ({episodes[-1]} at the ends)"
    panels = [
        ("eval.csv", "success", success, 100),
        ("train.csv", "path_kl", "path KL, nats per action (budget dashed)", 1),
        ("train.csv", "lam", "trust-region parameter λ", 1),
    ]
    for ax, (table, name, title, factor) in zip(axes, panels, strict=True):
        curves = [curve(folder, table, name) for folder in folders]
        for folder, points in zip(folders, curves, strict=True):
            values = [factor * value for value in points.values()]
            ax.plot(list(points), values, ".-", markersize=4, linewidth=0.9, label=folder.name)
        if all(points.keys() == curves[0].keys() for points in curves):
            mean = [factor * sum(p[step] for p in curves) / len(curves) for step in curves[0]]
            ax.plot(list(curves[0]), mean, color="black", linewidth=2.2, label="mean")
        ax.set(title=title, xlabel="TRQAM updates, thousands")
    budget = curve(folders[0], "train.csv", "kl_budget")
    axes[0].set_ylim(0, 104)
    axes[1].plot(list(budget), list(budget.values()), "k--", linewidth=1.2)
    axes[1].set_ylim(0, 2 * max(budget.values()))
    axes[2].set_yscale("log")
    axes[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[2].yaxis.set_major_formatter("{x:g}")
    axes[2].yaxis.set_minor_formatter("")
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(Path(__file__).with_name("learning.png"), dpi=100)


if __name__ == "__main__":
    main([Path(arg) for arg in sys.argv[1:]])
