"""The small runtime: load an artifact, attach it to a model, generate over the codes.

    artifact = load("artifact/")
    with attach(model, artifact) as attached:
        model.generate(**inputs, cache=attached.new_cache())

Knows no evaluation and no command line; typer, rich, yaml and datasets may be absent.
"""

from pqkv_cli.artifact.store import Artifact
from pqkv_cli.artifact.store import open_artifact as load
from pqkv_cli.runtime.attach import Attached, Simulation, attach, simulate, simulate_artifact
from pqkv_cli.runtime.prefix_index import StoredPrefix
from pqkv_cli.runtime.prefixes import PrefixStore, PrefixWarning, Restored

__all__ = [
    "Artifact",
    "Attached",
    "PrefixStore",
    "PrefixWarning",
    "Restored",
    "Simulation",
    "StoredPrefix",
    "attach",
    "load",
    "simulate",
    "simulate_artifact",
]
