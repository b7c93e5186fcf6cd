"""What the kernel sees of loading a folder: its own files run, no connection is opened, nothing beside it is read."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

LOAD = """
import json, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
print(json.dumps([sys.modules[name].__file__ for name in sys.modules if name.startswith("transformers_modules.")]))
"""
SYSTEM = ("/dev", "/etc", "/lib", "/proc", "/run", "/sys", "/usr", "/opt")
CALL = re.compile(r'(\w+)\((?:AT_FDCWD, )?"?([^",)]*)"?.* = (-?\d+)')


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_loading_runs_its_siblings_alone_and_reads_nothing_beside(tiny_model, tmp_path):
    folder, home = tmp_path / "here" / "model", tmp_path / "home"
    tiny_model().save_pretrained(folder)
    siblings = {path.name for path in folder.glob("*.py")}
    for name in siblings:  # in the working directory and above it: the same names, which nobody may take
        for beside in (folder.parent, tmp_path):
            (beside / name).write_text("raise SystemExit('a file beside the folder was run')")
    home.mkdir()
    ours = dict.fromkeys(("HOME", "HF_HOME", "TMPDIR"), str(home)) | {"TRITON_INTERPRET": "1"}
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-o", trace, "-e", "trace=open,openat,socket,connect"]
    found = subprocess.run(
        [*command, sys.executable, "-I", "-c", LOAD], cwd=folder.parent, env=os.environ | ours, text=True,
        capture_output=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    loaded = [Path(name) for name in json.loads(found.stdout.splitlines()[-1]) if name]
    assert {path.name for path in loaded} - {"__init__.py"} == siblings
    for path in loaded:
        if path.name in siblings:
            assert path.read_bytes() == (folder / path.name).read_bytes()
    allowed = [folder, home, sys.prefix, sys.base_prefix, tmp_path / "trace", *site.getsitepackages(), *SYSTEM]
    allowed += [Path(sys.executable).resolve().parents[1], sysconfig.get_path("stdlib")]
    allowed = [os.path.realpath(path) for path in allowed]
    for line in trace.read_text(errors="replace").splitlines():
        assert "AF_INET" not in line, line  # not even one that fails
        call = CALL.search(line)
        if call and int(call[3]) >= 0 and call[1] in ("open", "openat") and "O_DIRECTORY" not in line:
            path = os.path.realpath(folder.parent / call[2])
            assert any(path == each or path.startswith(each + os.sep) for each in allowed), line
