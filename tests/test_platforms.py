"""Where there is no fcntl, no resource and less in os, as on Windows: everything imports, caches and SAEs work.

What the libraries below need of the system stays: they are imported before it is taken away.
"""

import os
from pathlib import Path

from command_kit import run_python

REPO = Path(__file__).parents[1]

TAKE_AWAY = """
import errno, mmap, os, shutil, sys
import matplotlib.figure, numpy, pyarrow.parquet, torch, transformers, zarr, xxhash, safetensors.torch

sys.modules["fcntl"] = sys.modules["resource"] = None
NAMES = '''posix_fadvise POSIX_FADV_WILLNEED posix_fallocate RWF_NOWAIT preadv pwritev pread pwrite readv writev
    O_DIRECT O_DIRECTORY O_NOFOLLOW O_CLOEXEC O_NONBLOCK O_SYNC O_DSYNC getuid geteuid getgid sysconf fork forkpty
    getloadavg sched_getaffinity sched_setaffinity fchmod fdatasync sendfile mkfifo setsid killpg'''.split()
for name in NAMES:
    if hasattr(os, name):
        delattr(os, name)
del mmap.MAP_PRIVATE, mmap.MAP_SHARED

open_file = os.open
def open_no_folder(path, flags, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return open_file(path, flags, *rest, **more)
os.open = open_no_folder
shutil._use_fd_functions = False  # rmtree by paths, as there
"""

IMPORTS = """
import importlib, pathlib
root = pathlib.Path({repo!r})
paths = [p for name in ("cache", "harvest", "models", "sae_core", "train") for p in (root / name).rglob("*.py")]
paths = [p.relative_to(root) for p in paths if (p.parent / "__init__.py").is_file()]
paths += [p.relative_to(root / "sae_granary") for p in (root / "sae_granary" / "common").glob("*.py")]
assert len(paths) > 150, len(paths)
for path in paths:
    name = ".".join(("sae_granary", *path.with_suffix("").parts)).removesuffix(".__init__")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name.split(".")[0] in ("triton", "tensorboard"), error
"""

WORK = """
from pathlib import Path
import conftest
from sae_granary import load_sae, open_cache, resume_training, train_sae
from sae_granary.cache.errors import CacheLockedError
from sae_granary.cache.load.loader import Loader
from sae_granary.cache.read.verify import verify
from sae_granary.train.errors import RunExistsError
from sae_granary.train.folders import exclusive

def refused(document):
    if document == 1:
        try:
            conftest.write_cache(Path("cache"), n_docs=9)
        except CacheLockedError as error:
            assert error.pid == os.getpid() and error.age is not None, error
            return
        raise AssertionError("two writers of one cache")

conftest.write_cache(Path("cache"), n_docs=20, on_document=refused)
assert sorted(p.name for p in Path("cache").glob(".*")) == [], "a lock or a temporary file is left"
assert verify(Path("cache")).ok
cache = open_cache("cache")
assert len(next(iter(Loader(cache, batch_size=64))).x) == 64

settings = {"cache": "cache", "type": "topk", "d_sae": 32, "k": 4, "batch_size": 64, "steps": 4, "device": "cpu"}
result = train_sae(**settings, name="whole", save_every=2)
shutil.rmtree("runs/whole/checkpoints/step_00000004")
(Path("runs/whole") / "summary.json").unlink()
result = resume_training("runs/whole")
with exclusive(result.folder):
    try:
        with exclusive(result.folder):
            raise AssertionError("two trainings of one run")
    except RunExistsError as error:
        assert f"process {os.getpid()}" in str(error), error
assert load_sae(result.folder).config.d_sae == 32

"""

COMMAND = """
from cache_kit import run_cache
run_cache("verify", "cache")
print("done")
"""


def test_every_module_imports_and_caches_and_saes_work(tmp_path: Path) -> None:
    code = TAKE_AWAY + IMPORTS.format(repo=str(REPO)) + WORK + COMMAND
    done = run_python(code, cwd=tmp_path, env=os.environ | {"USERNAME": "somebody"})
    assert done.stdout.splitlines()[-1] == "done"
