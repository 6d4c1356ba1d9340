"""What `make gpu` runs, the most important first: a run that is cut short is worth something."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """One line of the table.

    Args:
        name: To choose it by.
        command: What follows the Python interpreter. ``OUT`` in it stands for the folder of results.
        limit: Seconds, after which it is ended.
        why: What it shows.
        needs: Modules that it needs besides torch, Triton and transformers. A package that requires torch is installed
            without what it requires, so that is named too.
        dry: What follows the Python interpreter in a dry run; None where that would be what `make test` runs anyway.
        kernels: Whether the dry run has kernels, in Triton's interpreter, which is slow.
    """

    name: str
    command: tuple[str, ...]
    limit: int
    why: str
    needs: tuple[str, ...] = ()
    dry: tuple[str, ...] | None = None
    kernels: bool = False


def _tests(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "--maxfail=5", "-p", "no:cacheprovider", *arguments)


def _kernel(hidden: int, ffn: int, experts: int, *tokens: int) -> tuple[str, ...]:
    sizes = (f"--hidden={hidden}", f"--ffn={ffn}", f"--experts={experts}", "--csv=OUT/kernel.csv")
    return ("benchmarks/kernel.py", *sizes, "--tokens", *map(str, tokens))


SELFTEST = ("-m", "densemixer_adapters.cli", "selftest")
BENCH = ("benchmarks", "--output=OUT", "--settings", "exact", "budget 1/8", "budget 1/32")
PRINTS = ("rich", "typer", "jinja2", "packaging")
DRAWS = ("rich", "matplotlib")
PEFT = ("pytest", "packaging", "peft", "accelerate", "psutil")
ZERO = ("deepspeed", "cpuinfo", "einops", "hjson", "msgpack", "ninja", "psutil", "pydantic")
OTHERS = ("OLMoE-1B-7B", "Qwen1.5-MoE-A2.7B", "Mixtral-8x7B")
FULL = (4096, 8192, 16384, 32768)

PARTS = (
    Part(
        "selftest",
        SELFTEST,
        240,
        "gradients against float64, the ways to evaluate experts, a step's time",
        PRINTS,
        (*SELFTEST, "ways"),
        kernels=True,
    ),
    Part(
        "Qwen3-30B-A3B",
        _kernel(2048, 768, 128, *FULL),
        120,
        "each way at full size, over the rate of a large product",
        dry=(*_kernel(24, 20, 2, 20), "--matmul=64", "--repetitions=2", "--dtype=float32"),
        kernels=True,
    ),
    Part(
        "one GPU",
        _tests("tests/gpu"),
        180,
        "full size against float64, memory, waiting for the device, NCCL",
        ("pytest", "packaging"),
    ),
    Part(
        "gradients",
        _tests("tests/transformers/test_gradients.py", "-k", "float32 or unselected"),
        180,
        "each family and implementation of experts against the oracle",
        ("pytest", "packaging"),
    ),
    Part(
        "one layer",
        (*BENCH, "--what=block", "--shapes=Qwen3-30B-A3B", "--tokens", "4096", "32768"),
        300,
        "steps at full size over conventional training",
        DRAWS,
        (*BENCH[:4], "--what=block", "--shapes=Qwen3-30B-A3B", "--tokens=32", "--scale=16", "--rounds=1"),
    ),
    Part("OLMoE", _kernel(2048, 1024, 64, *FULL), 120, "as for Qwen3-30B-A3B"),
    Part("Qwen1.5-MoE", _kernel(2048, 1408, 60, *FULL), 120, "as for Qwen3-30B-A3B"),
    Part("Mixtral", _kernel(4096, 14336, 8, *FULL), 180, "as for Qwen3-30B-A3B"),
    Part(
        "models",
        (*BENCH, "--what=model", "--shapes=Qwen3-30B-A3B", "--layers=2", "--tokens=4096"),
        300,
        "two layers with attention and head, with and without checkpointing",
        DRAWS,
    ),
    Part(
        "other layers",
        (*BENCH, "--what=block", "--shapes", *OTHERS, "--tokens=4096"),
        420,
        "as for one layer",
        DRAWS,
    ),
    Part(
        "PEFT",
        _tests("tests/transformers/test_peft.py", "-k", "test_gradients or experts_in_full or checkpointing"),
        180,
        "LoRA on attention and experts against the oracle",
        PEFT,
    ),
    Part(
        "quantised",
        _tests("tests/transformers/test_quantised.py", "-k", "test_qlora or test_experts_in_4_bit"),
        180,
        "bitsandbytes with its own kernels",
        (*PEFT, "bitsandbytes"),
    ),
    Part(
        "ways of running",
        _tests("tests/running/test_matrix.py", "-k", "test_cell and not Liger and not refused and not fsdp_size"),
        540,
        "trainers of transformers and TRL, compile, FSDP and ZeRO against the oracle",
        ("pytest", "packaging", "accelerate", "datasets", "trl", "liger_kernel", *ZERO),
    ),
)
