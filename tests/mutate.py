"""Would the tests notice? Every file of losses is changed in small wrong ways, one at a time, and its tests must fail.

    python tests/mutate.py [NAME ...] [--list]

The files are those under algorithms/ and what they share, under bench_dfusion/objectives/.

Operators, fixed: flip a sign; swap winner and loser; drop a clamp, clip or maximum; detach what is not, undetach
what is; take the mean before logsigmoid; move the window by a step; double beta. For each mutant a forked process
(the heavy imports are shared) runs the test files that import the module, or an algorithm that does, up to the first
failure. Survivors are printed with their line. Not a test: it takes a minute or two for each file.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHOLE_RUNS = ("test_run.py", "test_builders.py", "test_offline.py")  # too long for each mutant
SECONDS = 300  # a mutant that runs longer counts as noticed: it no longer ends

Change = Callable[[ast.AST], ast.AST | None]  # the node that replaces one, or None where the operator does not apply


def flip_sign(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return node.operand
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        return ast.BinOp(node.left, other, node.right)
    return None


def swap_sides(node: ast.AST) -> ast.AST | None:
    """a_w - a_l to a_l - a_w, and (winner, loser) to (loser, winner), wherever both stand in one expression."""
    pairs = {"winner": "loser", "ratio_w": "ratio_l", "gain_w": "gain_l", "ref_w": "ref_l", "reward_w": "reward_l"}
    pairs |= {"g_w": "g_l", "desirable": "undesirable", "positive": "negative"}
    both = pairs | {v: k for k, v in pairs.items()}
    if isinstance(node, ast.Lambda) and [a.arg for a in node.args.args][:2] == ["w", "x"]:  # preference.LOSSES
        args = copy.deepcopy(node.args)
        args.args[0].arg, args.args[1].arg = "x", "w"
        return ast.Lambda(args, node.body)
    if not isinstance(node, ast.Assign | ast.Return):
        return None
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {
        n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    if not any(k in found and v in found for k, v in pairs.items()):
        return None
    changed = copy.deepcopy(node)
    targets = changed.targets if isinstance(changed, ast.Assign) else []
    kept = {id(n) for t in targets for n in ast.walk(t)}  # swap what is assigned, not the names it gets
    for n in ast.walk(changed):
        if isinstance(n, ast.Name) and n.id in both and id(n) not in kept:
            n.id = both[n.id]
        elif isinstance(n, ast.Constant) and n.value in both and id(n) not in kept:
            n.value = both[n.value]
    return None if ast.dump(changed) == ast.dump(node) else changed


def drop_clamp(node: ast.AST) -> ast.AST | None:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    if node.func.attr in ("clamp", "clip"):
        return node.func.value
    if node.func.attr in ("maximum", "minimum", "max", "min") and len(node.args) == 2:
        return node.args[0]
    return None


def undetach(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
        return node.func.value
    return None


def detach(node: ast.AST) -> ast.AST | None:
    """Cut the gradient of a call's result where the file takes one with a gradient."""
    with_gradient: tuple[str, ...] = (
        "step_log_prob",
        "stored_steps",
        "output",
        "error",
        "clean_of",
        "mean_square",
        "predict",
    )
    with_gradient += ("log_prob", "score_tensors", "gaussian_log_prob", "gaussian_kl")
    with_gradient += ("self_normalised", "_error", "_view")
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in with_gradient:
            return ast.Call(ast.Attribute(node, "detach", ast.Load()), [], [])
    return None


def mean_before(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "logsigmoid":
        inside = node.args[0]
        mean = ast.BinOp(inside, ast.Mult(), ast.Constant(0))
        mean = ast.BinOp(mean, ast.Add(), ast.Call(ast.Attribute(inside, "mean", ast.Load()), [], []))
        return ast.Call(node.func, [mean], [])
    return None


def move_window(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "window_steps":
        return ast.BinOp(node, ast.Add(), ast.Constant(1))
    return None


def double_beta(node: ast.AST) -> ast.AST | None:
    is_beta = (isinstance(node, ast.Attribute) and node.attr == "beta") or (
        isinstance(node, ast.Name) and node.id in ("beta", "b")
    )
    if is_beta and isinstance(getattr(node, "ctx", None), ast.Load):
        return ast.BinOp(ast.Constant(2), ast.Mult(), node)  # type: ignore[arg-type]
    return None


OPERATORS: dict[str, Change] = {
    f.__name__: f for f in (flip_sign, swap_sides, drop_clamp, undetach, detach, mean_before, move_window, double_beta)
}


def mutants(source: str) -> Iterator[tuple[str, int, str, str]]:
    """(operator, line, the line changed as code, the whole module changed) for every place an operator applies to."""
    tree = ast.parse(source)
    places = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)]
    count = len({id(n) for n in places})
    for name, change in OPERATORS.items():
        for index in range(count):
            fresh = ast.parse(source)
            nodes = list(
                {
                    id(n): n
                    for f in ast.walk(fresh)
                    if isinstance(f, ast.FunctionDef | ast.Lambda)
                    for n in ast.walk(f)
                }.values()
            )
            node = nodes[index]
            new = change(node)
            if new is None:
                continue
            changed = _Replace(node, new).visit(fresh)
            line = getattr(node, "lineno", 0)
            yield (
                name,
                line,
                ast.unparse(ast.fix_missing_locations(new)),
                ast.unparse(ast.fix_missing_locations(changed)),
            )


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def noticed(module: str, source: str, tests: list[str]) -> bool:
    """Whether the tests fail (or never end) with the module's source changed, in a process of its own."""
    child = os.fork()
    if child == 0:
        import pytest

        signal.alarm(SECONDS)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        changed = importlib.util.module_from_spec(spec)
        sys.modules[module] = changed
        try:
            exec(compile(source, spec.origin, "exec"), changed.__dict__)
            package, _, name = module.rpartition(".")
            setattr(importlib.import_module(package), name, changed)
            code = int(pytest.main(["-q", "-x", "-n", "0", "-p", "no:cacheprovider", *tests]))
        except BaseException:
            code = 1
        os._exit(1 if code else 0)
    _, status = os.waitpid(child, 0)
    return status != 0


def module_of(path: Path) -> str:
    return f"bench_dfusion.{path.parent.name}.{path.stem}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="file names without .py (default: all)")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    args = parser.parse_args()
    algorithms = sorted(p for p in (ROOT / "algorithms").glob("*.py") if p.stem != "__init__")
    files = [
        *algorithms,
        *sorted(p for p in (ROOT / "bench_dfusion" / "objectives").glob("*.py") if p.stem != "__init__"),
    ]
    files = [p for p in files if not args.names or p.stem in args.names]
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not args.list:  # shared by every fork
        for heavy in ("torch", "diffusers", "peft", "hypothesis", "pytest", "bench_dfusion.diffusion.policy", "fakes"):
            importlib.import_module(heavy)
    survivors = 0
    for path in files:
        module = module_of(path)
        assert module not in sys.modules, f"{module} is imported already: its mutants would not be used"
        users = [module, *(module_of(p) for p in algorithms if f"{module} import" in p.read_text())]
        tests = [
            str(t)
            for t in sorted((ROOT / "tests").glob("test_*.py"))
            if any(f"{user} import" in t.read_text() for user in users) and t.name not in WHOLE_RUNS
        ]
        every = list(mutants(path.read_text()))
        print(f"{path.name}: {len(every)} mutants, {', '.join(Path(t).name for t in tests)}", flush=True)
        for operator, line, code, source in every:
            if args.list:
                print(f"  {operator} at line {line}: {code}")
            elif not noticed(module, source, tests):
                survivors += 1
                print(f"  SURVIVED {operator} at line {line}: {code}", flush=True)
    if not args.list:
        print(f"{survivors} survivors")


if __name__ == "__main__":
    main()
