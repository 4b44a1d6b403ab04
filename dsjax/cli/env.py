"""`dsjax env`: the contents of a bug report: versions, devices, memory, extras."""

import argparse
import collections
import importlib.metadata
import json

HELP = "versions, devices and memory"

PACKAGES = ("dsjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
EXTRAS = {  # extra -> a distribution that only it brings
    "cuda12": "jax-cuda12-plugin",
    "cuda13": "jax-cuda13-plugin",
    "parquet": "pyarrow",
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
}
WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag."""
    parser.add_argument("--json", action="store_true", help="print JSON, with the variables that JAX and XLA read")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(arguments: argparse.Namespace) -> int:
    """Start JAX's backend, in order to name its devices, and print what is there."""
    import jax

    from dsjax.observe.environment import environment_report
    from dsjax.observe.host import memory_pages, processor
    from dsjax.observe.memory import available_memory_bytes, device_memory_report, format_bytes, memory_rows

    kinds = collections.Counter(f"{device.device_kind} ({device.platform})" for device in jax.devices())
    extras = {extra: version for extra, package in EXTRAS.items() if (version := _version(package))}
    report = environment_report()
    if arguments.json:
        devices = [{"kind": kind, "count": count} for kind, count in kinds.items()]
        print(json.dumps(report | {"devices": devices, "extras": extras}, indent=2))
        return 0
    rows = [("python", str(report["python"])), ("system", str(report["platform"]))]
    rows += [(package, _version(package) or "not installed") for package in PACKAGES]
    rows.append(("extras", ", ".join(f"{extra} ({version})" for extra, version in extras.items()) or "none"))
    rows += [("devices", f"{count} x {kind}") for kind, count in kinds.items()]
    if jax.default_backend() != "cpu":
        for name, used, _, limit in memory_rows(device_memory_report(jax.local_devices())):
            rows.append(("device memory", f"{name}: {used} of {limit} in use"))
    cpu, pages = processor(), memory_pages()
    if cpu:
        rows.append(("processor", f"{cpu['name']}, family {cpu['family']}, model {cpu['model']}"))
    rows.append(("cores", str(report["cpu_cores"])))
    rows.append(("memory pages", f"{pages['malloc']}; large ones: {pages['huge_pages']}; {pages['libc']}"))
    rows.append(("memory", f"{format_bytes(available_memory_bytes())} available"))
    for name, value in rows:
        print(f"{name:<17} {value}"[:WIDTH])
    return 0
