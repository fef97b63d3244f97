"""Write the golden files of the version of the file format that the installed code writes: `python -P make_golden.py`.

For each kind of cache there is the saved cache, and beside it what is expected of it when it is loaded:
`<version>/<kind>.safetensors` (of processes one for each), `<kind>.json`, and `<kind>.dense.safetensors` where keys and
values are compared as numbers. Files of a version that has been released are never written again: run this once for a
new version, with `PYTHONPATH=src:tests/support`, and commit the folder.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from golden_caches import GOLDEN, KINDS, save_golden, version_of


def main() -> None:
    """Write each kind into the folder of its version; refuse to replace anything."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made, rendezvous = Path(folder) / "made", Path(folder) / "rendezvous"
        made.mkdir()
        rendezvous.mkdir()
        for kind in KINDS:
            if kind == "processes":
                script = GOLDEN.parent / "support" / "golden_processes.py"
                subprocess.run([sys.executable, "-P", script, "save", made, rendezvous], check=True, timeout=300)
            else:
                save_golden(made, kind)
        for kind in KINDS:
            file = next(made.glob(f"{kind}.safetensors*"))
            version = GOLDEN / version_of(file)
            version.mkdir(exist_ok=True)
            for path in sorted(made.glob(f"{kind}.*")):
                if (version / path.name).exists():
                    raise FileExistsError(f"{version / path.name} is committed already: golden files stay as they are")
                shutil.copy(path, version)
                print(version.name, path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
