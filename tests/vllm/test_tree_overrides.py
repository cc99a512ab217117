"""Methods of vLLM's that the classes for trees replace: still there, with the same parameters."""

import pytest
from typing_extensions import override

from vllm_msd.vllm_plugin.patches.overrides import check_overrides
from vllm_msd.vllm_plugin.patches.patching import PatchError


class Base:
    def run(self, tokens, level, step=0):
        return tokens


def test_classes_of_model_runner_v2_fit_this_vllm():
    from vllm_msd.vllm_plugin.gpu.model_state import TreeModelState
    from vllm_msd.vllm_plugin.gpu.sampler import TreeRejectionSampler
    from vllm_msd.vllm_plugin.gpu.speculator import TreeSpeculator

    for cls in (TreeModelState, TreeRejectionSampler, TreeSpeculator):
        check_overrides(cls)


def test_same_or_first_parameters_are_fine():
    class Same(Base):
        @override
        def run(self, tokens, level, step=0):
            return level

    class First(Base):
        @override
        def run(self, tokens, *args, **kwargs):
            return args

    check_overrides(Same)
    check_overrides(First)


def test_a_changed_method_is_loud():
    class Renamed(Base):
        @override
        def walk(self, tokens):
            return tokens

    class Other(Base):
        @override
        def run(self, tokens, level):
            return level

    class OtherFirst(Base):
        @override
        def run(self, level, *args, **kwargs):
            return level

    with pytest.raises(PatchError, match=r"Base\.walk is missing.*Supported: vLLM"):
        check_overrides(Renamed)
    for cls in (Other, OtherFirst):
        with pytest.raises(PatchError, match=r"Base\.run takes .*expected"):
            check_overrides(cls)
