"""One pinned environment for each framework, and what runs in it.

`make test` runs all default sessions, `make test-more` those with the tag `more`. One of them:
`.venv/bin/nox -f ci/noxfile.py -s "transformers(pins='5.24.0')"`; arguments after `--` go to pytest. `ci/pin.sh`
writes the files in `environments/`.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import stat
import sys
from pathlib import Path
from typing import Any

import nox

CI = Path(__file__).parent.resolve()
ROOT = CI.parent
ENVIRONMENTS = ROOT / ".nox"
ORIGINAL = ENVIRONMENTS / "original.pt"
WHEELS = ENVIRONMENTS / "wheels"
DEMO = {"PYTHONPATH": str(ROOT / "examples" / "demo")}
"""For programs that use data and models of the demo."""

# Two at a time. The tests of a file share what it takes long to set up. Files in the order of the arguments: those
# that take long first, so that no worker waits for the other in the end.
PYTEST = ("pytest", "-n2", "--dist=loadfile", "--no-loadscope-reorder", "--durations=10")

# Tests start hundreds of processes, which spend most of their time on imports: the first one keeps its bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

nox.options.envdir = str(ENVIRONMENTS)
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"


def pip_install(session: nox.Session, *arguments: str, **options: Any) -> None:
    """Without compiling all of a package to bytecode: most of it is never imported."""
    session.install("--no-compile", *arguments, **options)
    share_large_files(Path(session.virtualenv.location))


def share_large_files(environment: Path) -> None:
    """Link files that another environment has too to that one's: torch and Triton alone take 1.7 GB in each.

    pip replaces files, it doesn't write into them, so what changes in one environment stays there.
    """
    others = [one for one in ENVIRONMENTS.iterdir() if one.is_dir() and one != environment]
    for path in [one for one in environment.rglob("*") if is_large_and_alone(one.lstat())]:
        for other in others:
            twin = other / path.relative_to(environment)
            if twin.is_file() and filecmp.cmp(path, twin, shallow=False):
                link = path.with_name(f"{path.name}.link")
                with contextlib.suppress(OSError):  # some file systems have no links
                    os.link(twin, link)
                    link.replace(path)
                break


def is_large_and_alone(status: os.stat_result) -> bool:
    """Of a file: above 1 MiB, and no other has been linked to it."""
    return stat.S_ISREG(status.st_mode) and status.st_size > 2**20 and status.st_nlink == 1


def install(session: nox.Session, environment: str) -> None:
    """Install a pinned environment. torch comes first and alone, so that nothing else chooses its build."""
    session.chdir(ROOT)
    pip_install(session, "torch==2.13.0")
    pip_install(session, "-r", str(CI / "environments" / f"{environment}.txt"))


def install_listed(session: nox.Session, environment: str) -> None:
    """Nothing but what a pinned environment lists: what its packages require besides is for CUDA in part."""
    session.chdir(ROOT)
    pip_install(session, "torch==2.13.0")
    pip_install(session, "--no-deps", "-r", str(CI / "environments" / f"{environment}.txt"))


def install_wheel(session: nox.Session) -> None:
    pip_install(session, "--no-deps", "--force-reinstall", str(ROOT))


def install_editable(session: nox.Session) -> None:
    pip_install(session, "--no-deps", "--editable", str(ROOT))


def megatron_beside(session: nox.Session) -> str:
    """A folder with Megatron Core, for single tests: verl imports it in every process that finds it."""
    folder = Path(session.virtualenv.location) / "megatron"
    if not folder.exists():
        pip_install(session, "--no-deps", "--target", str(folder), "megatron-core==0.16.1")
    return str(folder)


def install_deepspeed(session: nox.Session) -> None:
    """With the extension for CPUs in it, which each environment would compile anew when it is first used.

    There is only a source distribution, whose setup imports torch.
    """
    if not list(WHEELS.glob("deepspeed-0.19.8-*.whl")):
        build = {"DS_BUILD_OPS": "0", "DS_BUILD_SHM_COMM": "1", "DS_ENABLE_NINJA": "1"}
        options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", f"--wheel-dir={WHEELS}")
        session.run("python", "-m", "pip", "wheel", *options, "deepspeed==0.19.8", env=build)
    (wheel,) = WHEELS.glob("deepspeed-0.19.8-*.whl")
    pip_install(session, "--no-deps", str(wheel))


def run_tests(session: nox.Session, *tests: str, env: dict[str, str] | None = None) -> None:
    """Run tests, or those that the command line names; with COVERAGE=1 in the environment, measured."""
    measured: tuple[str, ...] = ()
    if os.environ.get("COVERAGE"):
        pip_install(session, "-r", str(CI / "environments" / "coverage.txt"))
        measured = ("coverage", "run", "-m")
    session.run(*measured, *PYTEST, *(session.posargs or tests), env=env)


def tests_of(folder: str, *first: str) -> list[str]:
    """The files of a folder, those that take long first."""
    files = [f"tests/{folder}/test_{name}.py" for name in first]
    return files + sorted({str(path.relative_to(ROOT)) for path in ROOT.glob(f"tests/{folder}/test_*.py")} - {*files})


@nox.session
def lint(session: nox.Session) -> None:
    """ruff (lint and format) and mypy."""
    install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "densemixer_core", "adapters/densemixer_adapters")


@nox.session
def core(session: nox.Session) -> None:
    """densemixer_core, on torch alone."""
    install(session, "core")
    install_wheel(session)
    run_tests(session, "tests/core")


@nox.session
def package(session: nox.Session) -> None:
    """The wheel and the sdist, as a release checks them, and both ways of installing."""
    session.chdir(ROOT)
    pip_install(session, "-r", str(CI / "environments" / "package.txt"))
    session.run("pytest", "tests/packaging", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The pages: the site, built strictly from the sources alone, and what its commands, paths and links name."""
    session.chdir(ROOT)
    pip_install(session, "-r", str(CI / "environments" / "docs.txt"))
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})
    session.run("pytest", "tests/docs", *session.posargs)


@nox.session
def original(session: nox.Session) -> None:
    """Run the original densemixer 1.0.1, for comparison."""
    install(session, "original")
    session.run("python", "tests/parity/original.py", str(ORIGINAL), env={"HF_HUB_OFFLINE": "1"})


TRANSFORMERS = (
    "tests/running",
    "tests/transformers",
    "tests/metrics",
    "tests/cli",
    "--ignore=tests/cli/test_doctor.py",  # which makes installs: it runs with LLaMA-Factory
    "tests/parity",
)

DEPENDS = (
    "architectures",
    "checkpointing",
    "compile",
    "errors",
    "forward",
    "gradients",
    "output_is_checked",
    "peft",
    "quantised",
    "router_kinds",
    "routing_check",
    "table",
)
"""Those tests of the transformers adapter that the version of transformers bears on most."""

PLAINEST = "not test_matrix.py or test_cell and (plain or refused or fullgraph)"
"""Each way of running in its plainest variation; of the other files all."""


def install_transformers(session: nox.Session, pins: str) -> None:
    install(session, f"transformers-{pins}")
    install_deepspeed(session)
    if pins == "5.5.4":
        install_editable(session)
    else:
        install_wheel(session)


@nox.session(requires=["original"])
@nox.parametrize("pins", ["5.5.4", "5.24.0"])
def transformers(session: nox.Session, pins: str) -> None:
    """Adapter, ways of running, metrics, command line: newest, a wheel. Oldest, editable: what depends on it."""
    install_transformers(session, pins)
    tests = ["tests/demo", "tests/experiments", "tests/benchmarks", "tests/selftest", "tests/gpu", *TRANSFORMERS]
    if pins == "5.5.4":
        depends = [f"tests/transformers/test_{name}.py" for name in DEPENDS]
        tests = ["tests/running/test_matrix.py", *depends, "tests/parity", "-k", PLAINEST]
    run_tests(session, *tests, env={"ORIGINAL_DENSEMIXER": str(ORIGINAL)})


# torchaudio, which LLaMA-Factory imports, does without its compiled libraries if they aren't there; they need CUDA.
WITHOUT_CUDA = """
import importlib.util, pathlib, torch
if not torch.cuda.is_available():
    for library in pathlib.Path(importlib.util.find_spec("torchaudio").origin).parent.glob("lib/*.so"):
        library.unlink()
"""


@nox.session
def llamafactory(session: nox.Session) -> None:
    """LLaMA-Factory, DeepSpeed, open-instruct's launcher, the start-up hook, and the command line."""
    install_listed(session, "llamafactory")
    install_deepspeed(session)
    install_editable(session)
    session.run("python", "-c", WITHOUT_CUDA)
    tests = tests_of("llamafactory", "train", "megatron")
    others = ("tests/boot", "tests/cli/test_doctor.py", "tests/open_instruct")
    run_tests(session, *tests, *others, env={"MEGATRON_CORE": megatron_beside(session)})


@nox.session
def verl(session: nox.Session) -> None:
    """verl: GRPO, PPO and SFT with its own trainers, Ray and FSDP2, on the CPU; open-instruct's launcher with Ray."""
    install(session, "verl")
    install_editable(session)
    # Ray gives its own processes 15 seconds to start, without time for compiling them to bytecode.
    session.run("python", "-c", "import ray, verl.trainer.main_ppo, verl.workers.engine_workers; ray.init(num_cpus=1)")
    tests = [*tests_of("verl", "ppo", "sft"), "tests/open_instruct/test_ray.py"]
    run_tests(session, *tests, env={"MEGATRON_CORE": megatron_beside(session)})


# The newest from 0.17 on wants Python 3.12, and the oldest has no build for it.
MEGATRON = {"0.13.1": ((3, 10), (3, 11)), "0.16.1": ((3, 10), (3, 13)), "0.19.2": ((3, 12), (3, 13))}
"""The versions of Megatron Core, and the first and last version of Python for each."""


def test_megatron(session: nox.Session, pins: str) -> None:
    first, last = MEGATRON[pins]
    if not first <= sys.version_info[:2] <= last:
        session.skip(f"Megatron Core {pins} needs Python {first[0]}.{first[1]} to {last[0]}.{last[1]}")
    install(session, f"megatron-{pins}")
    install_editable(session)
    run_tests(session, "tests/megatron")


@nox.session
@nox.parametrize("pins", ["0.16.1", "0.19.2"])
def megatron(session: nox.Session, pins: str) -> None:
    """Megatron Core: layers and models on one, two and four processes, on the CPU."""
    test_megatron(session, pins)


@nox.session(default=False, tags=["more"], requires=["original"])
@nox.parametrize("framework", ["transformers", "megatron"])
def oldest(session: nox.Session, framework: str) -> None:
    """All tests under the oldest version of a framework, of which the other sessions run some or none."""
    if framework == "megatron":
        test_megatron(session, "0.13.1")
    else:
        install_transformers(session, "5.5.4")
        run_tests(session, *TRANSFORMERS, env={"ORIGINAL_DENSEMIXER": str(ORIGINAL)})


@nox.session(default=False, tags=["more"])
def oldest_triton(session: nox.Session) -> None:
    """The kernels under the Triton of torch 2.9: in its interpreter, and by its compiler."""
    install(session, "core")
    pip_install(session, "--no-deps", "triton==3.5.0")
    install_wheel(session)
    run_tests(session, "tests/core/test_kernel.py", "tests/core/test_compiled_kernels.py")


@nox.session(default=False, tags=["more"])
def torchtitan(session: nox.Session) -> None:
    """torchtitan: its layers, and its own Trainer on one, two and four processes, on the CPU."""
    install(session, "torchtitan")
    install_editable(session)
    run_tests(session, "tests/torchtitan")


@nox.session(default=False, tags=["more"])
def parallel_sweep(session: nox.Session) -> None:
    """Each architecture of transformers under its expert and its tensor parallelism, on two ranks."""
    install(session, "transformers-5.24.0")
    install_editable(session)
    run_tests(session, "tests/running/test_parallel_sweep.py", env={"PARALLEL_SWEEP": "1"})


@nox.session(default=False, tags=["more"])
@nox.parametrize("pins", ["0.7.0", "0.4.0"])
def automodel(session: nox.Session, pins: str) -> None:
    """NeMo Automodel: its layers, its recipe and its key on one to four processes; 0.4.0 is for verl's engine."""
    tests = ["tests/automodel"]
    if pins == "0.4.0":
        install(session, "verl")
        tests = ["tests/automodel/test_verl_engine.py", "tests/automodel/test_layers.py"]
    install_listed(session, f"automodel-{pins}")
    install_editable(session)
    run_tests(session, *tests)


@nox.session(default=False, tags=["more"])
def axolotl(session: nox.Session) -> None:
    """Axolotl: `axolotl train` with the plugin, on the CPU."""
    install_listed(session, "axolotl")
    install_editable(session)
    run_tests(session, "tests/axolotl")


@nox.session(default=False, tags=["more"])
def swift(session: nox.Session) -> None:
    """ms-swift: `swift sft` and `swift rlhf`, on the CPU."""
    install_listed(session, "swift")
    install_editable(session)
    run_tests(session, "tests/swift")


@nox.session(default=False, tags=["more"])
def veomni(session: nox.Session) -> None:
    """VeOmni: its models on one, two and four processes, and verl's engine of it, on the CPU."""
    install_listed(session, "veomni")
    install_editable(session)
    run_tests(session, "tests/veomni")


# Says on a line of its own what is newer than an environment's pins.
NEWER = """
import importlib.metadata, sys
installed = {one.metadata["name"].lower(): one.version for one in importlib.metadata.distributions()}
for line in open(sys.argv[1]):
    name, _, version = line.strip().partition("==")
    if installed.get(name, version) != version:
        print(f"newer: {name} {version} -> {installed[name]}")
"""

NEWEST = {
    "transformers": (
        "transformers-5.24.0",
        "transformers bitsandbytes liger-kernel matplotlib peft rich torchao triton trl scipy",
    ),
    "llamafactory": ("llamafactory", "llamafactory badam editables hatchling uv"),
    "verl": ("verl", "verl TransferQueue cachetools fastapi peft uvicorn"),
    "megatron": ("megatron-0.19.2", "megatron-core triton"),
}
"""For each framework the environment that has it pinned, and what is taken in its newest release."""


@nox.session(default=False)
@nox.parametrize("framework", list(NEWEST))
def newest(session: nox.Session, framework: str) -> None:
    """The newest of a framework, of torch and of all that goes with them: what will break, before it is pinned."""
    environment, packages = NEWEST[framework]
    session.chdir(ROOT)
    pip_install(session, "torch", "setuptools", "ninja", "py-cpuinfo")
    pip_install(session, *packages.split(), "pytest", "pytest-xdist", "hypothesis", "typer")
    if framework in ("transformers", "llamafactory"):
        pip_install(session, "einops", "hjson", "msgpack")
        pip_install(session, "--no-deps", "--no-build-isolation", "deepspeed", env={"DS_BUILD_OPS": "0"})
    install_editable(session)
    session.run("python", "-c", NEWER, str(CI / "environments" / f"{environment}.txt"))
    tests = [f"tests/{framework}"]
    if framework == "transformers":
        tests += ["tests/core/test_kernel.py", "tests/core/test_compiled_kernels.py"]
        tests += ["tests/metrics/test_router_metrics.py", "tests/cli/test_inspection.py", "tests/cli/test_report.py"]
    run_tests(session, *tests)


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Which lines the sessions have run that were started with COVERAGE=1: a table, and pages in outputs/coverage."""
    session.chdir(ROOT)
    pip_install(session, "-r", str(CI / "environments" / "coverage.txt"))
    session.run("coverage", "combine", "--keep", "--quiet", "outputs/coverage")
    session.run("coverage", "html", "--quiet", "--directory", "outputs/coverage/html")
    session.run("coverage", "report", *session.posargs)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Fine-tune a small Mixture-of-Experts model with and without DenseMixer."""
    install(session, "demo")
    install_editable(session)
    session.run("python", "examples/demo", *session.posargs)


@nox.session(default=False, requires=["original"])
def bench(session: nox.Session) -> None:
    """Time steps on this machine."""
    install(session, "transformers-5.24.0")
    install_editable(session)
    python = ENVIRONMENTS / "original" / "bin" / "python"
    session.run("python", "benchmarks", *session.posargs, env={"ORIGINAL_DENSEMIXER_PYTHON": str(python)})


@nox.session(default=False)
def bench_large(session: nox.Session) -> None:
    """Time steps of a large layer, in turns, in one process that keeps its memory."""
    install(session, "transformers-5.24.0")
    install_editable(session)
    session.run("python", "benchmarks/one_process.py", *session.posargs)


@nox.session(default=False)
def bench_budget(session: nox.Session) -> None:
    """How exact the extra gradient is at each budget."""
    install(session, "transformers-5.24.0")
    install_editable(session)
    session.run("python", "benchmarks/budget_error.py", *session.posargs, env=DEMO)


@nox.session(default=False)
def experiment(session: nox.Session) -> None:
    """Train small Mixture-of-Experts models further, in several ways, with seeds, tuning and error bars."""
    install(session, "transformers-5.24.0")
    install_editable(session)
    session.run("python", "experiments", *session.posargs, env=DEMO)


@nox.session(default=False)
def gradient_quality(session: nox.Session) -> None:
    """Compare the gradient of routers with the effect of changing the routing."""
    install(session, "transformers-5.24.0")
    install_editable(session)
    session.run("python", "experiments/gradient_quality.py", *session.posargs, env=DEMO)
