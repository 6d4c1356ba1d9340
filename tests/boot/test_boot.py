"""The hook that runs at every start of Python."""

from __future__ import annotations

import json
import statistics
import subprocess
import zipfile
from pathlib import Path

import pytest
from installs import Environment, build_wheel

LIVE = "from densemixer_adapters import _boot; print(_boot.is_live())"


def test_the_wheel_ships_the_files_at_its_root(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert {"densemixer.pth", "densemixer.start"} <= set(archive.namelist())
        line = archive.read("densemixer.start").decode().strip()
        assert archive.read("densemixer.pth").decode().count("\n") == 1
    module, function = line.split(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_live_in_every_process(bare: Environment) -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LIVE!r}])"
    assert bare.run(bare.python, "-c", LIVE).stdout == "True\n"
    assert bare.run(bare.python, "-c", child).stdout == "True\n"


def test_live_in_an_editable_install(tmp_path: Path) -> None:
    environment = Environment.create(tmp_path / "editable")
    environment.install(build_wheel(tmp_path, "editable"))
    done = environment.run(environment.python, "-c", LIVE)
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize("value", ["0", "false", "off", "NO"])
def test_the_off_switch(bare: Environment, value: str) -> None:
    assert bare.run(bare.python, "-c", LIVE, DENSEMIXER_BOOT=value).stdout == "False\n"


def test_only_the_standard_library_is_imported(bare: Environment) -> None:
    code = "import sys, json; print(json.dumps(sorted(sys.modules)))"
    modules = {}
    for switch in ("0", "1"):
        modules[switch] = set(json.loads(bare.run(bare.python, "-c", code, DENSEMIXER_BOOT=switch).stdout))
    assert "densemixer_adapters._boot" in modules["1"]
    assert modules["1"] == modules["0"]  # off: imported to look at the switch, and no more than that
    without = set(json.loads(subprocess.run([bare.python, "-I", "-c", code], capture_output=True, text=True).stdout))
    assert {name for name in modules["1"] if name.startswith("densemixer")} == {
        "densemixer_adapters",
        "densemixer_adapters._boot",
    }
    assert not {"torch", "typing", "logging", "importlib.util"} & (modules["1"] - without)


def test_it_costs_less_than_a_millisecond(bare: Environment) -> None:
    """In a process that reads another .pth file before, as it does in most environments.

    Of 21 starts the fastest counts: what others take longer is the machine's doing.
    """
    (bare.packages / "another.pth").write_text("import sys\n")
    code = (
        f"import sys, time, site; folder = {str(bare.packages)!r}; site.addpackage(folder, 'another.pth', set()); "
        "start = time.perf_counter(); site.addpackage(folder, 'densemixer.pth', set()); "
        "print(time.perf_counter() - start, 'densemixer_adapters._boot' in sys.modules)"
    )
    times = []
    for _ in range(21):
        # -S: site hasn't run the file yet.
        seconds, ran = bare.run(bare.python, "-S", "-c", code, PYTHONPATH=str(bare.packages)).stdout.split()
        assert ran == "True"
        times.append(float(seconds))
    print(f"fastest {1e3 * min(times):.2f} ms, median {1e3 * statistics.median(times):.2f} ms")
    assert min(times) < 1e-3, times


def test_a_framework_it_cannot_patch_still_imports(bare: Environment, tmp_path: Path) -> None:
    """Also what the hook leaves behind: the module's own loader, as if nothing had been there."""
    package = tmp_path / "llamafactory" / "hparams"
    package.mkdir(parents=True)
    (package / "finetuning_args.py").write_text("VALUE = 7\n")
    code = (
        "import inspect; from llamafactory.hparams import finetuning_args as m; print(m.VALUE, "
        "type(m.__loader__).__name__, vars(m.__loader__).keys() & {'exec_module'}, inspect.getsource(m).strip())"
    )
    done = bare.run(bare.python, "-c", code, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    assert done.stdout == "7 SourceFileLoader set() VALUE = 7\n"
    assert "DenseMixer can't hook into llamafactory.hparams.finetuning_args" in done.stderr
    assert "densemixer doctor" in done.stderr
    silent = bare.run(bare.python, "-c", code, PYTHONPATH=str(tmp_path), DENSEMIXER_BOOT="0")
    assert (silent.stdout, silent.stderr) == (done.stdout, "")


def test_other_names_are_left_to_the_other_finders(bare: Environment, tmp_path: Path) -> None:
    (tmp_path / "llamafactory.py").write_text("VALUE = 8\n")
    code = (
        "import llamafactory; print(llamafactory.VALUE)\ntry:\n import llamafactory.model.loader\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = bare.run(bare.python, "-c", code, PYTHONPATH=str(tmp_path))
    assert done.stdout == "8\nNo module named 'llamafactory.model'; 'llamafactory' is not a package\n"


def test_installing_twice_adds_one_finder(bare: Environment) -> None:
    count = "print(sum(finder is _boot._Finder for finder in sys.meta_path))"
    code = f"import sys; from densemixer_adapters import _boot; _boot.install(); {count}"
    assert bare.run(bare.python, "-c", code).stdout == "1\n"


def test_a_broken_install_does_not_stop_python(wheel: Path, tmp_path: Path) -> None:
    environment = Environment.create(tmp_path / "broken")
    environment.install(wheel)
    (environment.packages / "densemixer_adapters" / "_boot.py").unlink()
    done = environment.run(environment.python, "-c", "print(1)")
    assert (done.returncode, done.stdout) == (0, "1\n")


def test_modules_that_were_imported_before_are_patched_on_request_and_once(bare: Environment, tmp_path: Path) -> None:
    package = tmp_path / "verl" / "workers" / "config"
    package.mkdir(parents=True)
    (package / "model.py").write_text("")
    calls = tmp_path / "patches_of_verl.py"
    calls.write_text("def patch(module): print(module.__name__)\n")
    code = (
        "import sys; from densemixer_adapters import _boot; sys.meta_path.remove(_boot._Finder); "
        "import verl.workers.config.model; "
        "_boot.PATCHES = {'verl.workers.config.model': 'patches_of_verl:patch'}; "
        "_boot.patch_imported(); print('not yet'); _boot.install(); _boot.patch_imported(); _boot.patch_imported()"
    )
    done = bare.run(bare.python, "-c", code, PYTHONPATH=str(tmp_path))
    assert (done.stdout, done.stderr) == ("not yet\nverl.workers.config.model\n", "")


def test_another_hook_that_asks_all_finders_in_turn(bare: Environment, tmp_path: Path) -> None:
    package = tmp_path / "verl" / "workers" / "config"
    package.mkdir(parents=True)
    (package / "model.py").write_text("print('module')\n")
    (tmp_path / "patches_of_verl.py").write_text("def patch(module): print('patch')\n")
    (tmp_path / "other_hook.py").write_text(
        "import importlib.util, sys\n"
        "class Hook:\n"
        "    busy = False\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        if cls.busy or name != 'verl.workers.config.model': return None\n"
        "        cls.busy = True\n"
        "        spec = importlib.util.find_spec(name)\n"
        "        run = spec.loader.exec_module\n"
        "        spec.loader.exec_module = lambda module: (run(module), print('other'))\n"
        "        return spec\n"
        "def add(position): sys.meta_path.insert(position, Hook)\n"
    )
    for position in (0, 1):
        code = (
            "from densemixer_adapters import _boot; import other_hook; "
            "_boot.PATCHES = {'verl.workers.config.model': 'patches_of_verl:patch'}; "
            f"other_hook.add({position}); import verl.workers.config.model"
        )
        done = bare.run(bare.python, "-c", code, PYTHONPATH=str(tmp_path))
        assert done.stderr == ""
        assert sorted(done.stdout.split()) == ["module", "other", "patch"]
