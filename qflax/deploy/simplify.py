"""The same graph with less: nothing twice, nothing without effect, nothing unused."""

import dataclasses

from qflax.deploy.graph import BINARY, Constant, Graph, Node

# Names of inputs.
_ROLES = {"conv": ("x", "kernel"), "dense": ("x", "kernel"), "quantize": ("x", "scale", "zero_point")}
_IDENTITY = {"multiply": 1.0, "divide": 1.0, "add": 0.0, "subtract": 0.0}


def simplified(graph: Graph) -> Graph:
    """A graph of the same values, bit for bit (but for the sign of zero), with names of its layers."""
    constants = _operands(graph)
    first: dict[tuple, str] = {}
    renamed: dict[str, str] = {}
    for name, constant in constants.items():
        array = constant.array
        key = (array.shape, array.tobytes(), constant.format, constant.accumulator_bits)
        renamed[name] = first.setdefault(key, name)
    nodes = []
    for node in graph.nodes:
        node = dataclasses.replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        key = (node.operation, node.inputs, tuple(sorted(node.attributes.items())))
        same = _passes_on(node, constants) or first.get(key)
        if same:
            renamed[node.output] = same
            continue
        first[key] = node.output
        nodes.append(node)
    output = renamed.get(graph.output, graph.output)
    return _named(
        dataclasses.replace(graph, nodes=used_nodes(nodes, output), constants=constants, output=output)
    )


def _operands(graph: Graph) -> dict[str, Constant]:
    """Constants; those that are operands of elementwise operations alone without leading axes of 1."""
    others = [node for node in graph.nodes if node.operation not in (*BINARY, "select")]
    elsewhere = {name for node in others for name in node.inputs[:2]}
    quantizers = {name for node in graph.nodes if node.operation == "quantize" for name in node.inputs[1:]}
    return {
        name: constant if name in elsewhere - quantizers else _squeezed(constant)
        for name, constant in graph.constants.items()
    }


def _squeezed(constant: Constant) -> Constant:
    shape = list(constant.array.shape)
    while shape and shape[0] == 1:
        del shape[0]
    return dataclasses.replace(constant, array=constant.array.reshape(shape))


def _passes_on(node: Node, constants: dict[str, Constant]) -> str | None:
    """The operand that an operation without effect hands on."""
    if node.operation not in _IDENTITY:
        return None
    for x, other in (node.inputs, node.inputs[::-1]):
        if other in constants and constants[other].array.size == 1 and x not in constants:
            right_side = node.operation in ("multiply", "add") or other == node.inputs[1]
            if right_side and constants[other].array.item() == _IDENTITY[node.operation]:
                return x
    return None


def used_nodes(nodes: list[Node], output: str) -> tuple[Node, ...]:
    """Those that `output` depends on."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if node.output in needed:
            needed.update(node.inputs)
            kept.append(node)
    return tuple(reversed(kept))


def _named(graph: Graph) -> Graph:
    """Names of layers and operations instead of numbers, and only the constants that are used."""
    names, taken = {graph.input: graph.input}, {graph.input}
    layers = _below_root([node.layer for node in graph.nodes])

    def name(old: str, wish: str) -> None:
        new, count = wish, 1
        while new in taken:
            count += 1
            new = f"{wish}_{count}"
        taken.add(new)
        names[old] = new

    for node, layer in zip(graph.nodes, layers, strict=True):
        where = f"{layer}/" if layer else ""
        for i, operand in enumerate(node.inputs):
            if operand in graph.constants and operand not in names:
                roles = _ROLES.get(node.operation)
                name(operand, where + (roles[i] if roles else f"{node.operation}.constant"))
        name(node.output, where + node.operation)
    nodes = tuple(
        dataclasses.replace(
            node, inputs=tuple(names[old] for old in node.inputs), output=names[node.output], layer=layer
        )
        for node, layer in zip(graph.nodes, layers, strict=True)
    )
    constants = {names[old]: constant for old, constant in graph.constants.items() if old in names}
    return dataclasses.replace(graph, nodes=nodes, constants=constants, output=names[graph.output])


def _below_root(layers: list[str]) -> list[str]:
    """Paths without the module that all are in."""
    roots = {layer.split("/")[0] for layer in layers if layer}
    return [layer.partition("/")[2] for layer in layers] if len(roots) == 1 else layers
