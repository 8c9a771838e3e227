"""How many registers each kernel takes: what tests compare, and how to note it anew.

    python -m tests.registers [cuda] [triton] [--op OP]    compiles, writes the tables, and says what changed

With --op, only these ops of Triton: what was noted of the others stays. The tables are cuda.json, and
triton-VERSION.json for the versions of Triton that were asked. A kernel with a few more
registers than noted may have fewer threads on a multiprocessor, and be slower, without any test of its results failing.
So a jump is to be explained, and only then noted.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
TOLERANCE = 8  # registers: one step in which they are given out; compilers of other versions differ by as much


def table(name):
    """{kernel: {instance: {architecture: registers}}}, or None where none was noted."""
    path = HERE / f"{name}.json"
    return json.loads(path.read_text())["registers"] if path.exists() else None


def gathered(found):
    """A table from (kernel, instance, architecture, registers); of several that share a name, the most."""
    result = {}
    for kernel, instance, architecture, registers in found:
        of_instance = result.setdefault(kernel, {}).setdefault(instance, {})
        of_instance[str(architecture)] = max(registers, of_instance.get(str(architecture), 0))
    return result


def of_triton(binaries):
    """A table from what tests/triton_kernels/compiling.py reports."""
    return gathered((b["kernel"], f"{b['dtype']} {b['block']}", b["architecture"], b["registers"]) for b in binaries)


def of_cuda(uses):
    """A table from what cuda.py reports."""
    return gathered((use.kernel, use.instance, use.architecture, use.registers) for use in uses)


def flat(of_kernels):
    """{(kernel, instance, architecture): registers}."""
    return {
        (kernel, instance, architecture): registers
        for kernel, instances in of_kernels.items()
        for instance, by_architecture in instances.items()
        for architecture, registers in by_architecture.items()
    }


def jumps(noted, found):
    """What was found and is not noted, or takes more than noted."""
    noted, found = flat(noted), flat(found)
    return [
        f"{kernel} {instance} sm_{architecture}: {registers} registers, noted: {noted.get(key, 'nothing')}"
        for key, registers in found.items()
        for kernel, instance, architecture in [key]
        if registers > noted.get(key, -1000) + TOLERANCE
    ]


def write(name, found, made_with):
    """Note a table; returns what changed, a line each."""
    before, after = flat(table(name) or {}), flat(found)
    kernels = {kernel: dict(sorted(instances.items())) for kernel, instances in sorted(found.items())}
    lines = [
        f'  "{kernel}": {{\n'
        + ",\n".join(f'   "{name}": {json.dumps(dict(sorted(n.items())))}' for name, n in instances.items())
        + "\n  }"
        for kernel, instances in kernels.items()
    ]
    text = f'{{\n "made with": "{made_with}",\n "registers": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    (HERE / f"{name}.json").write_text(text)
    return [
        f"{' '.join(key)}: {before.get(key, 'none')} -> {after.get(key, 'none')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
