"""Everything runs offline, on the CPU, and within one process unless a test or `make test-gpu` says otherwise."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func warns at each use
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
# With several GPUs, one process would use nn.DataParallel, which OPOTrainer refuses.
os.environ.setdefault("OPO_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
first_gpu = os.environ["OPO_TEST_GPUS"].split(",")[0] or "0"
os.environ["CUDA_VISIBLE_DEVICES"] = first_gpu if os.environ.get("OPO_TEST_GPU") == "1" else ""

import gc

gc.disable()  # until the tests run: the imports make millions of objects and hardly any garbage

import functools
import importlib.metadata
import sys
from contextlib import suppress
from pathlib import Path

import pytest

with suppress(ImportError):  # the environment of `make test-vllm` is without it
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)  # a busy machine is not a defect
    settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "benchmarks"))

# Accelerate asks whether PEFT and DeepSpeed are installed several times in each step, and each time parses a file.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

# Files that take long, the longest first: with several workers, none may be left with one of them at the end.
LONGEST = (
    "engines",
    "train_math",
    "checkpoints",
    "distributed",
    "hub",
    "streaming",
    "reward_hostile",
    "evaluate_math",
    "examples",
    "resume",
    "trainer",
    "update",
    "reward_pool",
    "cli",
    "tracking",
)


# Files whose slow tests share what takes long to make, such as pairs of processes, a pool, or a browser.
SHARED = {f"test_{name}.py" for name in ("engines", "distributed", "hub", "tracking", "reward_pool", "report_browser")}


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """
    With `--dist loadgroup`, a free worker takes one test, or all tests of a shared file.

    pytest-xdist 3.8 ignores its own marks of groups under pytest 9.2: when it no longer does, use them and delete this.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Tests(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if Path(file).name in SHARED else nodeid

    return Tests(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_finish():
    """Each training run collects garbage, and most of its time would go into objects that the imports have made."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def freeze_later_imports():
    """Freeze what a module's tests have imported, too, so that later collections skip it."""
    yield
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


# `tiny` is imported by the fixtures: it takes seconds, and the process that starts the workers needs none of it.
@pytest.fixture
def model():
    from tiny import tiny_model

    return tiny_model()


@pytest.fixture
def tokenizer():
    from tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def chat_model_dir(tmp_path_factory):
    """A causal LM directory as users have them: chat template, own pad token."""
    from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

    path = tmp_path_factory.mktemp("chat-model")
    tiny_model().save_pretrained(path)
    tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def base_model_dir(tmp_path_factory):
    """A base model's directory: no chat template, no pad token."""
    from tiny import tiny_model, tiny_tokenizer

    path = tmp_path_factory.mktemp("base-model")
    tiny_model().save_pretrained(path)
    tiny_tokenizer(pad_token=None).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def shared_data():
    """Real problems, where the folder is there: tests must pass without it."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the folder of real problems is not here")
    return path
