"""Draw ``docs/assets/architecture.svg``: the layers of the package, and the imports between them.

    python scripts/architecture.py

The layers stand below. The arrows are read from the code: there is one where a module of a layer imports a module of
another. ``tests/test_architecture.py`` fails where an import points upwards, where a module is in no layer, and where
the drawing is not the one that this script makes.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DRAWING = ROOT / "docs" / "assets" / "architecture.svg"


class Layer(NamedTuple):
    """Name a layer, what it does, and its modules and packages."""

    name: str
    does: str
    modules: tuple[str, ...]


#: The layers stand from the top to the bottom. A module imports modules of its own layer and of layers below it.
LAYERS = (
    Layer(
        "Commands", "run a recipe, measure, report",
        ("cli", "demo", "bench", "report", "extras", "moved", "__main__"),
    ),
    Layer(
        "Trainer", "puts the step under transformers' Trainer: data, checkpoints, evaluation",
        ("training", "presets", "integrations", "reading"),
    ),
    Layer(
        "Step", "draws a batch, scores it once, weighs it, and commits",
        ("matcher", "rollout", "step_terms", "batch", "groups", "settings", "running", "metrics", "refit"),
    ),
    Layer(
        "Proposal", "says what is sampled from, and when it is renewed",
        ("proposal", "sampling", "rejection", "ranks"),
    ),
    Layer(
        "Target", "gives log P(x) from constraints, and estimates Z and divergences",
        ("targets", "estimators", "unseen", "verified", "diagnostics"),
    ),
    Layer(
        "Model", "makes a transformers model a distribution: sample, score, loss",
        ("models", "forwards", "samples", "prompts", "completions", "head", "decoding", "guard", "families", "draws",
         "packing", "copies", "adapters", "tensors", "sharding", "tensor_parallel", "seeds", "shipped"),
    ),
    Layer(
        "Loss", "takes logits, or hidden states and a head; picks a backend",
        ("functional", "log_probs", "kernels", "eager", "parallel"),
    ),
    Layer("Formula", "turns log-probabilities into the weight A of a sequence", ("objectives", "methods")),
)  # fmt: skip


class Import(NamedTuple):
    """Name the importing and the imported module or package of dmfast, and the place of the import."""

    source: str
    target: str
    place: str


def modules(package: Path) -> set[str]:
    """Return the modules and packages right below a package."""
    return {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def imports(package: Path) -> list[Import]:
    """Return the imports between the modules and packages right below a package, also those within functions.

    Imports by ``__init__.py`` are left out, since it only gathers the public names.
    """
    known, found = modules(package), []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(node, package.name, parts[:-1]):
                if target in known and target != parts[0]:
                    found.append(Import(parts[0], target, f"{path.relative_to(package.parent)}:{node.lineno}"))
    return found


def _targets(node: ast.AST, package: str, inside: Sequence[str]) -> list[str]:
    """Return the modules or packages right below the package that a statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
        return [name[1] for name in names if name[0] == package and len(name) > 1]
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module.split(".") if node.module else []
    if node.level:
        way = [*inside[: len(inside) - node.level + 1], *module]
    elif module and module[0] == package:
        way = module[1:]
    else:
        return []
    return [way[0]] if way else [alias.name for alias in node.names]


def layer_of(layers: Sequence[Layer] = LAYERS) -> Mapping[str, int]:
    """Return the place of each module's layer."""
    return {module: place for place, layer in enumerate(layers) for module in layer.modules}


def problems(package: Path, given: Sequence[Import], layers: Sequence[Layer] = LAYERS) -> list[str]:
    """Return what contradicts the layers: modules in none of them, and imports that point upwards."""
    place, found = layer_of(layers), []
    for name in sorted(modules(package) - {"__init__"} - set(place)):
        found.append(f"{name} is in no layer of scripts/architecture.py")
    for each in given:
        if each.source in place and each.target in place and place[each.target] < place[each.source]:
            found.append(
                f"{each.place}: {each.source} ({layers[place[each.source]].name}) imports "
                f"{each.target} ({layers[place[each.target]].name}), which is above it"
            )
    return found


def arrows(given: Sequence[Import], layers: Sequence[Layer] = LAYERS) -> set[tuple[int, int]]:
    """Return the arrows between layers that the imports make, without those that follow from two others."""
    place = layer_of(layers)
    direct = {(place[each.source], place[each.target]) for each in given if {*each[:2]} <= set(place)}
    direct = {(a, b) for a, b in direct if a != b}
    reach = {a: {a} for a in range(len(layers))}
    # this goes up from the bottom, since arrows point down
    for a in reversed(range(len(layers))):
        for _, b in sorted(arrow for arrow in direct if arrow[0] == a):
            reach[a] |= reach.get(b, set())
    return {
        (a, b) for a, b in direct if not any((a, c) in direct and b in reach[c] and c != b for c in range(len(layers)))
    }


STYLE = """
text { font-family: system-ui, sans-serif; fill: #1c2330 }
.name { font-size: 15px; font-weight: 600 }
.does { font-size: 13px }
.modules { font-family: ui-monospace, monospace; font-size: 11.5px; fill: #56607a }
.ground { fill: #ffffff }
.box { fill: #f1f4fa; stroke: #8a96b0 }
.arrow { fill: none; stroke: #4a5878; stroke-width: 1.6 }
.head { fill: #4a5878 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6eaf3 } .modules { fill: #a9b4cb } .ground { fill: #161a22 }
  .box { fill: #232a38; stroke: #5d6a86 } .arrow { stroke: #9fb0d3 } .head { fill: #9fb0d3 }
}
"""
WIDTH, LEFT, BOX, GAP, LINE = 760, 14, 690, 26, 17


def drawing(package: Path, given: Sequence[Import], layers: Sequence[Layer] = LAYERS) -> str:
    """Return the drawing as SVG."""
    here = {path.stem for path in package.iterdir()}
    body, tops, bottoms, y = [], [], [], 14
    for layer in layers:
        lines = _wrapped([module for module in layer.modules if module in here], 74)
        height = 30 + LINE * len(lines)
        tops.append(y)
        bottoms.append(y + height)
        body.append(f'<rect class="box" x="{LEFT}" y="{y}" width="{BOX}" height="{height}" rx="6"/>')
        body.append(f'<text class="name" x="{LEFT + 12}" y="{y + 21}">{layer.name}</text>')
        body.append(f'<text class="does" x="{LEFT + 116}" y="{y + 21}">{layer.does}</text>')
        for i, line in enumerate(lines):
            body.append(f'<text class="modules" x="{LEFT + 116}" y="{y + 39 + LINE * i}">{line}</text>')
        y += height + GAP
    aside = 0  # arrows that pass a layer run at the right, each on a line of its own
    for a, b in sorted(arrows(given, layers)):
        if b == a + 1:
            x = LEFT + 48
            body.append(f'<path class="arrow" d="M{x} {bottoms[a]}V{tops[b] - 7}"/>')
            body.append(f'<path class="head" d="M{x - 5} {tops[b] - 9}h10l-5 9z"/>')
        else:
            right, x = LEFT + BOX, LEFT + BOX + 14 + 12 * aside
            start, end = bottoms[a] - 12, tops[b] + 12
            body.append(f'<path class="arrow" d="M{right} {start}H{x}V{end}H{right + 7}"/>')
            body.append(f'<path class="head" d="M{right + 9} {end - 5}v10l-9 -5z"/>')
            aside += 1
    height = y - GAP + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="The layers of dmfast; arrows are imports">\n<style>{STYLE}</style>\n'
        f'<rect class="ground" width="{WIDTH}" height="{height}"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _wrapped(words: Sequence[str], width: int) -> list[str]:
    """Return words in lines of at most so many characters."""
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + word
    return [line.replace("  ", " · ") for line in lines]


if __name__ == "__main__":
    of_code = imports(ROOT / "dmfast")
    if faults := problems(ROOT / "dmfast", of_code):
        raise SystemExit("\n".join(faults))
    DRAWING.write_text(drawing(ROOT / "dmfast", of_code), encoding="utf-8")
