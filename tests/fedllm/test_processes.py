"""Processes in whatever program fedllm is used."""

import subprocess
import sys
from pathlib import Path


def test_a_script_without_a_guard_is_not_run_again_by_a_process_that_it_starts(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from multiprocessing import get_context\n"
        "from fedllm.processes import without_main\n"
        "print('once', flush=True)\n"
        "process = get_context('spawn').Process(target=os._exit, args=(7,))\n"
        "with without_main():\n"
        "    process.start()\n"
        "process.join()\n"
        "print(process.exitcode, sys.modules['__main__'].__file__ == __file__)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["once", "7", "True"], "")
