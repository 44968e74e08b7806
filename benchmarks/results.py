"""Makes the tables of README.md, docs/results.md and docs/recipes.md from the files in results/.

python -m benchmarks.results [--check]
"""

import argparse
import collections
import json
import pathlib
import re
import statistics
import sys

from benchmarks.tables import CONFIGS, TABLES, Row, Table
from qflax import config_file
from qflax.files import write_atomically
from qflax.report.published import linked

ROOT = CONFIGS.parent
DOCUMENTS = ("README.md", "docs/results.md", "docs/recipes.md")
_MARK = re.compile(r"(<!-- (\w+): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Writes the tables, or checks that they are what the files say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if tables are old")
    options = parser.parse_args()
    found, tried = load(ROOT / "results"), load(ROOT / "results/tuning")
    for name in DOCUMENTS:
        file = ROOT / name
        old = file.read_text()
        new = filled(old, found, tried)
        if options.check and new != old:
            sys.exit(f"{name}: its tables are not of results/; run python -m benchmarks.results")
        if new != old:
            write_atomically(file, new)


def load(folder: pathlib.Path) -> dict[tuple[str, str], list[dict]]:
    """(table, row) -> what is known of its seeds, in order."""
    found = collections.defaultdict(list)
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        found[result["table"], result["row"]].append(result)
    return {key: sorted(results, key=lambda result: result["seed"]) for key, results in found.items()}


def filled(text: str, found: dict[tuple[str, str], list[dict]], tried: dict) -> str:
    """The text with all that is between marks, `<!-- summary: TABLE -->` and `<!-- end -->`, made anew.

    `summary` has a line per row, `details` one per row and seed, `tuning` one per row and change.
    """
    made = {"summary": (summary, found), "details": (details, found), "tuning": (tuning, tried)}

    def block(match: re.Match) -> str:
        start, kind, name, end = match.groups()
        table, (make, results) = TABLES[name], made[kind]
        return f"{start}{make(table, [results.get((name, row.name), []) for row in table.rows])}\n{end}"

    return _MARK.sub(block, text)


def summary(table: Table, found: list[list[dict]]) -> str:
    """A line per row."""
    accuracies = table.published
    lines = [f"{table.title}; published figures of {linked(table.source)}.", ""]
    lines.append("| | published | top-1 | to float | epochs | file | same class as trained | accumulators |")
    lines.append("|---|---|---|---|---|---|---|---|")
    for row, results in zip(table.rows, found, strict=True):
        name = f"[{row.label}](configs/{row.config}.py)"
        published = f"{accuracies[row.label]:.2f} %" if row.label in accuracies else ""
        measured = list(_measured(row, results))
        if row is table.rows[0]:
            measured[1] = ""
        lines.append("| " + " | ".join((name, published, *measured)) + " |")
    return "\n".join(line.replace("  ", " ") for line in lines)


def _measured(row: Row, results: list[dict]) -> tuple[str, ...]:
    """top-1, difference to float, epochs, size of the file, images of the same class, accumulators.

    Of the seeds with the longest schedule.
    """
    if not results:
        return ("",) * 6
    longest = max(result["scale"] for result in results)
    results = [result for result in results if result["scale"] == longest]
    top1 = [result["top1"] for result in results]
    accuracy = _mean(top1)
    difference = statistics.mean(100 * (result["top1"] - result["float_top1"]) for result in results)
    proofs = [result["verification"] for result in results]
    same, held = "not verified yet", ""
    if all(proofs):
        images = sum(p["images"] for p in proofs)  # None of a data set that is not held in memory.
        same = f"{sum(p['same_class'] for p in proofs):,} of {images:,}" if images else ""
        held = f"{sum(p['accumulators_held'] for p in proofs)} of {sum(p['integer_layers'] for p in proofs)}"
        if not all(p["ok"] for p in proofs):
            held += ", NOT verified"
        if not any(p["integer_layers"] for p in proofs):
            held = "" if all(p["ok"] for p in proofs) else "NOT verified"
    sizes = [result["file_bytes"] for result in results if result["file_bytes"]]
    size = f"{max(sizes) / 1024:,.1f} KiB" if sizes else ""
    if any(result["missed_size_targets"] for result in results):
        size += ", target missed"
    return accuracy, f"{difference:+.2f}", _epochs(row, results), size, same, held


def _epochs(row: Row, results: list[dict]) -> str:
    """Their number, and of how many where the schedule was shortened."""
    recipe = config_file.read(str(CONFIGS / f"{row.config}.py"), ()).num_epochs
    # By --scale or a changed field. A row that is not trained has the number that the float network had.
    least = min(result["epochs"] if row.trained else result["config"]["num_epochs"] for result in results)
    shortened = min(result["scale"] for result in results) < 1 or least < recipe - 0.5
    if not row.trained:
        return "none; float shortened" if shortened else "none"
    epochs = " / ".join(sorted({f"{result['epochs']:.1f}".removesuffix(".0") for result in results}))
    return epochs + (f" of {recipe:g}, shortened" if shortened else "")


def details(table: Table, found: list[list[dict]]) -> str:
    """A line per row and seed, then how they were made."""
    lines = ["| | seed | top-1 | top-5 | epochs | minutes | weight bytes | file bytes | commit |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    origins = collections.defaultdict(list)
    for row, results in zip(table.rows, found, strict=True):
        for result in results:
            size = f"{result['file_bytes']:,}" if result["file_bytes"] else ""
            lines.append(
                f"| {row.label} | {result['seed']} | {result['top1']:.2%} | {result['top5']:.2%} "
                f"| {_epochs(row, [result])} | {result['minutes']:.1f} | {result['weight_bytes']:,.0f} "
                f"| {size} | {_commit(result)} |"
            )
            origins[_origin(result), result["command"]].append(row.label)
    lines += _made_by(origins)
    return "\n".join(lines) if len(lines) > 2 else "Nothing yet."


def tuning(table: Table, tried: list[list[dict]]) -> str:
    """A line per row and change, beside the recipe as it is, then how they were made."""
    lines = ["| | changed | top-1 on held-out training images | to the recipe | epochs | weights |"]
    lines.append("|---|---|---|---|---|---|")
    origins = collections.defaultdict(list)
    for row, trials in zip(table.rows, tried, strict=True):
        by_change = collections.defaultdict(list)
        for trial in trials:
            by_change[trial["scale"], trial["change"]].append(trial)
            origins[_origin(trial), trial["command"]].append(f"{row.label} at {_commit(trial)}")
        for (scale, change), own in sorted(by_change.items()):
            top1 = {trial["seed"]: trial["validation_top1"] for trial in own}
            recipe = {trial["seed"]: trial["validation_top1"] for trial in by_change[scale, ""]}
            changes = ", ".join(f"`{part}`" for part in change.split()) or "nothing"
            kib = max(trial["weight_bytes"] for trial in own) / 1024
            differences = [100 * (top1[seed] - recipe[seed]) for seed in top1 if seed in recipe]
            difference = f"{statistics.mean(differences):+.2f}" if change and differences else ""
            lines.append(
                f"| {row.label} | {changes} | {_mean(list(top1.values()))} | {difference} "
                f"| {_epochs(row, own)} | {kib:,.1f} KiB |"
            )
    lines += _made_by(origins)
    return "\n".join(lines) if len(lines) > 2 else "Nothing yet."


def _mean(accuracies: list[float]) -> str:
    """In percent, with the standard deviation where there are several."""
    mean = f"{statistics.mean(accuracies):.2%}".replace("%", " %")
    if len(accuracies) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(accuracies):.2f} ({len(accuracies)} seeds)"


def _made_by(origins: dict[tuple[str, str], list[str]]) -> list[str]:
    return [
        line
        for (origin, command), rows in origins.items()
        for line in ("", f"{', '.join(dict.fromkeys(rows))}: {origin}; `{command}`")
    ]


def _commit(result: dict) -> str:
    commit, plus, changes = result["commit"].partition("+")
    return commit[:7] + (", changed files" if plus else "")


def _origin(result: dict) -> str:
    packages = ", ".join(f"{name} {result['versions'][name]}" for name in ("jax", "flax"))
    return f"{result['device']} of {result['processor']}, Python {result['python']}, {packages}"


if __name__ == "__main__":
    main()
