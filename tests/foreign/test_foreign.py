"""A package outside of this one adds methods and selectors: nothing here knows of them before they register."""

import learned
import pytest
import streaming

from ssa import methods
from ssa.conformance import check_method, check_selector


@pytest.fixture(autouse=True)
def registered():
    streaming.register()
    learned.register()
    yield
    for name in ("streaming", "plain", "streamingllm", "learned"):
        methods.unregister(name)


@pytest.mark.parametrize("method", ["ssa", "moba", "nsa", "plain", "full"])
def test_streaming_does_what_a_selector_must(method):
    check_selector("streaming", {"sinks": 1}, method=method)


@pytest.mark.parametrize("method", ["ssa", "moba", "plain", "full"])
def test_a_selector_with_weights_does_what_it_must(method):
    check_selector("learned", method=method)


@pytest.mark.parametrize("method", methods.methods())
def test_ours_do_what_they_must(method):
    check_method(method)
    if method != "nsa":
        check_method(method, selection_scope="head", num_key_value_heads=1)
