#!/usr/bin/env python3
"""Draws a result of compare_peers.py: the fraction of the limit of each workload and program.

    bench/compare/plot.py RESULT.json [--out STEM]    # writes STEM.svg and STEM.png

Quire is a bar, peers are marks on its row. Shapes differ as well as colours (those of Okabe and
Ito, which colour-blind people tell apart), so that it can be read in print without colours.
"""

import argparse
import json
import pathlib
import sys

try:
    import matplotlib
except ImportError:
    sys.exit("plot.py: matplotlib is needed: pip install -r bench/compare/requirements.txt")

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  pylint: disable=wrong-import-position

QUIRE_COLOUR = "#0072B2"
# name: label, colour, marker; from the top of a row to its bottom, so that equal figures show
PEERS = {
    "fa3": ("FlashAttention-3", "#D55E00", "D"),
    "flashinfer": ("FlashInfer", "#009E73", "s"),
    "vllm_triton": ("vLLM Triton", "#000000", "X"),
    "vllm_cpu": ("vLLM CPU_ATTN", "#000000", "X"),
    "cudnn": ("cuDNN", "#CC79A7", "^"),
    "sdpa": ("PyTorch SDPA", "#E69F00", "v"),
}


def label_of(name, result):
    label = PEERS[name][0] if name in PEERS else name
    return label + (", K and V unpaged" if name in result["unpaged"] else "")


def limits_text(limits):
    """A GPU's in thousands, as its data sheet has them."""
    if "cuBLAS" in limits["flops_method"]:
        return (f"{limits['gb_per_s'] / 1000:.2f} TB/s read, "
                f"{limits['gflop_per_s'] / 1000:.0f} TFLOP/s bf16 GEMM")
    return (f"{limits['gb_per_s']:.0f} GB/s read, {limits['gflop_per_s']:.0f} GFLOP/s "
            f"({limits['flops_method']})")


def draw(result):
    workloads = result["workloads"]
    height = 1.5 + 0.36 * len(workloads)
    figure, axes = pyplot.subplots(figsize=(9.0, height))
    rows = range(len(workloads))
    fractions = [entry["fraction"] for workload in workloads
                 for entry in workload["results"].values() if "fraction" in entry]
    quire = [workload["results"]["quire"]["fraction"] for workload in workloads]
    axes.barh(rows, quire, height=0.72, color=QUIRE_COLOUR, zorder=2,
              label=f"Quire {result['versions']['quire']}")
    for row, fraction in zip(rows, quire):
        axes.text(0.008, row, f"{fraction:.2f}", color="white", va="center", fontsize=8.5,
                  fontweight="bold", zorder=4)
    peers = [name for name in PEERS if name in workloads[0]["results"]]
    for lane, name in enumerate(peers):
        _, colour, marker = PEERS[name]
        offset = 0.54 * (lane / (len(peers) - 1) - 0.5) if len(peers) > 1 else 0.0
        points = [(workload["results"][name]["fraction"], row + offset)
                  for row, workload in zip(rows, workloads)
                  if "fraction" in workload["results"].get(name, {})]
        if points:
            axes.scatter(*zip(*points), marker=marker, s=34, color=colour, edgecolor="white",
                         linewidth=0.9, zorder=3, label=label_of(name, result))

    axes.set_yticks(rows, [workload["name"] for workload in workloads])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(workloads) - 0.4, -0.6)
    axes.set_xlim(0.0, max(1.0, *(1.01 * fraction for fraction in fractions)))
    axes.set_xticks([0.1 * tenth for tenth in range(11)])
    axes.set_xlabel("fraction of the hardware limit (more is better)")
    axes.xaxis.grid(True, color="#CCCCCC", linewidth=0.7, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.text(0.02, 1.0 - 0.08 / height,
                f"Attention on one {result['device']}, {result['date'][:10]}", ha="left", va="top",
                fontsize=12, fontweight="bold")
    figure.text(
        0.02, 1.0 - 0.34 / height, f"bf16, blocks of {result['options']['block_size']}; limit: "
        f"{limits_text(result['limits'])}, measured in the same run", ha="left", va="top",
        fontsize=8.5, color="#444444")
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: not labels[i].startswith("Quire"))
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="lower center",
                  ncols=3, frameon=False)
    figure.subplots_adjust(left=0.185, right=0.975, bottom=1.0 / height, top=1.0 - 0.6 / height)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", metavar="RESULT.json")
    parser.add_argument("--out", metavar="STEM", help="default: that of RESULT.json, beside it")
    args = parser.parse_args()
    result = json.loads(pathlib.Path(args.result).read_text(encoding="utf-8"))
    # The same figures make the same file.
    matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9.5,
                                "svg.hashsalt": "quire"})
    figure = draw(result)
    stem = args.out or str(pathlib.Path(args.result).with_suffix(""))
    figure.savefig(stem + ".svg", metadata={"Date": None})
    figure.savefig(stem + ".png", dpi=160)


if __name__ == "__main__":
    main()
