"""The public remedy for a torchvision whose operators this build of torch misses."""

from __future__ import annotations

import subprocess
import sys


def test_transformers_imports_after_it_and_a_second_call_does_nothing():
    code = """
        import sys
        import asdl_ws_plugin
        assert 'torchvision' not in sys.modules
        asdl_ws_plugin.mend_torchvision()
        asdl_ws_plugin.mend_torchvision()
        from transformers import BertForSequenceClassification
        import torchvision
    """
    lines = [line.strip() for line in code.splitlines()]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=300)


def test_it_does_nothing_where_there_is_no_torchvision(monkeypatch):
    import importlib.util

    import asdl_ws_plugin

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib, "import_module", lambda name: 1 / 0)
    asdl_ws_plugin.mend_torchvision()
