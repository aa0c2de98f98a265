"""What happens to a run that does not end: nothing is lost, nothing is doubled, and no file is there by half."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import diveq_core as dq
from processes import importable, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ends processes by their number, limits files")

# 300 rows of 6 entries, of which a chunk has 100 and a Zarr piece 75.
SETUP = """
    import json
    import os
    import sys
    from pathlib import Path

    import numpy as np
    import diveq_core as dq
    from diveq_core.commands.tokens import coding, sinks

    coding.CHUNK_BYTES = 2400
    sinks.BETWEEN = 0.0
    sinks._CHUNK_BYTES = 150
    folder, suffix = Path(sys.argv[1]), sys.argv[2]
    rng = np.random.default_rng(0)
    z = rng.standard_normal((20, 15, 6), dtype=np.float32)
    z[3, 4], z[15, 1] = np.nan, np.inf
    np.save(folder / "z.npy", z)
    dq.Tokenizer(rng.standard_normal((2, 9, 6), dtype=np.float32), dq.Residual(dq.STE(), 2)).save(folder / "tok")

    def encode(name, resume=False):
        return coding.encode(folder / "tok", folder / "z.npy", folder / name, skip_bad=True, resume=resume)
"""

# Every call that changes what is on the disk is a moment, before which the process may end.
MOMENTS = """
    def at_every_call(moment):
        count = 0

        def counted(function):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == moment:
                    os._exit(9)
                return function(*arguments, **options)
            return call

        for name in ("mkdir", "replace", "fsync", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        sinks.NpyFile._write = counted(sinks.NpyFile._write)
        sinks.ZarrStore._write = counted(sinks.ZarrStore._write)

    def child(work):
        number = os.fork()
        if number == 0:
            try:
                work()
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])

    def whole(name):
        path = folder / name
        if suffix == ".npy":
            return path.read_bytes()
        return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}

    expected = encode("whole" + suffix)
    moment, codes = 0, []
    while not codes or codes[-1] != 0:
        moment += 1
        name = f"{moment}{suffix}"
        codes.append(child(lambda: (at_every_call(moment), encode(name))))
        if (folder / name).exists():
            assert whole(name) == whole("whole" + suffix), moment
        # Of two runs that go on with it, the first may end as well.
        if moment % 3 == 0:
            child(lambda: (at_every_call(moment // 2), encode(name, True)))
        if suffix == ".zarr" and (folder / name).exists() and not (folder / f"{name}.partial/progress.json").exists():
            # It had ended, and a store is not replaced.
            continue
        found = encode(name, True)
        assert whole(name) == whole("whole" + suffix), moment
        assert found["skipped"] == expected["skipped"] == 2, (moment, found)
        assert not (folder / (name + ".partial")).exists()
    assert set(codes) == {0, 9}, codes
    print(len(codes))
"""


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_a_run_that_ends_at_any_moment_goes_on(tmp_path, suffix):
    if suffix == ".zarr" and not importable("zarr"):
        pytest.skip("needs zarr")
    moments = int(run_python(SETUP + MOMENTS, str(tmp_path), suffix))
    assert moments > 15


def started(folder, *arguments, setup=""):
    """The command in a process of its own, after some Python code, in chunks of 40 KiB and with a record of each."""
    code = (
        "from diveq_core.commands.tokens import coding, sinks; coding.CHUNK_BYTES = 40960; sinks.BETWEEN = 0.0\n"
        f"{setup}\nfrom diveq_core.__main__ import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def problem(tmp_path):
    """A tokenizer and vectors near its codewords, of 400 chunks, which take some seconds."""
    rng = np.random.default_rng(0)
    book = rng.standard_normal((500, 64), dtype=np.float32)
    dq.Tokenizer(book).save(tmp_path / "tok")
    chosen = rng.integers(0, 500, 160 * 400)
    np.save(tmp_path / "z.npy", book[chosen] + 0.1 * rng.standard_normal((160 * 400, 64), dtype=np.float32))
    np.save(tmp_path / "chosen.npy", chosen)
    return tmp_path


ENCODE = ("encode", "tok", "z.npy", "-o", "t.npy")


def rows_so_far(folder):
    try:
        return json.loads((folder / "t.npy.partial" / "progress.json").read_text())["rows"]
    except FileNotFoundError:
        return 0


def wait_for(process, folder, rows):
    until = time.monotonic() + 60
    while rows_so_far(folder) < rows:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


def test_killed_and_interrupted_and_resumed(problem):
    def begun(rows, *arguments):
        process = started(problem, *ENCODE, *arguments)
        wait_for(process, problem, rows)
        return process

    process = begun(8000)
    second = started(problem, *ENCODE, "--resume")
    process.kill()
    process.communicate()
    second.communicate()
    assert not (problem / "t.npy").exists() or second.returncode == 0
    if second.returncode:
        process = begun(rows_so_far(problem) + 8000, "--resume")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        assert (process.returncode, out) == (130, "")
        assert err == "encode: interrupted; what was written so far is kept, and --resume goes on with it\n"
        assert not (problem / "t.npy").exists()
        process = started(problem, *ENCODE, "--resume")
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "")
        assert "Resumed at row " in out
    np.testing.assert_array_equal(np.load(problem / "t.npy"), np.load(problem / "chosen.npy"))


def test_two_runs_do_not_write_to_one_file(tmp_path):
    code = """
    from diveq_core.commands.tokens.errors import DataError

    source = np.zeros((4, 6), np.float32)
    arguments = ((4,), (), np.uint8, {})
    with sinks.open_sink(folder / "t.npy", *arguments) as first:
        first.begin(2, resume=False)
        try:
            with sinks.open_sink(folder / "t.npy", *arguments) as second:
                second.begin(2, resume=True)
        except DataError as error:
            print(error)
        first.write(np.arange(4, dtype=np.uint8), np.zeros(4, bool))
        first.finish()
    print(np.load(folder / "t.npy"))
    """
    out = run_python(SETUP + code, str(tmp_path), ".npy")
    assert out == f"{tmp_path / 't.npy.partial'} must not be in use, got another run that writes there\n[0 1 2 3]\n"


def test_a_full_disk(tmp_path):
    """A limit on the size of files takes the place of one; it stands from the middle of the run on."""
    rng = np.random.default_rng(0)
    dq.Tokenizer(rng.standard_normal((20, 4), dtype=np.float32)).save(tmp_path / "tok")
    np.save(tmp_path / "z.npy", rng.standard_normal((50000, 4), dtype=np.float32))
    before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))"
    process = started(tmp_path, *ENCODE, setup=before)
    out, err = process.communicate()
    assert (process.returncode, out) == (1, ""), err
    assert err == "encode: File too large; what was written so far is kept, and --resume goes on with it\n"
    assert not (tmp_path / "t.npy").exists()
    assert 0 < rows_so_far(tmp_path) < 30000
    # Something else took its place meanwhile: other data, another tokenizer.
    os.utime(tmp_path / "z.npy", ns=(1, 1))
    process = started(tmp_path, *ENCODE, "--resume")
    _, err = process.communicate()
    assert (process.returncode, err.count("\n")) == (2, 1)
    assert "--resume must go on with what t.npy.partial was begun with, got another data" in err
    np.save(tmp_path / "z.npy", np.load(tmp_path / "z.npy"))
    (tmp_path / "t.npy.partial" / "progress.json").unlink()
    process = started(tmp_path, *ENCODE)
    out, err = process.communicate()
    assert process.returncode == 0, err
    tokenizer = dq.Tokenizer.load(tmp_path / "tok")
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy"), tokenizer.encode(np.load(tmp_path / "z.npy")))
    assert not (tmp_path / "t.npy.partial").exists()


def test_an_old_file_stays_until_the_new_one_is_whole(problem):
    np.save(problem / "t.npy", np.arange(3))
    process = started(problem, *ENCODE)
    wait_for(process, problem, 8000)
    assert np.load(problem / "t.npy").tolist() == [0, 1, 2]
    process.terminate()
    process.communicate()
    assert np.load(problem / "t.npy").tolist() == [0, 1, 2]


PEAK = """
    from typer.testing import CliRunner
    from diveq_core.commands.cli import app

    def run(*arguments):
        result = CliRunner().invoke(app, [str(x) for x in arguments])
        assert result.exit_code == 0, result.output

    def peak():
        # Unlike what getrusage says, not that of the process which started this one.
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

    small, large, tok = folder / "small.npy", folder / "large.npy", folder / "tok.safetensors"
    def everything(z):
        run("fit", z, "-o", tok, "--codewords", 32, "--passes", 1, "--sample", 1000)
        run("encode", tok, z, "-o", folder / "t.npy")
        run("decode", tok, folder / "t.npy", "-o", folder / "v.npy")

    everything(small)
    before = peak()
    everything(large)
    print(peak() - before)
"""


def test_memory_does_not_grow_with_the_data(tmp_path):
    """Of 96 MiB in chunks of 1 MiB; pages of a mapped file would count too."""
    z = np.random.default_rng(0).standard_normal((3 << 17, 64), dtype=np.float32)
    np.save(tmp_path / "large.npy", z)
    np.save(tmp_path / "small.npy", z[: 1 << 15])
    setup = SETUP.replace("2400", "1 << 20").replace("sinks.BETWEEN = 0.0", "")
    grown = int(run_python(setup + PEAK, str(tmp_path), ".npy")) / 1024
    assert grown < 24, f"{grown:.0f} MiB"
