"""Import this before diffusers: a test without diffusers or transformers is skipped."""

import pytest

for library in ("diffusers", "transformers"):
    pytest.importorskip(library)
