"""Weights in a file: complete or absent, of the version that was asked for, and what a worker makes of them."""

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from opo_trl.rollouts import weight_file
from opo_trl.rollouts.weight_file import WeightFileError, read_weights, unusable_directory, write_weights
from vllm_stand_in import ServedModel, import_worker, stand_in_modules, stand_in_worker


def some_weights(seed=0):
    """Of several types and layouts, with one that is not contiguous and two that share memory."""
    torch.manual_seed(seed)
    shared = torch.randn(6, 5)
    return {"a": shared.t(), "b": shared, "c": torch.randn(7).to(torch.bfloat16), "d": torch.tensor(3.0)}


def test_weights_come_back_as_they_were_written(tmp_path):
    weights = some_weights()
    path = write_weights(tmp_path, "run-1", weights.items())
    read = read_weights(path, "run-1")
    assert read.keys() == weights.keys()
    for name, tensor in weights.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert list(tmp_path.iterdir()) == [path]


def test_each_tensor_is_copied_as_it_comes(tmp_path):
    """An adapter is merged into the weights in place, and taken out again when the iterator ends."""
    weight = torch.ones(3)

    def merged():
        weight.add_(1)
        yield "weight", weight
        weight.sub_(1)

    path = write_weights(tmp_path, "merged", merged())
    assert read_weights(path, "merged")["weight"].tolist() == [2, 2, 2]
    assert weight.tolist() == [1, 1, 1]


def test_no_file_has_the_final_name_before_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    seen = []

    def fsync(descriptor):
        [part] = tmp_path.iterdir()
        with part.open("rb") as file:
            assert os.path.sameopenfile(descriptor, file.fileno())
        seen.append((part.suffix, part.stat().st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    path = write_weights(tmp_path, "run-1", some_weights().items())
    assert seen == [(".part", path.stat().st_size)]


@pytest.mark.parametrize("fails", ["save_file", "os.fsync"])
def test_a_write_that_fails_leaves_nothing_and_costs_no_earlier_file(tmp_path, monkeypatch, fails):
    first = write_weights(tmp_path, "run-1", some_weights(1).items())

    def fail(*args, **kwargs):
        if fails == "save_file":
            save_file(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"opo_trl.rollouts.weight_file.{fails}", fail)
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path, "run-2", some_weights(2).items())
    assert list(tmp_path.iterdir()) == [first]
    assert torch.equal(read_weights(first, "run-1")["b"], some_weights(1)["b"])


@pytest.mark.parametrize("size", [0, 4, 60, -1])
def test_a_part_of_a_file_is_refused(tmp_path, size):
    path = write_weights(tmp_path, "run-1", some_weights().items())
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(WeightFileError, match=r"run-1\.safetensors cannot be read as weights"):
        read_weights(path, "run-1")


def test_a_file_that_is_absent_or_of_another_version_is_refused(tmp_path):
    with pytest.raises(WeightFileError, match=r"cannot be read as weights: .*o such file"):
        read_weights(tmp_path / "run-1.safetensors", "run-1")
    path = write_weights(tmp_path, "run-1", some_weights().items())
    with pytest.raises(WeightFileError, match="must hold the weights of version 'run-2', got 'run-1'"):
        read_weights(path, "run-2")
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(WeightFileError, match="got None"):
        read_weights(path, "run-1")


def test_a_directory_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
    assert unusable_directory(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert unusable_directory(tmp_path / "absent") == "it is not a directory"

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(weight_file.tempfile, "NamedTemporaryFile", refuse)
    assert "Permission denied" in unusable_directory(tmp_path)


# ---- The worker


def test_a_worker_holds_the_version_that_it_has_loaded(tmp_path):
    model = ServedModel()
    worker = stand_in_worker(model)
    assert worker.opo_held_version() == {"version": None}
    path = write_weights(tmp_path, "run-1", some_weights().items())
    assert worker.opo_load_weights(str(path), "run-1") == worker.opo_held_version() == {"version": "run-1"}
    assert torch.equal(model.weights["c"], some_weights()["c"])


def test_a_worker_whose_update_failed_holds_no_version(tmp_path):
    """Neither the new one, which it has not loaded, nor the old one, of which it may have lost a part."""
    model = ServedModel()
    worker = stand_in_worker(model)
    path = write_weights(tmp_path, "run-1", some_weights().items())
    worker.opo_load_weights(str(path), "run-1")
    answer = worker.opo_load_weights(str(path), "run-2")
    assert answer["version"] is None
    assert "WeightFileError: " in answer["error"]
    assert "must hold the weights of version 'run-2'" in answer["error"]
    assert worker.opo_held_version() == {"version": None}


def test_a_file_that_lacks_a_parameter_of_the_served_model_is_refused(tmp_path):
    """vLLM would keep the old values of that parameter, and warn."""
    model = ServedModel()
    worker = stand_in_worker(model)
    model.needs = {"a", "lm_head.weight"}
    path = write_weights(tmp_path, "run-1", some_weights().items())
    answer = worker.opo_load_weights(str(path), "run-1")
    assert "lacks parameters of the served model: ['lm_head.weight']" in answer["error"]
    assert worker.opo_held_version() == {"version": None}
    worker.model_config.quantization = "fp8"  # its scales are in no checkpoint
    assert worker.opo_load_weights(str(path), "run-1") == {"version": "run-1"}


def test_a_worker_whose_load_failed_in_its_middle_loads_nothing_more(tmp_path):
    """vLLM keeps the tensors of a layer that is not complete, and would put the next file's into the same layer."""
    model = ServedModel()
    worker = stand_in_worker(model)
    load, path = model.load_weights, write_weights(tmp_path, "run-1", some_weights().items())

    def fail(weights):
        raise MemoryError("allocation failed")

    model.load_weights = fail
    assert "MemoryError: allocation failed" in worker.opo_load_weights(str(path), "run-1")["error"]
    model.load_weights = load
    assert "restart the server" in worker.opo_load_weights(str(path), "run-1")["error"]
    assert worker.opo_held_version() == {"version": None}


def test_a_worker_reads_the_trainers_probe(tmp_path):
    worker = stand_in_worker(ServedModel())
    (tmp_path / "probe").write_text("run")
    assert worker.opo_read_probe(str(tmp_path / "probe")) == {"probe": "run"}
    assert worker.opo_read_probe(str(tmp_path / "absent")) == {"probe": None}


@pytest.mark.parametrize("on_cpu", [True, False])
def test_on_a_cpu_no_linear_weight_is_packed(on_cpu):
    """A packed copy does not follow the weight: vLLM's own choice is for other layers, and for other devices."""
    modules, packed = stand_in_modules(on_cpu), []
    layer_utils = modules["vllm.model_executor.layers.utils"]
    layer_utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: packed.append(layer)
    import_worker(modules)
    linear, convolution = SimpleNamespace(weight=torch.ones(3, 2)), SimpleNamespace(weight=torch.ones(3, 1, 4))
    for layer in (linear, convolution):
        layer_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert packed == ([convolution] if on_cpu else [linear, convolution])
    if on_cpu:
        linear.weight.mul_(2)
        assert linear.cpu_linear(torch.ones(1, 2), linear.weight, None).tolist() == [[4, 4, 4]]
