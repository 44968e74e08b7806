"""Damage to files, and what `qflax verify` must say of any file."""

import contextlib
import copy
import io
import json
import tracemalloc
import zipfile

from qflax.cli import main

NUMBERS = (0, -1, 0.5, 7, 10**12, 2**63 - 1, -(2**63), 10**400, 1e300, float("nan"), float("inf"))
VALUES = (*NUMBERS, None, True, "x", "a\nb\x1b[2J", "\ud800", [], {}, [10**12] * 3, [-1])
MEMORY = 2**29


def outcome(path):
    """Exit code of `qflax verify` and its error, after checking that it is as promised."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["verify", str(path)])
    line = err.getvalue()
    if code == 2:
        assert line.startswith(f"error: {path}: ") and line.endswith("\n") and line[:-1].isprintable()
        assert len(line) < 2100 + len(str(path))
    else:
        assert code in (0, 1) and not line and out.getvalue().startswith(f"{path}: ")
    return code, line


def refused(path, part=""):
    """Asserts that a file is refused for a reason, within little memory."""
    tracemalloc.start()
    try:
        code, line = outcome(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert code == 2 and part in line, line


def places(tree, at=()):
    """Paths to everything in a tree of JSON."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield *at, key
        yield from places(child, (*at, key))


def mutated(tree, rng):
    """A copy of a tree with one entry dropped, doubled, moved or replaced."""
    tree = copy.deepcopy(tree)
    *way, key = rng.choice(list(places(tree)))
    parent = tree
    for step in way:
        parent = parent[step]
    kind = rng.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif kind == 2 and isinstance(parent, list):
        rng.shuffle(parent)
    else:
        parent[key] = rng.choice(VALUES)
    return tree


def damaged(data, rng):
    """Bytes cut off, flipped, overwritten, dropped or inserted."""
    data, at = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at : at + 8] = rng.randbytes(8)
    elif kind == 3:
        del data[at : at + 16]
    else:
        data[at:at] = rng.randbytes(4)
    return bytes(data)


def archive(path, graph, codes=b"", numbers=b"", method=zipfile.ZIP_DEFLATED):
    """A packed file of any graph, or any text of one."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("graph.json", graph if isinstance(graph, str | bytes) else json.dumps(graph))
        file.writestr("codes.bin", codes)
        file.writestr("numbers.bin", numbers)
    return path


def entries(path):
    with zipfile.ZipFile(path) as file:
        return [file.read(name) for name in ("graph.json", "codes.bin", "numbers.bin")]
