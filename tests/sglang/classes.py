"""Lists the names that the plugin changes in a process of SGLang: `python -m tests.sglang.classes`.

Prints, as JSON, the names that are bound to other objects than before: once without kvcached, and once with
kvcached chosen, including the late rebinds.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

Picture = dict[str, int]
_PYTHONS_OWN = {"__builtins__", "__warningregistry__", "__dict__", "__weakref__", "__annotations__"}


def picture() -> Picture:
    """Return the identity of everything in SGLang's modules, and in their classes."""
    found: Picture = {}
    for name, module in list(sys.modules.items()):
        if module is None or not name.startswith("sglang."):
            continue
        for attribute, value in list(vars(module).items()):
            found[f"{name}.{attribute}"] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{attribute}.{key}": id(one) for key, one in vars(value).items()}
    return found


def changed(before: Picture, after: Picture) -> list[str]:
    """Return the names that are bound to another object than before; new names do not count."""
    names = (name for name in before if name in after and before[name] != after[name])
    return sorted(name for name in names if name.rpartition(".")[2] not in _PYTHONS_OWN)


def main() -> None:
    """Compare the names of a process before the plugin, with it, and with kvcached chosen."""
    import sglang.srt.entrypoints.engine
    import sglang.srt.managers.scheduler
    import sglang.srt.mem_cache.kv_cache_configurator
    import sglang.srt.model_executor.model_runner
    from sglang.srt import plugins

    kept: list[Any] = [sglang]  # keeps all objects alive, so that no identity is reused
    before = picture()
    plugins.load_plugins()
    without = changed(before, picture())
    os.environ["ENABLE_KVCACHED"] = "1"
    plugins._plugins_loaded = False
    plugins.load_plugins()
    from sglang_kvcached import hooks

    hooks.rebind_allocators()
    print(json.dumps({"without": without, "with": changed(before, picture()), "kept": len(kept)}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
