"""Draw success, path KL and λ of several runs of trqam.py over their fine-tuning updates.

    pip install matplotlib
    python .github/figure.py RUN …    writes .github/learning.png

A row per task; TRQAM and fixed λ in colours of their own; a thin line is a run, the thick one the
mean of those of a colour, at the steps that all of them have.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator


def method_of(folder: Path) -> str:
    lam = json.loads((folder / "config.json").read_text())["fixed_lambda"]
    return "TRQAM" if lam is None else f"fixed λ = {lam:g}"


def curve(folder: Path, table: str, name: str) -> dict:
    """Thousands of steps after pretraining -> value, of a run's train.csv or eval.csv."""
    start = json.loads((folder / "config.json").read_text())["pretrain_steps"]
    with open(folder / table) as file:
        rows = [row for row in csv.DictReader(file) if row[name]]
    steps = ((int(row["step"]) - start) / 1000 for row in rows)
    return {step: float(row[name]) for step, row in zip(steps, rows, strict=True) if step >= 0}


def task_of(folder: Path) -> str:
    """The domain, and the task if it is not OGBench's default of the domain."""
    env = json.loads((folder / "config.json").read_text())["env"]
    return env.removesuffix("-v0").replace("-play-singletask", "").replace("-task", ", task ")


def draw(axes, folders: list[Path]) -> None:
    """The curves of a task's runs."""
    panels = [
        ("eval.csv", "success", "success, %", 100),
        ("train.csv", "path_kl", "path KL, nats per action (budget dashed)", 1),
        ("train.csv", "lam", "trust-region parameter λ", 1),
    ]
    methods = list(dict.fromkeys(map(method_of, folders)))
    for ax, (table, name, title, factor) in zip(axes, panels, strict=True):
        for color, method in zip(("black", "tab:orange", "tab:blue"), methods, strict=False):
            own = [folder for folder in folders if method_of(folder) == method]
            curves = [curve(folder, table, name) for folder in own]
            for points in curves:
                values = [factor * value for value in points.values()]
                ax.plot(list(points), values, color=color, linewidth=0.7, alpha=0.6)
            common = [step for step in curves[0] if all(step in points for points in curves)]
            mean = [factor * sum(points[step] for points in curves) / len(own) for step in common]
            label = f"{method}, mean of {len(own)}"
            ax.plot(common, mean, color=color, linewidth=2.2, label=label)
        ax.set_title(f"{task_of(folders[0])}: {title}", fontsize=11)
    budget = curve(folders[0], "train.csv", "kl_budget")
    axes[0].set_ylim(-2, 104)
    axes[1].plot(list(budget), list(budget.values()), "k--", linewidth=1.2)
    axes[1].set_ylim(0)
    axes[2].set_yscale("log")
    axes[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[2].yaxis.set_major_formatter("{x:g}")
    axes[2].yaxis.set_minor_formatter("")


def main(folders: list[Path]) -> None:
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
    tasks = list(dict.fromkeys(map(task_of, folders)))
    size = (14.4, 3 * len(tasks))
    figure, axes = plt.subplots(len(tasks), 3, figsize=size, layout="constrained", squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        draw(row, [folder for folder in folders if task_of(folder) == task])
    for ax in axes[-1]:
        ax.set_xlabel("updates, thousands")
    axes[0][0].legend(frameon=False, loc="lower right")
    figure.savefig(Path(__file__).with_name("learning.png"), dpi=100)


if __name__ == "__main__":
    main([Path(arg) for arg in sys.argv[1:]])
