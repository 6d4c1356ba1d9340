"""``DENSEMIXER_ENABLED=1`` and programs that know nothing of this package."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from installs import Environment, build_wheel, is_installed

pytest.importorskip("transformers", reason="needs transformers; run `nox -s llamafactory`")

# Loads and trains what the cases say, each with some variables set. Of 8 experts, 4 can't be selected: their rows of
# the router's weight get a gradient from DenseMixer alone.
PROGRAM = """
import json, logging, os, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3MoeForCausalLM

logging.basicConfig(level=logging.INFO, format="%(name)s|%(levelname)s|%(message)s")

class Subclass(Qwen3MoeForCausalLM):
    pass

class Composite(Qwen3MoeForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = AutoModel.from_config(config)

def load(how, folder):
    config = AutoConfig.from_pretrained(folder)
    if how == "from_config":
        return AutoModelForCausalLM.from_config(config)
    if how == "a subclass":
        return Subclass.from_pretrained(folder)
    if how == "a part made by itself":
        return Composite.from_pretrained(folder)
    if how == "the meta device":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.to_empty(device="cpu")
        model.load_state_dict(Qwen3MoeForCausalLM(config).state_dict())
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        return model
    if how == "loading info":
        return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)[0]
    if how == "without a head":
        return AutoModel.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)

def train(how, folder):
    model = load(how, folder).train()
    gate = getattr(model, "model", model).layers[0].mlp.gate
    with torch.no_grad():
        gate.weight[1], gate.weight[3], gate.weight[4:] = -gate.weight[0], -gate.weight[2], 0
    for _ in range(2):
        model.zero_grad()
        model(input_ids=torch.arange(24).reshape(2, 12))[0].pow(2).sum().backward()
    rows = gate.weight.grad.norm(dim=-1)
    return (rows[4:].min() / rows.max()).item()

results, inherited = [], dict(os.environ)
for how, folder, variables in json.loads(sys.argv[1]):
    print("next", file=sys.stderr, flush=True)
    os.environ.clear()
    os.environ.update({**inherited, **variables})
    try:
        results.append(train(how, folder))
    except ValueError as error:
        results.append(str(error))
print(json.dumps(results))
"""
# Loads a model under each way of setting up logging, and prints what that brought to standard error.
SPEAKING = """
import contextlib, io, json, logging, sys
from transformers import AutoModelForCausalLM

class OthersOnly(logging.Filter):
    def filter(self, record):
        return not record.name.startswith("densemixer")

def handle(level=logging.NOTSET, filter=None):
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("theirs: %(message)s"))
    if filter is not None:
        handler.addFilter(filter)
    logging.getLogger().addHandler(handler)

SETUPS = {
    "none": lambda: None,
    "a level of errors": lambda: logging.getLogger().setLevel(logging.ERROR),
    "the default level": handle,
    "info": lambda: (handle(), logging.getLogger().setLevel(logging.INFO)),
    "a handler for warnings": lambda: handle(logging.WARNING),
    "a handler for other loggers": lambda: handle(filter=OthersOnly()),
    "a filter": lambda: logging.getLogger("densemixer").addFilter(OthersOnly()),
    "a handler for nothing": lambda: logging.getLogger().addHandler(logging.NullHandler()),
    "its level": lambda: logging.getLogger("densemixer").setLevel(logging.WARNING),
}
found = {}
for name, set_up in SETUPS.items():
    for logger in (logging.getLogger(), logging.getLogger("densemixer")):
        logger.handlers.clear()
        logger.filters.clear()
        logger.setLevel(logging.NOTSET if logger.parent else logging.WARNING)
    with contextlib.redirect_stderr(io.StringIO()) as heard:
        set_up()
        for folder in sys.argv[1:]:
            AutoModelForCausalLM.from_pretrained(folder)
    found[name] = [line for line in heard.getvalue().splitlines() if "DenseMixer" in line or "DENSEMIXER" in line]
print(json.dumps(found))
"""
SPOKEN = [
    "DenseMixer is attached to 2 layers of Qwen3MoeForCausalLM (qwen3_moe): estimator centered, layers 0:, "
    "0.0002949 GFLOP more a token in the backward",
    "DENSEMIXER_ENABLED=1: Qwen3ForCausalLM has no Mixture-of-Experts layers, so nothing is attached",
]
HOWS = (
    "from_pretrained",
    "from_config",
    "a subclass",
    "a part made by itself",
    "the meta device",
    "loading info",
    "without a head",
)
VARIABLES: dict[str, tuple[str, dict[str, str], bool]] = {
    "qwen3 off": ("qwen3", {"DENSEMIXER_QWEN3": "0"}, False),
    "others off": ("qwen3", {"DENSEMIXER_OLMOE": "0", "DENSEMIXER_QWEN2": "off"}, True),
    "olmoe off": ("olmoe", {"DENSEMIXER_OLMOE": "0"}, False),
    "olmoe": ("olmoe", {}, True),
    "among models": ("qwen3", {"DENSEMIXER_MODELS": "olmoe, qwen3_moe"}, True),
    "not among models": ("qwen3", {"DENSEMIXER_MODELS": "olmoe"}, False),
    "conventional": ("qwen3", {"DENSEMIXER_ESTIMATOR": "conventional"}, False),
    "another layer": ("qwen3", {"DENSEMIXER_LAYERS": "1"}, False),
    "this layer": ("qwen3", {"DENSEMIXER_LAYERS": "0"}, True),
}
WRONG: dict[str, tuple[str, dict[str, str]]] = {
    "environment variable DENSEMIXER_ENABLED='maybe': must be 1 or 0": ("qwen3", {"DENSEMIXER_ENABLED": "maybe"}),
    "environment variable DENSEMIXER_QWEN3='no way': must be 1 or 0": ("qwen3", {"DENSEMIXER_QWEN3": "no way"}),
    "environment variable DENSEMIXER_MODELS: qwen-3: no such model type": ("qwen3", {"DENSEMIXER_MODELS": "qwen-3"}),
    "environment variable DENSEMIXER_ESTIMATOR='dense': estimator must be": (
        "qwen3",
        {"DENSEMIXER_ESTIMATOR": "dense"},
    ),
    "environment variable DENSEMIXER_METRICS='maybe': must be 1 or 0": ("qwen3", {"DENSEMIXER_METRICS": "maybe"}),
    "environment variable DENSEMIXER_LOG_LEVEL='loud': must be one of": ("qwen3", {"DENSEMIXER_LOG_LEVEL": "loud"}),
    "unknown environment variable of DenseMixer: DENSEMIXER_ESTIMATER (did you mean DENSEMIXER_ESTIMATOR?)": (
        "qwen3",
        {"DENSEMIXER_ESTIMATER": "centered"},
    ),
    "environment variable DENSEMIXER_LAYERS: layers=(9,): the model has 2 Mixture-of-Experts layers": (
        "qwen3",
        {"DENSEMIXER_LAYERS": "9"},
    ),
    "DENSEMIXER_ENABLED=1: model.layers.0.feed_forward (Llama4TextMoe): DenseMixer can't train it": ("llama4", {}),
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_models
    import transformers

    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model in {"qwen3": "Qwen3Moe", "olmoe": "Olmoe", "dense": "Qwen3"}.items():
        tiny_models.build(model, **tiny_models.QWEN).save_pretrained(folder / name)
    own = {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 16, "rope_parameters": None}
    llama4 = transformers.Llama4TextConfig(**{**tiny_models.COMMON, **own})
    transformers.Llama4ForCausalLM(llama4).save_pretrained(folder / "llama4")
    return folder


def program(
    environment: Environment, checkpoints: Path, *cases: tuple[str, str, dict[str, str]], **variables: str
) -> tuple[list[float | str], list[str]]:
    """For each case how strongly the router learns from experts that are never selected; and what we logged."""
    listed = json.dumps([(how, str(checkpoints / model), changed) for how, model, changed in cases])
    done = environment.run(environment.python, "-c", PROGRAM, listed, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), [line for line in done.stderr.splitlines() if line.startswith("densemixer|")]


@pytest.fixture(scope="module")
def on(full: Environment, checkpoints: Path) -> dict[str, float | str]:
    cases = [
        *(("from_pretrained", *case) for case in WRONG.values()),
        *(("from_pretrained", model, changed) for model, changed, _ in VARIABLES.values()),
    ]
    results, _ = program(full, checkpoints, *cases, DENSEMIXER_ENABLED="1")
    return dict(zip([*WRONG, *VARIABLES], results, strict=True))


def test_any_way_of_loading(full: Environment, checkpoints: Path) -> None:
    results, lines = program(full, checkpoints, *((how, "qwen3", {}) for how in HOWS), DENSEMIXER_ENABLED="1")
    for how, share, line in zip(HOWS, results, lines, strict=True):
        assert share > 1e-3, how
        assert line.startswith("densemixer|INFO|DenseMixer is attached to 2 layers of "), how
        assert "(qwen3_moe): estimator densemixer, 0.0002949 GFLOP more a token in the backward" in line


@pytest.mark.parametrize("variables", [{}, {"DENSEMIXER_ENABLED": "0"}])
def test_off(full: Environment, checkpoints: Path, variables: dict[str, str]) -> None:
    (share,), lines = program(full, checkpoints, ("from_pretrained", "qwen3", {}), **variables)
    assert share < 1e-6
    assert not lines


def test_router_metrics(full: Environment, checkpoints: Path, tmp_path: Path) -> None:
    if not is_installed("accelerate"):
        pytest.skip("needs accelerate, for the HF Trainer; run `nox -s llamafactory`")
    code = (
        "import json, os, sys; from transformers import AutoModelForCausalLM, Trainer, TrainingArguments\n"
        "rows = [{'input_ids': list(range(12)), 'labels': list(range(12))}] * 8\n"
        "settings = dict(max_steps=1, logging_steps=1, save_strategy='no', report_to='none', use_cpu=True)\n"
        "logged = []\n"
        "for variables in ({}, {'DENSEMIXER_METRICS': '1'}):\n"
        "    os.environ.update(variables)\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "    trainer = Trainer(model, TrainingArguments(sys.argv[2], **settings), train_dataset=rows)\n"
        "    trainer.train()\n"
        "    logged.append(trainer.state.log_history[0])\n"
        "print(json.dumps(logged))"
    )
    done = full.run(full.python, "-c", code, checkpoints / "qwen3", tmp_path, DENSEMIXER_ENABLED="1")
    assert done.returncode == 0, done.stderr
    without, measured = json.loads(done.stdout.splitlines()[-1])
    assert "densemixer/router_grad_norm" in measured
    assert not any("densemixer" in name for name in without)


def test_an_editable_install(checkpoints: Path, tmp_path: Path) -> None:
    environment = Environment.create(tmp_path / "editable")
    environment.install(build_wheel(tmp_path, "editable"))
    environment.borrow()
    ((share,), _) = program(environment, checkpoints, ("from_pretrained", "qwen3", {}), DENSEMIXER_ENABLED="1")
    assert share > 1e-3


@pytest.mark.parametrize("case", VARIABLES)
def test_variables(on: dict[str, float], case: str) -> None:
    assert on[case] > 1e-3 if VARIABLES[case][2] else on[case] < 1e-6


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_an_error(on: dict[str, str], message: str) -> None:
    assert message in on[message]


def test_a_refused_model_says_how_to_leave_it_out(on: dict[str, str]) -> None:
    assert "name them in DENSEMIXER_MODELS" in on[list(WRONG)[-1]]


def test_one_line_a_model_whatever_logging_is_set_up(full: Environment, checkpoints: Path) -> None:
    variables = {"DENSEMIXER_ENABLED": "1", "DENSEMIXER_ESTIMATOR": "centered", "DENSEMIXER_LAYERS": "0:"}
    done = full.run(full.python, "-c", SPEAKING, checkpoints / "qwen3", checkpoints / "dense", **variables)
    assert done.returncode == 0, done.stderr
    heard = json.loads(done.stdout.splitlines()[-1])
    assert heard.pop("its level") == []  # somebody wanted it so
    for theirs in ("the default level", "info"):
        assert heard.pop(theirs) == [f"theirs: {line}" for line in SPOKEN]
    assert list(heard.values()) == [SPOKEN] * 6


# In the words of a program that sets the variable itself, at three places.
SETTING = """
import os, sys, torch
os.environ.update({"DENSEMIXER_ENABLED": "1"} if sys.argv[2] == "before" else {})
import transformers
os.environ.update({"DENSEMIXER_ENABLED": "1"} if sys.argv[2] == "between" else {})
from transformers import Qwen3MoeForCausalLM
os.environ.update({"DENSEMIXER_ENABLED": "1"} if sys.argv[2] == "after" else {})
model = Qwen3MoeForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.arange(24).reshape(2, 12)
model(input_ids=tokens, labels=tokens).loss.backward()
torch.optim.SGD(model.parameters(), 0.1).step()
print(sum(len(module._forward_hooks) for module in model.modules()))
"""


@pytest.mark.parametrize("place", ["before", "between", "after", "never"])
def test_a_program_that_sets_the_variable_itself(full: Environment, checkpoints: Path, place: str) -> None:
    done = full.run(full.python, "-c", SETTING, checkpoints / "qwen3", place)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) > 0) == (place in ("before", "between"))
    late = "DENSEMIXER_ENABLED was set after transformers.modeling_utils had been imported. That is too late"
    assert done.stderr.count(late) == (place == "after")


def test_metrics_that_nobody_reads(full: Environment, checkpoints: Path) -> None:
    variables = {"DENSEMIXER_ENABLED": "1", "DENSEMIXER_METRICS": "1"}
    done = full.run(full.python, "-c", SETTING, checkpoints / "qwen3", "never", **variables)
    assert done.stderr.count("the option metrics does nothing in this training loop") == 1
    done = full.run(full.python, "-c", SETTING, checkpoints / "qwen3", "never", **variables, RANK="1")
    assert "the option metrics" not in done.stderr


def test_an_explicit_call_takes_its_place(full: Environment, checkpoints: Path) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "from densemixer_core import DenseMixerConfig\n"
        "from densemixer_adapters.transformers import apply_densemixer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "with apply_densemixer(model, DenseMixerConfig('centered', layers=[1])) as handle: print(len(handle.layers))\n"
        "print(sum(len(module._forward_hooks) for module in model.modules()))"
    )
    done = full.run(full.python, "-c", code, checkpoints / "qwen3", DENSEMIXER_ENABLED="1")
    assert (done.returncode, done.stdout) == (0, "1\n0\n"), done.stderr


def test_children_inherit_it_and_only_the_first_rank_speaks(full: Environment, checkpoints: Path) -> None:
    variables: list[dict[str, str]] = [{}, {"RANK": "1"}, {"DENSEMIXER_LOG_LEVEL": "warning"}]
    cases = json.dumps([("from_pretrained", str(checkpoints / "qwen3"), each) for each in variables])
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PROGRAM!r}, sys.argv[1]], check=True)"
    done = full.run(full.python, "-c", code, cases, DENSEMIXER_ENABLED="1")
    assert all(share > 1e-3 for share in json.loads(done.stdout))
    _, *heard = done.stderr.split("next\n")
    assert [each.count("densemixer|") for each in heard] == [1, 0, 0]


def test_torchrun_and_models_that_zero3_partitions_as_they_are_loaded(full: Environment, tmp_path: Path) -> None:
    """On two ranks, with gradients equal to those of the oracle in one process."""
    if not is_installed("deepspeed"):
        pytest.skip("needs deepspeed 0.19.8; run `nox -s llamafactory`")
    tests = Path(__file__).parents[1]
    variables = {
        "PYTHONPATH": str(tests),
        # DeepSpeed compiles its CPU communication with ninja, which lies beside the interpreter.
        "PATH": f"{full.scripts}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    report = tmp_path / "report.json"
    command = [full.scripts / "torchrun", "--standalone", "--nproc-per-node=2", tests / "boot" / "zero3.py", report]
    done = full.run(*command, **variables, DENSEMIXER_ENABLED="1")
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(report.read_text())
    assert found["partitioned"]
    assert found["leaf modules"]
    assert found["error"] <= found["allowed"]
    assert found["difference"] > 0.1  # from conventional training


def test_a_program_without_transformers_imports_nothing_more(bare: Environment) -> None:
    code = "import sys; print(sorted(name for name in sys.modules if 'densemixer' in name or name == 'torch'))"
    done = bare.run(bare.python, "-c", code, DENSEMIXER_ENABLED="1")
    assert done.stdout == "['densemixer_adapters', 'densemixer_adapters._boot']\n"


def test_transformers_imports_nothing_of_ours_where_it_is_off(full: Environment) -> None:
    ours = "[name for name in sys.modules if name.startswith('densemixer')]"
    done = full.run(full.python, "-c", f"import sys, transformers.modeling_utils; print({ours})")
    assert done.stdout == "['densemixer_adapters', 'densemixer_adapters._boot']\n"
