"""What a bring-up knows of the machine."""

import json

import gpu_facts
import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_facts():
    facts = gpu_facts.facts()
    assert facts["device"].startswith("cpu-") and facts["versions"]["torch"] == torch.__version__
    assert facts["packages"]["pytest"] == pytest.__version__ and facts["command"] == "python tools/gpu.py"
    assert facts["backends"] == {"triton": ["there is no GPU"], "cuda": ["there is no GPU"]}
    assert json.loads(json.dumps(facts)) == facts


def test_backends_of_the_gpu():
    def probe(device, dtype, **backends):
        return {"device": device, "dtype": dtype, "backends": backends}

    probes = [
        probe("cpu", "bfloat16", triton=["a CPU"]),
        probe("cuda", "float32", triton=["float32"]),
        probe("cuda", "bfloat16", triton=[], cuda=["not Hopper"]),
    ]
    found = gpu_facts.backends({"operations": {"similarity_logsumexp": probes}})
    assert found == {"triton": [], "cuda": ["not Hopper"]}


def test_a_package_that_is_not_there():
    assert gpu_facts.installed("no-such-package-as-this") == ""
