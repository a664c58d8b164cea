"""docs/families.md is what timm's registry and this package make today."""

from __future__ import annotations

import pytest

from benchmarks.families import PAGE, SMALL, page, supported_row


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_small_patch16_18x2_224"])
def test_what_stays_in_float_is_named(name: str) -> None:
    row = supported_row(name, SMALL[name])
    assert ("attn_pool" in row.words, row.quantized) in ((True, "all but attn_pool"), (False, "no"))
    assert row.scored.startswith("no: ")


@pytest.mark.slow
def test_the_committed_table_is_that_of_today() -> None:
    assert page() == PAGE.read_text(encoding="utf-8"), "run python -m benchmarks.families"
