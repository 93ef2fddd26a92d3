"""Nobody needs to read what a run says: it goes on, and its last commit is made, after every reader has gone."""

import subprocess
import sys
from pathlib import Path

import small_run

ROOT = Path(__file__).parents[2]
SAYS = """
import sys
from distill.broken_pipe import outliving_readers
with outliving_readers():
    sys.stdin.readline()  # until the reader has gone
    for stream in (sys.stdout, sys.stderr):
        print("x" * 100000, file=stream, flush=True)
        print("once more", file=stream, flush=True)
    open(sys.argv[1], "w").write("reached")
"""


def test_what_nobody_reads_is_lost_and_nothing_else(tmp_path):
    command = [sys.executable, "-c", SAYS, str(tmp_path / "end")]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe)
    child.stdout.close()
    child.stderr.close()
    child.stdin.write(b"\n")
    child.stdin.close()
    assert child.wait(60) == 0
    assert (tmp_path / "end").read_text() == "reached"


def test_a_run_whose_log_is_cut_off_finishes(tmp_path):
    teacher = small_run.write_teacher(tmp_path / "teacher")
    recipe = small_run.write_recipe(tmp_path / "r.yaml", teacher)
    code = "import sys, cli; sys.exit(cli.distill_main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(recipe), "-o", str(tmp_path / "run")]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    child.stdout.readline()
    child.stdout.close()
    assert child.wait(300) == 0
    assert (tmp_path / "run" / "export" / "manifest.json").is_file()
